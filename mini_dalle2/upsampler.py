"""The upsamplers: two diffusion models that enlarge the decoder's picture fourfold each, 64 → 256 → 1024 in the paper.

    ε_θ(x_t, t, low) = UNet([x_t, enlarge(low)], t)            the small picture is simply three more input channels

They are told nothing but the small picture: no caption, no z_img, hence no guidance (the paper found no gain in conditioning them). With
no attention anywhere they are convolutions alone, which do not care how large a picture is: trained on random crops of a quarter of the
target's side, applied to the whole picture. In training the small picture is spoilt first (degradation.py), so that the flaws of the
stage before do not matter.

Shapes: B batch, S × S the large picture (or crop), s × s the small one, S = factor · s.
References: unCLIP (2204.06125) §2.1, App. C, Table 3; ADM-U (2105.05233) §4; GLIDE (2112.10741) App. B.2 for the 27 steps; Karlo.
Read next: pipeline.py.
"""

import functools
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .runtime.checks import check_choice, check_positive
from .degradation import DEGRADATIONS, degrade
from .diffusion import GaussianDiffusion, UniformSampler, check_diffusion, randn_like
from .runtime.noise import draw_rows
from .sampling import ddim_step, ddpm_step, keep_known, sample_loop, strided_timesteps
from .unet import UNet, UNetConfig


@dataclass(frozen=True)
class UpsamplerConfig:
    """Sizes and diffusion settings of one upsampler; the U-Net's fields keep their names (see UNetConfig)."""

    low_size: int = 32                  # side of the small picture, in pixels
    high_size: int = 128                # side of the large one: a whole multiple
    model_channels: int = 32
    channel_mult: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 1
    norm_groups: int = 8
    dropout: float = 0.0
    patch_size: int = 1
    schedule: str = "cosine"            # Table 3: first upsampler cosine, second linear
    num_timesteps: int = 1000
    objective: str = "eps"
    weighting: str = "none"
    degradation: str = "blur"           # first upsampler "blur", second "bsr_full", or "bsr", which is milder
    crop_fraction: float = 0.25         # Table 3, of the large picture's side
    sampling_steps: int = 27            # Table 3: 27 and 15
    # How Karlo differs; the paper's own are the defaults.
    sampler: str = "ddim"               # "ddim", or "ddpm" with the fixed variance β̃
    last_unet: bool = False             # a second network for the last step, t = 0
    use_adagn: bool = True              # False: the timestep is only added, it does not scale

    def __post_init__(self):
        check_positive(self, "low_size", "high_size")
        if self.high_size <= self.low_size or self.high_size % self.low_size:
            raise ValueError(f"high_size {self.high_size} is not a whole multiple of low_size {self.low_size}")
        if not 0 < self.crop_fraction <= 1:
            raise ValueError(f"crop_fraction must be above 0 and at most 1, not {self.crop_fraction}")
        check_choice("degradation", self.degradation, DEGRADATIONS)
        check_choice("sampler", self.sampler, ("ddim", "ddpm"))
        check_diffusion(self)
        self.unet()                                                        # which checks itself
        if self.crop_size < 1 or self.crop_size % self.factor or self.crop_size % self.stride:
            raise ValueError(f"crops of {self.crop_size} pixels: the factor {self.factor} and the U-Net's {self.stride} must divide them")

    def unet(self):
        """The configuration of the U-Net in it: the noised and the enlarged picture go in."""
        return UNetConfig(
            image_size=self.high_size, in_channels=6, out_channels=3, model_channels=self.model_channels, channel_mult=self.channel_mult,
            num_res_blocks=self.num_res_blocks, attn_resolutions=(), middle_attention=False, dropout=self.dropout,
            norm_groups=self.norm_groups, patch_size=self.patch_size, use_adagn=self.use_adagn)

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
        """The U-Net can take sides that are a multiple of this."""
        return self.unet().stride


def random_crop(images, crop, generator=None):
    """One random square of side `crop` from each of images (B, C, H, W), any dtype -> (B, C, crop, crop).

    Raises ValueError if the images are smaller than the crop.
    """
    B, _, H, W = images.shape
    if crop > min(H, W):
        raise ValueError(f"a crop of {crop} pixels does not fit into pictures of {H} × {W}")
    # mini: the paper does not say where the crops lie: anywhere, each place as often as another.
    top = draw_rows(functools.partial(torch.randint, H - crop + 1), (B, 1), generator, images.device)
    left = draw_rows(functools.partial(torch.randint, W - crop + 1), (B, 1), generator, images.device)
    window = torch.arange(crop, device=images.device)
    rows, columns = top + window, left + window                            # (B, crop) each
    example = torch.arange(B, device=images.device)[:, None, None]
    squares = images.permute(0, 2, 3, 1)[example, rows[:, :, None], columns[:, None, :]]   # (B, crop, crop, C)
    return squares.permute(0, 3, 1, 2)


def sampling_timesteps(steps, num_timesteps=1000):
    """The original steps to sample over, ascending list of int: GLIDE's hand-tuned ones for 27, evenly spaced ones otherwise.

    Hand-tuned: T is cut into fifths, which get 10, 10, 3, 2 and 2 steps, so that most are spent on fine detail, at low noise
    (GLIDE App. B.2); the last, at pure noise, is then moved two steps earlier (its code), where x̂_0 is not yet a division by nearly 0.
    """
    # mini: the paper calls its 27 and 15 steps hand-tuned and does not list them. GLIDE's 27 are known; for 15 we take even ones.
    if steps != 27 or num_timesteps < 50:
        return strided_timesteps(num_timesteps, steps)
    fifth, rest = divmod(num_timesteps, 5)
    timesteps, start = [], 0
    for i, count in enumerate((10, 10, 3, 2, 2)):
        size = fifth + (i < rest)
        timesteps += [start + offset for offset in strided_timesteps(size, count)]
        start += size
    return timesteps[:-1] + [num_timesteps - 3]


