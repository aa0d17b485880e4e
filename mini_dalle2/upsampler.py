"""The upsamplers: two diffusion models that each enlarge the picture, 64 → 256 → 1024 in the paper.

    ε_θ(x_t, t, low) = UNet([x_t, enlarge(low)], t)      the small picture is three more channels in

They are told nothing but the small picture: no caption and no z_img, hence no guidance. The paper
found no gain in conditioning them. Without attention they are convolutions alone, which work at any
size. So they are trained on random crops of a quarter of the target's side, and applied to the
whole picture. In training the small picture is degraded first (degradation.py), so that flaws of
the stage before do not matter.

Shapes: B batch, S × S the large picture (or crop), s × s the small one, S = factor · s, C channels.
References: unCLIP (2204.06125) §2.1, App. C, Table 3; ADM-U (2105.05233) §4; GLIDE (2112.10741)
App. B.2 for the 27 steps. Read next: pipeline.py.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .degradation import DEGRADATIONS, degrade
from .diffusion import GaussianDiffusion, check_diffusion
from .runtime.checks import check_choice, check_positive
from .runtime.device import off_mps
from .runtime.noise import randint, randn, randn_like
from .sampling import ddim_step, keep_known, sample_loop, strided_timesteps
from .unet import UNet, UNetConfig


@dataclass(frozen=True)
class UpsamplerConfig:
    """Sizes and diffusion settings of one upsampler. The U-Net's fields keep their names."""

    # Sides in pixels; high_size is a whole multiple of low_size.
    low_size: int = 32
    high_size: int = 128
    model_channels: int = 32
    channel_mult: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 1
    norm_groups: int = 8
    dropout: float = 0.0
    # Table 3: cosine for the first upsampler, linear for the second.
    schedule: str = "cosine"
    num_timesteps: int = 1000
    objective: str = "eps"
    weighting: str = "none"
    # "blur" for the first upsampler; "bsr_full" for the second, or "bsr", which is milder.
    degradation: str = "blur"
    # Table 3, of the large picture's side.
    crop_fraction: float = 0.25
    # Table 3: 27 and 15.
    sampling_steps: int = 27

    def __post_init__(self):
        check_positive(self, "low_size", "high_size")
        if self.high_size <= self.low_size or self.high_size % self.low_size:
            raise ValueError(f"high_size {self.high_size} is not a whole multiple of "
                             f"low_size {self.low_size}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be above 0 and at most 1, "
                             f"not {self.crop_fraction}")
        check_choice("degradation", self.degradation, DEGRADATIONS)
        check_diffusion(self)
        # Makes the U-Net's configuration, which checks itself.
        self.unet()
        if self.crop_size < 1 or self.crop_size % self.factor or self.crop_size % self.stride:
            raise ValueError(f"crops of {self.crop_size} pixels: the factor {self.factor} and the "
                             f"U-Net's {self.stride} must divide them")

    def unet(self):
        """Return the U-Net's configuration."""
        return UNetConfig(**self.unet_settings())

    def unet_settings(self):
        """Return the U-Net's settings as a dict. The noised and the enlarged picture go in."""
        return dict(
            image_size=self.high_size, in_channels=6, out_channels=3,
            model_channels=self.model_channels, channel_mult=self.channel_mult,
            num_res_blocks=self.num_res_blocks, attn_resolutions=(), middle_attention=False,
            dropout=self.dropout, norm_groups=self.norm_groups)

    @property
    def factor(self):
        """How many times larger the result is: 4 in the paper."""
        return self.high_size // self.low_size

    @property
    def crop_size(self):
        """Side of a training crop, in pixels of the large picture."""
        return int(self.high_size * self.crop_fraction)

    @property
    def stride(self):
        """The U-Net takes sides that are multiples of this."""
        return self.unet().stride


def random_crop(images, crop, generator=None):
    """Cut one random square of side `crop` from each of images (B, C, H, W), any dtype.

    Returns (B, C, crop, crop). Raises ValueError if the images are smaller than the crop.
    """
    B, _, H, W = images.shape
    if crop > min(H, W):
        raise ValueError(f"a crop of {crop} pixels does not fit into pictures of {H} × {W}")
    # mini: the paper does not say where the crops lie. Here every place is equally likely.
    top = randint(H - crop + 1, (B, 1), generator, images.device)
    left = randint(W - crop + 1, (B, 1), generator, images.device)
    window = torch.arange(crop, device=images.device)
    rows = top + window                                                    # (B, crop)
    columns = left + window                                                # (B, crop)
    example = torch.arange(B, device=images.device)[:, None, None]
    pixels = images.permute(0, 2, 3, 1)                                    # (B, H, W, C)
    squares = pixels[example, rows[:, :, None], columns[:, None, :]]       # (B, crop, crop, C)
    return squares.permute(0, 3, 1, 2)


