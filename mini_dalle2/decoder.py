"""The decoder P(x | z_img, y): from a CLIP image embedding, and if there is one a caption, to a small picture.

    ε_θ(x_t, t, z_img, y):   emb = time(t) + W_1 z_img + W_2 pooled(y)          context = [4 tokens from z_img, states of y]

It is GLIDE's U-Net and text transformer, with two additions of the unCLIP paper (§2.1): z_img is projected and added to the timestep
embedding, and projected into four extra context tokens. In training z_img is zeroed 10 % of the time and the caption dropped 50 %, so
that the same network also knows what an unconditional picture is, and classifier-free guidance can move away from that. In `tiny` and
`micro` it is also shown a sketch beside x_t (sketch.py), which the paper's does without.

The decoder sees CLIP only as the tensor z_img: always the *true* embedding of the training picture, never a sample of the prior.
Shapes: B batch, S image side, L context length, W text width, D = clip_dim, E the U-Net's width of emb.
References: unCLIP (2204.06125) §2.1, Table 3; GLIDE (2112.10741) §4.1. Read next: upsampler.py.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from .runtime.checks import (
    check_above_zero, check_captions, check_choice, check_divisible, check_positive, check_range)
from .diffusion import GaussianDiffusion, TIMESTEP_SAMPLERS, check_diffusion, randn_like
from .runtime.noise import draw_rows
from .sampling import (
    ddim_invert, ddim_step, ddpm_step, guide, keep_known, sample_loop, strided_timesteps)
from .tricks.sketch import Sketch, SketchConfig
from .transformer import CaptionEmbedding, FrozenText, Transformer
from .unet import UNet, UNetConfig
from .tricks.whitening import Whitening


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and diffusion settings; the U-Net's fields keep their names (see UNetConfig)."""

    image_size: int = 32
    clip_dim: int = 128
    model_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (8,)
    head_dim: int = 32
    norm_groups: int = 32
    dropout: float = 0.0
    patch_size: int = 1
    position_embedding: bool = False
    emb_channels: int | None = None
    vocab_size: int = 600
    context_length: int = 16
    eot_id: int = 599
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    whiten_z: bool = False              # mini: see whitening.py
    sketch: bool = False                # mini: see sketch.py
    z_noise: float = 0.0                # mini: see Decoder.loss
    z_noise_from: float = 0.75          # share of the steps after which z_noise begins
    sketch_width: int = SketchConfig.width
    sketch_layers: int = SketchConfig.layers
    z_drop: float = 0.1                 # §2.1
    caption_drop: float = 0.5           # §2.1
    schedule: str = "cosine"
    num_timesteps: int = 1000
    objective: str = "eps"
    weighting: str = "none"
    vlb_weight: float = 0.001           # of L_vlb in L_hybrid (improved DDPM §3.1)
    timestep_sampling: str = "uniform"  # which t are trained on: "uniform", or "loss_aware" (improved DDPM §3.3)
    sampling_steps: int = 250
    sampler: str = "ddpm"               # "ddpm": learned variance, as the paper; "ddim"
    eta: float = 0.0                    # of the "ddim" sampler
    guidance: float = 3.0               # mini: the paper measures with 1.25 (Table 2); it does not give that of its pictures

    # How Karlo differs; the paper's own are the defaults.
    frozen_text: int | None = None      # width of the states of CLIP's text transformer, read instead of training one; None: one's own
    z_scale: float | None = None        # what z_img is multiplied by, unless whitened; None: √clip_dim
    learned_null: bool = False          # what stands for a dropped z_img: a learned vector instead of zero

    def __post_init__(self):
        check_captions(self)
        check_positive(self, "clip_dim", "text_width", "text_layers", "text_heads", "sketch_width", "sketch_layers")
        check_range(self, 0, 1, "z_drop", "caption_drop", "z_noise_from")
        check_range(self, 0, math.inf, "vlb_weight", "eta", "guidance", "z_noise")
        check_above_zero(self, "z_scale")
        check_positive(self, "frozen_text")
        check_divisible(self, "text_width", "text_heads")
        check_choice("sampler", self.sampler, ("ddpm", "ddim"))
        check_choice("timestep_sampling", self.timestep_sampling, TIMESTEP_SAMPLERS)
        check_diffusion(self)
        self.unet()                                                        # which checks itself

    def unet(self):
        """The configuration of the U-Net in it: x_t goes in, and the sketch; two times three channels come out, prediction and variance."""
        return UNetConfig(
            image_size=self.image_size, in_channels=6 if self.sketch else 3, out_channels=6, model_channels=self.model_channels,
            channel_mult=self.channel_mult, num_res_blocks=self.num_res_blocks, attn_resolutions=self.attn_resolutions, head_dim=self.head_dim,
            context_dim=self.text_width, dropout=self.dropout, norm_groups=self.norm_groups, patch_size=self.patch_size,
            position_embedding=self.position_embedding, emb_channels=self.emb_channels)


