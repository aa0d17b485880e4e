"""The diffusion prior P(z_img | y): from a caption to the CLIP embedding of a matching picture.

    L_prior = E_{t, x_t} ‖ f_θ(x_t, t, y) − z_img ‖²      (unCLIP Eq. 2: it predicts x_0, not ε)

f_θ is a causal transformer over this sequence, whose last output is the prediction (§2.2):

    caption tokens | CLIP text embedding z_txt | timestep | noised z_img | final query

z_img is scaled up to the variance of pixels before it is noised, so that a schedule made for
images fits. The caption (tokens and z_txt) is dropped 10 % of the time for classifier-free
guidance. Of two samples the one closer to z_txt is kept.

Shapes: B batch, L context length, W width, D = clip_dim. The paper's z_img at time t is called
x_t here, as everywhere in diffusion code.
References: unCLIP (2204.06125) §2.2, App. C, Table 3. Read next: unet.py, decoder.py.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .diffusion import GaussianDiffusion, check_diffusion
from .runtime.checks import (
    check_above_zero, check_captions, check_choice, check_divisible, check_positive, check_range)
from .runtime.noise import rand, randint, randn, randn_like
from .sampling import analytic_step, ddpm_step, guide, sample_loop, strided_timesteps
from .transformer import CaptionEmbedding, Transformer, timestep_embedding


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
    # §2.2
    text_drop: float = 0.1
    # Std of one coordinate of the scaled z_img: App. C's 17.2 at 1024 dimensions, 17.2 / √1024.
    std_per_dim: float = 0.5375
    schedule: str = "cosine"
    num_timesteps: int = 1000
    sampling_steps: int = 64
    # Variance of a sampling step: "analytic" (Table 3), or "ddpm", the fixed β̃.
    sampler: str = "analytic"
    # mini: the paper does not give the prior's guidance scale. The default of 1 is no guidance.
    guidance: float = 1.0
    # §2.2: sample two, keep the one with the higher z_img · z_txt.
    candidates: int = 2

    def __post_init__(self):
        check_captions(self)
        check_positive(self, "clip_dim", "width", "layers", "heads", "candidates")
        check_range(self, 0, 1, "text_drop")
        check_range(self, 0, math.inf, "guidance")
        check_divisible(self, "width", "heads")
        if self.width % 2:
            raise ValueError(f"width {self.width} is odd: the timestep's embedding is half cosines "
                             f"and half sines, so choose an even width")
        check_above_zero(self, "std_per_dim")
        check_choice("sampler", self.sampler, ("analytic", "ddpm"))
        check_diffusion(self)


class DiffusionPrior(nn.Module):
    """f_θ, its loss and its sampler."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.diffusion = GaussianDiffusion(cfg.schedule, cfg.num_timesteps)
        # Variance of x_0 given x_t; see `measure_variance`.
        self.register_buffer("cov", torch.zeros(cfg.num_timesteps))
        self.add_caption()
        self.z_txt_proj = nn.Linear(cfg.clip_dim, cfg.width)
        # mini: the paper does not say how t is embedded, nor whether positions are learned. We do
        # both as Karlo does.
        self.time_embed = nn.Sequential(
            nn.Linear(cfg.width, cfg.width), nn.SiLU(), nn.Linear(cfg.width, cfg.width))
        self.z_img_proj = nn.Linear(cfg.clip_dim, cfg.width)
        self.query = nn.Parameter(torch.empty(cfg.width))
        # mini: the paper does not say what replaces dropped text. Here a learned vector replaces
        # z_txt, and padding replaces the caption.
        self.null_z_txt = nn.Parameter(torch.empty(cfg.width))
        # Of the four items behind the caption.
        self.position = nn.Parameter(torch.empty(4, cfg.width))
        self.transformer = Transformer(cfg.layers, cfg.width, cfg.heads, causal=True)
        self.ln_final = nn.LayerNorm(cfg.width)
        self.add_output()
        self.init_weights()

    def add_caption(self):
        """Add the layers that read the caption."""
        cfg = self.cfg
        # mini: the paper does not say what encodes the text (§2.2). Here this same transformer
        # reads embedded tokens, which fits the size in Table 3.
        self.caption = CaptionEmbedding(
            cfg.vocab_size, cfg.context_length, cfg.width, cfg.eot_id)

    def add_output(self):
        """Add the layers behind the final query."""
        self.out_proj = nn.Linear(self.cfg.width, self.cfg.clip_dim)

    def init_weights(self):
        """Draw the free vectors from small normals. torch and Transformer initialise the rest."""
        for vector in (self.query, self.null_z_txt, self.position):
            nn.init.normal_(vector, std=0.02)

    def measure(self, z_img, z_txt):
        """Fit what is fixed before training to the training embeddings (N, D): nothing here."""

    def scale(self, z_img):
        """Scale z_img (B, D) to what diffusion works on: each coordinate has std std_per_dim.

        App. C multiplies unit vectors of 1024 dimensions by 17.2 = √1024 · 0.5375.
        """
        return z_img * math.sqrt(self.cfg.clip_dim) * self.cfg.std_per_dim

    def unscale(self, x_start):
        """Invert `scale`, (B, D) -> (B, D), back onto CLIP's unit sphere."""
        # mini: embeddings are normalised to unit length. The paper only divides by the scale.
        z_img = x_start / self.cfg.std_per_dim / math.sqrt(self.cfg.clip_dim)
        return F.normalize(z_img, dim=-1)

    def scale_text(self, z_txt):
        """Scale z_txt (B, D), a unit vector, to unit variance per coordinate."""
        # mini: the paper does not scale z_txt. A linear layer learns faster from unit variance.
        return z_txt * math.sqrt(self.cfg.clip_dim)

    def condition(self, tokens, z_txt, keep=None):
        """Compute what depends on neither x_t nor t, once per picture.

        tokens (B, L), z_txt (B, D), keep (B,) bool: False drops the text.
        Returns the caption (B, L, W), the item of z_txt (B, W), and a mask (B, L + 4) of the
        places that may be seen; None shows all places.
        """
        caption = self.caption(tokens, keep)                               # (B, L, W)
        text = self.z_txt_proj(self.scale_text(z_txt))                     # (B, W)
        if keep is not None:
            text = torch.where(keep[:, None], text, self.null_z_txt)
        return caption, text, None

    def forward(self, x_t, t, condition, cache=None):
        """Predict the scaled z_img (B, D) from x_t (B, D), t (B,) and what `condition` returned.

        cache: what `read` made of this condition. With it, only the 3 places behind the text are
        computed instead of L + 4.
        """
        caption, text, mask = condition
        time = self.time_embed(timestep_embedding(t, self.cfg.width))      # (B, W)
        items = [time, self.z_img_proj(x_t), self.query.expand(len(x_t), -1)]
        sequence = torch.stack(items, dim=1) + self.position[1:]           # (B, 3, W)
        if cache is None:
            text_places = self.text_places(caption, text)                  # (B, L + 1, W)
            sequence = torch.cat([text_places, sequence], dim=1)           # (B, L + 4, W)
        else:
            # A copy: the next x_t has the same text before it, but not this x_t.
            cache = [list(layer) for layer in cache]
        query = self.transformer(sequence, cache, mask, place=-1)[:, 0]    # (B, W)
        # Guidance magnifies rounding, hence float32.
        return self.predict(self.ln_final(query), time).float()

    def predict(self, query, time):
        """Turn the final query's state (B, W) into the scaled z_img (B, D).

        time (B, W), the timestep's embedding, is for subclasses.
        """
        return self.out_proj(query)

    def text_places(self, caption, text):
        """Return the first L + 1 places of the sequence, (B, L + 1, W)."""
        return torch.cat([caption, (text + self.position[0])[:, None]], dim=1)

    def read(self, condition):
        """Return the keys and values of caption and z_txt in every layer.

        They are the same at every sampling step, because the mask is causal and x_t and t come
        behind the text.
        """
        caption, text, mask = condition
        cache = self.transformer.new_cache()
        text_mask = None if mask is None else mask[:, :-3]                 # (B, L + 1)
        self.transformer(self.text_places(caption, text), cache, text_mask, place=-1)
        return cache

    def loss(self, z_img, z_txt, tokens, generator=None):
        """Return L_prior, a scalar, the mean over coordinates.

        z_img, z_txt (B, D) of unit norm, tokens (B, L).
        """
        B = len(z_img)
        t = randint(self.cfg.num_timesteps, (B,), generator, z_img.device)
        keep = rand((B,), generator, z_img.device) >= self.cfg.text_drop
        x_start = self.scale(z_img)
        noise = randn_like(x_start, generator)
        x_t = self.diffusion.q_sample(x_start, t, noise)
        # Only the text is dropped. x_t stays: "unconditional" still means denoising this x_t.
        raw = self(x_t, t, self.condition(tokens, z_txt, keep))
        return self.diffusion.loss(raw, x_start, x_t, t, noise, objective="x_start").mean()

    @torch.no_grad()
    def measure_variance(self, z_img, z_txt, tokens, generator=None, points=50):
        """Estimate `cov` (T,) after training, from N examples (Analytic-DPM).

        cov_t = E‖x_0‖² / D − E‖x̂_0(x_t)‖² / D, both about the mean: the part of the data's
        variance that the prediction leaves unexplained. It is measured at `points` timesteps and
        interpolated in between. It is then cut to what a perfect prediction could leave: at least
        0, at most all of the variance, at most (1−ᾱ)/ᾱ, which x_t / √ᾱ would leave.
        """
        # mini: the paper does not say whether guidance enters, nor how many examples are used.
        # Here the prediction is unguided; training/stages.py gives 1,024 examples.
        T = self.cfg.num_timesteps
        x_start = self.scale(z_img)
        mean = x_start.mean(0)                                             # (D,)
        total = x_start.var(0, correction=0).mean()
        measured_at = torch.linspace(0, T - 1, min(points, T)).round()
        unexplained = []
        for step in measured_at.long().tolist():
            t = torch.full((len(x_start),), step, device=x_start.device)
            x_t = self.diffusion.q_sample(x_start, t, randn_like(x_start, generator))
            parts = zip(x_t.split(256), t.split(256), tokens.split(256), z_txt.split(256))
            predicted = torch.cat([self(x, t_part, self.condition(tokens_part, z_part))
                                   for x, t_part, tokens_part, z_part in parts])
            unexplained.append(total - (predicted - mean).square().mean())
        unexplained = torch.stack(unexplained).clamp(min=0).cpu().numpy()
        every_step = np.interp(np.arange(T), measured_at.numpy(), unexplained)
        self.cov.copy_(torch.from_numpy(every_step))
        self.cov.copy_(self.cov.minimum(total).minimum(1 / self.diffusion.snr))

    def denoiser(self, tokens, z_txt, guidance=1.0):
        """Return denoise(x, t) -> ModelOutput for these captions, tokens (B, L), z_txt (B, D).

        Guidance acts on the predicted x_0 and drops the text only.
        """
        B = len(tokens)
        if guidance == 1.0:
            condition = self.condition(tokens, z_txt)
        else:
            # The second half of the batch loses its text.
            keep = torch.arange(2 * B, device=tokens.device) < B           # (2B,)
            condition = self.condition(tokens.repeat(2, 1), z_txt.repeat(2, 1), keep)
        cache = self.read(condition)

        def denoise(x, t):
            if guidance == 1.0:
                raw = self(x, t, condition, cache)
            else:
                both = self(torch.cat([x, x]), torch.cat([t, t]), condition, cache)
                cond, null = both.chunk(2)
                raw = guide(cond, null, guidance)
            return self.interpret(raw, x, t)

        return denoise

    def interpret(self, raw, x_t, t):
        """Turn a prediction (B, D) at x_t into a ModelOutput."""
        # mini: the paper does not say whether x̂_0 is bounded. Here it is not: an embedding has no
        # fixed range, as pixels have.
        return self.diffusion.interpret(raw, x_t, t, objective="x_start")

    @torch.no_grad()
    def sample(self, tokens, z_txt, guidance=None, steps=None, generator=None, progress=False):
        """Sample z_img (B, D) for captions, tokens (B, L), with z_txt (B, D).

        Of `candidates` samples for each caption, the one with the highest z_img · z_txt is kept.
        guidance, steps: None takes the configuration's. `generator`: one, or a list with one per
        caption.
        """
        cfg = self.cfg
        k = cfg.candidates
        guidance = cfg.guidance if guidance is None else guidance
        steps = cfg.sampling_steps if steps is None else steps
        denoise = self.denoiser(
            tokens.repeat_interleave(k, 0), z_txt.repeat_interleave(k, 0), guidance)
        step = analytic_step(self.cov) if cfg.sampler == "analytic" else ddpm_step
        timesteps = strided_timesteps(cfg.num_timesteps, steps)
        x_T = randn((len(tokens) * k, cfg.clip_dim), generator, z_txt.device)
        x_0 = sample_loop(self.diffusion, denoise, x_T, step, timesteps, generator, progress)
        z_img = self.unscale(x_0).unflatten(0, (-1, k))                    # (B, k, D)
        best = (z_img * z_txt[:, None]).sum(-1).argmax(dim=1)              # (B,)
        return z_img[torch.arange(len(tokens), device=best.device), best]
