"""Emoji: real captioned pictures that anybody can build in minutes, in the styles of nine teams.

    python -m mini_dalle2.data emoji --out data/emoji       64 pixels a side; --size for others

The paper's pairs (x, y) (§2) are not public. Emoji are public: nearly every one is drawn in
several styles, and Unicode gives each a name. So the caption "tiger, noto style" has two parts
that can be learned apart. It asks for a composition if training saw the tiger only in other
styles, and other concepts in this style. The splits hold back pictures of this kind:

    train       the rest: each concept in at least two styles, if it has two
    val         4 % of the (concept, style) combinations
    held_out    8 %; like val, combinations that training never sees, of concepts and styles
                that training does see

The caption alone decides which split a combination falls into. Skin tones, flags and components
(hair, letters) are left out. Of pictures that are identical only the first stays. Otherwise a
held-out picture could hide in training under another name.

The command needs `npm`, which fetches the packages and checks them, and `pip install resvg-py`,
which draws SVG. Nothing of this lies in the repository.

The result is three folders that `CaptionedFolder` reads, and LICENCES.md, which says who drew the
pictures and what they ask for in return. `python train.py --data data/emoji` learns from `train`
and shows pictures of `val`.

References: Unicode CLDR short names; IconifyJSON (the format of icons.json); the `imagefolder`
page of the Hugging Face documentation.
Read next: folder.py.
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

# Style, as captions call it -> package.
PACKAGES = {
    "noto": "@iconify-json/noto@1.2.9",
    "noto v1": "@iconify-json/noto-v1@1.2.5",
    "twemoji": "@iconify-json/twemoji@1.2.5",
    "openmoji": "@iconify-json/openmoji@1.2.29",
    "fluent": "@iconify-json/fluent-emoji@1.2.7",
    "fluent flat": "@iconify-json/fluent-emoji-flat@1.2.6",
    "emojione": "@iconify-json/emojione@1.2.3",
    "emojione v1": "@iconify-json/emojione-v1@1.2.3",
    "firefox": "@iconify-json/fxemoji@1.2.2",
}
# Unicode's names and keywords.
NAMES = "emojibase-data@17.0.0"
# Style -> {code points: icon}. In this style "tiger" is the name of the tiger's face.
MISNAMED = {"firefox": {
    "1f436": "dog", "1f415": "dogside",
    "1f431": "cat", "1f408": "catside",
    "1f42f": "tiger", "1f405": "tigerside",
    "1f42d": "mouse", "1f401": "mouseside",
    "1f437": "pig", "1f416": "pigside",
}}
# The groups of emojibase that are left out: letters (without a group), components, flags.
LEFT_OUT = (None, 2, 9)
# The upper end of each split's share; the rest is "train".
SHARES = {"held_out": 0.08, "val": 0.12}
SPLITS = ("train", "val", "held_out")
# So many styles of a concept stay in training at least.
KEPT_IN_TRAINING = 2


@dataclass(frozen=True)
class Concept:
    """What an emoji shows, in any style.

    name: Unicode's name in lower case. code: the code points, such as "1f405". emoji: the
    character itself. keywords: other words for it.
    """
    name: str
    code: str
    emoji: str
    keywords: tuple


# ------------------------------------------------------------------------------ packages

def fetch(package, folder):
    """Fetch a package's tarball into `folder` and return its path. npm checks the tarball.

    Raises ValueError if npm is missing or cannot fetch the package.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise ValueError("npm is needed to fetch the emoji: install Node.js, which brings it")
    options = ["--loglevel=error", "--prefer-offline", "--fetch-retries=1",
               "--fetch-retry-mintimeout=1000"]
    done = subprocess.run([npm, "pack", package, *options], cwd=folder, capture_output=True,
                          text=True, encoding="utf-8", errors="replace")
    if done.returncode:
        found = re.search(r"code (\w+)", done.stderr)
        code = found[1] if found else f"exit code {done.returncode}"
        missing = code in ("E404", "ETARGET")
        why = "there is no such package" if missing else "is there a network?"
        raise ValueError(f"npm cannot fetch {package} ({code}): {why}")
    return Path(folder, done.stdout.split()[-1])


