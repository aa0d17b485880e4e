"""The decoder P(x | z_img, y): from a CLIP image embedding, and perhaps a caption, to a picture.

    ε_θ(x_t, t, z_img, y):   emb     = time(t) + W_1 z_img + W_2 pooled(y)
                             context = [4 tokens from z_img, states of y]

It is GLIDE's U-Net and text transformer with two additions of the unCLIP paper (§2.1). z_img is
projected and added to the timestep embedding. z_img is also projected to four extra context tokens.
In training z_img is set to zero 10 % of the time, and the caption is dropped 50 % of the time. So
the same network also knows unconditional pictures, and classifier-free guidance can move away from
them.

The decoder sees CLIP only as the tensor z_img. In training this is always the *true* embedding of
the training picture, never a sample of the prior.

Shapes: B batch, S image side, L context length, W text width, D = clip_dim, E the width of emb.
References: unCLIP (2204.06125) §2.1, Table 3; GLIDE (2112.10741) §4.1. Read next: upsampler.py.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from .diffusion import GaussianDiffusion, check_diffusion
from .runtime.checks import (
    check_captions, check_choice, check_divisible, check_positive, check_range)
from .runtime.noise import rand, randint, randn, randn_like
from .sampling import (
    ddim_invert, ddim_step, ddpm_step, guide, keep_known, sample_loop, strided_timesteps)
from .transformer import CaptionEmbedding, Transformer
from .unet import UNet, UNetConfig


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes and diffusion settings. The U-Net's fields keep their names; see UNetConfig."""

    image_size: int = 32
    clip_dim: int = 128
    model_channels: int = 64
    channel_mult: tuple[int, ...] = (1, 2)
    num_res_blocks: int = 2
    attn_resolutions: tuple[int, ...] = (8,)
    head_dim: int = 32
    norm_groups: int = 32
    dropout: float = 0.0
    vocab_size: int = 600
    context_length: int = 16
    eot_id: int = 599
    text_width: int = 128
    text_layers: int = 3
    text_heads: int = 4
    # §2.1
    z_drop: float = 0.1
    caption_drop: float = 0.5
    schedule: str = "cosine"
    num_timesteps: int = 1000
    objective: str = "eps"
    weighting: str = "none"
    # Weight of L_vlb in L_hybrid (improved DDPM §3.1).
    vlb_weight: float = 0.001
    sampling_steps: int = 250
    # "ddpm" samples with the learned variance, as the paper does; "ddim" with `eta`.
    sampler: str = "ddpm"
    eta: float = 0.0
    # mini: the paper gives 1.25 for Table 2 and no guidance scale for its pictures. Ours default to
    # 3.
    guidance: float = 3.0

    def __post_init__(self):
        check_captions(self)
        check_positive(self, "clip_dim", "text_width", "text_layers", "text_heads")
        check_range(self, 0, 1, "z_drop", "caption_drop")
        check_range(self, 0, math.inf, "vlb_weight", "eta", "guidance")
        check_divisible(self, "text_width", "text_heads")
        check_choice("sampler", self.sampler, ("ddpm", "ddim"))
        check_diffusion(self)
        # Makes the U-Net's configuration, which checks itself.
        self.unet()

    def unet(self):
        """Return the U-Net's configuration."""
        return UNetConfig(**self.unet_settings())

    def unet_settings(self):
        """Return the U-Net's settings as a dict. The six channels out: prediction and variance."""
        return dict(
            image_size=self.image_size, in_channels=3, out_channels=6,
            model_channels=self.model_channels, channel_mult=self.channel_mult,
            num_res_blocks=self.num_res_blocks, attn_resolutions=self.attn_resolutions,
            head_dim=self.head_dim, context_dim=self.text_width, dropout=self.dropout,
            norm_groups=self.norm_groups)


class Condition(NamedTuple):
    """All that the U-Net is told besides x_t and t. It does not depend on t."""

    emb: torch.Tensor                                                      # (B, E)
    context: torch.Tensor                                                  # (B, 4 + L, W)


