"""Emoji: a set of real captioned pictures that anybody can build in minutes, drawn in nine styles by nine different teams.

    python -m mini_dalle2.data emoji --out data/emoji                        pictures of 64 pixels; --size for others

The paper's pairs (x, y) (§2) are not public; emoji are: nearly every one is drawn in several styles, and Unicode gives each a name. So the
caption "tiger, noto style" has two parts that can be learned apart, and asks for a composition where training saw the tiger in other
styles, and other things in this one. That is what the splits hold back, picture by picture:

    train       what is left: each concept in at least two styles, if it has so many
    val         4 % of the (concept, style) combinations
    held_out    8 %; like val, no combination of it is in training, but each concept and each style is

Which split a combination falls into is a function of its caption alone. Skin tones, flags and components (hair, letters) are left out. Of
pictures that are alike to the last pixel only the first stays, lest a held-out one hide in training under another name.
Needs `npm`, which fetches the packages and checks them, and `pip install resvg-py`, which draws SVG. None of it lies in the repository.

The result is three folders that `CaptionedFolder` reads, and LICENCES.md: who drew what, and what they ask for in return. `python train.py
--data data/emoji` learns from `train` and shows pictures of `val`.
References: Unicode CLDR short names; IconifyJSON (the format of icons.json); the `imagefolder` page of the Hugging Face documentation.
Read next: `folder.py`.
"""

import argparse
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import unicodedata
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from tqdm import tqdm

PACKAGES = {                                                               # style, as captions call it -> package
    "noto": "@iconify-json/noto@1.2.9", "noto v1": "@iconify-json/noto-v1@1.2.5", "twemoji": "@iconify-json/twemoji@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29", "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "fluent flat": "@iconify-json/fluent-emoji-flat@1.2.6", "emojione": "@iconify-json/emojione@1.2.3",
    "emojione v1": "@iconify-json/emojione-v1@1.2.3", "firefox": "@iconify-json/fxemoji@1.2.2",
}
NAMES = "emojibase-data@17.0.0"                                            # Unicode's names and keywords
MISNAMED = {"firefox": {                                                   # in this style "tiger" is its face: code points -> icon
    "1f436": "dog", "1f415": "dogside", "1f431": "cat", "1f408": "catside", "1f42f": "tiger", "1f405": "tigerside",
    "1f42d": "mouse", "1f401": "mouseside", "1f437": "pig", "1f416": "pigside"}}
LEFT_OUT = (None, 2, 9)                                                    # emojibase's groups: letters; components; flags
SPLITS = {"held_out": 0.08, "val": 0.12}                                   # upper ends of the shares; the rest is "train"
SEEN = 2                                                                   # styles of a concept that training keeps at least


@dataclass(frozen=True)
class Concept:
    """What an emoji shows, in any style: its CLDR name in lower case, its code points ("1f405"), itself, and keywords."""
    name: str
    code: str
    emoji: str
    keywords: tuple


# ---------------------------------------------------------------------------------------------------------------- packages

