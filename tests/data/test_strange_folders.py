"""Folders of somebody else, and of rough machines: nothing hangs, nothing outside is read, and all
that is left out has its reason."""

import json
import os
import subprocess
import sys
import tarfile
import tracemalloc
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, noisy
from mini_dalle2.configs import DataConfig
from mini_dalle2.data import archives, folder, tables
from mini_dalle2.data.archives import OUTSIDE, Tree
from mini_dalle2.data.folder import CaptionedFolder
from mini_dalle2.data.pixels import to_mask, to_rgb
from mini_dalle2.data.tables import Pictures
from mini_dalle2.runtime.pictures import check_out, open_picture


def save(path, text="a picture"):
    """A picture with its caption beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noisy((24, 20)).save(path)
    path.with_suffix(".txt").write_text(text)


def reasons(dataset):
    """{name: reason} of what was left out."""
    return {name: reason for name, reason, _ in dataset.skipped}


@pytest.fixture
def pictures(tmp_path):
    """A folder with one good picture, beside a folder that is not part of it."""
    save(tmp_path / "pictures" / "good.png")
    save(tmp_path / "private" / "secret.png", "a secret")
    return tmp_path / "pictures"


# ------------------------------------------------------------------------------ outside the folder

def test_nothing_outside_is_read_unless_it_is_asked_for(pictures):
    secret = pictures.parent / "private" / "secret.png"
    (pictures / "link.png").symlink_to(secret)
    (pictures / "more").symlink_to(secret.parent)
    save(pictures / "own.png")
    (pictures / "own.txt").unlink()
    (pictures / "own.txt").symlink_to(secret.with_suffix(".txt"))
    names = ["../private/secret.png", str(secret), "more/secret.png", "link.png"]
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in names]
    # Without a caption: one would be found beside the file.
    lines.append(json.dumps({"file_name": "../private/secret.png", "text": ""}))
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    dataset = CaptionedFolder(pictures, 8)
    assert [file.name for file, _ in dataset.pictures] == ["good.png"]
    found = reasons(dataset)
    assert found.pop("own.png") == "no caption"
    assert found == dict.fromkeys(
        ["link.png", "more", "own.txt", "../private/secret.png", "more/secret.png"], OUTSIDE)
    assert "--data.outside=true" in dataset.report and "a secret" not in dataset.report
    everything = CaptionedFolder(pictures, 8, outside=True)
    files = {os.path.relpath(file, pictures): texts for file, texts in everything.pictures}
    assert files == {"../private/secret.png": ["x", "x"], "good.png": ["a picture"],
                     "link.png": ["x"], "more/secret.png": ["x"], "own.png": ["a secret"]}
    assert len(everything[0]["image"]) == 3


def test_a_link_as_the_folder_itself_and_links_inside_are_fine(pictures, tmp_path):
    (tmp_path / "here").symlink_to(pictures)
    save(pictures / "sub" / "b.png")
    (pictures / "again.png").symlink_to(pictures / "sub" / "b.png")
    (pictures / "again.txt").write_text("the same")
    (pictures / "twice").symlink_to(pictures / "sub")
    dataset = CaptionedFolder(tmp_path / "here", 8)
    assert [file.name for file, _ in dataset.pictures] == ["again.png", "good.png", "b.png"]
    assert reasons(dataset) == {"twice": "link to a folder that is read already"}


def test_circles_of_links_have_an_end(pictures):
    (pictures / "up").symlink_to(pictures.parent)
    (pictures / "self").symlink_to(pictures)
    (pictures / "private").symlink_to(pictures.parent / "private")
    (pictures.parent / "private" / "back").symlink_to(pictures.parent / "private")
    dataset = CaptionedFolder(pictures, 8, outside=True)
    assert [file.name for file, _ in dataset.pictures] == ["good.png", "secret.png"]
    assert set(reasons(dataset)) == {"up", "self", "private/back"}


def test_a_run_with_pictures_outside(pictures):
    (pictures / "metadata.jsonl").write_text(
        '{"file_name": "../private/secret.png", "text": "a secret"}')
    for outside, n in ((False, 1), (True, 2)):
        cfg = DataConfig(source=str(pictures), outside=outside)
        found = Pictures(cfg, torch.device("cpu"))
        assert found.available == n and len(found.table("train", 8, 10)[1]) == n


# ------------------------------------------------------------------------------ no end, no entry

def test_what_is_no_regular_file_is_left_out(pictures):
    for name in ("pipe.png", "metadata.jsonl", "good.caption", "pipe.tar", "named.png"):
        os.mkfifo(pictures / name)
    (pictures / "zero.png").symlink_to("/dev/zero")
    (pictures / "circle.png").symlink_to(pictures / "circle.png")
    (pictures / "nowhere.png").symlink_to(pictures / "gone.png")
    (pictures / "metadata.csv").write_text("file_name,text\nnamed.png,x\ncircle.png,x\nzero.png,x\n")
    dataset = CaptionedFolder(pictures, 8)
    assert [file.name for file, _ in dataset.pictures] == ["good.png"]
    found = reasons(dataset)
    for name in ("pipe.png", "metadata.jsonl", "good.caption", "pipe.tar", "named.png"):
        assert found[name] == "no regular file"
    assert found["zero.png"] == OUTSIDE and found["nowhere.png"] == "link to nowhere"
    assert found["circle.png"] in ("file cannot be read", "file missing", "link to nowhere")
    for name, said in (("pipe.png", "this is a pipe, a socket or a device"),
                       ("../private", "this is a folder"), ("circle.png", "no picture")):
        with pytest.raises(FileNotFoundError, match=said):
            open_picture(pictures / name)
    check_out(pictures / "out.png", [pictures / "circle.png"])
    everything = reasons(CaptionedFolder(pictures, 8, outside=True))
    assert everything["zero.png"] == "no regular file"


def test_a_very_deep_folder(pictures):
    """Deeper than Python calls itself."""
    depth = 1200
    here = os.getcwd()
    try:
        os.chdir(pictures)
        for _ in range(depth):
            os.mkdir("d")
            os.chdir("d")
        noisy((8, 8)).save("deep.png")
        Path("deep.txt").write_text("deep")
        dataset = CaptionedFolder(pictures, 8)
        assert [texts for _, texts in dataset.pictures] == [["deep"], ["a picture"]]
        os.unlink("deep.png")
        os.unlink("deep.txt")
        for _ in range(depth):
            os.chdir("..")
            os.rmdir("d")
    finally:
        os.chdir(here)


def forbid(monkeypatch, function, name):
    """Let a function of os or of Tree fail for paths of this name. (Root may read everything.)"""
    owner, attribute = function
    original = getattr(owner, attribute)

    def refused(*arguments):
        if Path(arguments[-1]).name == name:
            raise PermissionError(13, "Permission denied")
        return original(*arguments)

    monkeypatch.setattr(owner, attribute, refused)


def test_a_subfolder_that_may_not_be_read_is_named(pictures, monkeypatch):
    save(pictures / "closed" / "a.png")
    forbid(monkeypatch, (archives.os, "scandir"), "closed")
    dataset = CaptionedFolder(pictures, 8)
    assert len(dataset) == 1 and reasons(dataset) == {"closed": "folder cannot be read"}
    assert "closed (Permission denied)" in dataset.report


@pytest.mark.parametrize("name, left_out", [
    ("b.txt", ("b.png", "side-car text cannot be read")),
    ("metadata.csv", ("metadata.csv", "captions cannot be read"))])
def test_one_text_that_may_not_be_read_stops_nothing(pictures, monkeypatch, name, left_out):
    save(pictures / "b.png")
    (pictures / "metadata.csv").write_text("file_name,text\ngood.png,from the table\n")
    forbid(monkeypatch, (Tree, "read"), name)
    dataset = CaptionedFolder(pictures, 8)
    assert left_out in reasons(dataset).items() and len(dataset) >= 1


def test_names_that_are_not_utf_8(pictures, capsys):
    raw = os.fsencode(pictures)
    (pictures / "good.png").rename(os.fsdecode(raw + b"/caf\xe9.png"))
    (pictures / "good.txt").rename(os.fsdecode(raw + b"/caf\xe9.txt"))
    Path(os.fsdecode(raw + b"/b\xe4r.doc")).write_text("x")
    found = Pictures(DataConfig(source=str(pictures)), torch.device("cpu"))
    assert "b\\udce4r.doc" in capsys.readouterr().out
    assert found.table("train", 8, 10)[1] == ["a picture"] and len(found.fingerprint()) == 64


def test_all_that_is_said_about_a_folder_can_be_printed(pictures):
    """Control characters, bytes that are not UTF-8, and endless names, anywhere."""
    root = pictures / os.fsdecode(b"caf\xe9")
    save(root / "a.png")
    noisy((8, 8)).save(root / "two\nlines\x1b[2J.png")
    (root / "metadata.csv").write_text("x" * 10 ** 5 + "\n1\n")
    inner = root / os.fsdecode(b"\xe4")
    inner.mkdir()
    (inner / "metadata.jsonl").write_text('{"\\udce9": 1}')
    dataset = CaptionedFolder(root, 8)
    report = dataset.report
    assert report.encode() and "caf\\udce9, 3 skipped" in report and len(report) < 2000
    assert "two\\nlines\\x1b[2J.png" in report and report.count("\n") == 2
    assert "\\udce4/metadata.jsonl" in report and "the columns are \\udce9" in report


def test_captions_with_half_a_character(pictures):
    (pictures / "metadata.jsonl").write_text('{"file_name": "good.png", "text": "half \\udce9"}')
    assert CaptionedFolder(pictures, 8)[0]["text"] == "half ?"


def test_brackets_within_brackets(pictures):
    line = '{"file_name": "good.png", "text": ' + "[" * 900 + "]" * 900 + "}"
    (pictures / "metadata.jsonl").write_text(line + "\n" + '{"file_name": {"a": 1}, "text": "x"}')
    dataset = CaptionedFolder(pictures, 8)
    assert [texts for _, texts in dataset.pictures] == [["a picture"]]
    assert all(len(detail) < 200 for _, _, detail in dataset.skipped) and len(dataset.skipped) == 2


def test_names_that_lead_nowhere(pictures):
    """A link to a link to a link, and so on, and a name that is longer than any path."""
    for i in range(1200):
        (pictures / f"{i}.lnk").symlink_to(f"{i + 1}.lnk")
    names = ["0.lnk", "a/" * 10 ** 6]
    lines = [json.dumps({"file_name": name, "text": "x"}) for name in names]
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    dataset = CaptionedFolder(pictures, 8)
    assert [file.name for file, _ in dataset.pictures] == ["good.png"]
    assert ("0.lnk", "file missing", "") in dataset.skipped
    assert "file_name is longer than any path" in dataset.report


# ------------------------------------------------------------------------------ archives, tables

def test_members_of_archives_that_are_no_files_of_it(pictures):
    with tarfile.open(pictures / "a.tar", "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "link.png"), (tarfile.FIFOTYPE, "pipe.txt"),
                           (tarfile.DIRTYPE, "folder"), (tarfile.REGTYPE, "/good.png")):
            member = tarfile.TarInfo(name)
            member.type = kind
            member.linkname = "../private/secret.png"
            tar.addfile(member)
    with zipfile.ZipFile(pictures / "b.zip", "w") as file:
        link = zipfile.ZipInfo("good.txt")
        link.external_attr = 0o120777 << 16
        file.writestr(link, "../private/secret.txt")
        file.writestr("../good.txt", "another caption")
    dataset = CaptionedFolder(pictures, 8)
    assert [texts for _, texts in dataset.pictures] == [["a picture"]]
    leads_out = "names that lead out of their archive"
    assert sorted(dataset.skipped) == [
        ("a.tar", leads_out, "/good.png"), ("a.tar/link.png", "no regular file", "a link or a device"),
        ("a.tar/pipe.txt", "no regular file", "a link or a device"),
        ("b.zip", leads_out, "../good.txt"),
        ("b.zip/good.txt", "no regular file", "a link or a device")]


def packed(path):
    """A .zip of a table of captions, and where the packed table begins in it."""
    rows = [f'{{"file_name": "{i}.png", "text": "picture {i}"}}' for i in range(60)]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("metadata.jsonl", "\n".join(rows))
    return 30 + len("metadata.jsonl")


def parquet(path):
    """A table of captions, and where its first page begins."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet
    parquet.write_table(pyarrow.table({"file_name": ["a.png"] * 60, "text": ["a cat"] * 60}), path)
    return 4