def sampling_timesteps(steps, num_timesteps=1000):
    """Return the original steps to sample over, an ascending list of int.

    27 steps are GLIDE's hand-tuned ones: T is cut into fifths, which get 10, 10, 3, 2 and 2 steps,
    so that most of them refine detail at low noise (GLIDE App. B.2). The last step, at pure noise,
    is moved two steps earlier (GLIDE's code), where x̂_0 is not yet a division by nearly 0. Other
    numbers of steps are evenly spaced.
    """
    # mini: the paper calls its 27 and 15 steps hand-tuned and does not list them. The 27 here are
    # GLIDE's, the 15 are even.
    if steps != 27 or num_timesteps < 50:
        return strided_timesteps(num_timesteps, steps)
    fifth, rest = divmod(num_timesteps, 5)
    timesteps = []
    start = 0
    for i, count in enumerate((10, 10, 3, 2, 2)):
        size = fifth + (i < rest)
        timesteps += [start + offset for offset in strided_timesteps(size, count)]
        start += size
    return timesteps[:-1] + [num_timesteps - 3]


class Upsampler(nn.Module):
    """An unconditional ADM U-Net on [x_t, enlarged small picture], without attention."""

    # Pixels sampled at once: a whole batch of large pictures would need too much memory.
    CHUNK_PIXELS = 512 * 512

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.diffusion = GaussianDiffusion(cfg.schedule, cfg.num_timesteps)
        # mini: the paper does not say whether the variance is learned. Here it is not, because DDIM
        # would not use it.
        self.unet = UNet(cfg.unet())

    def enlarge(self, low):
        """Enlarge small pictures by bicubic interpolation: (B, 3, s, s) -> (B, 3, S, S)."""
        # mini: the paper does not say how the small picture is enlarged. Here it is bicubic with
        # antialiasing, as in Karlo.
        enlarged = F.interpolate(off_mps(low), scale_factor=self.cfg.factor, mode="bicubic",
                                 align_corners=False, antialias=True)
        return enlarged.to(low.device)

    def forward(self, x_t, t, enlarged):
        """Return the raw output (B, 3, S, S).

        x_t (B, 3, S, S), t (B,), enlarged (B, 3, S, S).
        """
        raw = self.unet(torch.cat([x_t, enlarged], dim=1), t).float()
        # mini: the paper's networks predict ε. A network that predicts x_0 predicts what is missing
        # from the enlarged picture, so that it starts as plain interpolation.
        return raw + enlarged if self.cfg.objective == "x_start" else raw

    def loss(self, high, generator=None):
        """Return L_simple, a scalar, for sharp crops `high` (B, 3, S, S) in [-1, 1].

        Their small pictures are made and degraded here.
        """
        cfg = self.cfg
        low = degrade(high, cfg.degradation, cfg.factor, generator)        # (B, 3, s, s)
        t = randint(cfg.num_timesteps, (len(high),), generator, high.device)
        noise = randn_like(high, generator)
        x_t = self.diffusion.q_sample(high, t, noise)
        raw = self(x_t, t, self.enlarge(low))
        losses = self.diffusion.loss(raw, high, x_t, t, noise, cfg.objective, cfg.weighting)
        return losses.mean()

    def denoiser(self, low):
        """Return denoise(x, t) -> ModelOutput for these small pictures, enlarged only once."""
        enlarged = self.enlarge(low)

        def denoise(x, t):
            raw = self(x, t, enlarged)
            return self.diffusion.interpret(raw, x, t, self.cfg.objective, clip=1.0)

        return denoise

    def step_rule(self):
        """Return the rule of a sampling step: DDIM (Table 3)."""
        # mini: the paper gives no η. Here it is 0, so that x_T is the only random input.
        return ddim_step(eta=0.0)

    @torch.no_grad()
    def sample(self, low, steps=None, generator=None, progress=False, known=None):
        """Sample large pictures (B, 3, S, S) in [-1, 1] for small ones (B, 3, s, s) in [-1, 1].

        s may be any size whose S is a multiple of the U-Net's stride. Large batches are sampled in
        chunks. generator: one, or a list with one per picture (see runtime/noise.py).
        known: (picture (1, 3, S, S), mask (1, 1, S, S)): what the large pictures show where the
        mask is 0. Raises ValueError for a size that cannot be.
        """
        cfg = self.cfg
        B, _, h, w = low.shape
        H = h * cfg.factor
        W = w * cfg.factor
        if H % cfg.stride or W % cfg.stride:
            raise ValueError(f"pictures of {H} × {W} pixels: the upsampler's U-Net needs "
                             f"multiples of {cfg.stride}")
        steps = cfg.sampling_steps if steps is None else steps
        timesteps = sampling_timesteps(steps, cfg.num_timesteps)
        # All at once, so that the size of a chunk does not change the result.
        x_T = randn((B, 3, H, W), generator, low.device, low.dtype)
        x_T = x_T.contiguous(memory_format=torch.channels_last)
        chunk = max(1, self.CHUNK_PIXELS // (H * W))
        generators = itertools.repeat(generator)
        if isinstance(generator, (list, tuple)):
            generators = [generator[i:i + chunk] for i in range(0, B, chunk)]
        step = self.step_rule()
        high = []
        for low_part, x_part, noise in zip(low.split(chunk), x_T.split(chunk), generators):
            denoise = self.denoiser(low_part)
            if known is not None:
                denoise = keep_known(denoise, self.diffusion, *known)
            high.append(sample_loop(
                self.diffusion, denoise, x_part, step, timesteps, noise, progress))
        return torch.cat(high).clamp(-1, 1).contiguous()
