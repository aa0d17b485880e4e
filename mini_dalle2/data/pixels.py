"""Pixels: from a picture to a tensor and back.

A model sees a pixel value v of 0..255 as x = v / 127.5 − 1, a number in [-1, 1]. Picture files
come in many kinds: transparent, rotated, 16-bit, grey. `to_rgb` brings all of them to one form,
upright RGB on white.

Shapes: S side of a square picture in pixels, H and W height and width. A picture is (3, H, W).
Reference: CLIP's preprocessing (bicubic, the shorter side, the centre).
Read next: folder.py, which reads your pictures with these functions.
"""

import numpy as np
import torch
from PIL import Image, ImageOps


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

    image: uint8, or float in [-1, 1], which is clamped. Raises ValueError for another shape.
    """
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"to_pil got shape {tuple(image.shape)}: give it one image (3, H, W)")
    if image.dtype != torch.uint8:
        image = to_uint8(image.detach())
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def scale_transparency(image):
    """Bring the transparent value of a PNG, still unread, to the 8 bits that its pixels get.

    Pillow scales pixels of 2, 4 and 16 bits, but not this value.
    """
    value = image.info.get("transparency")
    if image.format != "PNG" or value is None or not image.tile:
        return
    bits = image.tile[0][3]
    if bits in ("L;2", "L;4"):
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}[bits]
    elif bits == "RGB;16B":
        image.info["transparency"] = tuple(v >> 8 for v in value)


def to_rgb(image):
    """Convert any PIL image to upright RGB.

    The EXIF orientation is applied, transparent pictures are laid on white, and grey pictures of
    16 bits or of floats are scaled to 8 bits. Floats in [0, 1] become 0 to 255.
    Raises whatever Pillow raises for a damaged file.
    """
    scale_transparency(image)
    image.load()
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:
        # A broken EXIF block does not damage the pixels: keep the picture as it is.
        pass
    if image.mode.startswith("I"):
        # 16-bit grey. Pillow's `convert` would clip all values above 255 to white.
        values = np.asarray(image, dtype=np.float64)
        # One value of the 65,536 may stand for "transparent"; under it lies white.
        values = np.where(values == image.info.get("transparency", -1), 65535, values) / 257
    elif image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # Not a number means that nothing was measured there: white, as for transparent pixels.
        known = values[np.isfinite(values)]
        unit = known.size > 0 and known.min() >= 0 and known.max() <= 1
        values = np.where(np.isnan(values), 255, values * 255 if unit else values)
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    else:
        return image.convert("RGB")
    grey = values.round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB")


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
