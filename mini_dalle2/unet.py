"""The ADM U-Net: the network that looks at a noisy image and says what the noise is.

    h = GN(h)·(1 + scale) + shift,   (scale, shift) = Linear(SiLU(emb))             AdaGN (ADM §3, Eq. "AdaGN(h, y) = y_s GN(h) + y_b")
    attention over [context, image] keys in ONE softmax                             GLIDE §4.1

It goes down in resolution (average-pooling inside a residual block), through the middle, and up again (nearest-neighbour inside a
residual block), each block on the way up also reading the block at its own height on the way down. Conditioning arrives in two
forms: one vector `emb`, added to the timestep embedding, scales and shifts every residual block; a sequence `context` is attended to.

Shapes: B batch, C channels (of the level), H × W pixels of the level, L context tokens, E width of emb (4 · model_channels in ADM).
References: ADM (2105.05233) §3 and its public code; GLIDE (2112.10741) §4.1. Read next: decoder.py, upsampler.py.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .runtime.checks import check_positive, check_range
from .transformer import (
    attention, is_short_on_cpu, merge_heads, run_block, split_heads, timestep_embedding)


@dataclass(frozen=True)
class UNetConfig:
    """Sizes. Widths are model_channels · channel_mult, one per level; attention sits at the levels whose side is in attn_resolutions."""

    image_size: int
    in_channels: int = 3
    out_channels: int = 3
    model_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (8,)
    head_dim: int = 64
    context_dim: int | None = None      # width of the context tokens; None: no context
    dropout: float = 0.0
    norm_groups: int = 32
    use_adagn: bool = True              # False: emb is only added (Karlo's upsamplers)
    middle_attention: bool = True
    patch_size: int = 1                 # mini: see UNet
    position_embedding: bool = False    # mini: see UNet
    emb_channels: int | None = None     # width E of the conditioning vector; None: 4 · model_channels, as in ADM

    def __post_init__(self):
        check_positive(self, "image_size", "model_channels", "channel_mult", "num_res_blocks", "head_dim", "norm_groups", "patch_size",
                       "emb_channels")
        check_range(self, 0, 1, "dropout")
        if not self.channel_mult:
            raise ValueError("channel_mult is empty: it has one number per level")
        if self.model_channels % 2:
            raise ValueError(f"model_channels {self.model_channels} is odd: half of the timestep's embedding are cosines, half sines")
        if any(width % self.norm_groups for width in self.widths):
            raise ValueError(f"{self.widths} channels at the levels: they are not divisible by norm_groups {self.norm_groups}")
        if self.image_size % self.stride:
            raise ValueError(f"pictures of {self.image_size} pixels: patch_size · 2^(levels − 1) = {self.stride} must divide them")
        if not set(self.attn_resolutions) <= set(self.sides):
            raise ValueError(f"attn_resolutions {self.attn_resolutions}: this U-Net's levels have the sides {self.sides}")
        attended = [width for width, side in zip(self.widths, self.sides) if side in self.attn_resolutions]
        for width in attended + self.widths[-1:] * self.middle_attention:
            if width % self.head_dim:
                raise ValueError(f"attention at {width} channels: they are not divisible by head_dim {self.head_dim}")

    @property
    def emb_dim(self):
        """E."""
        return self.emb_channels or 4 * self.model_channels

    @property
    def widths(self):
        """C of each level."""
        return [self.model_channels * m for m in self.channel_mult]

    @property
    def sides(self):
        """H = W of each level, for pictures of image_size."""
        return [self.image_size // self.patch_size // 2 ** level for level in range(len(self.channel_mult))]

    @property
    def stride(self):
        """The sides of pictures must be multiples of this, so that they can be halved as often as there are levels."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)


class GroupNorm(nn.GroupNorm):
    """torch's, but numbers of 16 bits on a CPU are normalised in float32 and rounded back: its own kernel takes two to three times as long."""

    def forward(self, x):
        if is_short_on_cpu(x):
            return F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)
        return super().forward(x)


def norm(channels, groups):
    """GroupNorm, by its own affine."""
    return GroupNorm(groups, channels)


def zero(module):
    """The module with its parameters at zero: a residual branch that starts as the identity (ADM)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def downsample(x):
    """Average pooling by 2."""
    return F.avg_pool2d(x, 2)


def upsample(x):
    """Nearest neighbour by 2."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def waves(channels, side):
    """Position embedding to start from, (1, C, side, side): products of cosines over the square, from slow to fast (the DCT's basis)."""
    n = math.isqrt(channels - 1) + 1                                       # n² waves are enough for C channels
    place = (torch.arange(side) + 0.5) / side
    line = torch.cos(math.pi * torch.arange(n)[:, None] * place)           # (n, side): half waves
    plane = torch.einsum("iy,jx->ijyx", line, line).flatten(0, 1)          # (n², side, side)
    slow_first = torch.tensor([i + j for i in range(n) for j in range(n)]).argsort(stable=True)
    return plane[slow_first[:channels]][None].contiguous()


