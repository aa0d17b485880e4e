"""The ADM U-Net: the network that looks at a noisy image and says what the noise is.

    h = GN(h)·(1 + scale) + shift,   (scale, shift) = Linear(SiLU(emb))       AdaGN (ADM §3)
    attention over [context, image] keys in one softmax                       GLIDE §4.1

It goes down in resolution by average-pooling inside a residual block, through the middle, and up
again by nearest-neighbour inside a residual block. Each block on the way up also reads the block at
the same height on the way down. Conditioning has two forms. One vector `emb`, added to the timestep
embedding, scales and shifts every residual block. A sequence `context` is attended to.

Shapes: B batch, C channels (of the level), H × W pixels of the level, L context tokens, E width of
emb (4 · model_channels in ADM).
References: ADM (2105.05233) §3 and its public code; GLIDE (2112.10741) §4.1.
Read next: decoder.py, upsampler.py.
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
    """Sizes.

    Widths are model_channels · channel_mult, one per level. Attention sits at the levels whose side
    is in attn_resolutions. context_dim is the width of the context tokens; None: no context.
    """

    image_size: int
    in_channels: int = 3
    out_channels: int = 3
    model_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (8,)
    head_dim: int = 64
    context_dim: int | None = None
    dropout: float = 0.0
    norm_groups: int = 32
    middle_attention: bool = True
    # False: emb is only added, as in Karlo's upsamplers.
    use_adagn: bool = True
    # mini: ADM sees single pixels and has no position embedding. UNet explains both settings.
    patch_size: int = 1
    position_embedding: bool = False
    # Width E of the conditioning vector; None: 4 · model_channels, as in ADM.
    emb_channels: int | None = None

    def __post_init__(self):
        check_positive(self, "image_size", "model_channels", "channel_mult", "num_res_blocks",
                       "head_dim", "norm_groups", "patch_size", "emb_channels")
        check_range(self, 0, 1, "dropout")
        if not self.channel_mult:
            raise ValueError("channel_mult is empty: it has one number per level")
        if self.model_channels % 2:
            raise ValueError(f"model_channels {self.model_channels} is odd: the timestep's "
                             f"embedding is half cosines and half sines, so choose an even number")
        if any(width % self.norm_groups for width in self.widths):
            raise ValueError(f"{self.widths} channels at the levels: they are not divisible by "
                             f"norm_groups {self.norm_groups}")
        if self.image_size % self.stride:
            raise ValueError(f"pictures of {self.image_size} pixels: patch_size · 2^(levels − 1) = "
                             f"{self.stride} must divide them")
        if not set(self.attn_resolutions) <= set(self.sides):
            raise ValueError(f"attn_resolutions {self.attn_resolutions}: this U-Net's levels have "
                             f"the sides {self.sides}")
        attended = [width for width, side in zip(self.widths, self.sides)
                    if side in self.attn_resolutions]
        if self.middle_attention:
            attended.append(self.widths[-1])
        for width in attended:
            if width % self.head_dim:
                raise ValueError(f"attention at {width} channels: they are not divisible by "
                                 f"head_dim {self.head_dim}")

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
        largest = self.image_size // self.patch_size
        return [largest // 2 ** level for level in range(len(self.channel_mult))]

    @property
    def stride(self):
        """The sides of pictures must be multiples of this, to be halved once between levels."""
        return self.patch_size * 2 ** (len(self.channel_mult) - 1)


class GroupNorm(nn.GroupNorm):
    """torch's GroupNorm, but 16-bit floats on a CPU are normalised in float32 and rounded back.

    torch's own 16-bit kernel is slower there.
    """

    def forward(self, x):
        if is_short_on_cpu(x):
            weight = self.weight.float()
            bias = self.bias.float()
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        return super().forward(x)


def zero(module):
    """Set a module's parameters to zero, so that its residual branch starts as nothing (ADM)."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


def downsample(x):
    """Halve the sides by average pooling."""
    return F.avg_pool2d(x, 2)


