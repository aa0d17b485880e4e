"""A folder of captioned images: both caption conventions, every kind of pixel, an honest report."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import noisy
from mini_dalle2.data import folder
from mini_dalle2.data.captions import NOT_UNDERSTOOD
from mini_dalle2.data.folder import CaptionedFolder
from mini_dalle2.data.pixels import to_uint8
from mini_dalle2.data.pixels import central_square

RGB = (200, 60, 20)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines),
        encoding="utf-8",
    )


def save(path, image=None, text=None, **options):
    """Save an image (a plain one by default) and, if given, its side-car text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (40, 30), RGB)).save(path, **options)
    if text is not None:
        write(path.with_suffix(".txt"), text)


def colour(item, y=0.5, x=0.5):
    pixels = to_uint8(item["image"])
    return pixels[:, int(y * pixels.shape[1]), int(x * pixels.shape[2])].tolist()


def near(found, expected, tolerance=3):
    return all(abs(a - b) <= tolerance for a, b in zip(found, expected))


# ------------------------------------------------------------------------------ captions


def test_metadata_and_sidecars(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "deep" / "b.jpg")
    save(tmp_path / "train" / "c.webp")
    save(tmp_path / "d.PNG", text="  from a   side-car \n\n")
    save(tmp_path / "e.png", text="side-car loses against metadata")
    write(
        tmp_path / "metadata.jsonl",
        "\ufeff" + json.dumps({"file_name": "a.png", "text": "ein Bär\u2028im Schnee"}),
        "",
        {"file_name": "deep/b.jpg", "text": ["first", " ", "second"]},
        {"file_name": "e.png", "text": "from metadata"},
    )
    write(
        tmp_path / "train" / "metadata.jsonl",
        {"file_name": "c.webp", "text": "beside its own metadata"},
    )
    dataset = CaptionedFolder(tmp_path, 16)
    assert [dataset.texts(i) for i in range(len(dataset))] == [
        ["ein Bär im Schnee"],
        ["from a side-car"],
        ["first", "second"],
        ["from metadata"],
        ["beside its own metadata"],
    ]
    assert (
        dataset.skipped == [] and dataset.report == f"5 captioned pictures in {tmp_path}, 0 skipped"
    )
    item = dataset[-1]
    assert (
        item["image"].shape == (3, 16, 16)
        and item["image"].dtype == torch.float32
        and item["text"] == "beside its own metadata"
    )
    with pytest.raises(IndexError):
        dataset[5]


def test_one_of_several_captions_by_index(tmp_path):
    for i in range(60):
        save(tmp_path / f"{i:02}.png", text="one\ntwo\n\nthree")
    dataset = CaptionedFolder(tmp_path, 8)
    texts = [dataset[i]["text"] for i in range(60)]
    assert texts == [CaptionedFolder(str(tmp_path), 32)[i]["text"] for i in range(60)]
    counts = [texts.count(t) for t in ("one", "two", "three")]
    assert sum(counts) == 60 and min(counts) >= 10
    assert any(len(set(texts[i::3])) > 1 for i in range(3)), (
        "not in step with the order of the files"
    )


def test_several_lines_for_one_picture_add_up(tmp_path):
    save(tmp_path / "a.png")
    write(
        tmp_path / "metadata.jsonl",
        {"file_name": "a.png", "text": "one"},
        {"file_name": "./a.png", "text": "two"},
    )
    dataset = CaptionedFolder(tmp_path)
    assert len(dataset) == 1 and dataset.texts(0) == ["one", "two"]


# ------------------------------------------------------------------------------ pixels