class ResBlock(nn.Module):
    """GN, SiLU, conv, AdaGN, SiLU, dropout, zero conv, plus the skip; `resample` acts on both paths (BigGAN's up/down block)."""

    def __init__(self, cfg, c_in, c_out, resample=None):
        super().__init__()
        self.use_adagn, self.resample = cfg.use_adagn, resample
        self.in_norm = norm(c_in, cfg.norm_groups)
        self.in_conv = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb_proj = nn.Linear(cfg.emb_dim, 2 * c_out if cfg.use_adagn else c_out)
        self.out_norm = norm(c_out, cfg.norm_groups)
        self.dropout = nn.Dropout(cfg.dropout)
        self.out_conv = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = F.silu(self.in_norm(x))                                        # (B, C_in, H, W)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.in_conv(h)                                                # (B, C, H', W')
        emb = self.emb_proj(F.silu(emb))[..., None, None]                  # (B, 2C, 1, 1)
        if self.use_adagn:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_norm(h) * (1 + scale) + shift
        else:
            h = self.out_norm(h + emb)
        return self.skip(x) + self.out_conv(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Every pixel looks at every pixel and at every context token: keys and values of the context stand before the image's own."""

    def __init__(self, cfg, channels):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.norm = norm(channels, cfg.norm_groups)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.encoder_kv = nn.Linear(cfg.context_dim, 2 * channels) if cfg.context_dim else None
        self.proj = zero(nn.Linear(channels, channels))

    def forward(self, x, context=None, mask=None):
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)                   # (B, HW, C)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        if self.encoder_kv is not None:
            k_context, v_context = self.encoder_kv(context).chunk(2, dim=-1)
            k, v = torch.cat([k_context, k], dim=1), torch.cat([v_context, v], dim=1)   # (B, L + HW, C)
        if mask is not None:
            mask = F.pad(mask, (0, H * W), value=True)                     # (B, L + HW)
        q, k, v = (split_heads(part, self.head_dim) for part in (q, k, v)) # (B, heads, ., head_dim)
        h = self.proj(merge_heads(attention(q, k, v, mask=mask)))          # (B, HW, C)
        return x + h.transpose(1, 2).reshape(B, C, H, W)


class UNetBlock(nn.Module):
    """A residual block, with attention behind it where the level has it."""

    def __init__(self, res, attn=None):
        super().__init__()
        self.res, self.attn = res, attn

    def forward(self, x, emb, context=None, mask=None):
        x = self.res(x, emb)
        return x if self.attn is None else self.attn(x, context, mask)


class UNet(nn.Module):
    """forward(x (B, in, H, W), t (B,), emb (B, E) or None, context (B, L, context_dim) or None, mask or None) -> (B, out, H, W).

    mask (B, L) bool: False hides a token of the context (GLIDE, and all presets but `karlo`, have none: padding is learned instead).
    Without attention and position embedding it is fully convolutional: any H, W divisible by patch_size · 2^(levels − 1) will do.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.recompute = False                                             # see run_block; set for training
        # mini: patch_size p folds each p × p square of pixels into channels before the first convolution and unfolds
        # after the last. The paper's networks see single pixels (1); a CPU has better uses for its time.
        p, widths, side = cfg.patch_size, cfg.widths, cfg.sides[0]
        self.time_embed = nn.Sequential(
            nn.Linear(cfg.model_channels, cfg.emb_dim), nn.SiLU(), nn.Linear(cfg.emb_dim, cfg.emb_dim))
        self.in_conv = nn.Conv2d(cfg.in_channels * p * p, widths[0], 3, padding=1)
        # mini: convolutions learn only slowly, from the zeros beyond the border, where "above" is. A learned vector per
        # position, which starts as waves, tells them; ADM has none.
        self.position = nn.Parameter(waves(widths[0], side)) if cfg.position_embedding else None

        def block(c_in, c_out, side):
            attn = AttentionBlock(cfg, c_out) if side in cfg.attn_resolutions else None
            return UNetBlock(ResBlock(cfg, c_in, c_out), attn)

        channels, skips = widths[0], [widths[0]]
        self.down = nn.ModuleList()
        for level, width in enumerate(widths):
            for _ in range(cfg.num_res_blocks):
                self.down.append(block(channels, width, side))
                channels = width
                skips.append(channels)
            if level < len(widths) - 1:
                self.down.append(UNetBlock(ResBlock(cfg, channels, channels, downsample)))
                skips.append(channels)
                side //= 2

        self.middle = nn.ModuleList([
            UNetBlock(ResBlock(cfg, channels, channels), AttentionBlock(cfg, channels) if cfg.middle_attention else None),
            UNetBlock(ResBlock(cfg, channels, channels)),
        ])

        self.up = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            for i in range(cfg.num_res_blocks + 1):
                self.up.append(block(channels + skips.pop(), width, side))
                channels = width
            if level > 0:
                self.up.append(UNetBlock(ResBlock(cfg, channels, channels, upsample)))
                side *= 2

        self.out_norm = norm(channels, cfg.norm_groups)
        self.out_conv = zero(nn.Conv2d(channels, cfg.out_channels * p * p, 3, padding=1))

    def forward(self, x, t, emb=None, context=None, mask=None):
        time = self.time_embed(timestep_embedding(t, self.cfg.model_channels))   # (B, E)
        emb = time if emb is None else time + emb
        h = self.in_conv(F.pixel_unshuffle(x, self.cfg.patch_size))
        if self.position is not None:
            h = h + self.position
        skips = [h]
        for block in self.down:
            h = run_block(block, self.recompute, h, emb, context, mask)
            skips.append(h)
        for block in self.middle:
            h = run_block(block, self.recompute, h, emb, context, mask)
        for block in self.up:
            if block.res.resample is None:
                h = torch.cat([h, skips.pop()], dim=1)
            h = run_block(block, self.recompute, h, emb, context, mask)
        h = self.out_conv(F.silu(self.out_norm(h)))
        return F.pixel_shuffle(h, self.cfg.patch_size)
