"""The emoji builder, on small packages made here, without a network.

Tested are captions, duplicates, splits, and one sentence for whatever can go wrong.
"""

import io
import json
import subprocess
import sys
import tarfile
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from conftest import ROOT
from mini_dalle2.data.__main__ import main
from mini_dalle2.data import emoji
from mini_dalle2.data.folder import CaptionedFolder
from mini_dalle2.data.emoji import Concept, as_svg, choose_splits, match

STYLES = {
    "noto": "@test/noto@1.0.0",
    "fluent flat": "@test/flat@1.0.0",
    "firefox": "@test/fx@1.0.0",
}
COLOURS = {"noto": "#ff0000", "fluent flat": "#00ff00", "firefox": "#0000ff"}
INFO = {
    "name": "Set",
    "author": {"name": "Ann", "url": "https://example.org"},
    "license": {"title": "CC BY 4.0", "spdx": "CC-BY-4.0", "url": "x"},
}
ENTRIES = [
    {"label": "tiger", "hexcode": "1F405", "emoji": "🐅", "tags": ["animal", "zoo"], "group": 3},
    {"label": "man’s shoe", "hexcode": "1F45E", "emoji": "👞", "group": 7},
    {"label": "Sun", "hexcode": "2600-FE0F", "emoji": "☀️", "group": 5},
    {"label": "keycap: #", "hexcode": "0023-FE0F-20E3", "emoji": "#️⃣", "group": 8},
    {"label": "keycap: *", "hexcode": "002A-FE0F-20E3", "emoji": "*️⃣", "group": 8},
    {"label": "flag: Wales", "hexcode": "1F3F4", "emoji": "🏴", "group": 9},
    {"label": "light skin tone", "hexcode": "1F3FB", "emoji": "🏻", "group": 2},
    {"label": "regional indicator A", "hexcode": "1F1E6", "emoji": "🇦"},
]


def square(x, colour):
    return {"body": f'<path fill="{colour}" d="M{x} 2h4v4h-4z"/>'}