def test_every_kind_of_pixel(tmp_path):
    half = Image.new("RGBA", (20, 20), (255, 0, 0, 128))
    clear = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    palette = Image.new("P", (20, 20), 1)
    palette.putpalette([0, 0, 255, 0, 255, 0])
    cases = {
        "rgb.png": (Image.new("RGB", (20, 20), RGB), {}, RGB),
        "rgba_half.png": (half, {}, (255, 127, 127)),
        "rgba_clear.png": (clear, {}, (255, 255, 255)),
        "la.png": (Image.new("LA", (20, 20), (0, 64)), {}, (191, 191, 191)),
        "palette.png": (palette, {}, (0, 255, 0)),
        "palette_clear.png": (palette, {"transparency": 1}, (255, 255, 255)),
        "palette_clear.gif": (palette, {"transparency": 1}, (255, 255, 255)),
        "keyed.png": (Image.new("RGB", (20, 20), RGB), {"transparency": RGB}, (255, 255, 255)),
        "grey.jpg": (Image.new("L", (20, 20), 77), {}, (77, 77, 77)),
        "bits.png": (Image.new("1", (20, 20), 1), {}, (255, 255, 255)),
        "cmyk.jpg": (Image.new("CMYK", (20, 20), (0, 255, 255, 0)), {}, (255, 0, 0)),
        "grey16.png": (Image.fromarray(np.full((20, 20), 30000, np.uint16)), {}, (117, 117, 117)),
        "grey16.tif": (Image.fromarray(np.full((20, 20), 30000, np.uint16)), {}, (117, 117, 117)),
        "float01.tif": (Image.fromarray(np.full((20, 20), 0.25, np.float32)), {}, (64, 64, 64)),
        "float255.tif": (Image.fromarray(np.full((20, 20), 99.0, np.float32)), {}, (99, 99, 99)),
        "ycbcr.jpg": (Image.new("YCbCr", (20, 20), (128, 128, 128)), {}, (128, 128, 128)),
    }
    for name, (image, options, _) in cases.items():
        save(tmp_path / name, image, **options)
        with open(tmp_path / "metadata.jsonl", "a") as f:
            f.write(json.dumps({"file_name": name, "text": name}) + "\n")
    dataset = CaptionedFolder(tmp_path, 16)
    assert len(dataset) == len(cases), dataset.report
    for item in dataset:
        assert near(colour(item), cases[item["text"]][2]), (item["text"], colour(item))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    """The corner that a viewer shows at the upper left is red, however the file stores it."""
    upright = Image.new("RGB", (32, 32), (255, 255, 255))
    upright.paste((255, 0, 0), (0, 0, 16, 16))
    upright.paste((0, 0, 255), (16, 0, 32, 16))
    T = Image.Transpose
    stored = {
        1: None,
        2: T.FLIP_LEFT_RIGHT,
        3: T.ROTATE_180,
        4: T.FLIP_TOP_BOTTOM,
        5: T.TRANSPOSE,
        6: T.ROTATE_90,
        7: T.TRANSVERSE,
        8: T.ROTATE_270,
    }[orientation]  # what undoes the rotation that the flag asks for
    exif = Image.Exif()
    exif[0x0112] = orientation
    save(
        tmp_path / "a.jpg",
        upright if stored is None else upright.transpose(stored),
        "x",
        exif=exif,
        quality=95,
    )
    item = CaptionedFolder(tmp_path, 32)[0]
    assert near(colour(item, 0.2, 0.2), (255, 0, 0), 12) and near(
        colour(item, 0.2, 0.8), (0, 0, 255), 12
    )
    assert near(colour(item, 0.8, 0.5), (255, 255, 255), 12)


