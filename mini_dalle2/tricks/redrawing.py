"""A CLIP whose z_img also says what its captions leave unsaid.

    loss = contrastive loss + picture_weight · ‖ redraw(z_img) − picture ‖²

The paper's captions say nearly everything of some picture or other. Ours never say where an object
is. A CLIP has no reason to keep the position, and keeps it by accident: in directions of z_img far
narrower than the others, which prior and decoder learn badly. So a small network must also be able
to redraw the picture from z_img. The network is only used in training.

Shapes: B batch, S image side, D = clip_dim. Read next: whitening.py.
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from ..clip import CLIP, CLIPConfig
from ..runtime.checks import check_range


@dataclass(frozen=True)
class RedrawingCLIPConfig(CLIPConfig):
    """CLIP's sizes and the weight of the picture's squared error. 0 is the paper's CLIP."""

    picture_weight: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        check_range(self, 0, math.inf, "picture_weight")


# mini: the paper's CLIP learns from captions alone. Ours must also be able to redraw the picture.
class RedrawingCLIP(CLIP):
    """CLIP, and a network z_img -> picture that helps to train it."""

    def add_layers(self):
        """Add the network, with hidden layers as wide as those of the image tower."""
        cfg = self.cfg
        self.redraw = None
        if cfg.picture_weight:
            hidden = 4 * cfg.vision_width
            self.redraw = nn.Sequential(
                nn.Linear(cfg.clip_dim, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(),
                nn.Linear(hidden, 3 * cfg.image_size ** 2))

    def loss(self, images, tokens, gather=None):
        """Return CLIP's loss plus `picture_loss`; the arguments are those of CLIP.loss."""
        self.bound_scale()
        z_img, z_txt = self.unit(images, tokens)
        pictures = self.picture_loss(z_img, images)
        return self.contrastive_loss(z_img, z_txt, tokens, gather) + pictures

    def picture_loss(self, z_img, images):
        """Return picture_weight times the mean squared error of the redrawn pictures, a scalar.

        z_img (B, D), images (B, 3, S, S) in [-1, 1].
        """
        if self.redraw is None:
            return 0.0
        redrawn = self.redraw(math.sqrt(self.cfg.clip_dim) * z_img).view_as(images)
        return self.cfg.picture_weight * F.mse_loss(redrawn.float(), images)