class Decoder(nn.Module):
    """U-Net, text transformer, and the two ways in for z_img."""

    Z_TOKENS = 4
    # Corrections of each step of the inversion, at most.
    REFINE = 20

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.diffusion = GaussianDiffusion(cfg.schedule, cfg.num_timesteps)
        self.unet = UNet(cfg.unet())
        emb_dim = self.unet.cfg.emb_dim
        self.add_text(emb_dim)
        self.ln_final = nn.LayerNorm(cfg.text_width)
        self.z_to_emb = nn.Linear(cfg.clip_dim, emb_dim)
        self.z_to_tokens = nn.Linear(cfg.clip_dim, self.Z_TOKENS * cfg.text_width)
        # mini: §2.1 names two nulls for z_img, zero or a learned embedding. Ours is zero, which
        # Fig. 8 needs.
        self.register_buffer("null_z", torch.zeros(cfg.clip_dim), persistent=False)

    def add_text(self, emb_dim):
        """Add GLIDE's text transformer, which is bidirectional and trained with the U-Net."""
        cfg = self.cfg
        # Tokens start with GLIDE's std of 1. CLIP's 0.02 is too small: this model then learns to
        # ignore the caption.
        self.caption = CaptionEmbedding(
            cfg.vocab_size, cfg.context_length, cfg.text_width, cfg.eot_id, std=1.0)
        self.transformer = Transformer(cfg.text_layers, cfg.text_width, cfg.text_heads)
        self.text_to_emb = nn.Linear(cfg.text_width, emb_dim)

    def measure(self, z_img, z_txt):
        """Fit what is fixed before training to the training embeddings (N, D): nothing here."""

    def scale(self, z_img):
        """Scale z_img (B, D), a unit vector, to unit variance per coordinate."""
        # mini: the paper does not scale z_img on its way in. A linear layer learns faster from unit
        # variance.
        return z_img * math.sqrt(self.cfg.clip_dim)

    def condition(self, z_img, tokens, keep_z=None, keep_text=None):
        """Compute the Condition, once per picture.

        z_img (B, D) as CLIP gives it, tokens (B, L). keep_z, keep_text (B,) bool: False drops this
        condition; None keeps all. One of z_img and tokens may be None: dropped throughout.
        """
        B = len(z_img) if z_img is not None else len(tokens)
        z = self.null_z.expand(B, -1) if z_img is None else self.scale(z_img)              # (B, D)
        if keep_z is not None:
            z = torch.where(keep_z[:, None], z, self.null_z)
        if tokens is None:
            # Any tokens will do, because none of them is kept.
            tokens = torch.full((B, self.cfg.context_length), self.cfg.eot_id, device=z.device)
            keep_text = torch.zeros(B, dtype=torch.bool, device=z.device)
        return self.join(z, *self.read(tokens, keep_text))

    def read(self, tokens, keep=None):
        """Read captions, tokens (B, L): states (B, L, W) and what is added to emb, (B, E)."""
        states = self.ln_final(self.transformer(self.caption(tokens, keep)))     # (B, L, W)
        # GLIDE pools the last position.
        return states, self.text_to_emb(states[:, -1])

    def join(self, z, states, text_emb):
        """Put the scaled z_img (B, D) and the caption (see `read`) together as a Condition."""
        z_tokens = self.z_to_tokens(z).unflatten(-1, (self.Z_TOKENS, -1))        # (B, 4, W)
        context = torch.cat([z_tokens, states], dim=1)                     # (B, 4 + L, W)
        return Condition(self.z_to_emb(z) + text_emb, context)

    def forward(self, x_t, t, condition):
        """Return the raw output (B, 6, S, S): prediction and variance channels.

        x_t (B, 3, S, S), t (B,) and a Condition. float32, because guidance magnifies rounding.
        """
        return self.unet(x_t, t, condition.emb, condition.context).float()

    def loss(self, images, z_img, tokens, generator=None):
        """Return L_hybrid, a scalar.

        images (B, 3, S, S) in [-1, 1], z_img (B, D) their true embeddings, tokens (B, L).
        """
        keep_z, keep_text = self.choose_kept(images, generator)
        t = randint(self.cfg.num_timesteps, (len(images),), generator, images.device)
        noise = randn_like(images, generator)
        condition = self.condition(z_img, tokens, keep_z, keep_text)
        return self.denoising_loss(images, t, noise, condition)

    def choose_kept(self, images, generator=None):
        """Choose at random which pictures keep z_img and which keep the caption: (B,) bool."""
        # mini: the paper does not say whether the two drops are independent. Here they are, so 5 %
        # of the pictures keep the caption alone, which is the share that Fig. 8 names.
        u = rand((2, len(images)), generator, images.device, dim=1)        # (2, B)
        return u[0] >= self.cfg.z_drop, u[1] >= self.cfg.caption_drop

    def denoising_loss(self, images, t, noise, condition):
        """Return L_hybrid, a scalar, for pictures noised to step t (B,) with `noise`."""
        cfg = self.cfg
        x_t = self.diffusion.q_sample(images, t, noise)
        raw = self(x_t, t, condition)
        losses = self.diffusion.loss(
            raw, images, x_t, t, noise, cfg.objective, cfg.weighting, vlb_weight=cfg.vlb_weight)
        return losses.mean()

    def denoiser(self, z_img, tokens, guidance=1.0, clip=1.0):
        """Return denoise(x, t) -> ModelOutput for these conditions; see `condition`.

        guidance: how far to move away from "no z_img, no caption"; 1 is not at all. clip: the bound
        on |x̂_0|.
        """
        condition = self.condition(z_img, tokens)
        if guidance != 1.0:
            # mini: the paper does not say what guidance moves away from. Here it is a picture
            # without z_img and without caption.
            drop = torch.zeros(len(condition.emb), dtype=torch.bool, device=condition.emb.device)
            null = self.condition(z_img, tokens, drop, drop)
            both = [torch.cat(pair) for pair in zip(condition, null)]
            condition = type(condition)(*both)

        def denoise(x, t):
            if guidance == 1.0:
                raw = self(x, t, condition)
            else:
                # Both halves of the batch see the same x_t.
                halves = self(torch.cat([x, x]), torch.cat([t, t]), condition)
                cond, null = halves.chunk(2)
                raw = guide(cond, null, guidance, learned_variance=True)
            return self.diffusion.interpret(
                raw, x, t, self.cfg.objective, learned_variance=True, clip=clip)

        return denoise

    @torch.no_grad()
    def sample(self, z_img, tokens, guidance=None, steps=None, generator=None, progress=False,
               x_T=None, eta=None, known=None):
        """Sample pictures (B, 3, S, S) in [-1, 1] for z_img (B, D) and tokens (B, L).

        One of z_img and tokens may be None. The model must be in eval mode.
        guidance, steps, eta (of DDIM): None takes the configuration's. `steps` may be the timesteps
        themselves, ascending; x_T is then as noisy as the last of them says.
        generator: one, or a list with one per picture (see runtime/noise.py).
        x_T (B, 3, S, S): replaces the random start.
        known: (picture (B or 1, 3, S, S), mask (B or 1, 1, S, S)); only where the mask is 1 is
        anything new sampled, by DDIM, to fit the rest.
        Raises ValueError for a number of steps outside 1..T.
        """
        cfg = self.cfg
        if x_T is None:
            given = z_img if z_img is not None else tokens
            shape = (len(given), 3, cfg.image_size, cfg.image_size)
            x_T = randn(shape, generator, given.device)
        x_T = x_T.contiguous(memory_format=torch.channels_last)
        guidance = cfg.guidance if guidance is None else guidance
        steps = cfg.sampling_steps if steps is None else steps
        denoise = self.denoiser(z_img, tokens, guidance)
        if known is not None:
            denoise = keep_known(denoise, self.diffusion, *known)
        step = self.step_rule(eta, known)
        timesteps = steps
        if not isinstance(steps, list):
            timesteps = strided_timesteps(cfg.num_timesteps, steps)
        x_0 = sample_loop(self.diffusion, denoise, x_T, step, timesteps, generator, progress)
        return x_0.clamp(-1, 1)

    def step_rule(self, eta=None, known=None):
        """Choose the rule of a sampling step; `eta` or a known part ask for DDIM."""
        # mini: the paper samples with the learned variance, "ddpm". A preset that hardly trains
        # this variance takes "ddim".
        if self.cfg.sampler == "ddpm" and eta is None and known is None:
            return ddpm_step
        return ddim_step(self.cfg.eta if eta is None else eta)

    @torch.no_grad()
    def invert(self, images, z_img, steps=None, progress=False):
        """Find the x_T (B, 3, S, S) from which DDIM with η = 0 samples `images` (§3).

        images (B, 3, S, S), z_img (B, D) their embeddings. The way back is sample(z_img, None,
        guidance=1, eta=0, x_T=x_T) with as many steps. z_img and x_T together are the paper's
        bipartite latent.
        """
        # mini: the paper does not say what else the decoder is told during inversion. Here it gets
        # no caption and no guidance.
        # mini: the paper does not say whether x̂_0 is clipped during inversion. Here it is cut to
        # [-1, 1], as in sampling.
        # mini: the paper does not mention corrections to DDIM run backwards. Here each step gets up
        # to REFINE, because small errors grow on the way back.
        steps = self.cfg.sampling_steps if steps is None else steps
        timesteps = strided_timesteps(self.cfg.num_timesteps, steps)
        denoise = self.denoiser(z_img, None)
        x_0 = images.contiguous(memory_format=torch.channels_last)
        return ddim_invert(self.diffusion, denoise, x_0, timesteps, self.REFINE, progress)
