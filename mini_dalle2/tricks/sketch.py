"""The sketch: what pictures with this z_img look like on average, E[x | z_img], as a first guess for the decoder to start from.

    sketch(z_img) = argmin_f E‖f(z_img) − x‖²                  least squares, by a network of linear layers

Not in the paper, whose decoder has 3.5 billion parameters to find out where in the picture the things of a z_img stand. A small one
spends nearly all of its training on that, because its convolutions turn a vector into places only slowly. A few linear layers are quicker:
of unseen pictures of two things a sketch had a squared error of 0.018 after 40 seconds on two cores, the guess x̂_0 of a decoder of 4 million
parameters 0.021 (at t = 999) after 195 minutes. So it is learned first and alone; then the decoder is shown it beside x_t, as the upsamplers
are shown the small picture. What is in z_img is sharp in the sketch, what is not is blurred: that is what a regression makes of a question
with many answers, and why the decoder, which draws one of them, is a diffusion model. CLIP, too, looks at it, to choose between z_img that the
prior gives (pipeline.py). Presets without `decoder.sketch` do as the paper does.

Shapes: B batch, S image side, D = clip_dim. References: SR3 (2104.07636) §2 and unCLIP (2204.06125) §2.1 for showing a picture beside x_t.
Read next: decoder.py, which is shown it.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from ..runtime.checks import check_positive
from .whitening import Whitening


@dataclass(frozen=True)
class SketchConfig:
    """Sizes of the network: `layers` hidden layers of `width`, then the picture."""

    clip_dim: int = 128
    image_size: int = 32
    width: int = 512
    layers: int = 4

    def __post_init__(self):
        check_positive(self, "clip_dim", "image_size", "width", "layers")


# mini: not in the paper; presets with `decoder.sketch` use it.
class Sketch(nn.Module):
    """Whitened z_img, some linear layers, a picture."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.whitening = Whitening(cfg.clip_dim)
        layers, width = [], cfg.clip_dim
        for _ in range(cfg.layers):
            layers += [nn.Linear(width, cfg.width), nn.SiLU()]
            width = cfg.width
        self.layers = nn.Sequential(*layers, nn.Linear(width, 3 * cfg.image_size ** 2))

    def measure(self, z_img):
        """Fits the whitening to the training embeddings z_img (N, D): without it the same minutes teach a tenth (see whitening.py)."""
        self.whitening.fit(z_img)

    def forward(self, z_img):
        """z_img (B, D) as CLIP gives it -> pictures (B, 3, S, S), about in [-1, 1]."""
        S = self.cfg.image_size
        return self.layers(self.whitening(z_img)).unflatten(-1, (3, S, S)) # (B, 3, S, S)

    def loss(self, images, z_img):
        """Mean squared error, a scalar: images (B, 3, S, S) in [-1, 1], z_img (B, D) their embeddings."""
        return F.mse_loss(self(z_img).float(), images)