def tarball(path, **files):
    """A package as npm packs it, with these JSON files."""
    with tarfile.open(path, "w:gz") as archive:
        for name, value in files.items():
            content = value if isinstance(value, bytes) else json.dumps(value).encode()
            member = tarfile.TarInfo(f"package/{name.replace('__', '/')}.json")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Packages that stand in for the real ones: {package: its files}.

    A test may change them before a build. To fetch one means to write it.
    """
    contents = {emoji.NAMES: {"en__data": ENTRIES}}
    for style, package in STYLES.items():
        icons = {
            name: square(2 * i, COLOURS[style])
            for i, name in enumerate(("tiger", "mans-shoe", "sun", "keycap"))
        }
        pack = {"width": 16, "height": 16, "icons": icons}
        icons |= {"flag-wales": square(1, "#000"), "light-skin-tone": square(3, "#000")}
        if style == "firefox":  # where "tiger" would be its face
            icons["tigerside"] = icons.pop("tiger")
        contents[package] = {"icons": pack, "chars": {}, "info": INFO}

    def fetch(package, folder):
        path = tmp_path / "fetched" / f"{package.replace('/', '-')}.tgz"
        path.parent.mkdir(exist_ok=True)
        tarball(path, **contents[package])
        return path

    monkeypatch.setattr(emoji, "PACKAGES", STYLES)
    monkeypatch.setattr(emoji, "fetch", fetch)
    return contents


@pytest.fixture
def drawn():
    """For tests that draw."""
    pytest.importorskip("resvg_py")


def run(out, *options):
    return main(["emoji", f"--out={out}", *options])


def lines(out):
    """[(split, line of its metadata.jsonl)]."""
    return [
        (split, json.loads(line))
        for split in ("train", "val", "held_out")
        for line in (out / split / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    ]


# ------------------------------------------------------------------------------ names


def test_concepts_leave_out_flags_and_components():
    found = emoji.read_concepts(ENTRIES)
    assert found[0] == Concept("tiger", "1f405", "🐅", ("animal", "zoo"))
    assert [concept.name for concept in found] == [
        "tiger",
        "man's shoe",
        "sun",
        "keycap: #",
        "keycap: *",
    ]
    assert found[2].code == "2600" and found[3].code == "0023-20e3"


def test_match_by_code_points_before_names():
    tiger, shoe, sun, hash_key, star_key = emoji.read_concepts(ENTRIES)
    pack = {
        "icons": {"tiger": {}, "tiger2": {}, "mansshoe": {}, "keycap": {}},
        "aliases": {"sun": {"parent": "tiger"}},
    }
    assert match([tiger, shoe, sun, hash_key, star_key], pack, {}) == {
        tiger: "tiger",
        shoe: "mansshoe",
        sun: "sun",
    }
    found = match(
        [tiger, hash_key, star_key],
        pack,
        {"1F405": "tiger2", "23-20e3": "x", "0023-fe0f-20e3": "keycap"},
    )
    assert found == {tiger: "tiger2", hash_key: "keycap"}, (
        "neither the bare name nor a name that two concepts share"
    )


# ------------------------------------------------------------------------------ drawing


def pixels(pack, name, size=16):
    return np.asarray(emoji.renderer()(as_svg(pack, name, size))).astype(int)


def test_drawing(drawn):
    """Corner, colour and background; a mirrored alias; a wide icon; an origin that is not zero."""
    wide = {"body": '<path fill="#000" d="M0 0h32v16H0z"/>', "width": 32}
    moved = {"body": '<path fill="#000" d="M-8 -8h8v8h-8z"/>', "left": -8, "top": -8}
    pack = {
        "width": 16,
        "height": 16,
        "icons": {"a": square(2, "#ff0000"), "wide": wide, "moved": moved},
        "aliases": {
            "b": {"parent": "a", "hFlip": True},
            "c": {"parent": "b"},
            "d": {"parent": "b", "hFlip": True},
        },
    }
    a = pixels(pack, "a")
    assert (
        a.shape == (16, 16, 3)
        and a[3, 3].tolist() == [255, 0, 0]
        and a[1, 1].tolist() == a[8, 8].tolist() == [255, 255, 255]
    )
    assert (
        (pixels(pack, "b") == a[:, ::-1]).all()
        and (pixels(pack, "c") == a[:, ::-1]).all()
        and (pixels(pack, "d") == a).all()
    )
    a = pixels(pack, "wide")
    assert (a[4:12] == 0).all() and (a[:4] == 255).all() and (a[12:] == 255).all()
    a = pixels(pack, "moved", 32)
    assert (a[:16, :16] == 0).all() and (a[16:] == 255).all() and (a[:, 16:] == 255).all()


# ------------------------------------------------------------------------------ splits


def test_splits():
    """The same in any order, with the shares as said; every concept and style stays in training."""
    pairs = [
        (Concept(f"thing {i}", f"{i:x}", "", ()), style)
        for i in range(1500)
        for style in list(emoji.PACKAGES)[: 1 + i % 9]
    ]
    splits = choose_splits(pairs)
    assert splits == choose_splits(pairs[::-1]) and set(splits) == set(pairs)
    there, seen = (
        Counter(concept for concept, _ in pairs),
        Counter(pair[0] for pair in pairs if splits[pair] == "train"),
    )
    assert all(seen[concept] >= min(2, there[concept]) for concept in there)
    assert {style for concept, style in pairs if splits[concept, style] == "train"} == set(
        emoji.PACKAGES
    )
    many = [
        splits[pair] for pair in pairs if there[pair[0]] > 5
    ]  # rarely kept back for want of styles
    assert (
        0.07 < many.count("held_out") / len(many) < 0.09
        and 0.03 < many.count("val") / len(many) < 0.05
    )
    assert splits[pairs[0]] == "train" and choose_splits(pairs[:45]).items() <= splits.items(), (
        "others do not matter"
    )


# ------------------------------------------------------------------------------ the set


def test_build(tmp_path, packages, drawn, capsys, monkeypatch):
    """What the whole set says and holds, and that CaptionedFolder reads it."""
    monkeypatch.setattr(emoji, "KEPT_IN_TRAINING", 1)
    monkeypatch.setattr(emoji, "SHARES", {"held_out": 0.4, "val": 0.6})
    out = tmp_path / "deep" / "emoji"
    assert run(out, "--size=32") == 0
    captured = capsys.readouterr()
    assert (
        "9 pictures of 3 concepts" in captured.out
        and "left out: nothing" in captured.out
        and captured.out.count("\n") == 1
    )
    assert "drawing" in captured.err
    found = lines(out)
    assert len(found) == 9 and len({split for split, _ in found}) == 3
    texts = {line["text"] for _, line in found}
    assert {
        "tiger, noto style",
        "man's shoe, fluent flat style",
        "sun, firefox style",
    } <= texts and len(texts) == 9
    for split, line in found:
        assert line["text"] == f"{line['concept']}, {line['style']} style"
        with Image.open(out / split / line["file_name"]) as image:
            assert image.size == (32, 32) and image.mode == "RGB"
            x = 2 * ["tiger", "man's shoe", "sun"].index(
                line["concept"]
            )  # what is there is what the caption says
            assert image.getpixel((2 * x + 4, 8)) == tuple(
                bytes.fromhex(COLOURS[line["style"]][1:])
            )
    tiger = next(line for _, line in found if line["text"] == "tiger, noto style")
    assert (
        tiger["emoji"] == "🐅"
        and tiger["keywords"] == ["animal", "zoo"]
        and tiger["file_name"] == "noto/1f405.png"
    )
    assert {line["concept"] for split, line in found if split == "train"} == {
        "tiger",
        "man's shoe",
        "sun",
    }
    read = [CaptionedFolder(out / split, 32) for split in ("train", "val", "held_out")]
    assert sum(map(len, read)) == 9 and not any(folder.skipped for folder in read)
    assert sorted(path.name for path in out.iterdir()) == [
        "LICENCES.md",
        "held_out",
        "train",
        "val",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["emoji"], "the work folder is gone"
    text = (out / "LICENCES.md").read_text(encoding="utf-8")
    for style, package in STYLES.items():
        assert (
            f"| {style} | 3 | Set, [Ann](https://example.org) | [CC-BY-4.0](x) | `{package}` |"
            in text
        )
    assert "Unicode" in text and emoji.NAMES in text


def test_the_same_again(tmp_path, packages, drawn):
    assert run(tmp_path / "a") == run(tmp_path / "b") == 0
    files = [
        {
            path.relative_to(folder): path.read_bytes()
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        for folder in (tmp_path / "a", tmp_path / "b")
    ]
    assert files[0] == files[1] and len(files[0]) == 9 + 3 + 1


def test_what_is_left_out(tmp_path, packages, drawn, capsys):
    """Of identical pictures, also across styles, the first stays; what is empty or not SVG goes."""
    icons = packages[STYLES["noto"]]["icons"]["icons"]
    icons["mans-shoe"] = icons["tiger"]
    icons["sun"] = {"body": ""}
    other = packages[STYLES["firefox"]]["icons"]["icons"]
    other["tigerside"], other["sun"] = icons["tiger"], {"body": "<path"}
    assert run(tmp_path / "out") == 0
    summary = capsys.readouterr().out
    assert (
        "2 identical to another" in summary
        and "1 empty" in summary
        and "1 that could not be drawn" in summary
    )
    texts = {line["text"] for _, line in lines(tmp_path / "out")}
    assert texts == {
        "tiger, noto style",
        "tiger, fluent flat style",
        "man's shoe, fluent flat style",
        "sun, fluent flat style",
        "man's shoe, firefox style",
    }


# ------------------------------------------------------------------------------ what goes wrong


def sentence(capsys):
    """The one line on standard error, without the bars before it."""
    line = capsys.readouterr().err.split("\r")[-1].strip().splitlines()
    assert len(line) == 1, line
    return line[0]


def test_not_a_package(tmp_path, packages, capsys, monkeypatch):
    monkeypatch.setattr(emoji, "renderer", lambda: None)
    for content, name in (
        ({"icons": b"{", "chars": {}, "info": INFO}, "flat"),
        ({"chars": {}}, "flat"),
    ):
        packages[STYLES["fluent flat"]] = content
        assert run(tmp_path / "out") == 2
        assert name in sentence(capsys)
    (tmp_path / "broken.tgz").write_bytes(b"no archive")
    monkeypatch.setattr(emoji, "fetch", lambda package, folder: tmp_path / "broken.tgz")
    assert run(tmp_path / "out") == 2
    assert "broken.tgz cannot be used" in sentence(capsys)
    assert not list(tmp_path.glob("*out*")), "nothing half written stays"


def test_nothing_half_written_after_an_interruption(tmp_path, packages, monkeypatch):
    def interrupted():
        def draw(svg):
            raise KeyboardInterrupt

        return draw

    monkeypatch.setattr(emoji, "renderer", interrupted)
    assert run(tmp_path / "out") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["fetched"]


def test_no_optional_package(tmp_path, packages, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert run(tmp_path / "out") == 2
    assert sentence(capsys) == "emoji: drawing emoji needs resvg-py: pip install resvg-py"
    assert not (tmp_path / "out").exists()


def npm(monkeypatch, code, out="", err=""):
    """In place of npm: a program that answers like this."""
    monkeypatch.setattr(emoji.shutil, "which", lambda name: "npm")
    monkeypatch.setattr(
        emoji.subprocess,
        "run",
        lambda command, **options: subprocess.CompletedProcess(command, code, out, err),
    )


def test_npm(tmp_path, monkeypatch):
    npm(monkeypatch, 0, "some notice\ntest-noto-1.0.0.tgz\n")
    assert emoji.fetch("@test/noto@1.0.0", tmp_path) == tmp_path / "test-noto-1.0.0.tgz"


@pytest.mark.parametrize(
    "code, err, expected",
    [
        (
            1,
            "npm error code ENOTFOUND\nnpm error errno ENOTFOUND",
            r"cannot fetch .*@17.* \(ENOTFOUND\): is there a network\?",
        ),
        (1, "npm error code E404\nnpm error 404 Not Found", r"\(E404\): there is no such package"),
        (7, "", r"\(exit code 7\)"),
    ],
)
def test_no_network(tmp_path, capsys, monkeypatch, code, err, expected):
    npm(monkeypatch, code, err=err)
    monkeypatch.setattr(emoji, "renderer", lambda: None)
    assert run(tmp_path / "out") == 2
    with pytest.raises(ValueError, match=expected):
        emoji.fetch(emoji.NAMES, tmp_path)
    assert (
        sentence(capsys).startswith("emoji: npm cannot fetch emojibase-data")
        and list(tmp_path.iterdir()) == []
    )


def test_no_npm(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(emoji.shutil, "which", lambda name: None)
    monkeypatch.setattr(emoji, "renderer", lambda: None)
    assert run(tmp_path / "out") == 2
    assert "install Node.js" in sentence(capsys)


def test_bad_output(tmp_path, packages, capsys, monkeypatch):
    monkeypatch.setattr(emoji, "renderer", lambda: None)
    (tmp_path / "file").write_text("x")
    assert run(tmp_path / "file" / "below") == 2
    assert sentence(capsys).startswith("emoji: cannot write ")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "photo.png").write_text("x")
    for out in (tmp_path / "mine", tmp_path / "file"):
        assert run(out) == 2
        assert "already there" in sentence(capsys)
    assert (tmp_path / "mine" / "photo.png").exists()
    assert run(tmp_path / "out", "--size=0") == 2
    assert "from 8 to 1024" in sentence(capsys)


def test_which_set(capsys):
    assert main([]) == main(["cats"]) == 2
    assert capsys.readouterr().err.count("data emoji --out FOLDER") == 2


def test_the_command_runs():
    command = [sys.executable, "-m", "mini_dalle2.data", "cats"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("data: the one set to build is emoji")