class Upsampler(nn.Module):
    """An unconditional ADM U-Net on [x_t, enlarged small picture], without attention."""

    CHUNK_PIXELS = 512 * 512            # sampled at once: a whole batch of large pictures would need too much memory

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.diffusion = GaussianDiffusion(cfg.schedule, cfg.num_timesteps)
        self.timestep_sampler = UniformSampler(cfg.num_timesteps)
        # mini: the variance is not learned (3 output channels, as in Karlo). The paper does not say; DDIM would not use it.
        # mini: with patch_size > 1 a narrow network has no room to pass on the noise of every pixel of a patch, so that small
        # presets predict x_0 or v (`objective`); the paper's networks see pixels, and predict ε.
        self.unet = UNet(cfg.unet())
        # Karlo made it out of the first with losses of its own, which are not published: it can be loaded here, but is not trained.
        self.unet_last = UNet(cfg.unet()).requires_grad_(False) if cfg.last_unet else None

    def enlarge(self, low):
        """The small picture at the large one's size, by bicubic interpolation: (B, 3, s, s) -> (B, 3, S, S)."""
        # mini: the paper does not say how the small picture is enlarged; GLIDE's paper says bicubic, its code is bilinear, Karlo is bicubic with
        # antialiasing, as here.
        return F.interpolate(low, scale_factor=self.cfg.factor, mode="bicubic", align_corners=False, antialias=True)

    def forward(self, x_t, t, enlarged):
        """Raw output (B, 3, S, S) for x_t (B, 3, S, S), t (B,) and enlarged (B, 3, S, S)."""
        last = self.unet_last is not None and not self.training and not t.any()
        raw = (self.unet_last if last else self.unet)(torch.cat([x_t, enlarged], dim=1), t).float()
        # mini: a network that predicts x_0 predicts what is missing from the enlarged picture, so that it starts as plain
        # interpolation and spends nothing on relearning colours. The paper's networks predict ε, and know of no such shortcut.
        return raw + enlarged if self.cfg.objective == "x_start" else raw

    def loss(self, high, generator=None):
        """L_simple, a scalar, for sharp crops (B, 3, S, S) in [-1, 1]; their small pictures are made, and spoilt, here."""
        cfg, B = self.cfg, len(high)
        low = degrade(high, cfg.degradation, cfg.factor, generator)        # (B, 3, s, s)
        t, weight = self.timestep_sampler.sample(B, generator, high.device)
        noise = randn_like(high, generator)
        x_t = self.diffusion.q_sample(high, t, noise)
        raw = self(x_t, t, self.enlarge(low))
        return (self.diffusion.loss(raw, high, x_t, t, noise, cfg.objective, cfg.weighting) * weight).mean()

    def denoiser(self, low):
        """denoise(x, t) -> ModelOutput for these small pictures, which are enlarged only once."""
        enlarged = self.enlarge(low)

        def denoise(x, t):
            return self.diffusion.interpret(self(x, t, enlarged), x, t, self.cfg.objective, clip=1.0)

        return denoise

    @torch.no_grad()
    def sample(self, low, steps=None, generator=None, progress=False, known=None):
        """Large pictures (B, 3, S, S) in [-1, 1] for small ones (B, 3, s, s) in [-1, 1], by DDIM with η = 0 (Karlo: by ancestral steps).

        s may be any size whose S the U-Net can halve as often as it must; ValueError otherwise. Large batches are done in chunks.
        `generator`: one for all, or a list with one per picture (see diffusion.randn_like); with DDIM only the start is random. known: (picture
        (1, 3, S, S), mask (1, 1, S, S)), what the large pictures show where the mask is 0.
        """
        cfg = self.cfg
        B, _, h, w = low.shape
        H, W = h * cfg.factor, w * cfg.factor
        if H % cfg.stride or W % cfg.stride:
            raise ValueError(f"pictures of {H} × {W} pixels: the upsampler's U-Net needs multiples of {cfg.stride}")
        timesteps = sampling_timesteps(cfg.sampling_steps if steps is None else steps, cfg.num_timesteps)
        x_T = randn_like(low.new_empty(B, 3, H, W), generator)             # all at once, so that chunks do not change the result
        x_T = x_T.contiguous(memory_format=torch.channels_last)
        chunk = max(1, self.CHUNK_PIXELS // (H * W))
        many = isinstance(generator, (list, tuple))
        noise = iter([generator[i:i + chunk] for i in range(0, B, chunk)]) if many else itertools.repeat(generator)
        high = []
        for low_part, x_part in zip(low.split(chunk), x_T.split(chunk)):
            denoise = self.denoiser(low_part)
            if known is not None:
                denoise = keep_known(denoise, self.diffusion, *known)
            # mini: the paper gives no η; 0, so that the last noise is drawn above and the picture depends on nothing else.
            step = ddim_step(eta=0.0) if cfg.sampler == "ddim" else ddpm_step
            high.append(sample_loop(self.diffusion, denoise, x_part, step, timesteps, next(noise), progress))
        return torch.cat(high).clamp(-1, 1).contiguous()