class Condition(NamedTuple):
    """All that the U-Net is told besides x_t and t: it does not depend on t."""

    emb: torch.Tensor                   # (B, E), added to the timestep's
    context: torch.Tensor               # (B, 4 + L, W), attended to
    mask: torch.Tensor | None = None    # (B, 4 + L) bool, False hides; with frozen text
    sketch: torch.Tensor | None = None  # (B, 3, S, S), beside x_t


class Decoder(nn.Module):
    """U-Net, text transformer and the two ways in for z_img."""

    Z_TOKENS = 4
    REFINE = 20                         # corrections of each step of the inversion, at most

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.diffusion = GaussianDiffusion(cfg.schedule, cfg.num_timesteps)
        self.timestep_sampler = TIMESTEP_SAMPLERS[cfg.timestep_sampling](cfg.num_timesteps)
        self.unet = UNet(cfg.unet())
        emb_dim = self.unet.cfg.emb_dim
        if cfg.frozen_text is None:
            # Words begin as far apart as GLIDE's code leaves them (std 1), not CLIP's 0.02: told captions alone, 1,000 steps then brought
            # the error of x̂_0 at t = 999 from 0.1205 to 0.111, with 0.02 to 0.119. Beside z_img, 55,000 steps from 0.02 taught no reading.
            self.caption = CaptionEmbedding(cfg.vocab_size, cfg.context_length, cfg.text_width, cfg.eot_id, std=1.0)
            self.transformer = Transformer(cfg.text_layers, cfg.text_width, cfg.text_heads)   # bidirectional, trained with the U-Net
            self.text_to_emb = nn.Linear(cfg.text_width, emb_dim)
        else:
            self.caption = FrozenText(cfg.frozen_text, cfg.text_width, cfg.eot_id)
            self.text_to_emb = nn.Linear(cfg.clip_dim, emb_dim)            # of z_txt
        self.ln_final = nn.LayerNorm(cfg.text_width)
        self.null_z = nn.Parameter(torch.zeros(cfg.clip_dim)) if cfg.learned_null else None
        self.whitening = Whitening(cfg.clip_dim, cfg.z_scale)
        self.z_to_emb = nn.Linear(cfg.clip_dim, emb_dim)
        self.z_to_tokens = nn.Linear(cfg.clip_dim, self.Z_TOKENS * cfg.text_width)
        self.sketch = None
        if cfg.sketch:                                                     # trained before, by a stage of its own
            self.sketch = Sketch(SketchConfig(cfg.clip_dim, cfg.image_size, cfg.sketch_width, cfg.sketch_layers))
            self.sketch.requires_grad_(False)

    def measure(self, z_img, z_txt):
        """Fits what is fixed before training to the training embeddings (N, D): the whitening, if there is to be one."""
        if self.cfg.whiten_z:
            self.whitening.fit(z_img)

    def condition(self, z_img, tokens, keep_z=None, keep_text=None):
        """The Condition, computed once per picture.

        z_img (B, D) as CLIP gives it, tokens (B, L); keep_z, keep_text (B,) bool, False drops that condition (None keeps all). One of z_img
        and tokens may be None: dropped throughout.
        """
        given = z_img if z_img is not None else tokens
        B, device = len(given), given.device
        # mini: the paper does not scale z_img on its way in. Unless fitted, whitening is times √D: unit variance, as linear layers like it.
        # mini: of the two nulls that §2.1 names, zero or learned, the zero vector, which Fig. 8 needs; no caption is all padding.
        # Once whitening is fitted, zero is the mean of all embeddings.
        null = torch.zeros(self.cfg.clip_dim, device=device) if self.null_z is None else self.null_z
        z = self.whitening(z_img) if z_img is not None else null.expand(B, -1)             # (B, D)
        if keep_z is not None:
            z = torch.where(keep_z[:, None], z, null)
        if tokens is None:                                                 # any tokens, none of them kept
            tokens = torch.full((B, self.cfg.context_length), self.cfg.eot_id, device=device)
            keep_text = torch.zeros(B, dtype=torch.bool, device=device)
        if self.cfg.frozen_text is None:
            states = self.ln_final(self.transformer(self.caption(tokens, keep_text)))      # (B, L, W)
            emb, mask = self.text_to_emb(states[:, -1]), None              # GLIDE pools the last position
        else:
            states, z_txt, mask = self.caption(tokens, keep_text)
            states, emb, mask = self.ln_final(states), self.text_to_emb(z_txt), F.pad(mask, (self.Z_TOKENS, 0), value=True)
        z_tokens = self.z_to_tokens(z).unflatten(-1, (self.Z_TOKENS, -1))  # (B, 4, W)
        context = torch.cat([z_tokens, states], dim=1)                     # (B, 4 + L, W)
        return Condition(self.z_to_emb(z) + emb, context, mask, self.sketch_shown(z_img, keep_z, B, device))

    def sketch_shown(self, z_img, keep_z, B, device):
        """(B, 3, S, S) of z_img (B, D), nothing but zeros where that is dropped; None for a decoder that is shown none."""
        if self.sketch is None:
            return None
        # mini: a dropped sketch is middle grey, which no picture is and no mean of pictures: it cannot be taken for one.
        if z_img is None:
            return torch.zeros(B, 3, self.cfg.image_size, self.cfg.image_size, device=device)
        sketch = self.sketch(z_img).float()
        return sketch if keep_z is None else sketch * keep_z[:, None, None, None]

    def forward(self, x_t, t, condition):
        """Raw output (B, 6, S, S), prediction and variance channels, for x_t (B, 3, S, S), t (B,) and a Condition."""
        seen = x_t if condition.sketch is None else torch.cat([x_t, condition.sketch], dim=1)
        return self.unet(seen, t, condition.emb, condition.context, condition.mask).float()        # guidance magnifies rounding

    def loss(self, images, z_img, tokens, generator=None, z_noise=0.0):
        """L_hybrid, a scalar: images (B, 3, S, S) in [-1, 1], z_img (B, D) their true embeddings, spoiled by z_noise at most, tokens (B, L)."""
        cfg, B, device = self.cfg, len(images), images.device
        draw = draw_rows(torch.rand, (2, B), generator, device, dim=1)
        # mini: the paper does not say whether the two drops are independent. Here they are: 5 % of pictures keep the caption alone,
        # which is how often Fig. 8 says that happens, and 5 % keep nothing.
        keep_z, keep_text = draw[0] >= cfg.z_drop, draw[1] >= cfg.caption_drop
        t, weight = self.timestep_sampler.sample(B, generator, device)
        noise = randn_like(images, generator)
        x_t = self.diffusion.q_sample(images, t, noise)
        # mini: z_img may be spoiled in training, as what the upsamplers are shown is: a prior's are a little off, and a decoder that only ever
        # saw true ones believes them in everything, and the caption in nothing. Towards the end of it (see stages.py), because at first
        # there is enough to learn: five minutes of it after half an hour without (256 captions) brought 55.9 % right by the whole chain to 61.7 %.
        if z_noise:
            level = z_noise * draw_rows(torch.rand, (B, 1), generator, device)
            z_img = self.whitening.spoil(z_img, randn_like(z_img, generator), level)
        raw = self(x_t, t, self.condition(z_img, tokens, keep_z, keep_text))
        losses = self.diffusion.loss(raw, images, x_t, t, noise, cfg.objective, cfg.weighting, learned_variance=True,
                                     vlb_weight=cfg.vlb_weight)
        if self.training:
            self.timestep_sampler.update(t, losses)
        return (losses * weight).mean()

    def denoiser(self, z_img, tokens, guidance=1.0, clip=1.0):
        """denoise(x, t) -> ModelOutput for these conditions, guided by `guidance` (1: not at all) away from "no z_img, no caption"."""
        B, device = (len(z_img), z_img.device) if z_img is not None else (len(tokens), tokens.device)
        condition = self.condition(z_img, tokens)
        if guidance != 1.0:
            # mini: the paper does not say what guidance leads away from: here a picture without z_img and without caption.
            drop = torch.zeros(B, dtype=torch.bool, device=device)
            null = self.condition(z_img, tokens, drop, drop)
            condition = Condition(*(None if a is None else torch.cat([a, b]) for a, b in zip(condition, null)))

        def denoise(x, t):
            if guidance == 1.0:
                raw = self(x, t, condition)
            else:                                                          # both halves see the same x_t, in one batch
                raw = guide(*self(torch.cat([x, x]), torch.cat([t, t]), condition).chunk(2), guidance, learned_variance=True)
            return self.diffusion.interpret(raw, x, t, self.cfg.objective, learned_variance=True, clip=clip)

        return denoise

    @torch.no_grad()
    def sample(self, z_img, tokens, guidance=None, steps=None, generator=None, progress=False, x_T=None, eta=None, known=None):
        """Pictures (B, 3, S, S) in [-1, 1] for z_img (B, D), tokens (B, L), one of which may be None, from a model in eval mode.

        `x_T` (B, 3, S, S) replaces the random start. guidance, steps and DDIM's eta: None takes the configuration's. `generator`: one,
        or a list with one per picture (see diffusion.randn_like). known: (picture (B, 3, S, S), mask (B or 1, 1, S, S)): only where the
        mask is 1 anything is drawn, to go with the rest (by DDIM); one picture and mask may serve all. `steps` may be the timesteps themselves,
        ascending: from x_T, noisy as the last of them is, down. Raises ValueError for a number of steps outside 1..T.
        """
        cfg = self.cfg
        if x_T is None:
            given = z_img if z_img is not None else tokens
            x_T = randn_like(torch.empty(len(given), 3, cfg.image_size, cfg.image_size, device=given.device), generator)
        x_T = x_T.contiguous(memory_format=torch.channels_last)
        # mini: the paper's sampler is "ddpm", with the learned variance. A preset that hardly trains that one takes "ddim" (see `tiny`).
        step = ddpm_step if cfg.sampler == "ddpm" and eta is None and known is None else ddim_step(cfg.eta if eta is None else eta)
        denoise = self.denoiser(z_img, tokens, cfg.guidance if guidance is None else guidance)
        if known is not None:
            denoise = keep_known(denoise, self.diffusion, *known)
        steps = cfg.sampling_steps if steps is None else steps
        timesteps = steps if isinstance(steps, list) else strided_timesteps(cfg.num_timesteps, steps)
        return sample_loop(self.diffusion, denoise, x_T, step, timesteps, generator, progress).clamp(-1, 1)

    @torch.no_grad()
    def invert(self, images, z_img, steps=None, progress=False):
        """The x_T (B, 3, S, S) from which DDIM with η = 0 draws `images` (B, 3, S, S), given their z_img (B, D) (§3).

        For `sample(z_img, None, guidance=1, eta=0, x_T=x_T)` with as many steps. z_img and x_T together are the paper's bipartite latent.
        """
        # mini: the paper does not say what else the decoder is told (here no caption, no guidance), whether x̂_0 is cut to [-1, 1] (it is,
        # as in sampling), nor of corrections to DDIM run backwards (up to REFINE a step, each one more look at the network).
        timesteps = strided_timesteps(self.cfg.num_timesteps, self.cfg.sampling_steps if steps is None else steps)
        denoise = self.denoiser(z_img, None)
        x_0 = images.contiguous(memory_format=torch.channels_last)
        return ddim_invert(self.diffusion, denoise, x_0, timesteps, self.REFINE, progress)