@pytest.mark.parametrize("make, name, left_out", [
    (packed, "a.zip", "a.zip/metadata.jsonl"), (parquet, "metadata.parquet", "metadata.parquet")])
def test_a_damaged_table_stops_nothing(pictures, make, name, left_out):
    start = make(pictures / name)
    content = bytearray((pictures / name).read_bytes())
    content[start:start + 12] = b"\xff" * 12
    (pictures / name).write_bytes(content)
    dataset = CaptionedFolder(pictures, 8)
    assert len(dataset) == 1 and reasons(dataset) == {left_out: "captions cannot be read"}


def test_texts_of_any_length_are_not_read(pictures, monkeypatch):
    monkeypatch.setattr(archives, "MOST_BYTES", 100)
    save(pictures / "b.png", "x" * 101)
    (pictures / "metadata.csv").write_text("file_name,text\n" + "\n" * 100)
    packed(pictures / "a.zip")
    dataset = CaptionedFolder(pictures, 8)
    assert [texts for _, texts in dataset.pictures] == [["a picture"]]
    assert reasons(dataset) == {
        "b.png": "side-car text cannot be read", "metadata.csv": "captions cannot be read",
        "a.zip/metadata.jsonl": "captions cannot be read"}
    assert "it has 101 bytes, and at most 100 are read" in dataset.report