def upsample(x):
    """Double the sides by repeating the nearest neighbour."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def waves(channels, side):
    """Return a position embedding to start from, (1, C, side, side).

    It holds products of cosines over the square, from slow to fast (the basis of the DCT).
    """
    # n² waves are enough for C channels.
    n = math.isqrt(channels - 1) + 1
    place = (torch.arange(side) + 0.5) / side
    line = torch.cos(math.pi * torch.arange(n)[:, None] * place)           # (n, side)
    plane = torch.einsum("iy,jx->ijyx", line, line).flatten(0, 1)          # (n², side, side)
    speed = torch.tensor([i + j for i in range(n) for j in range(n)])      # (n²,)
    slow_first = speed.argsort(stable=True)
    return plane[slow_first[:channels]][None].contiguous()


class ResBlock(nn.Module):
    """GN, SiLU, conv, AdaGN, SiLU, dropout, zero conv, plus the skip.

    `resample` acts on both paths (BigGAN's up and down block).
    """

    def __init__(self, cfg, c_in, c_out, resample=None):
        super().__init__()
        self.use_adagn = cfg.use_adagn
        self.resample = resample
        self.in_norm = GroupNorm(cfg.norm_groups, c_in)
        self.in_conv = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.emb_proj = nn.Linear(cfg.emb_dim, 2 * c_out if cfg.use_adagn else c_out)
        self.out_norm = GroupNorm(cfg.norm_groups, c_out)
        self.dropout = nn.Dropout(cfg.dropout)
        self.out_conv = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x, emb):
        h = F.silu(self.in_norm(x))                                        # (B, C_in, H, W)
        if self.resample is not None:
            h = self.resample(h)
            x = self.resample(x)
        h = self.in_conv(h)                                                # (B, C, H', W')
        emb = self.emb_proj(F.silu(emb))[..., None, None]                  # (B, 2C, 1, 1)
        if self.use_adagn:
            scale, shift = emb.chunk(2, dim=1)
            h = self.out_norm(h) * (1 + scale) + shift
        else:
            h = self.out_norm(h + emb)
        return self.skip(x) + self.out_conv(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Every pixel attends to every context token and every pixel, in one softmax."""

    def __init__(self, cfg, channels):
        super().__init__()
        self.head_dim = cfg.head_dim
        self.norm = GroupNorm(cfg.norm_groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.encoder_kv = None
        if cfg.context_dim:
            self.encoder_kv = nn.Linear(cfg.context_dim, 2 * channels)
        self.proj = zero(nn.Linear(channels, channels))

    def forward(self, x, context=None, mask=None):
        B, C, H, W = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)                   # (B, HW, C)
        q, k, v = self.qkv(tokens).chunk(3, dim=-1)
        if self.encoder_kv is not None:
            k_context, v_context = self.encoder_kv(context).chunk(2, dim=-1)     # (B, L, C)
            k = torch.cat([k_context, k], dim=1)                           # (B, L + HW, C)
            v = torch.cat([v_context, v], dim=1)                           # (B, L + HW, C)
        if mask is not None:
            mask = F.pad(mask, (0, H * W), value=True)                     # (B, L + HW)
        q, k, v = (split_heads(part, self.head_dim) for part in (q, k, v))
        h = self.proj(merge_heads(attention(q, k, v, mask=mask)))          # (B, HW, C)
        return x + h.transpose(1, 2).reshape(B, C, H, W)


class UNetBlock(nn.Module):
    """A residual block, with attention behind it where the level has it."""

    def __init__(self, res, attn=None):
        super().__init__()
        self.res = res
        self.attn = attn

    def forward(self, x, emb, context=None, mask=None):
        x = self.res(x, emb)
        if self.attn is None:
            return x
        return self.attn(x, context, mask)


class UNet(nn.Module):
    """(x (B, in, H, W), t (B,), emb (B, E), context (B, L, context_dim)) -> (B, out, H, W).

    emb and context may be None. mask (B, L) bool: False hides a token of the context. Without
    attention and position embedding the network is fully convolutional, and takes any H, W that
    patch_size · 2^(levels − 1) divides.
    """

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        # Training may set this; see `run_block`.
        self.recompute = False
        # mini: ADM sees single pixels. patch_size p folds each p × p square of pixels into channels
        # before the first convolution and unfolds after the last, which a CPU computes faster.
        p = cfg.patch_size
        self.time_embed = nn.Sequential(
            nn.Linear(cfg.model_channels, cfg.emb_dim), nn.SiLU(),
            nn.Linear(cfg.emb_dim, cfg.emb_dim))
        self.in_conv = nn.Conv2d(cfg.in_channels * p * p, cfg.widths[0], 3, padding=1)
        # mini: ADM has no position embedding. Convolutions learn only slowly, from the zeros beyond
        # the border, where "above" is; a learned vector per position tells them.
        self.position = None
        if cfg.position_embedding:
            self.position = nn.Parameter(waves(cfg.widths[0], cfg.sides[0]))
        skips = self.add_down()
        channels = self.add_middle()
        self.add_up(channels, skips)
        self.out_norm = GroupNorm(cfg.norm_groups, cfg.widths[0])
        self.out_conv = zero(nn.Conv2d(cfg.widths[0], cfg.out_channels * p * p, 3, padding=1))

    def block(self, c_in, c_out, side):
        """Make a residual block, with attention where the level's side asks for it."""
        cfg = self.cfg
        attn = AttentionBlock(cfg, c_out) if side in cfg.attn_resolutions else None
        return UNetBlock(ResBlock(cfg, c_in, c_out), attn)

    def add_down(self):
        """Add the blocks on the way down. Returns the widths of all skips, the first one first."""
        cfg = self.cfg
        channels = cfg.widths[0]
        skips = [channels]
        self.down = nn.ModuleList()
        for level, (width, side) in enumerate(zip(cfg.widths, cfg.sides)):
            for _ in range(cfg.num_res_blocks):
                self.down.append(self.block(channels, width, side))
                channels = width
                skips.append(channels)
            if level < len(cfg.widths) - 1:
                self.down.append(UNetBlock(ResBlock(cfg, channels, channels, downsample)))
                skips.append(channels)
        return skips

    def add_middle(self):
        """Add the two blocks in the middle. Returns their width."""
        cfg = self.cfg
        channels = cfg.widths[-1]
        first = ResBlock(cfg, channels, channels)
        attn = AttentionBlock(cfg, channels) if cfg.middle_attention else None
        second = ResBlock(cfg, channels, channels)
        self.middle = nn.ModuleList([UNetBlock(first, attn), UNetBlock(second)])
        return channels

    def add_up(self, channels, skips):
        """Add the blocks on the way up. Each reads the skip at its own height."""
        cfg = self.cfg
        self.up = nn.ModuleList()
        for level in reversed(range(len(cfg.widths))):
            width = cfg.widths[level]
            side = cfg.sides[level]
            for _ in range(cfg.num_res_blocks + 1):
                self.up.append(self.block(channels + skips.pop(), width, side))
                channels = width
            if level > 0:
                self.up.append(UNetBlock(ResBlock(cfg, channels, channels, upsample)))

    def forward(self, x, t, emb=None, context=None, mask=None):
        time = self.time_embed(timestep_embedding(t, self.cfg.model_channels))             # (B, E)
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
