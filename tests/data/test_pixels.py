"""Pixels: to a tensor and back without loss, and the central square of any picture."""

import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import noisy
from mini_dalle2.data.pixels import (
    central_square,
    mask_square,
    to_float,
    to_mask,
    to_pil,
    to_rgb,
    to_uint8,
)
from mini_dalle2.data.shapes import CaptionedShapes, render
from mini_dalle2.runtime.pictures import open_picture


def test_float_and_back():
    values = torch.arange(256, dtype=torch.uint8).expand(3, 4, 256)
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_float(values).min() == -1 and to_float(values).max() == 1
    item = CaptionedShapes("val", 48)[0]
    assert (
        item["image"].shape == (3, 48, 48)
        and item["image"].dtype == torch.float32
        and item["image"].abs().max() <= 1
    )
    assert (np.asarray(to_pil(item["image"])) == np.asarray(render(item["scene"], 48))).all()
    assert np.asarray(to_pil(torch.full((3, 2, 2), 7.0))).min() == 255, (
        "clamped, not wrapped around"
    )
    with pytest.raises(ValueError, match="3, H, W"):
        to_pil(torch.zeros(1, 3, 4, 4))


def test_no_dark_fringe_around_transparency():
    """White comes before resizing: hidden black under transparent pixels must not bleed in."""
    image = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (13, 13, 51, 51))
    assert np.asarray(central_square(image, 16)).min() >= 254


@pytest.mark.parametrize("width, height", [(90, 30), (30, 90), (31, 17)])
def test_middle_of_the_longer_side(tmp_path, width, height):
    """First third red, middle green, last third blue: only the middle stays, at its own aspect."""
    pixels = np.zeros((height, width, 3), np.uint8)
    along = np.arange(max(width, height))
    start, side = (max(width, height) - min(width, height)) / 2, min(width, height)
    for channel, part in enumerate(
        (along < start, (along >= start) & (along < start + side), along >= start + side)
    ):
        pixels[..., channel] = 255 * (part[None, :] if width > height else part[:, None])
    result = np.asarray(central_square(Image.fromarray(pixels), side))
    assert (result[..., 1] > 250).all() and result[..., [0, 2]].max() < 5


def test_resizing_is_antialiased_and_matches_resize_then_crop():
    image = noisy((200, 160))
    small = np.asarray(central_square(image, 8), dtype=float)
    assert small.std() < 12, "noise of deviation 74 averages out; picking pixels would keep it"
    by_steps = np.asarray(
        image.resize((40, 32), Image.Resampling.BICUBIC).crop((4, 0, 36, 32)), dtype=float
    )
    assert np.abs(np.asarray(central_square(image, 32), dtype=float) - by_steps).max() <= 2


def png(depth, colour, row, transparent):
    """A PNG of one row, with a transparent value: bytes. Pillow itself writes 8 bits only."""
    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
    width = len(row) * 8 // (depth * {0: 1, 2: 3}[colour])
    header = struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", transparent)
            + chunk(b"IDAT", zlib.compress(b"\0" + row)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("depth, colour, row, transparent, expected", [
    (1, 0, bytes([0b01000000]), struct.pack(">H", 1), [0, 255, 0, 0, 0, 0, 0, 0]),
    (2, 0, bytes([0b00011011]), struct.pack(">H", 1), [0, 255, 170, 255]),
    (4, 0, bytes([0x12, 0x3F]), struct.pack(">H", 1), [255, 34, 51, 255]),
    (8, 0, bytes([10, 11, 200, 255]), struct.pack(">H", 10), [255, 11, 200, 255]),
    (16, 0, struct.pack(">4H", 1000, 1001, 30000, 65535), struct.pack(">H", 1000), [255, 4, 117, 255]),
    (8, 2, bytes([1, 2, 3, 4, 4, 4]), struct.pack(">3H", 1, 2, 3), [255, 4]),
    (16, 2, struct.pack(">6H", 1000, 2000, 3000, 1024, 1024, 1024), struct.pack(">3H", 1000, 2000, 3000), [255, 4]),
])
def test_a_transparent_value_becomes_white_at_every_depth(depth, colour, row, transparent, expected):
    """PNG's tRNS chunk names one value as transparent, in the depth of the file (PNG specification, 11.3.2.1)."""
    image = to_rgb(Image.open(io.BytesIO(png(depth, colour, row, transparent))))
    assert np.asarray(image)[0].tolist() == [[value] * 3 for value in expected]


@pytest.mark.parametrize("values, expected", [
    ([[0.0, 0.5, 1.0]], [0, 128, 255]),
    ([[0.0, 0.5, np.nan]], [0, 128, 255]),
    ([[0.0, 127.6, np.nan]], [0, 128, 255]),
    ([[np.nan, np.nan, np.nan]], [255, 255, 255]),
    ([[0.0, np.inf, -np.inf]], [0, 255, 0]),
])
def test_floats_that_are_no_numbers_are_white_and_change_no_others(tmp_path, values, expected):
    Image.fromarray(np.array(values, dtype=np.float32)).save(tmp_path / "a.tiff")
    assert np.asarray(to_rgb(Image.open(tmp_path / "a.tiff")))[0, :, 0].tolist() == expected


# ------------------------------------------------------------------------------ masks

MARKED = Image.new("L", (8, 8))
MARKED.paste(255, (0, 0, 4, 8))
KEPT = MARKED.point(lambda value: 255 - value)
WHITE, BLACK = Image.new("L", (8, 8), 255), Image.new("L", (8, 8))


def saved(image, kind="PNG", **options):
    """The picture as it comes back from a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    image = Image.open(file)
    image.load()
    return image


def erased():
    """A picture whose left half is erased, as OpenAI's image API takes it."""
    image = noisy((8, 8))
    image.putalpha(KEPT)
    return image


def palette():
    """A picture of two colours: the left half is red, the right half is blue."""
    image = Image.new("P", (8, 8))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (4, 0, 8, 8))
    return image