def read_package(tarball, *names):
    """Read JSON files from a package, in memory: list, one entry per name.

    Raises ValueError if one is missing or damaged.
    """
    try:
        with tarfile.open(tarball) as archive:
            return [json.load(archive.extractfile(f"package/{name}")) for name in names]
    except Exception as error:
        # OSError, EOFError, TarError, KeyError, zlib.error: a damaged archive raises many kinds.
        name = Path(tarball).name
        raise ValueError(f"the package {name} cannot be used ({error}): try again") from error


def read_concepts(entries):
    """Turn emojibase's list of emoji into a list of `Concept`.

    Skin tones, flags and components are left out. Curly quotes become straight.
    """
    straight = str.maketrans("’“”", "'\"\"")
    concepts = []
    for entry in entries:
        if entry.get("group") in LEFT_OUT:
            continue
        name = entry["label"].lower().translate(straight)
        keywords = tuple(entry.get("tags", ()))
        concepts.append(Concept(name, plain_code(entry["hexcode"]), entry["emoji"], keywords))
    return concepts


def plain_code(code):
    """Write code points in lower case and without the selector "drawn as a picture".

    Some packages write the selector and others leave it out.
    """
    return re.sub("-?fe0f", "", code.lower())


def slug(name):
    """Return the letters and digits of a name, without accents, spaces and hyphens."""
    return re.sub("[^a-z0-9]", "", unicodedata.normalize("NFKD", name).lower())


def match(concepts, pack, chars):
    """Find which icon of a package shows which concept: {concept: icon's name}.

    pack: icons.json. chars: chars.json, {code points: icon's name}. Code points decide where
    chars.json has them, else the name does.
    """
    codes = {plain_code(code): name for code, name in chars.items()}
    # Icons come after aliases: an icon's own name wins over an alias.
    slugs = {slug(name): name for name in [*pack.get("aliases", {}), *pack["icons"]]}
    # A slug of two concepts decides nothing, such as that of "keycap: #" and "keycap: *".
    owners = Counter(slug(concept.name) for concept in concepts)
    found = {}
    for concept in concepts:
        name = codes.get(concept.code)
        if name is None and owners[slug(concept.name)] == 1:
            name = slugs.get(slug(concept.name))
        if name is not None:
            found[concept] = name
    return found


def as_svg(pack, name, size):
    """Write one icon of an IconifyJSON package as an SVG document of size × size pixels.

    The icon is centred and whole. Raises KeyError if it is not in the package.
    """
    values = {}
    flipped = False
    while name not in pack["icons"]:
        # An alias may mirror its parent, as "facing right" does.
        alias = pack.get("aliases", {})[name]
        values = alias | values
        flipped ^= alias.get("hFlip", False)
        name = alias["parent"]
    icon = {"left": 0, "top": 0, "width": 16, "height": 16}
    icon |= {side: pack[side] for side in ("width", "height") if side in pack}
    icon |= pack["icons"][name]
    icon |= values
    body = icon["body"]
    if flipped:
        right = 2 * icon["left"] + icon["width"]
        body = f'<g transform="translate({right} 0) scale(-1 1)">{body}</g>'
    box = f"{icon['left']} {icon['top']} {icon['width']} {icon['height']}"
    return (f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'width="{size}" height="{size}" viewBox="{box}">{body}</svg>')


# ------------------------------------------------------------------------------ pictures

def renderer():
    """Return a function from an SVG document to an RGB image on white.

    Raises ValueError if the optional package for this is missing.
    """
    try:
        from resvg_py import svg_to_bytes
    except ImportError:
        raise ValueError("drawing emoji needs resvg-py: pip install resvg-py") from None

    def rasterise(svg):
        png = svg_to_bytes(svg_string=svg, background="#ffffff", skip_system_fonts=True)
        return Image.open(io.BytesIO(png)).convert("RGB")
    return rasterise


