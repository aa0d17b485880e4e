"""The sketch: what pictures with this z_img look like on average, E[x | z_img].

    sketch(z_img) = argmin_f E‖f(z_img) − x‖²        least squares, by a network of linear layers

The paper has no sketch. Its decoder has 3.5 billion parameters to find out where in the picture the
objects of a z_img stand. A small decoder spends nearly all of its training on this question,
because its convolutions turn a vector into places only slowly. A few linear layers are quicker. So
the sketch is learned first, and alone. The decoder is then shown the sketch beside x_t, as the
upsamplers are shown the small picture.

What z_img says is sharp in the sketch; what z_img leaves open is blurred, because a regression
averages over all answers. The decoder samples one of the answers, and therefore is a diffusion
model. CLIP also looks at the sketch, to choose between several z_img of the prior (pipeline.py).

Shapes: B batch, S image side, D = clip_dim. References: SR3 (2104.07636) §2 and unCLIP (2204.06125)
§2.1 for showing a picture beside x_t. Read next: sketched.py, the decoder that is shown it.
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


# mini: the paper has no sketch. Presets with `decoder.sketch` train one before the decoder.
class Sketch(nn.Module):
    """Whitened z_img, some linear layers, a picture."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.whitening = Whitening(cfg.clip_dim)
        layers = []
        width = cfg.clip_dim
        for _ in range(cfg.layers):
            layers += [nn.Linear(width, cfg.width), nn.SiLU()]
            width = cfg.width
        self.layers = nn.Sequential(*layers, nn.Linear(width, 3 * cfg.image_size ** 2))

    def measure(self, z_img):
        """Fit the whitening to the training embeddings z_img (N, D).

        Without it, the same training time teaches about a tenth as much.
        """
        self.whitening.fit(z_img)

    def forward(self, z_img):
        """z_img (B, D) as CLIP gives it -> pictures (B, 3, S, S), about in [-1, 1]."""
        S = self.cfg.image_size
        pixels = self.layers(self.whitening(z_img))                        # (B, 3 S²)
        return pixels.unflatten(-1, (3, S, S))                             # (B, 3, S, S)

    def loss(self, images, z_img):
        """Return the mean squared error, a scalar.

        images (B, 3, S, S) in [-1, 1], z_img (B, D) their embeddings.
        """
        return F.mse_loss(self(z_img).float(), images)
