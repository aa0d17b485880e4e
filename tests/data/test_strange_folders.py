"""Folders of somebody else, and of rough machines: nothing hangs, nothing outside is read, and all
that is left out has its reason."""

import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import noisy
from mini_dalle2.configs import DataConfig
from mini_dalle2.data import archives, folder, tables
from mini_dalle2.data.archives import OUTSIDE, Tree
from mini_dalle2.data.folder import CaptionedFolder
from mini_dalle2.data.pixels import to_rgb
from mini_dalle2.data.tables import Pictures
from mini_dalle2.runtime.pictures import open_picture


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
    with pytest.raises(FileNotFoundError, match="no picture"):
        open_picture(pictures / "pipe.png")
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


def test_captions_with_half_a_character(pictures):
    (pictures / "metadata.jsonl").write_text('{"file_name": "good.png", "text": "half \\udce9"}')
    assert CaptionedFolder(pictures, 8)[0]["text"] == "half ?"


def test_brackets_within_brackets(pictures):
    line = '{"file_name": "good.png", "text": ' + "[" * 900 + "]" * 900 + "}"
    (pictures / "metadata.jsonl").write_text(line + "\n" + '{"file_name": {"a": 1}, "text": "x"}')
    dataset = CaptionedFolder(pictures, 8)
    assert [texts for _, texts in dataset.pictures] == [["a picture"]]
    assert all(len(detail) < 200 for _, _, detail in dataset.skipped) and len(dataset.skipped) == 2


# ------------------------------------------------------------------------------ sizes

def test_more_pixels_than_pillow_reads_has_a_reason_of_its_own(pictures, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    said = "more than 200 pixels, which Pillow does not read"
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