def caption(concept, style):
    """Write the caption of a concept in a style: "tiger, noto style"."""
    return f"{concept.name}, {style} style"


def choose_splits(pairs):
    """Choose the split of each (concept, style): {pair: "train" | "val" | "held_out"}.

    `KEPT_IN_TRAINING` styles of each concept stay in training in any case.
    """
    styles = {}
    for concept, style in pairs:
        digest = hashlib.sha256(caption(concept, style).encode()).hexdigest()
        # A number in [0, 1) that only the caption decides.
        number = int(digest[:15], 16) / 16 ** 15
        styles.setdefault(concept, []).append((number, style))
    splits = {}
    for concept, numbered in styles.items():
        may_leave = len(numbered) - KEPT_IN_TRAINING
        for i, (number, style) in enumerate(sorted(numbered)):
            splits[concept, style] = split_of(number) if i < may_leave else "train"
    return splits


def split_of(number):
    """Return the split in whose share a number of [0, 1) lies."""
    for split, end in SHARES.items():
        if number < end:
            return split
    return "train"


def draw_all(jobs, rasterise, folder):
    """Draw [(concept, style, SVG)] into folder/STYLE/CODE.png: (files, left_out).

    rasterise: see `renderer`. files: {(concept, style): path below the folder}.
    left_out: how many pictures were left out, a Counter of reasons.
    """
    files = {}
    seen = set()
    left_out = Counter()
    for concept, style, svg in tqdm(jobs, desc="drawing", unit="", leave=False):
        try:
            image = rasterise(svg)
        except ValueError:
            # So resvg reports SVG that it does not understand.
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


LICENCES_HEAD = """# Who drew these pictures

They were scaled to {size} × {size} pixels and laid on white; nothing else was changed.

| style | pictures | author | licence | package |
|---|---|---|---|---|"""
LICENCES_FOOT = """
Names and keywords: Unicode CLDR (Unicode License v3, https://www.unicode.org/license.txt), as in
`{names}` (MIT).

The authors and licences stand here as the packages state them. Whoever passes pictures on keeps
to the licence of each. MIT and Apache-2.0 ask that their text goes along. CC-BY asks that the
authors are named. CC-BY-SA asks also that what is made from the pictures is passed on under
CC-BY-SA. The set as a whole therefore has no single licence. To do without a style, delete its
three folders.
"""


def licences(infos, counts, size):
    """Write the text of LICENCES.md.

    infos: {style: the package's info.json}. counts: {style: number of pictures}.
    """
    lines = [LICENCES_HEAD.format(size=size)]
    for style, info in infos.items():
        author = info["author"]
        licence = info["license"]
        who = f"{info['name']}, [{author['name']}]({author.get('url', '')})"
        terms = f"[{licence.get('spdx') or licence['title']}]({licence.get('url', '')})"
        lines.append(f"| {style} | {counts[style]:,} | {who} | {terms} | `{PACKAGES[style]}` |")
    lines.append(LICENCES_FOOT.format(names=NAMES))
    return "\n".join(lines)


# ------------------------------------------------------------------------------ the set

def read_packages(work, size):
    """Fetch and read all packages: (jobs, infos).

    work: a folder for the tarballs. jobs: [(concept, style, SVG)]. infos: {style: info.json}.
    """
    names = [NAMES, *PACKAGES.values()]
    tarballs = {}
    for package in tqdm(names, desc="packages", unit="", leave=False):
        tarballs[package] = fetch(package, work)
    entries, = read_package(tarballs[NAMES], "en/data.json")
    concepts = read_concepts(entries)
    jobs = []
    infos = {}
    for style, package in tqdm(PACKAGES.items(), desc="reading", unit="", leave=False):
        pack, chars, infos[style] = read_package(
            tarballs[package], "icons.json", "chars.json", "info.json")
        icons = match(concepts, pack, chars | MISNAMED.get(style, {}))
        jobs += [(concept, style, as_svg(pack, name, size)) for concept, name in icons.items()]
    return jobs, infos


