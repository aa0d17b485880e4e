"""Pixels: from a picture to a tensor and back.

A model sees a pixel value v of 0..255 as x = v / 127.5 − 1, a number in [-1, 1]. Picture files
come in many kinds: transparent, rotated, 16-bit, grey. `to_rgb` brings all of them to one form,
upright RGB on white.

Shapes: S side of a square picture in pixels, H and W height and width. A picture is (3, H, W).
References: CLIP's preprocessing (bicubic, the shorter side, the centre); OpenAI's image API, whose
masks are transparent where something new is wanted.
Read next: folder.py, which reads your pictures with these functions.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps

from ..runtime.pictures import scale_transparency

# Rows of a grey picture that are converted at once.
BAND = 64


def to_float(image):
    """Convert uint8 pixels 0..255 of any shape to float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def to_uint8(image):
    """Convert float pixels in [-1, 1] of any shape to uint8 0..255.

    Values are rounded and clamped, so this undoes `to_float` exactly.
    """
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_pil(image):
    """Convert an RGB PIL image to a uint8 tensor (3, H, W)."""
    pixels = torch.from_numpy(np.array(image))                          # (H, W, 3)
    return pixels.permute(2, 0, 1).contiguous()                         # (3, H, W)


def to_pil(image):
    """Convert a tensor (3, H, W) to an RGB PIL image.

    image: uint8, or float in [-1, 1], which is clamped. Raises ValueError for another shape or
    type.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"to_pil got shape {tuple(image.shape)}: give it one image (3, H, W)")
    if image.dtype != torch.uint8 and not image.is_floating_point():
        raise ValueError(f"to_pil got {image.dtype}: give it uint8, or float in [-1, 1]")
    if image.dtype != torch.uint8:
        image = to_uint8(image.detach())
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def upright(image):
    """Read a PIL image to its last pixel, and turn it as its EXIF orientation says."""
    scale_transparency(image)
    image.load()
    try:
        return ImageOps.exif_transpose(image)
    except Exception:
        # A broken EXIF block does not damage the pixels: keep the picture as it is.
        return image


def to_rgb(image):
    """Convert any PIL image to upright RGB.

    The EXIF orientation is applied, transparent pictures are laid on white, and grey pictures of
    16 bits or of floats are scaled to 8 bits. Floats in [0, 1] become 0 to 255.
    Raises whatever Pillow raises for a damaged file.
    """
    image = upright(image)
    if image.mode.startswith("I") or image.mode == "F":
        return grey_to_8_bits(image).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def bands(image):
    """Yield the values of a grey PIL image as float64 (rows, W), some rows at a time.

    The whole picture as float64 would take eight times the memory of its 8-bit values.
    """
    for top in range(0, image.height, BAND):
        rows = image.crop((0, top, image.width, min(top + BAND, image.height)))
        yield np.asarray(rows, dtype=np.float64)


def grey_to_8_bits(image):
    """Scale a grey PIL image of 16 bits or of floats to 8 bits: an image of mode "L"."""
    clear = image.info.get("transparency", -1)
    scale = 255 if image.mode == "F" and is_in_unit_range(image) else 1
    grey = np.empty((image.height, image.width), np.uint8)
    for i, rows in enumerate(bands(image)):
        if image.mode == "F":
            # Not a number means that nothing was measured there: white, as for transparent pixels.
            values = np.where(np.isnan(rows), 255, rows * scale)
        else:
            # 16-bit grey. Pillow's `convert` would clip all values above 255 to white.
            # One value of the 65,536 may stand for "transparent"; under it lies white.
            values = np.where(rows == clear, 65535, rows) / 257
        grey[i * BAND:(i + 1) * BAND] = values.round().clip(0, 255)
    return Image.fromarray(grey)


def is_in_unit_range(image):
    """Tell whether all numbers in a PIL image of floats lie in [0, 1]."""
    known = (rows[np.isfinite(rows)] for rows in bands(image))
    extremes = [(rows.min(), rows.max()) for rows in known if rows.size]
    return bool(extremes) and all(low >= 0 and high <= 1 for low, high in extremes)


def to_255(marked):
    """Return uint8 values of 255 where a bool array is true, and 0 elsewhere.

    np.where would make whole numbers of eight bytes first.
    """
    return marked.astype(np.uint8) * np.uint8(255)


def opacity(image):
    """Return how opaque each pixel of a PIL image is: uint8 (H, W), 0 for transparent."""
    clear = image.info.get("transparency")
    if image.mode.startswith("I"):
        # Pillow leaves the transparent value of 16-bit grey to us.
        return to_255(np.asarray(image) != clear)
    if clear is None and "A" not in image.getbands():
        return np.full((image.height, image.width), 255, np.uint8)
    return np.asarray(image.convert("RGBA").getchannel("A"))


def to_mask(picture):
    """Turn any PIL image into a mask: (mask, mark).

    mask: an upright image of mode "L", 255 where something new is wanted, else 0.
    mark: "white" or "transparent", which of the two marks that place. Transparent parts mark it,
    as in OpenAI's image API. But white strokes alone on a transparent sheet are the mark.
    """
    picture = upright(picture)
    opaque = opacity(picture)                                           # (H, W)
    has_alpha = "A" in picture.getbands() or picture.mode == "P"
    grey = to_rgb(picture.convert("RGBA").convert("RGB") if has_alpha else picture).convert("L")
    grey = np.asarray(grey, dtype=np.uint16)                            # (H, W)
    # Some programs make masks whose most opaque pixels are almost transparent.
    clear = opaque < opaque.max() / 2
    strokes = grey[opaque == opaque.max()].min() > 250
    if clear.any() and not strokes:
        return Image.fromarray(to_255(clear)), "transparent"
    # More than half of 255 · 255.
    white = grey * opaque > 32512
    return Image.fromarray(to_255(white)), "white"


def mask_square(mask, size):
    """Cut the central square out of a mask of `to_mask`: float (1, 1, size, size), 0 or 1.

    A pixel of the result is 1 if any pixel in its place is marked.
    """
    square = min(mask.size)
    left = (mask.width - square) // 2
    top = (mask.height - square) // 2
    crop = mask.crop((left, top, left + square, top + square))
    full = torch.from_numpy(np.array(crop))[None, None].float() / 255   # (1, 1, square, square)
    if square >= size:
        return F.adaptive_max_pool2d(full, size)
    return F.interpolate(full, (size, size), mode="nearest")


def central_square(image, size):
    """Cut the central square out of any PIL image: RGB, upright, opaque, size × size pixels.

    The square is as long as the picture's shorter side. It is resized by bicubic interpolation
    with antialiasing.
    """
    image = to_rgb(image)
    side = min(image.size)
    left = (image.width - side) / 2
    top = (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)