def fetch(package, folder):
    """The package's tarball, fetched into `folder` by npm, which checks it: its path. Raises ValueError if it cannot be had."""
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError("npm is needed to fetch the emoji: install Node.js, which brings it")
    options = ["--loglevel=error", "--prefer-offline", "--fetch-retries=1", "--fetch-retry-mintimeout=1000"]
    done = subprocess.run([npm, "pack", package, *options], cwd=folder, capture_output=True, text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        code = re.search(r"code (\w+)", done.stderr)
        why = "there is no such package" if code and code[1] in ("E404", "ETARGET") else "is there a network?"
        raise ValueError(f"npm cannot fetch {package} ({code[1] if code else f'exit code {done.returncode}'}): {why}")
    return Path(folder, done.stdout.split()[-1])


def read(tarball, *names):
    """The JSON files of these names in a package, in memory: list. Raises ValueError if one is missing or damaged."""
    try:
        with tarfile.open(tarball) as archive:
            return [json.load(archive.extractfile(f"package/{name}")) for name in names]
    except Exception as error:                                             # OSError, EOFError, TarError, KeyError, zlib.error, ...
        raise ValueError(f"the package {Path(tarball).name} cannot be used: {error}") from error


def read_concepts(entries):
    """emojibase's list of emoji -> list of `Concept`, without skin tones, flags and components."""
    straight = str.maketrans("’“”", "'\"\"")
    return [Concept(e["label"].lower().translate(straight), plain_code(e["hexcode"]), e["emoji"], tuple(e.get("tags", ())))
            for e in entries if e.get("group") not in LEFT_OUT]


def plain_code(code):
    """Code points as text, in lower case and without the selector "drawn as a picture", which some write and some do not."""
    return re.sub("-?fe0f", "", code.lower())


def slug(name):
    """Letters and digits of a name, without accents, spaces and hyphens."""
    return re.sub("[^a-z0-9]", "", unicodedata.normalize("NFKD", name).lower())


def match(concepts, pack, chars):
    """Which icon of a package shows which concept: {concept: icon name}; by code points where chars.json has them, else by name."""
    codes = {plain_code(code): name for code, name in chars.items()}
    slugs = {slug(name): name for name in [*pack.get("aliases", {}), *pack["icons"]]}      # an icon's own name before an alias
    shared = Counter(slug(concept.name) for concept in concepts)           # "keycap: #" and "keycap: *"
    found = {}
    for concept in concepts:
        by_name = slugs.get(slug(concept.name)) if shared[slug(concept.name)] == 1 else None
        name = codes.get(concept.code, by_name)
        if name is not None:
            found[concept] = name
    return found


def as_svg(pack, name, size):
    """One icon of an IconifyJSON package as an SVG document of size × size, centred and whole. Raises KeyError if it is not there."""
    values, flipped, aliases = {}, False, pack.get("aliases", {})
    while name not in pack["icons"]:                                       # an alias may mirror its parent: "facing right"
        alias = aliases[name]
        values, flipped, name = alias | values, flipped ^ alias.get("hFlip", False), alias["parent"]
    icon = {"left": 0, "top": 0, "width": 16, "height": 16} | {key: pack[key] for key in ("width", "height") if key in pack}
    icon |= pack["icons"][name] | values
    left, top, width, height, body = (icon[key] for key in ("left", "top", "width", "height", "body"))
    if flipped:
        body = f'<g transform="translate({2 * left + width} 0) scale(-1 1)">{body}</g>'
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{size}" height="{size}" '
            f'viewBox="{left} {top} {width} {height}">{body}</svg>')


# ---------------------------------------------------------------------------------------------------------------- pictures

def renderer():
    """A function from an SVG document to an RGB image on white. Raises ValueError if the optional package for it is missing."""
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise ValueError("drawing emoji needs resvg-py: pip install resvg-py") from None
    return lambda svg: Image.open(io.BytesIO(svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True))).convert("RGB")


def caption(concept, style):
    """The caption of a concept in a style: "tiger, noto style"."""
    return f"{concept.name}, {style} style"


def choose_splits(pairs):
    """(concept, style) pairs -> {pair: "train" | "val" | "held_out"}; `SEEN` styles of each concept stay in training, come what may."""
    styles, splits = {}, {}
    for concept, style in pairs:
        number = int(hashlib.sha256(caption(concept, style).encode()).hexdigest()[:15], 16) / 16 ** 15     # in [0, 1)
        styles.setdefault(concept, []).append((number, style))
    for concept, numbered in styles.items():
        for i, (number, style) in enumerate(sorted(numbered)):
            may_leave = i < len(numbered) - SEEN
            splits[concept, style] = next((split for split, end in SPLITS.items() if may_leave and number < end), "train")
    return splits


def draw_all(jobs, draw, folder):
    """Draw [(concept, style, SVG)] into folder/STYLE/CODE.png: ({(concept, style): path}, what was left out: Counter of reasons)."""
    files, seen, left_out = {}, set(), Counter()
    for concept, style, svg in tqdm(jobs, desc="drawing", unit="", leave=False):
        try:
            image = draw(svg)
        except ValueError:                                                 # resvg's word for SVG that it does not understand
            left_out["that could not be drawn"] += 1
            continue
        digest = hashlib.sha256(image.tobytes()).digest()
        if all(low == high for low, high in image.getextrema()):
            left_out["empty"] += 1
        elif digest in seen:
            left_out["identical to another"] += 1
        else:
            seen.add(digest)
            files[concept, style] = Path(style.replace(" ", "-"), f"{concept.code}.png")
            path = Path(folder, files[concept, style])
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return files, left_out