def metadata_line(concept, style, file):
    """Write the line of metadata.jsonl about one picture."""
    entry = {
        "file_name": file.as_posix(), "text": caption(concept, style), "concept": concept.name,
        "style": style, "emoji": concept.emoji, "keywords": concept.keywords}
    return json.dumps(entry, ensure_ascii=False) + "\n"


def move_into_splits(drawn, files, splits):
    """Move the pictures from drawn/drawn to drawn/SPLIT, each split with its metadata.jsonl."""
    for split in SPLITS:
        lines = []
        for (concept, style), file in files.items():
            if splits[concept, style] != split:
                continue
            target = drawn / split / file
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(drawn / "drawn" / file, target)
            lines.append(metadata_line(concept, style, file))
        (drawn / split).mkdir(exist_ok=True)
        (drawn / split / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    shutil.rmtree(drawn / "drawn")


def build(out, size=64):
    """Fetch, draw and split the whole set into the folder `out`: a summary in one line.

    The folder appears when it is complete, or not at all. size: side in pixels.
    Raises ValueError for a bad size, for an `out` that exists and is not empty, for a package
    that cannot be fetched or used, and for a missing program. Raises OSError if `out` cannot be
    written.
    """
    began = time.perf_counter()
    out = Path(out).absolute()
    if not 8 <= size <= 1024:
        raise ValueError(f"--size is {size}: the size must be from 8 to 1024 pixels")
    is_empty = out.is_dir() and not any(out.iterdir())
    if out.exists() and not is_empty:
        raise ValueError(f"{out} is already there and not an empty folder: "
                         f"delete it or choose another one with --out")
    rasterise = renderer()
    out.parent.mkdir(parents=True, exist_ok=True)
    # The work folder lies beside `out`, because a folder can be renamed only on its own disk.
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as work:
        jobs, infos = read_packages(work, size)
        drawn = Path(work, "set")
        files, left_out = draw_all(jobs, rasterise, drawn / "drawn")
        if not files:
            raise ValueError("the packages hold no picture that could be drawn: try again")
        splits = choose_splits(files)
        move_into_splits(drawn, files, splits)
        counts = Counter(style for _, style in files)
        (drawn / "LICENCES.md").write_text(licences(infos, counts, size), encoding="utf-8")
        if out.is_dir():
            # An empty folder: Windows renames only to a name that is free.
            out.rmdir()
        os.rename(drawn, out)
    return summary(out, splits, left_out, time.perf_counter() - began)


def summary(out, splits, left_out, seconds):
    """Say in one line what was built and what was left out."""
    counts = Counter(splits.values())
    parts = ", ".join(f"{counts[split]:,} {split}" for split in SPLITS)
    without = ", ".join(f"{n} {reason}" for reason, n in left_out.items()) or "nothing"
    concepts = {concept for concept, _ in splits}
    return (f"{len(splits):,} pictures of {len(concepts):,} concepts in {out}: {parts}; "
            f"left out: {without}; {seconds:.0f} s")


def main(argv):
    """Run the command `emoji --out FOLDER [--size N]` and return its exit code.

    0: all went well. 2: a mistake, said in one sentence on standard error. 130: Ctrl-C.
    """
    parser = argparse.ArgumentParser(
        prog="python -m mini_dalle2.data emoji", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="FOLDER", required=True,
                        help="the folder to make; it must be empty or not there yet")
    parser.add_argument("--size", type=int, default=64,
                        help="side of the pictures in pixels (default: 64)")
    args = parser.parse_args(argv)
    try:
        print(build(args.out, args.size))
        return 0
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        # Keep the text and not the error, which would keep its progress bar on the screen.
        message = str(error)
    except OSError as error:
        message = f"cannot write {error.filename or args.out}: {error.strerror or error}"
    print(f"emoji: {' '.join(message.split())}", file=sys.stderr)
    return 2