# ------------------------------------------------------------------------------ sizes

def test_more_pixels_than_pillow_reads_has_a_reason_of_its_own(pictures, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    # 24 · 20 pixels. Up to twice Pillow's limit is read, with a warning.
    for limit, action in ((200, "default"), (400, "error")):
        folder.VERIFIED.clear()
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100 if action == "default" else limit)
        said = rf"more pixels than Pillow reads.*480 pixels\) exceeds limit of {limit} pixels"
        with warnings.catch_warnings():
            warnings.simplefilter(action)
            with pytest.raises(ValueError, match=said):
                CaptionedFolder(pictures, 8)
            with pytest.raises(ValueError, match=said):
                open_picture(pictures / "good.png")


@pytest.mark.parametrize("mode", ["I;16", "F"])
def test_grey_pictures_are_converted_in_bands(mode):
    """The same values as at once, in a tenth of the memory."""
    height, width = 1001, 800
    values = np.random.default_rng(0).random((height, width)) * 65535
    values = values.astype(np.uint16) if mode == "I;16" else (values / 65535).astype(np.float32)
    image = Image.fromarray(values)
    wanted = values.astype(np.float64) * (1 / 1 if mode == "I;16" else 255)
    wanted = (wanted / 257 if mode == "I;16" else wanted).round().clip(0, 255).astype(np.uint8)
    tracemalloc.start()
    rgb = to_rgb(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(np.asarray(rgb), np.repeat(wanted[..., None], 3, axis=2))
    # Of our own: the 8-bit values, and a band of floats. Pillow's memory is not counted.
    assert peak < 4 * height * width


def test_large_pictures_are_decoded_one_at_a_time(pictures, monkeypatch):
    monkeypatch.setattr(folder, "MANY_PIXELS", 100)
    now, most = [0], [0]

    def decode(image, size):
        now[0] += 1
        most[0] = max(most[0], now[0])
        np.random.default_rng(0).random(200_000)
        now[0] -= 1

    for i in range(12):
        save(pictures / f"{i}.png")
    monkeypatch.setattr(folder, "central_square", decode)
    monkeypatch.setattr(folder.os, "cpu_count", lambda: 8)
    CaptionedFolder(pictures, 7)
    assert most == [1]


# Four pictures that wait for the lock, loaded in two worker processes. Each notes when.
LOAD = """
import time, torch
from mini_dalle2.data import folder, tables

class Large:
    def __len__(self):
        return 40
    def __getitem__(self, i):
        began = time.time()
        if i >= 36:
            with folder.ONE_LARGE:
                began = time.time()
                time.sleep(0.2)
                with open(NOTES, "a") as file:
                    file.write(f"{began} {time.time()}\\n")
        return {"image": torch.zeros(3, 1, 1), "text": ""}

if __name__ == "__main__":
    tables.available_cores = lambda: 2
    tables.WORTH_PROCESSES = 0
    tables.CHUNK_EXAMPLES = 1
    print(len(tables.load_table(Large())[1]))
"""


def test_large_pictures_are_decoded_one_at_a_time_in_all_workers(tmp_path):
    (tmp_path / "load.py").write_text(LOAD.replace("NOTES", repr(str(tmp_path / "notes"))))
    done = subprocess.run([sys.executable, str(tmp_path / "load.py")], capture_output=True,
                          text=True, timeout=120, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.stdout == "40\n", done.stderr
    times = sorted(tuple(map(float, line.split()))
                   for line in (tmp_path / "notes").read_text().splitlines())
    assert len(times) == 4
    assert all(end <= began for (_, end), (began, _) in zip(times, times[1:]))


def test_masks_take_no_whole_numbers_of_eight_bytes():
    values = np.zeros((1000, 1000), np.uint16)
    values[:300] = 65535
    tracemalloc.start()
    mask, mark = to_mask(Image.fromarray(values))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert mark == "white" and np.array_equal(np.asarray(mask), (values > 0) * np.uint8(255))
    assert peak < 12 * values.size


def test_small_pictures_are_counted(pictures):
    noisy((100, 64)).save(pictures / "large.png")
    (pictures / "large.txt").write_text("large")
    found = Pictures(DataConfig(source=str(pictures)), torch.device("cpu"))
    assert found.smaller_than(64) == (1, 20) and found.smaller_than(20) == (0, 20)
    assert Pictures(DataConfig(), torch.device("cpu")).smaller_than(512) == (0, 512)


def test_a_folder_is_listed_once(pictures, monkeypatch):
    made = []
    original = tables.CaptionedFolder
    monkeypatch.setattr(tables, "CaptionedFolder", lambda *a: made.append(a) or original(*a))
    found = Pictures(DataConfig(source=str(pictures)), torch.device("cpu"))
    for size in (8, 16, 32):
        assert found.table("train", size, 10)[0].shape == (1, 3, size, size)
        assert found.table("val", size, 10)[0].shape == (1, 3, size, size)
    found.captions()
    found.fingerprint()
    assert len(made) == 1