def deep(image):
    """The same greys with 16 bits."""
    return Image.fromarray(np.asarray(image).astype(np.uint16) * 257)


# {what the mask is: (the mask, how it marks)}. All mark the left half.
MASKS = {
    "grey": (MARKED, "white"),
    "one bit": (MARKED.convert("1"), "white"),
    "a palette": (MARKED.convert("P"), "white"),
    "colours": (MARKED.convert("RGB"), "white"),
    "CMYK": (MARKED.convert("RGB").convert("CMYK"), "white"),
    "16 bits": (deep(MARKED), "white"),
    "floats": (Image.fromarray(np.asarray(MARKED, dtype=np.float32) / 255), "white"),
    "opaque, with an alpha channel": (Image.merge("LA", [MARKED, WHITE]), "white"),
    "white strokes on a transparent sheet": (Image.merge("RGBA", [WHITE] * 3 + [MARKED]), "white"),
    "a layer whose black is transparent": (saved(MARKED, transparency=0), "white"),
    "one bit, black is transparent": (saved(MARKED.convert("1"), transparency=0), "white"),
    "16 bits, black is transparent": (saved(deep(MARKED), transparency=0), "white"),
    "a picture with a part erased": (erased(), "transparent"),
    "the same as WebP": (saved(erased(), "WEBP"), "transparent"),
    "black with a hole": (Image.merge("LA", [BLACK, KEPT]), "transparent"),
    "white is transparent": (
        saved(MARKED.convert("RGB"), transparency=(255,) * 3), "transparent"),
    "16 bits, white is transparent": (
        saved(deep(MARKED), transparency=65535), "transparent"),
    "a palette with a transparent colour": (saved(palette(), transparency=0), "transparent"),
    "the same as GIF": (saved(palette(), "GIF", transparency=0), "transparent"),
    "an alpha of 1, called opaque": (
        Image.merge("RGBA", [BLACK] * 3 + [KEPT.point(bool)]), "transparent"),
    "half erased edges": (
        Image.merge("LA", [BLACK, Image.blend(KEPT, WHITE, 0.2)]), "transparent"),
}  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_all_kinds_mark_the_same_half(name):
    mask, mark = to_mask(MASKS[name][0])
    assert mask.mode == "L" and np.array_equal(np.asarray(mask), np.asarray(MARKED))
    assert mark == MASKS[name][1]


def test_a_mask_is_turned_upright_once():
    sideways = MARKED.convert("RGB").rotate(90)
    sideways.getexif()[0x0112] = 6
    mask, _ = to_mask(sideways)
    assert np.array_equal(np.asarray(mask), np.asarray(MARKED))
    again, mark = to_mask(mask)
    assert np.array_equal(np.asarray(again), np.asarray(mask)) and mark == "white"


def test_nothing_is_marked_by_black_or_by_glass():
    for empty in (BLACK, Image.new("RGBA", (8, 8)), Image.new("RGBA", (8, 8), (255, 255, 255, 0))):
        assert np.asarray(to_mask(empty)[0]).max() == 0


def test_a_coarse_mask_marks_all_that_a_fine_one_touches():
    wide = Image.new("L", (12, 8))
    wide.paste(255, (0, 0, 7, 8))
    assert mask_square(wide, 4)[0, 0].tolist() == [[1, 1, 1, 0]] * 4
    assert mask_square(wide, 16)[0, 0].tolist() == [[1] * 10 + [0] * 6] * 16


def test_tensors_that_are_no_pictures_are_refused():
    for wrong in (torch.zeros(3, 4, 4, dtype=torch.int64), torch.zeros(3, 4, 4, dtype=torch.bool)):
        with pytest.raises(ValueError, match="give it uint8, or float"):
            to_pil(wrong)


@pytest.mark.parametrize("depth, colour, row, transparent, expected", [
    (2, 0, bytes([0b00011011]), struct.pack(">H", 1), [0, 255, 0, 0]),
    (4, 0, bytes([0x12, 0x3F]), struct.pack(">H", 1), [255, 0, 0, 0]),
    (16, 0, struct.pack(">4H", 1000, 1001, 30000, 65535), struct.pack(">H", 1000), [255, 0, 0, 0]),
    (16, 2, struct.pack(">6H", 1000, 2000, 3000, 1024, 1024, 1024),
     struct.pack(">3H", 1000, 2000, 3000), [255, 0]),
])  # fmt: skip
def test_a_transparent_value_marks_at_every_depth(
    tmp_path, depth, colour, row, transparent, expected
):
    """A file is read whole before it becomes a mask, and its transparent value must survive."""
    (tmp_path / "a.png").write_bytes(png(depth, colour, row, transparent))
    mask, mark = to_mask(open_picture(tmp_path / "a.png"))
    assert np.asarray(mask)[0].tolist() == expected and mark == "transparent"
