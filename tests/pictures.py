"""What test_pipeline, test_latents and test_sample share: captions, and how to compare pictures."""

import numpy as np
from PIL import Image

from mini_dalle2.data.pixels import to_pil
from mini_dalle2.data.shapes import CaptionedShapes

CAPTIONS = ["a red circle above a blue square", "two cyan rings", "a small black star"]
# Base pictures without a progress bar.
QUIET = {"progress": False, "stage": "base"}


def pixels(image):
    return np.asarray(image).astype(int)


def sampled(model, captions, **options):
    return model.text_to_image(captions, progress=False, **options)


def nearly(a, b):
    """Whether two pictures are the same, but for rounding.

    Another batch size may round the last bit of a float differently, which can move a pixel by one
    level.
    """
    return np.abs(pixels(a) - pixels(b)).max() <= 1


def half_mask(size=64):
    """White on the left half."""
    mask = Image.new("L", (size, size))
    mask.paste(255, (0, 0, size // 2, size))
    return mask


def val_picture(i):
    """A picture of the val split, 64 px."""
    return to_pil(CaptionedShapes("val", 64, 0, 4)[i]["image"])
