"""The diffusion prior P(z_img | y): from a caption to the CLIP embedding of a picture that it could describe.

    L_prior = E_{t, z_t} ‖ f_θ(z_t, t, y) − z_img ‖²                                            (unCLIP Eq. 2: it predicts x_0, not ε)

f_θ is a causal transformer over this sequence, whose last output is the prediction (§2.2):

    caption tokens | CLIP text embedding z_txt | timestep | noised z_img | final query

z_img is scaled up before it is noised, to the variance that pixels have, so that a schedule made for images fits it. The caption
(tokens and z_txt) is dropped 10 % of the time for classifier-free guidance. Of two samples the one closer to z_txt is kept.

Shapes: B batch, L context length, W width, D = clip_dim. "z_t" at time t is called x_t here, as everywhere in diffusion code.
References: unCLIP (2204.06125) §2.2, App. C, Table 3. Read next: unet.py, decoder.py.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .runtime.checks import (
    check_above_zero, check_captions, check_choice, check_divisible, check_positive, check_range)
from .diffusion import GaussianDiffusion, UniformSampler, check_diffusion, randn_like
from .runtime.noise import draw_rows
from .sampling import analytic_step, ddpm_step, guide, sample_loop, strided_timesteps
from .transformer import CaptionEmbedding, FrozenText, Transformer, timestep_embedding
from .tricks.whitening import Whitening


@dataclass(frozen=True)
class PriorConfig:
    """Sizes and diffusion settings."""

    clip_dim: int = 128
    width: int = 192
    layers: int = 4
    heads: int = 6
    vocab_size: int = 600
    context_length: int = 16
    eot_id: int = 599
    text_drop: float = 0.1              # §2.2
    std_per_dim: float = 0.5375         # std of one coordinate of the scaled z_img: App. C's 17.2 at 1024 dimensions, 17.2 / √1024
    schedule: str = "cosine"
    num_timesteps: int = 1000
    sampling_steps: int = 64
    sampler: str = "analytic"           # variance of a step: "analytic" (Table 3), or "ddpm", the fixed β̃
    guidance: float = 1.0               # mini: the paper's scale for the prior is not given; 1 is none
    whiten_z: bool = False              # mini: see whitening.py
    candidates: int = 2                 # §2.2: sample two, keep the one with the higher z_img · z_txt
    head_layers: int = 0                # mini: see Head; 0, none, is the paper's
    head_width: int = 512
    # How Karlo differs; the paper's own are the defaults.
    frozen_text: int | None = None      # width of the states of CLIP's text transformer, read instead of tokens; None: tokens
    z_scale: float | None = None        # what z_img and z_txt are multiplied by, unless whitened; None: √clip_dim
    unit_norm: bool = True              # whether z_img has unit length
    clip_x_start: float | None = None   # bound on the predicted x_0

    def __post_init__(self):
        check_captions(self)
        check_positive(self, "clip_dim", "width", "layers", "heads", "candidates", "head_width")
        check_range(self, 0, 1, "text_drop")
        check_range(self, 0, math.inf, "guidance", "clip_x_start", "head_layers")
        check_positive(self, "frozen_text")
        check_divisible(self, "width", "heads")
        if self.width % 2:
            raise ValueError(f"width {self.width} is odd: half of the timestep's embedding are cosines, half sines")
        check_above_zero(self, "std_per_dim", "z_scale")
        check_choice("sampler", self.sampler, ("analytic", "ddpm"))
        check_diffusion(self)


class HeadBlock(nn.Module):
    """h + W_2 SiLU(W_1 LN(h) + W_3 time): a residual block for a single vector, W_2 at first zero."""

    def __init__(self, width, time_width):
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.c_fc, self.time_proj, self.c_proj = nn.Linear(width, width), nn.Linear(time_width, width), nn.Linear(width, width)
        for p in self.c_proj.parameters():
            nn.init.zeros_(p)

    def forward(self, h, time):
        return h + self.c_proj(F.silu(self.c_fc(self.ln(h)) + self.time_proj(time)))


# mini: not in the paper; `head_layers` asks for it (`tiny`'s has four). A block of the transformer is computed at all L + 4
# places, though only one of them is read; the head is computed for that one. In two minutes a prior of one block and a head of four came
# to an error of x̂_0 (over the variance, at t = 30, 200, 400, 700) of 0.060, 0.112, 0.198 and 0.316, one of four blocks and no head to
# 0.098, 0.152, 0.246 and 0.351.
class Head(nn.Module):
    """Layers behind the final query: (B, W) and the timestep's embedding (B, W) -> (B, head_width)."""

    def __init__(self, cfg):
        super().__init__()
        self.enter = nn.Linear(cfg.width, cfg.head_width)
        self.blocks = nn.ModuleList(HeadBlock(cfg.head_width, cfg.width) for _ in range(cfg.head_layers))
        self.ln_final = nn.LayerNorm(cfg.head_width)

    def forward(self, query, time):
        h = self.enter(query)
        for block in self.blocks:
            h = block(h, time)
        return self.ln_final(h)


