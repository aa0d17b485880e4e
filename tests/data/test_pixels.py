"""Pixels: to a tensor and back without loss, and the central square of any picture."""

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import noisy
from mini_dalle2.data.pixels import central_square, to_float, to_pil, to_uint8
from mini_dalle2.data.shapes import CaptionedShapes, render


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
