"""Both priors with what a small budget needs: whitened embeddings, and cheap layers.

    diffusion prior:        whitening of z_img and z_txt, a head behind the final query
    autoregressive prior:   whitening of z_txt, a network for each place

A setting of False or 0 gives the paper's own. Whitening is explained in whitening.py, head and
place networks in heads.py. Read next: sketched.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from ..ar_prior import ARPrior, ARPriorConfig, Codes
from ..prior import DiffusionPrior, PriorConfig
from ..runtime.checks import check_positive, check_range
from .heads import Head, PlaceNetworks
from .whitening import Whitening


@dataclass(frozen=True)
class SmallPriorConfig(PriorConfig):
    """The diffusion prior's settings; whiten_z, and the head's layers and width."""

    whiten_z: bool = False
    head_layers: int = 0
    head_width: int = 512

    def __post_init__(self):
        super().__post_init__()
        check_range(self, 0, math.inf, "head_layers")
        check_positive(self, "head_width")


class SmallPrior(DiffusionPrior):
    """The diffusion prior on whitened embeddings, with a head."""

    def __init__(self, cfg):
        super().__init__(cfg)
        # Until they are fitted: times √D, as in the paper.
        self.whitening = Whitening(cfg.clip_dim)
        self.whitening_txt = Whitening(cfg.clip_dim)

    def add_output(self):
        """Add the head and the output layer behind it."""
        cfg = self.cfg
        self.head = None
        if not cfg.head_layers:
            super().add_output()
            return
        self.head = Head(cfg.width, cfg.head_width, cfg.head_layers)
        self.out_proj = nn.Linear(cfg.head_width, cfg.clip_dim)

    def predict(self, query, time):
        """Turn the final query's state (B, W) and time (B, W) into the scaled z_img (B, D)."""
        if self.head is not None:
            query = self.head(query, time)                                 # (B, head_width)
        return self.out_proj(query)

    def measure(self, z_img, z_txt):
        """Fit both whitenings to the training embeddings (N, D), if `whiten_z`."""
        if self.cfg.whiten_z:
            self.whitening.fit(z_img)
            self.whitening_txt.fit(z_txt)

    def scale(self, z_img):
        """Whiten z_img (B, D), then give each coordinate the std std_per_dim."""
        return self.whitening(z_img) * self.cfg.std_per_dim

    def unscale(self, x_start):
        """Invert `scale`, (B, D) -> (B, D), back onto CLIP's unit sphere."""
        return F.normalize(self.whitening.inverse(x_start / self.cfg.std_per_dim), dim=-1)

    def scale_text(self, z_txt):
        """Whiten z_txt (B, D)."""
        return self.whitening_txt(z_txt)


@dataclass(frozen=True)
class SmallARPriorConfig(ARPriorConfig):
    """The autoregressive prior's settings, and those of its tricks.

    place_width is the hidden width of the place networks. `places` is the most codes there is room
    for, whatever pca_error asks; 0: as many as clip_dim.
    """

    whiten_z: bool = False
    place_width: int = 0
    places: int = 0

    def __post_init__(self):
        super().__post_init__()
        check_range(self, 0, math.inf, "place_width")
        check_range(self, 0, self.clip_dim, "places")


class SmallARPrior(ARPrior):
    """The autoregressive prior on a whitened z_txt, with place networks."""

    def __init__(self, cfg):
        super().__init__(cfg)
        # Until it is fitted: times √D, as in the paper.
        self.whitening_txt = Whitening(cfg.clip_dim)

    def new_codes(self):
        """Make the codes, at most `places` of them."""
        # mini: the paper keeps as many codes as its limit on the lost variance asks for. `places`
        # bounds their number, because each place needs a network of its own.
        return Codes(self.cfg.clip_dim, self.cfg.buckets, self.cfg.places)

    def add_transformer(self):
        """Add the place networks before the transformer."""
        cfg = self.cfg
        self.places = None
        if cfg.place_width:
            self.places = PlaceNetworks(self.codes.most, cfg.width, cfg.place_width)
        super().add_transformer()

    @torch.no_grad()
    def measure(self, z_img, z_txt):
        """Fit codes, quantiles and, if `whiten_z`, the whitening to the embeddings (N, D)."""
        lost = super().measure(z_img, z_txt)
        if self.codes.count == self.cfg.places and lost > self.cfg.pca_error:
            print(f"ar_prior: --ar_prior.places={self.cfg.places} is too small to leave out only "
                  f"{self.cfg.pca_error:.2%}")
        if self.cfg.whiten_z:
            self.whitening_txt.fit(z_txt)
        return lost

    def scale_text(self, z_txt):
        """Whiten z_txt (B, D)."""
        return self.whitening_txt(z_txt)

    def items(self, codes, dot, text, first=0):
        """Return the items from `first` on, with what the place networks add to them."""
        items = super().items(codes, dot, text, first)
        if self.places is None:
            return items
        # The ends of an interval are about three standard deviations from the mean.
        values = self.codes.middle(codes) * 6 - 3                          # (B, k)
        return items + self.places(values, text, first)
