"""Sheets of pictures in few colours."""

import numpy as np
from PIL import Image

from mini_dalle2.data.shapes import CaptionedShapes, render
from mini_dalle2.evaluate.seen import few_colours


def test_a_sheet_in_few_colours_keeps_the_rare_ones():
    """Sixty pictures, most of each its ground: pillow's own choice makes a rare green grey."""
    pictures = [render(CaptionedShapes("val", 32, 0, 60).scene(i), 32) for i in range(60)]
    sheet = np.concatenate(
        [
            np.concatenate([np.asarray(one) for one in pictures[i : i + 10]], axis=1)
            for i in range(0, 60, 10)
        ]
    )
    ours, theirs = (
        np.abs(np.asarray(made.convert("RGB")).astype(int) - sheet).max()
        for made in (
            few_colours(Image.fromarray(sheet)),
            Image.fromarray(sheet).quantize(256, dither=Image.Dither.NONE),
        )
    )
    assert ours < 16 < 30 < theirs