def licences(infos, counts, size):
    """The text of LICENCES.md. infos: {style: the package's info.json}; counts: pictures per style."""
    lines = [f"# Who drew these pictures\n\nThey were scaled to {size} × {size} pixels and laid on white; nothing else was changed.\n",
             "| style | pictures | author | licence | package |", "|---|---|---|---|---|"]
    for style, info in infos.items():
        author, licence = info["author"], info["license"]
        lines.append(f"| {style} | {counts[style]:,} | {info['name']}, [{author['name']}]({author.get('url', '')}) | "
                     f"[{licence.get('spdx') or licence['title']}]({licence.get('url', '')}) | `{PACKAGES[style]}` |")
    lines.append(f"""
Names and keywords: Unicode CLDR (Unicode License v3, https://www.unicode.org/license.txt), as in `{NAMES}` (MIT).

The authors and licences stand here as the packages state them. Whoever passes pictures on keeps to the licence of each: MIT and Apache-2.0
ask that their text goes along, CC-BY that the authors are named, CC-BY-SA also that what is made from the pictures is passed on under
CC-BY-SA. The set as a whole therefore has no single licence. To do without a style, delete its three folders.
""")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- the set

def build(out, size=64):
    """Fetch, draw and split the whole set into the folder `out`, which is there complete or not at all.

    Returns a summary in one line. Raises ValueError for a bad size, an `out` that is already there and not empty, a package that cannot be
    had or used, a missing program; OSError if `out` cannot be written.
    """
    began, out = time.perf_counter(), Path(out).absolute()
    if not 8 <= size <= 1024:
        raise ValueError(f"the size must be from 8 to 1024 pixels, not {size}")
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out} is already there and not an empty folder: delete it or choose another one with --out")
    draw = renderer()
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:               # beside it: there a folder can be renamed
        tarballs = {package: fetch(package, work) for package in tqdm([NAMES, *PACKAGES.values()], desc="packages", unit="", leave=False)}
        concepts, jobs, infos = read_concepts(*read(tarballs[NAMES], "en/data.json")), [], {}
        for style, package in tqdm(PACKAGES.items(), desc="reading", unit="", leave=False):
            pack, chars, infos[style] = read(tarballs[package], "icons.json", "chars.json", "info.json")
            jobs += [(concept, style, as_svg(pack, name, size))
                     for concept, name in match(concepts, pack, chars | MISNAMED.get(style, {})).items()]
        drawn = Path(work, "set")
        files, left_out = draw_all(jobs, draw, drawn / "drawn")
        if not files:
            raise ValueError("the packages hold no picture that could be drawn")
        splits = choose_splits(files)
        for split in ("train", "val", "held_out"):
            lines = []
            for (concept, style), file in files.items():
                if splits[concept, style] == split:
                    target = drawn / split / file
                    target.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(drawn / "drawn" / file, target)
                    lines.append(json.dumps({"file_name": file.as_posix(), "text": caption(concept, style), "concept": concept.name,
                                             "style": style, "emoji": concept.emoji, "keywords": concept.keywords}, ensure_ascii=False))
            (drawn / split).mkdir(exist_ok=True)
            (drawn / split / "metadata.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        shutil.rmtree(drawn / "drawn")
        (drawn / "LICENCES.md").write_text(licences(infos, Counter(style for _, style in files), size), encoding="utf-8")
        if out.is_dir():
            out.rmdir()                                                    # empty; Windows renames over nothing
        os.rename(drawn, out)
    counts, without = Counter(splits.values()), ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "nothing"
    return (f"{len(files):,} pictures of {len({concept for concept, _ in files}):,} concepts in {out}: "
            f"{', '.join(f'{counts[split]:,} {split}' for split in ('train', 'val', 'held_out'))}; left out: {without}; "
            f"{time.perf_counter() - began:.0f} s")


def main(argv):
    """python -m mini_dalle2.data emoji --out FOLDER [--size N]: 0, 2 after a mistake (one sentence on standard error), 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m mini_dalle2.data emoji", description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FOLDER", required=True, help="where to; must be empty or not there yet")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels (default: 64)")
    args = parser.parse_args(argv)
    try:
        print(build(args.out, args.size))
        return 0
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        message = str(error)                                               # not the error itself, which would keep its bar on the screen
    except OSError as error:
        message = f"cannot write {error.filename or args.out}: {error.strerror or error}"
    print(f"emoji: {' '.join(message.split())}", file=sys.stderr)
    return 2
