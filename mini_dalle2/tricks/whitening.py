"""Whitening: CLIP's embeddings, stretched so that every direction is about as wide as any other.

    w = (z − mean) · U diag(1 / d)        z = mean + w · diag(d) Uᵀ        d = c · (s + f·s̄)

U are the principal directions of z, s the standard deviation along each, s̄ their mean.
f is a floor under the narrowest directions. c makes the average variance of w one.

The paper's prior and decoder take z_img as it is, times a constant. That is enough for a large
CLIP. In a small one, a dozen directions (colour, shape, how many) are ten times wider than the next
fifty. Which colour belongs to which shape lies in those fifty. A squared error hardly notices them,
and a linear layer learns them last.

Shapes: B batch, N examples, D = clip_dim. References: Kessy, Lewin and Strimmer, "Optimal whitening
and decorrelation" (1512.00809), PCA whitening. Read next: small_priors.py and sketched.py.
"""

import math

import torch
from torch import nn

from ..runtime.device import in_float32


# mini: the paper does not whiten embeddings. Presets with `whiten_z` do.
class Whitening(nn.Module):
    """z (B, D) of unit norm <-> w (B, D) of about unit variance per coordinate.

    Until it is fitted: w = scale · z; None is √D.
    """

    # f: directions far narrower than the average are mostly noise.
    FLOOR = 0.1
    # Embeddings of copies of one picture differ by less than this. Then nothing can be measured.
    ROUNDING = 1e-5

    def __init__(self, dim, scale=None):
        super().__init__()
        self.scale = math.sqrt(dim) if scale is None else scale
        self.register_buffer("mean", torch.zeros(dim))
        # U diag(1 / d).
        self.register_buffer("matrix", self.scale * torch.eye(dim))        # (D, D)
        # Standard deviation of each coordinate of w.
        self.register_buffer("spread", torch.ones(dim))                    # (D,)

    @torch.no_grad()
    def fit(self, z):
        """Measure the embeddings z (N, D). The buffers keep the result in checkpoints.

        If all z are equal, w = scale · (z − mean).
        """
        z = z.double()
        mean = z.mean(0)
        covariance = (z - mean).T @ (z - mean) / len(z)                    # (D, D)
        variance, directions = torch.linalg.eigh(covariance)               # (D,), (D, D)
        std = variance.clamp(min=0).sqrt()
        if std.norm() <= self.ROUNDING * z.norm(dim=1).max():
            self.mean.copy_(mean)
            self.matrix.copy_(self.scale * torch.eye(len(mean)))
            self.spread.zero_()
            return
        # What each direction is divided by.
        width = std + self.FLOOR * std.mean()
        # The floor makes w a little too narrow: back to unit variance.
        width = width * (std / width).square().mean().sqrt()
        self.mean.copy_(mean)
        self.matrix.copy_(directions / width)
        self.spread.copy_(std / width)

    @torch.no_grad()
    def set(self, mean, std):
        """Standardise each coordinate by itself: w = (z − mean) / std; mean, std (D,)."""
        self.mean.copy_(mean)
        self.matrix.copy_(torch.diag(1 / std))

    def forward(self, z):
        """z -> w."""
        with in_float32(z):
            return (z.float() - self.mean) @ self.matrix

    def inverse(self, w):
        """w -> z, not normalised."""
        # The columns of the matrix are at right angles, each 1 / d long.
        with in_float32(w):
            return w.float() / self.matrix.square().sum(0) @ self.matrix.T + self.mean

    def add_noise(self, z, noise, level):
        """Perturb z (B, D) the way a prior's errors do: add noise·min(level, spread) to w.

        noise (B, D) is standard normal, level (B, 1).
        """
        return self.inverse(self(z) + noise * level.minimum(self.spread))
