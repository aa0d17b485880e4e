"""Layers that compute at one place only: cheaper than another block of the transformer.

    head:            h ← h + W_2 SiLU(W_1 LN(h) + W_3 time)              a few times
    place networks:  item_k ← item_k + W_k SiLU(U_k values_<k + V_k text + b_k)

A block of a transformer is computed at every place of the sequence. The diffusion prior reads only
one of its places, so its last layers may as well be computed there alone: that is the head. The
autoregressive prior needs every place; there each place gets a small network of its own.

Shapes: B batch, W width of the transformer. Read next: small_priors.py, which uses both.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class HeadBlock(nn.Module):
    """A residual block for single vectors: h + W_2 SiLU(W_1 LN(h) + W_3 time). W_2 starts at 0."""

    def __init__(self, width, time_width):
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.c_fc = nn.Linear(width, width)
        self.time_proj = nn.Linear(time_width, width)
        self.c_proj = nn.Linear(width, width)
        nn.init.zeros_(self.c_proj.weight)
        nn.init.zeros_(self.c_proj.bias)

    def forward(self, h, time):
        hidden = self.c_fc(self.ln(h)) + self.time_proj(time)
        return h + self.c_proj(F.silu(hidden))


# mini: the paper has no such head. In equal time, one transformer block and a head of four layers
# predict better than four transformer blocks.
class Head(nn.Module):
    """Layers behind the prior's final query: (B, W) and time (B, W) -> (B, head_width)."""

    def __init__(self, width, head_width, head_layers):
        super().__init__()
        self.enter = nn.Linear(width, head_width)
        self.blocks = nn.ModuleList(HeadBlock(head_width, width) for _ in range(head_layers))
        self.ln_final = nn.LayerNorm(head_width)

    def forward(self, query, time):
        h = self.enter(query)
        for block in self.blocks:
            h = block(h, time)
        return self.ln_final(h)


# mini: the paper has no such networks. A code mostly follows from the text and from the values of
# all earlier codes, in another way at each place; few training steps do not teach a transformer
# this.
class PlaceNetworks(nn.Module):
    """One network for each place k: what the text and all earlier codes say of code k.

    The output W_k SiLU(U_k values_<k + V_k text + b_k) is added to what enters the transformer at
    place k. W_k starts at 0.
    """

    def __init__(self, places, width, hidden, text_width=64):
        super().__init__()
        self.text = nn.Sequential(
            nn.Linear(width, 4 * text_width), nn.SiLU(), nn.Linear(4 * text_width, text_width))
        self.from_values = nn.Parameter(torch.randn(places, places, hidden) / math.sqrt(places))
        self.from_text = nn.Parameter(
            torch.randn(places, text_width, hidden) / math.sqrt(text_width))
        self.bias = nn.Parameter(torch.zeros(places, hidden))
        self.leave = nn.Parameter(torch.zeros(places, hidden, width))

    def forward(self, values, text, first=0):
        """Compute places `first` to k, (B, k + 1 − first, W), when k codes are known.

        values (B, k), of the known codes, about −3..3; text (B, W).
        """
        k = values.shape[1]
        places = slice(first, k + 1)
        # Place i knows the values 0..i−1.
        earlier = torch.ones(k + 1, k, device=values.device).tril(-1)[first:, :, None]
        from_values = self.from_values[places, :k] * earlier               # (places, k, hidden)
        h = torch.einsum("bj,ijh->bih", values.to(text.dtype), from_values)
        h = h + torch.einsum("bt,ith->bih", self.text(text), self.from_text[places])
        h = h + self.bias[places]
        return torch.einsum("bih,ihw->biw", F.silu(h), self.leave[places])
