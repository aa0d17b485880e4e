"""The decoder for a small budget: a sketch beside x_t, noised z_img, whitening, patches.

    ε_θ([x_t, sketch(z_img)], t, z_img + noise, y)

Each setting at its default of False, 0, 1 or None gives the paper's own. The U-Net's patches and
position embedding are explained in unet.py. Read next: ../configs.py, whose presets choose it.

Shapes: B batch, S image side, D = clip_dim, as in decoder.py.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..decoder import Decoder, DecoderConfig
from ..runtime.checks import check_positive, check_range
from ..runtime.noise import rand, randint, randn_like
from .sketch import Sketch, SketchConfig
from .whitening import Whitening


@dataclass(frozen=True)
class SketchedDecoderConfig(DecoderConfig):
    """The decoder's settings and those of its tricks.

    z_noise is the largest noise on z_img in training, from the share z_noise_from of the steps on.
    """

    whiten_z: bool = False
    sketch: bool = False
    sketch_width: int = SketchConfig.width
    sketch_layers: int = SketchConfig.layers
    z_noise: float = 0.0
    z_noise_from: float = 0.75
    patch_size: int = 1
    position_embedding: bool = False
    emb_channels: int | None = None

    def __post_init__(self):
        super().__post_init__()
        check_positive(self, "sketch_width", "sketch_layers")
        check_range(self, 0, 1, "z_noise_from")
        check_range(self, 0, math.inf, "z_noise")

    def unet_settings(self):
        """Return the U-Net's settings as a dict. The sketch is three more channels in."""
        return super().unet_settings() | dict(
            in_channels=6 if self.sketch else 3, patch_size=self.patch_size,
            position_embedding=self.position_embedding, emb_channels=self.emb_channels)


class SketchedCondition(NamedTuple):
    """A Condition, and the sketch beside x_t."""

    emb: torch.Tensor                                                      # (B, E)
    context: torch.Tensor                                                  # (B, 4 + L, W)
    sketch: torch.Tensor                                                   # (B, 3, S, S)


class SketchedDecoder(Decoder):
    """The decoder that is shown a sketch, and whose z_img is whitened and noised in training."""

    def __init__(self, cfg):
        super().__init__(cfg)
        # Until it is fitted: times √D, as in the paper. Once it is fitted, a z_img of zero is the
        # mean of all embeddings.
        self.whitening = Whitening(cfg.clip_dim)
        self.sketch = None
        if cfg.sketch:
            # A stage of its own trains it before.
            self.sketch = Sketch(SketchConfig(
                cfg.clip_dim, cfg.image_size, cfg.sketch_width, cfg.sketch_layers))
            self.sketch.requires_grad_(False)

    def measure(self, z_img, z_txt):
        """Fit the whitening to the training embeddings (N, D), if `whiten_z`."""
        if self.cfg.whiten_z:
            self.whitening.fit(z_img)

    def scale(self, z_img):
        """Whiten z_img (B, D)."""
        return self.whitening(z_img)

    def condition(self, z_img, tokens, keep_z=None, keep_text=None):
        """Compute the condition and its sketch; the arguments are those of Decoder.condition."""
        condition = super().condition(z_img, tokens, keep_z, keep_text)
        if self.sketch is None:
            return condition
        return SketchedCondition(*condition, self.shown_sketch(z_img, keep_z, condition.emb))

    def shown_sketch(self, z_img, keep_z, like):
        """Return the sketch of z_img (B, D), zeros where it is dropped: (B, 3, S, S)."""
        # mini: a dropped sketch is middle grey. No picture and no mean of pictures is, so the
        # decoder can tell.
        if z_img is None:
            S = self.cfg.image_size
            return torch.zeros(len(like), 3, S, S, device=like.device)
        sketch = self.sketch(z_img).float()
        if keep_z is None:
            return sketch
        return sketch * keep_z[:, None, None, None]

    def forward(self, x_t, t, condition):
        """Return the raw output (B, 6, S, S), as Decoder.forward does."""
        if self.sketch is not None:
            x_t = torch.cat([x_t, condition.sketch], dim=1)                # (B, 6, S, S)
        return super().forward(x_t, t, condition)

    def loss(self, images, z_img, tokens, generator=None, z_noise=0.0):
        """Return L_hybrid, a scalar, with z_img noised by at most z_noise in whitened space."""
        keep_z, keep_text = self.choose_kept(images, generator)
        t = randint(self.cfg.num_timesteps, (len(images),), generator, images.device)
        noise = randn_like(images, generator)
        # mini: the paper trains on true z_img alone. A small prior's z_img are a little off, and a
        # decoder that never saw such errors trusts them and ignores the caption.
        if z_noise:
            level = z_noise * rand((len(images), 1), generator, images.device)             # (B, 1)
            z_img = self.whitening.add_noise(z_img, randn_like(z_img, generator), level)
        condition = self.condition(z_img, tokens, keep_z, keep_text)
        return self.denoising_loss(images, t, noise, condition)