class DiffusionPrior(nn.Module):
    """f_θ, its loss and its sampler."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.whitening, self.whitening_txt = (Whitening(cfg.clip_dim, cfg.z_scale) for _ in range(2))
        self.diffusion = GaussianDiffusion(cfg.schedule, cfg.num_timesteps)
        self.timestep_sampler = UniformSampler(cfg.num_timesteps)
        self.register_buffer("cov", torch.zeros(cfg.num_timesteps))        # variance of x_0 given x_t; see `measure_variance`
        # mini: "encoded text" (§2.2) leaves open by what: here tokens are embedded for this very transformer, as wide as Table 3 says;
        # Karlo and others feed it the states of CLIP's text transformer, and would need a second encoder to be the paper's.
        if cfg.frozen_text is None:
            self.caption = CaptionEmbedding(cfg.vocab_size, cfg.context_length, cfg.width, cfg.eot_id)
        else:
            self.caption = FrozenText(cfg.frozen_text, cfg.width, cfg.eot_id)
            self.caption_position = nn.Parameter(torch.empty(cfg.context_length, cfg.width))
        self.z_txt_proj = nn.Linear(cfg.clip_dim, cfg.width)
        # mini: how the timestep becomes an embedding, and that places are learned, is Karlo's way; the paper says nothing.
        self.time_embed = nn.Sequential(nn.Linear(cfg.width, cfg.width), nn.SiLU(), nn.Linear(cfg.width, cfg.width))
        self.z_img_proj = nn.Linear(cfg.clip_dim, cfg.width)
        self.query = nn.Parameter(torch.empty(cfg.width))
        # mini: the paper does not say what stands for dropped text: a learned vector in z_txt's place, padding in the caption's.
        self.null_z_txt = nn.Parameter(torch.empty(cfg.width)) if cfg.frozen_text is None else None
        self.position = nn.Parameter(torch.empty(4, cfg.width))            # of the four items behind the caption
        self.transformer = Transformer(cfg.layers, cfg.width, cfg.heads, causal=True)
        self.ln_final = nn.LayerNorm(cfg.width)
        self.head = Head(cfg) if cfg.head_layers else None
        self.out_proj = nn.Linear(cfg.head_width if cfg.head_layers else cfg.width, cfg.clip_dim)
        self.init_weights()

    def init_weights(self):
        """Small normals for what is learned freely; the rest as torch and Transformer.init_weights have it."""
        for name in ("query", "null_z_txt", "position", "caption_position"):
            if getattr(self, name, None) is not None:
                nn.init.normal_(getattr(self, name), std=0.02)

    def scale(self, z_img):
        """z_img (B, D), as CLIP gives it -> what diffusion works on: each coordinate has a spread of std_per_dim.

        App. C multiplies unit vectors of 1024 dimensions by 17.2; at another width, √D · std_per_dim keeps each coordinate's spread.
        """
        return self.whitening(z_img) * self.cfg.std_per_dim

    def unscale(self, x_start):
        """The inverse of `scale`, back on the sphere CLIP lives on (unless `unit_norm` is off): (B, D) -> (B, D)."""
        # mini: embeddings are normalised to the unit sphere; the paper divides by the scale and leaves the norm as it comes.
        z = self.whitening.inverse(x_start / self.cfg.std_per_dim)
        return F.normalize(z, dim=-1) if self.cfg.unit_norm else z

    def condition(self, tokens, z_txt, keep=None):
        """All that does not depend on x_t and t, computed once per picture: tokens (B, L), z_txt (B, D); keep (B,) bool: text kept?

        With frozen text, z_txt is taken from the frozen CLIP, which has one for dropped text too; the argument is then not looked at.

        -> the caption (B, L, W), the place of z_txt (B, W), and a mask (B, L + 4) of the places that may be seen, or None: all.
        """
        if self.cfg.frozen_text is None:
            caption, mask = self.caption(tokens, keep), None
        else:
            states, z_txt, mask = self.caption(tokens, keep)
            caption, mask = states + self.caption_position, F.pad(mask, (0, 4), value=True)
        # mini: the paper does not scale z_txt. A unit vector is tiny per coordinate; whitening (unfitted: √D) gives it unit variance.
        text = self.z_txt_proj(self.whitening_txt(z_txt))                  # (B, W)
        if keep is not None and self.null_z_txt is not None:
            text = torch.where(keep[:, None], text, self.null_z_txt)
        return caption, text, mask

    def forward(self, x_t, t, condition, cache=None):
        """Predicted (scaled) z_img (B, D) from the noised x_t (B, D), t (B,) and what `condition` returned.

        cache: what `read` made of that condition. Then only the places behind the text are computed: 3 of L + 4.
        """
        caption, text, mask = condition
        time = self.time_embed(timestep_embedding(t, self.cfg.width))      # (B, W)
        items = [time, self.z_img_proj(x_t), self.query.expand(len(x_t), -1)]
        sequence = torch.stack(items, dim=1) + self.position[1:]           # (B, 3, W)
        if cache is None:
            sequence = torch.cat([self.text_places(caption, text), sequence], dim=1)           # (B, L + 4, W)
        else:
            cache = [list(layer) for layer in cache]                       # a copy: the next x_t has the same text before it, and no other x_t
        query = self.transformer(sequence, cache, mask, place=-1)[:, 0]    # (B, W)
        found = self.ln_final(query)
        if self.head is not None:
            found = self.head(found, time)                                 # (B, head_width)
        return self.out_proj(found).float()                                # guidance magnifies rounding

    def text_places(self, caption, text):
        """The first L + 1 places of the sequence, (B, L + 1, W)."""
        return torch.cat([caption, (text + self.position[0])[:, None]], dim=1)

    def read(self, condition):
        """The keys and values of caption and z_txt in every layer. No step changes them: the mask is causal, and x_t and t come behind."""
        caption, text, mask = condition
        cache = self.transformer.new_cache()
        self.transformer(self.text_places(caption, text), cache, None if mask is None else mask[:, :-3], place=-1)
        return cache

    def loss(self, z_img, z_txt, tokens, generator=None):
        """L_prior, a scalar (mean over coordinates): z_img, z_txt (B, D) of unit norm, tokens (B, L)."""
        B, device = len(z_img), z_img.device
        t, _ = self.timestep_sampler.sample(B, generator, device)
        keep = draw_rows(torch.rand, (B,), generator, device) >= self.cfg.text_drop
        x_start = self.scale(z_img)
        noise = randn_like(x_start, generator)
        x_t = self.diffusion.q_sample(x_start, t, noise)
        # x_t stays in the row whose text is dropped: "unconditional" still means denoising this very x_t.
        raw = self(x_t, t, self.condition(tokens, z_txt, keep))
        return self.diffusion.loss(raw, x_start, x_t, t, noise, objective="x_start").mean()

    def measure(self, z_img, z_txt):
        """Fits what is fixed before training to the training embeddings (N, D): the whitenings, if there are to be any."""
        if self.cfg.whiten_z:
            self.whitening.fit(z_img)
            self.whitening_txt.fit(z_txt)

    @torch.no_grad()
    def measure_variance(self, z_img, z_txt, tokens, generator=None, points=50):
        """Estimates `cov` (T,) after training, from N examples at `points` timesteps; in between it is interpolated (Analytic-DPM).

        cov_t = E‖x_0‖² / D − E‖x̂_0(x_t)‖² / D, both about the mean: what of the data's variance the prediction leaves unexplained. It is
        cut to what it can be of a perfect prediction: at least 0, at most all, and at most (1−ᾱ)/ᾱ, which x_t / √ᾱ would leave.
        """
        # mini: the paper does not say how guidance enters, nor of how many pictures it is estimated: the unguided prediction; stages.py, 1,024.
        x_start = self.scale(z_img)
        mean, total = x_start.mean(0), x_start.var(0, correction=0).mean()
        at = torch.linspace(0, self.cfg.num_timesteps - 1, min(points, self.cfg.num_timesteps)).round()
        found = []
        for t in at.long().tolist():
            t = torch.full((len(x_start),), t, device=x_start.device)
            x_t = self.diffusion.q_sample(x_start, t, randn_like(x_start, generator))
            rows = zip(*(part.split(256) for part in (x_t, t, tokens, z_txt)))
            found.append(total - (torch.cat([self(x, t, self.condition(*text)) for x, t, *text in rows]) - mean).square().mean())
        steps = np.interp(np.arange(self.cfg.num_timesteps), at.numpy(), torch.stack(found).clamp(min=0).cpu().numpy())
        self.cov.copy_(torch.from_numpy(steps))
        self.cov.copy_(self.cov.minimum(total).minimum(1 / self.diffusion.snr))

    def denoiser(self, tokens, z_txt, guidance=1.0):
        """denoise(x, t) -> ModelOutput for these captions; guidance acts on the predicted x_0 and drops the text only."""
        B = len(tokens)
        if guidance == 1.0:
            condition = self.condition(tokens, z_txt)
        else:                                                              # a second half without its text
            condition = self.condition(tokens.repeat(2, 1), z_txt.repeat(2, 1), torch.arange(2 * B, device=tokens.device) < B)
        cache = self.read(condition)

        def denoise(x, t):
            if guidance == 1.0:
                raw = self(x, t, condition, cache)
            else:
                raw = guide(*self(torch.cat([x, x]), torch.cat([t, t]), condition, cache).chunk(2), guidance)
            # mini: the paper does not say whether the predicted x_0 is bounded. It is not: an embedding has no range as pixels have.
            return self.diffusion.interpret(raw, x, t, objective="x_start", clip=self.cfg.clip_x_start)

        return denoise

    @torch.no_grad()
    def sample(self, tokens, z_txt, guidance=None, steps=None, generator=None, progress=False):
        """z_img (B, D) for captions tokens (B, L) with z_txt (B, D): the best of `candidates` samples by z_img · z_txt."""
        cfg, k = self.cfg, self.cfg.candidates
        guidance = cfg.guidance if guidance is None else guidance
        denoise = self.denoiser(tokens.repeat_interleave(k, 0), z_txt.repeat_interleave(k, 0), guidance)
        timesteps = strided_timesteps(cfg.num_timesteps, cfg.sampling_steps if steps is None else steps)
        step = analytic_step(self.cov) if cfg.sampler == "analytic" else ddpm_step
        x_T = randn_like(torch.empty(len(tokens) * k, cfg.clip_dim, device=z_txt.device), generator)
        x_0 = sample_loop(self.diffusion, denoise, x_T, step, timesteps, generator, progress)
        z_img = self.unscale(x_0).unflatten(0, (-1, k))                    # (B, k, D)
        best = (z_img * z_txt[:, None]).sum(-1).argmax(dim=1)              # (B,)
        return z_img[torch.arange(len(tokens), device=best.device), best]
