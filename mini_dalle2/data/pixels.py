"""Pixels: from a PIL image to a tensor and back.

Read next: folder.py.
"""

import numpy as np
import torch
from PIL import Image, ImageOps


def to_float(image):
    """uint8 pixels 0..255 -> float32 in [-1, 1], any shape."""
    return image.float() / 127.5 - 1


def to_uint8(image):
    """Float pixels in [-1, 1] -> uint8 0..255, rounded and clamped, any shape; undoes `to_float` exactly."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def from_pil(image):
    """RGB image -> uint8 tensor (3, H, W)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()                 # (H, W, 3) -> (3, H, W)


def to_pil(image):
    """Image (3, H, W), float in [-1, 1] (clamped) or uint8 -> RGB PIL image. Raises ValueError for another shape."""
    if image.ndim != 3 or image.shape[0] != 3:
        raise ValueError(f"to_pil needs one image of shape (3, H, W), got {tuple(image.shape)}")
    image = image if image.dtype == torch.uint8 else to_uint8(image.detach())
    return Image.fromarray(image.permute(1, 2, 0).cpu().numpy())


def to_rgb(image):
    """Any PIL image -> upright RGB: EXIF orientation applied, transparency composited on white, 16-bit and float grey scaled to 8 bits."""
    try:
        image = ImageOps.exif_transpose(image)
    except Exception:                                                      # a broken EXIF block says nothing against the pixels
        pass
    if image.mode.startswith("I"):                                         # 16-bit grey; `convert` would clip it to white
        values = np.asarray(image, dtype=np.float64) / 257
    elif image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        values = values * 255 if values.min() >= 0 and values.max() <= 1 else values
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    else:
        return image.convert("RGB")
    return Image.fromarray(np.nan_to_num(values).round().clip(0, 255).astype(np.uint8)).convert("RGB")


def central_square(image, size):
    """Any PIL image -> the central square of its upright, opaque self: RGB, size × size, bicubic with antialiasing."""
    image = to_rgb(image)
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