def test_large_jpeg_by_the_quick_path(tmp_path):
    """libjpeg's reduced decoding gives the same small picture as decoding in full."""
    y, x = np.mgrid[0:1000, 0:1200]
    image = Image.fromarray(np.stack([x % 256, y % 256, (x + y) // 9], axis=-1).astype(np.uint8))
    save(tmp_path / "a.jpg", image, "x", quality=95)
    full = central_square(Image.open(tmp_path / "a.jpg"), 32)
    assert (
        np.abs(
            np.asarray(folder.load_picture(tmp_path / "a.jpg", 32), dtype=float) - np.asarray(full)
        ).mean()
        < 3
    )


# ------------------------------------------------------------------------------ what is left out


def encoded(kind, **options):
    buffer = io.BytesIO()
    noisy().save(buffer, kind, **options)
    return buffer.getvalue()


def test_the_report_names_everything_left_out(tmp_path):
    save(tmp_path / "good.png", noisy(), "good")
    for kind in ("JPEG", "PNG", "WEBP", "GIF", "TIFF", "BMP"):
        content = encoded(kind)
        (tmp_path / f"cut.{kind.lower()}").write_bytes(content[: len(content) * 2 // 3])
    content = bytearray(encoded("PNG"))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "flipped.png").write_bytes(content)
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    (tmp_path / "drawing.svg").write_text("<svg/>")
    (tmp_path / "pointer.png").write_text("version https://git-lfs.github.com/spec/v1\nsize 9\n")
    damaged = [p.name for p in tmp_path.iterdir() if p.suffix != ".txt" and p.name != "good.png"]
    for name in damaged:
        write((tmp_path / name).with_suffix(".txt"), "x")
    save(tmp_path / "silent.png")
    save(tmp_path / "blank.png", text=" \n \n")
    save(tmp_path / "latin.png")
    (tmp_path / "latin.txt").write_bytes("Bär".encode("latin-1"))
    save(tmp_path / ".hidden.png", text="x")
    (tmp_path / "notes.md").write_text("no image")
    write(
        tmp_path / "metadata.jsonl",
        {"file_name": "gone.png", "text": "x"},
        "{broken",
        {"text": "no file"},
        ["list"],
        {"file_name": "good.png", "text": 7},
        {"file_name": "numbers.png", "text": ["a", 1]},
    )
    dataset = CaptionedFolder(tmp_path, 16)
    assert [dataset[i]["text"] for i in range(len(dataset))] == ["good"]
    reasons = {}
    for name, reason, _ in dataset.skipped:
        reasons.setdefault(reason, set()).add(name)
    foreign = {"empty.png", "page.jpg", "drawing.svg"}
    pointers = {"pointer.png"}
    assert reasons == {
        "corrupt or truncated": set(damaged) - foreign - pointers,
        "not an image that Pillow can read": foreign,
        folder.LEFT_IN_LFS: pointers,
        "no caption": {"silent.png", "blank.png"},
        "side-car text is not UTF-8": {"latin.png"},
        "file missing": {"gone.png"},
        NOT_UNDERSTOOD: {f"metadata.jsonl line {i}" for i in (2, 3, 4, 5, 6)},
        "neither picture nor caption": {"notes.md"},
    }
    assert dataset.report.startswith(
        f"1 captioned pictures in {tmp_path}, {len(dataset.skipped)} skipped\n"
    )
    assert (
        "2 × no caption: blank.png, silent.png" in dataset.report and "and 2 more" in dataset.report
    )
    assert "1 × file missing: gone.png" in dataset.report and len(dataset.report.splitlines()) == 9


def test_nothing_to_use(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such folder"):
        CaptionedFolder(tmp_path / "absent")
    with pytest.raises(ValueError, match="no image files"):
        CaptionedFolder(tmp_path)
    save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"junk")
    write(tmp_path / "b.txt", "x")
    with pytest.raises(ValueError, match="1 × no caption, 1 × not an image") as error:
        CaptionedFolder(tmp_path)
    assert "\n" not in str(error.value)
    (tmp_path / "Metadata.csv").write_text("id,words\n1,a\n")
    with pytest.raises(ValueError, match=r"no fitting column \(Metadata.csv: .*columns are id, words\)"):
        CaptionedFolder(tmp_path)
    (tmp_path / "Metadata.csv").unlink()
    write(tmp_path / "metadata.jsonl", {"name": "a.png", "file_name": None}, {"text": "b"})
    with pytest.raises(ValueError, match=r'like \{"file_name".*\(metadata.jsonl line 1: file_name'):
        CaptionedFolder(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    save(tmp_path / "a.png", text="x")
    with pytest.raises(ValueError, match="at least 1"):
        CaptionedFolder(tmp_path, 0)


def test_a_second_size_does_not_decode_again(tmp_path, monkeypatch):
    for i in range(3):
        save(tmp_path / f"{i}.png", text="x")
    CaptionedFolder(tmp_path, 8)
    monkeypatch.setattr(folder, "load_picture", lambda path, size: pytest.fail("decoded again"))
    assert len(CaptionedFolder(tmp_path, 64)) == 3


def test_a_file_that_changes_later_is_an_error_with_its_name(tmp_path):
    save(tmp_path / "a.png", text="x")
    dataset = CaptionedFolder(tmp_path, 8)
    (tmp_path / "a.png").write_bytes(b"junk")
    with pytest.raises(ValueError, match="a.png was readable"):
        dataset[0]
    with pytest.raises(ValueError, match="no usable"):
        CaptionedFolder(tmp_path, 8)
