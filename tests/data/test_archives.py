"""Archives: the files in them are read where they lie, and their names cannot lead elsewhere."""

import io
import pickle
import tarfile
import zipfile

import torch
from PIL import Image

from mini_dalle2.data.archives import Tree
from mini_dalle2.data.folder import CaptionedFolder


def picture(colour):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def make(folder, files, mode="w"):
    """Write the same files into a .tar and a .zip."""
    with tarfile.open(folder / "a.tar", mode) as tar, zipfile.ZipFile(folder / "b.zip", "w", zipfile.ZIP_DEFLATED) as packed:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
            packed.writestr(name, content)


def test_the_bytes_are_those_that_were_packed(tmp_path):
    files = {"one.bin": b"1" * 1000, "deep/two.bin": bytes(range(256)), "x" * 200 + ".bin": b"long name", "none.bin": b""}
    make(tmp_path, files)
    (tmp_path / "three.bin").write_bytes(b"3")
    tree = pickle.loads(pickle.dumps(Tree(tmp_path)))                      # as a worker process gets it
    assert {path.relative_to(tmp_path).as_posix(): tree.read(path) for path in tree.files} == {
        f"{archive}/{name}": content for archive in ("a.tar", "b.zip") for name, content in files.items()} | {"three.bin": b"3"}


def test_names_that_lead_out_and_hidden_files_are_left_out(tmp_path):
    make(tmp_path, {"../out.png": picture("red"), "/top.png": picture("red"), ".hidden.png": b"", "in.png": picture("red")})
    assert [path.relative_to(tmp_path).as_posix() for path in Tree(tmp_path).files] == ["a.tar/in.png", "b.zip/in.png"]


def test_a_damaged_or_compressed_archive_is_reported(tmp_path):
    make(tmp_path, {"a.png": picture("red"), "a.txt": b"red"})
    (tmp_path / "cut.zip").write_bytes((tmp_path / "b.zip").read_bytes()[:-30])
    (tmp_path / "text.tar").write_text("no archive" * 200)
    (tmp_path / "small.tar.gz").write_bytes(b"")
    data = CaptionedFolder(tmp_path, 8)
    assert len(data) == 2 and {(name, reason) for name, reason, _ in data.skipped} == {
        ("cut.zip", "archive cannot be read"), ("text.tar", "archive cannot be read"),
        ("small.tar.gz", "neither picture nor caption")}


def test_pictures_of_an_archive_are_those_of_the_folder(tmp_path):
    files = {f"{colour}.png": picture(colour) for colour in ("red", "lime", "blue")}
    files |= {f"{colour}.txt": colour.encode() for colour in ("red", "lime", "blue")}
    (tmp_path / "packed").mkdir()
    (tmp_path / "plain").mkdir()
    make(tmp_path / "packed", files)
    for name, content in files.items():
        (tmp_path / "plain" / name).write_bytes(content)
    plain, packed = CaptionedFolder(tmp_path / "plain", 8), CaptionedFolder(tmp_path / "packed", 8)
    assert len(packed) == 6 and packed.skipped == []
    for i in range(6):
        assert torch.equal(packed[i]["image"], plain[i % 3]["image"]) and packed[i]["text"] == plain[i % 3]["text"]
