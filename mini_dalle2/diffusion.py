"""Gaussian diffusion: destroying data with noise, step by known step, and the learned way back.

Forward    x_t = √ᾱ_t · x_0 + √(1−ᾱ_t) · ε,   ε ~ N(0, I),   ᾱ_t = Π (1−β_i)                                        (DDPM Eq. 4)
Backward   p(x_{t−1} | x_t) = N(μ_θ, Σ_θ), where μ_θ is the posterior mean q(x_{t−1} | x_t, x̂_0) at the predicted x̂_0  (DDPM Eq. 7)

The network predicts ε (decoder and upsamplers of the paper), x_0 (the prior), or v = √ᾱ·ε − √(1−ᾱ)·x_0; at a given x_t each is a
linear function of the others, so samplers (sampling.py) see all of them at once as a `ModelOutput`.

Steps are 0-based, t = 0..T−1, as in the code of the papers; their formulas count 1..T. ᾱ "before step 0" is 1.
Shapes: x (B, ...) of any kind (images, embeddings); t (B,) integer.
References: DDPM (2006.11239); improved DDPM (2102.09672) for cosine schedule, learned variance, L_hybrid; min-SNR weighting (2303.09556).
Read next: sampling.py.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from .runtime.checks import check_choice, check_positive, check_range
from .runtime.noise import draw_rows, noise_device

SCHEDULES = ("cosine", "linear")
OBJECTIVES = ("eps", "x_start", "v")                                       # what a network may predict
# mini: the paper weighs the error alike at all t, "none". "min_snr" bounds the weight of nearly clean x_t, where least is to be learned;
# mini: "snr_plus_1" also keeps some weight where x_t is nearly noise, and where it is decided what the picture shows.
WEIGHTINGS = ("none", "min_snr", "snr_plus_1")                             # of its squared error; see GaussianDiffusion.loss


class ModelOutput(NamedTuple):
    """What a denoiser knows at x_t. x_start, eps: like x_t; frac: like x_t, 0 gives variance β̃_t, 1 gives β_t (None: β̃_t)."""

    x_start: torch.Tensor
    eps: torch.Tensor
    frac: torch.Tensor | None = None


def make_betas(schedule, num_timesteps):
    """β_t of the schedule "linear" (DDPM §4) or "cosine" (improved DDPM Eq. 17), float64 (T,).

    Linear: evenly from 1e-4 to 0.02 at T = 1000, rescaled by 1000/T. Cosine: ᾱ(u) = cos²((u + 0.008) / 1.008 · π/2), β capped at 0.999.
    """
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "linear":
        scale = 1000 / num_timesteps
        if num_timesteps <= 20:
            raise ValueError(f"the linear schedule needs more than 20 timesteps, not {num_timesteps}: β would reach 1")
        return np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)
    u = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


class GaussianDiffusion(nn.Module):
    """The fixed numbers of a diffusion process and the formulas that need them; computed in float64, kept in float32.

    With `timesteps` (ascending indices into the full schedule) it is the *strided* process over those steps only: ᾱ stays,
    β'_k = 1 − ᾱ_{S_k} / ᾱ_{S_{k−1}} (improved DDPM §4), and `timestep_map` gives the original index that the network is shown.
    """

    def __init__(self, schedule="cosine", num_timesteps=1000, timesteps=None):
        super().__init__()
        self.schedule, self.full_length = schedule, num_timesteps
        betas = make_betas(schedule, num_timesteps)
        kept = list(range(num_timesteps)) if timesteps is None else list(timesteps)
        alphas_cumprod = np.cumprod(1 - betas)[kept]
        alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        betas = 1 - alphas_cumprod / alphas_cumprod_prev
        self.num_timesteps = len(kept)

        def buffer(name, value):
            self.register_buffer(name, torch.tensor(np.asarray(value), dtype=torch.float32), persistent=False)

        self.register_buffer("timestep_map", torch.tensor(kept), persistent=False)
        buffer("betas", betas)
        buffer("alphas_cumprod", alphas_cumprod)
        buffer("alphas_cumprod_prev", alphas_cumprod_prev)
        buffer("one_minus_alphas_cumprod_prev", 1 - alphas_cumprod_prev)   # in float32 the difference would lose its digits
        buffer("sqrt_alphas_cumprod", np.sqrt(alphas_cumprod))
        buffer("sqrt_one_minus_alphas_cumprod", np.sqrt(1 - alphas_cumprod))
        buffer("snr", alphas_cumprod / (1 - alphas_cumprod))
        # The posterior q(x_{t-1} | x_t, x_0), DDPM Eq. 6-7. Its variance is 0 at the first step; the log is cut there
        # by reusing the second step's value (improved DDPM's code), so that log-interpolation stays finite.
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        clipped = np.append(posterior_variance[1], posterior_variance[1:]) if len(kept) > 1 else np.maximum(betas, 1e-20)
        buffer("posterior_variance", posterior_variance)
        buffer("posterior_log_variance", np.log(clipped))
        buffer("log_betas", np.log(betas))
        buffer("posterior_mean_coef1", betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod))
        buffer("posterior_mean_coef2", np.sqrt(1 - betas) * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod))

    def strided(self, timesteps):
        """The process over these original indices only (ascending), on the same device."""
        return GaussianDiffusion(self.schedule, self.full_length, timesteps).to(self.betas.device)

    # ------------------------------------------------------------------ forward process and its posterior

    def q_sample(self, x_start, t, noise):
        """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (DDPM Eq. 4): x_start, noise (B, ...), t (B,)."""
        return at(self.sqrt_alphas_cumprod, t, x_start) * x_start + at(self.sqrt_one_minus_alphas_cumprod, t, x_start) * noise

    def q_posterior(self, x_start, x_t, t):
        """Mean and (clipped) log variance of q(x_{t−1} | x_t, x_0) (DDPM Eq. 6-7)."""
        mean = at(self.posterior_mean_coef1, t, x_t) * x_start + at(self.posterior_mean_coef2, t, x_t) * x_t
        return mean, at(self.posterior_log_variance, t, x_t).expand_as(x_t)

    # ------------------------------------------------------------------ ε, x_0 and v are each other's linear images

    def x_start_from_eps(self, x_t, t, eps):
        """x_0 = (x_t − √(1−ᾱ)·ε) / √ᾱ."""
        return (x_t - at(self.sqrt_one_minus_alphas_cumprod, t, x_t) * eps) / at(self.sqrt_alphas_cumprod, t, x_t)

    def eps_from_x_start(self, x_t, t, x_start):
        """ε = (x_t − √ᾱ·x_0) / √(1−ᾱ)."""
        return (x_t - at(self.sqrt_alphas_cumprod, t, x_t) * x_start) / at(self.sqrt_one_minus_alphas_cumprod, t, x_t)

    def v_from(self, x_start, t, noise):
        """v = √ᾱ·ε − √(1−ᾱ)·x_0 (2202.00512 App. D)."""
        return at(self.sqrt_alphas_cumprod, t, noise) * noise - at(self.sqrt_one_minus_alphas_cumprod, t, noise) * x_start

    def x_start_from_v(self, x_t, t, v):
        """x_0 = √ᾱ·x_t − √(1−ᾱ)·v."""
        return at(self.sqrt_alphas_cumprod, t, x_t) * x_t - at(self.sqrt_one_minus_alphas_cumprod, t, x_t) * v

    def interpret(self, raw, x_t, t, objective="eps", learned_variance=False, clip=None):
        """The network's raw output -> ModelOutput. raw (B, C, ...), or (B, 2C, ...) with learned variance: first prediction, then v in
        frac = (v + 1) / 2. clip: bound |x̂_0| by this number; ε is then recomputed to agree (DDIM would drift otherwise)."""
        check_choice("objective", objective, OBJECTIVES)
        frac = None
        if learned_variance:
            raw, variance = raw.chunk(2, dim=1)
            frac = (variance + 1) / 2
        if objective == "eps":
            x_start = self.x_start_from_eps(x_t, t, raw)
        elif objective == "v":
            x_start = self.x_start_from_v(x_t, t, raw)
        else:
            x_start = raw
        if clip is not None:
            x_start = x_start.clamp(-clip, clip)
        eps = raw if objective == "eps" and clip is None else self.eps_from_x_start(x_t, t, x_start)
        return ModelOutput(x_start, eps, frac)

    def p_mean_variance(self, out, x_t, t):
        """Mean and log variance of p(x_{t−1} | x_t). Learned range: log Σ = frac·log β_t + (1−frac)·log β̃_t (improved DDPM Eq. 15)."""
        mean, min_log = self.q_posterior(out.x_start, x_t, t)
        if out.frac is None:
            return mean, min_log
        return mean, out.frac * at(self.log_betas, t, x_t) + (1 - out.frac) * min_log

    # ------------------------------------------------------------------ losses

    def loss(self, raw, x_start, x_t, t, noise, objective="eps", weighting="none", learned_variance=False,
             vlb_weight=0.001):
        """Loss per example (B,): weighted L_simple, plus vlb_weight · T · L_t with a detached mean when the variance is learned (L_hybrid).

        weighting "none": plain squared error of what the network predicts (DDPM Eq. 14 for ε; the paper's L_prior for x_0).
        weighting "min_snr": the x_0 error weighs min(SNR, 5) whatever the network predicts (2303.09556).
        weighting "snr_plus_1": it weighs min(SNR + 1, 5): like v's plain error (2202.00512 §4), but cut where only fine noise is left.
        """
        check_choice("objective", objective, OBJECTIVES)
        prediction = raw.chunk(2, dim=1)[0] if learned_variance else raw
        target = {"eps": noise, "x_start": x_start}[objective] if objective != "v" else self.v_from(x_start, t, noise)
        loss = (prediction - target).square().flatten(1).mean(1)           # (B,)
        loss = loss * self.loss_weight(t, objective, weighting)
        if learned_variance:
            frozen = torch.cat([prediction.detach(), raw.chunk(2, dim=1)[1]], dim=1)   # the variance learns, the mean does not
            out = self.interpret(frozen, x_t, t, objective, learned_variance=True)
            loss = loss + vlb_weight * self.num_timesteps * self.vlb_term(out, x_start, x_t, t)
        return loss

    def loss_weight(self, t, objective, weighting):
        """Factor per example (B,) on the squared error in the space of `objective`. See `loss`."""
        check_choice("loss weighting", weighting, WEIGHTINGS)
        if weighting == "none":
            return torch.ones_like(t, dtype=torch.float32)
        check_choice("objective", objective, OBJECTIVES)
        snr = self.snr[t]
        of_x_start = (snr if weighting == "min_snr" else snr + 1).clamp(max=5.0)
        return of_x_start / {"eps": snr, "x_start": torch.ones_like(snr), "v": snr + 1}[objective]

    def vlb_term(self, out, x_start, x_t, t):
        """One term of the variational bound per example, in bits per dimension (B,): KL(q‖p) for t > 0, −log p(x_0 | x_1) at t = 0."""
        true_mean, true_log_var = self.q_posterior(x_start, x_t, t)
        mean, log_var = self.p_mean_variance(out, x_t, t)
        kl = normal_kl(true_mean, true_log_var, mean, log_var)
        nll = -discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_var)
        term = torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))
        return term / math.log(2)


def check_diffusion(cfg):
    """Raises ValueError unless the diffusion settings of a model's configuration can work, those of these fields that it has."""
    for key, choices in (("schedule", SCHEDULES), ("objective", OBJECTIVES), ("weighting", WEIGHTINGS)):
        if hasattr(cfg, key):
            check_choice(key, getattr(cfg, key), choices)
    check_positive(cfg, "num_timesteps")
    check_range(cfg, 1, cfg.num_timesteps, "sampling_steps")
    make_betas(cfg.schedule, cfg.num_timesteps)                            # the linear schedule has a condition of its own


def at(buffer, t, like):
    """buffer[t] for t (B,), shaped (B, 1, ..., 1) so that it multiplies `like`."""
    return buffer[t].view(-1, *[1] * (like.dim() - 1))


def normal_kl(mean1, log_var1, mean2, log_var2):
    """KL(N(mean1, e^log_var1) ‖ N(mean2, e^log_var2)) per element, in nats."""
    return 0.5 * (log_var2 - log_var1 - 1 + (log_var1 - log_var2).exp() + (mean1 - mean2).square() * (-log_var2).exp())


def discretized_gaussian_log_likelihood(x, mean, log_scale):
    """log-probability per element, in nats, of 8-bit images x in [-1, 1]: the Gaussian's mass in x ± 1/255, tails open at ±1 (DDPM Eq. 13)."""
    def cdf(z):
        return 0.5 * torch.erfc(-z / math.sqrt(2))                         # exact far into the left tail, unlike ½(1 + erf)

    precision, error = (-log_scale).exp(), x - mean
    lower_tail = cdf((error + 1 / 255) * precision)                        # all the mass below the bin's upper edge
    upper_tail = cdf((1 / 255 - error) * precision)                        # all above its lower edge
    # By symmetry the bin is taken on the left side, where a float can still tell two small tails apart.
    left = -error.abs()
    inside = cdf((left + 1 / 255) * precision) - cdf((left - 1 / 255) * precision)
    mass = torch.where(x < -0.999, lower_tail, torch.where(x > 0.999, upper_tail, inside))
    return mass.clamp(min=1e-12).log()


def randn_like(x, generator=None):
    """Gaussian noise like x, drawn on the generator's device: a CPU generator gives the same numbers whatever device x is on.

    `generator` may be a list, one per picture: then each picture's noise is its own affair, the same in any company. x may hold
    several rows per generator (the prior's candidates).
    """
    return draw_rows(functools.partial(torch.randn, dtype=x.dtype), x.shape, generator, x.device)


# ---------------------------------------------------------------------- which t to train on

# mini: the paper does not say how t is drawn; its L_prior, an expectation over t, reads as uniformly.
class UniformSampler(nn.Module):
    """t ~ U{0..T−1}, every loss weighs 1."""

    def __init__(self, num_timesteps):
        super().__init__()
        self.num_timesteps = num_timesteps

    def sample(self, batch, generator=None, device=None):
        """-> t (B,) and the factor (B,) on each loss."""
        t = draw_rows(functools.partial(torch.randint, self.num_timesteps), (batch,), generator, device)
        return t, torch.ones(batch, device=device)

    def update(self, t, losses):
        """Uniform sampling learns nothing from the losses."""


class LossAwareSampler(UniformSampler):
    """p_t ∝ √E[L_t²] from the last `history` losses of each t, mixed with 0.1 % uniform; the loss weighs 1/(T p_t) (improved DDPM Eq. 18).

    Uniform until every t has a full history. Meant for pure L_vlb, whose terms differ by orders of magnitude. The history is part of
    the model's state, so that a resumed run goes on with it.
    """

    def __init__(self, num_timesteps, history=10, uniform=0.001):
        super().__init__(num_timesteps)
        self.uniform = uniform
        self.register_buffer("losses", torch.zeros(num_timesteps, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.long))

    def probabilities(self):
        """The present p_t, float64 (T,), sums to 1."""
        T, history = self.losses.shape
        if (self.counts < history).any():
            return torch.full_like(self.losses[:, 0], 1 / T)
        p = self.losses.square().mean(1).sqrt()
        return p / p.sum() * (1 - self.uniform) + self.uniform / T

    def sample(self, batch, generator=None, device=None):
        p = self.probabilities()
        p = p.to(noise_device(generator, device))
        t = torch.multinomial(p, batch, replacement=True, generator=generator)
        return t.to(device), (1 / (self.num_timesteps * p[t])).float().to(device)

    def update(self, t, losses):
        """Remember the (unweighted) losses (B,) of steps t (B,), the oldest of each t forgotten first."""
        for step, loss in zip(t.tolist(), losses.detach().tolist()):
            self.losses[step, self.counts[step] % self.losses.shape[1]] = loss
            self.counts[step] += 1


TIMESTEP_SAMPLERS = {"uniform": UniformSampler, "loss_aware": LossAwareSampler}
