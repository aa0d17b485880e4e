"""Gaussian diffusion: destroying data with noise in known steps, and the learned way back.

Forward    x_t = √ᾱ_t · x_0 + √(1−ᾱ_t) · ε,   ε ~ N(0, I),   ᾱ_t = Π (1−β_i)        (DDPM Eq. 4)
Backward   p(x_{t−1} | x_t) = N(μ_θ, Σ_θ)                                           (DDPM Eq. 7)
           μ_θ is the mean of the posterior q(x_{t−1} | x_t, x̂_0) at the predicted x̂_0

A network predicts ε (the paper's decoder and upsamplers), x_0 (the prior) or v = √ᾱ·ε − √(1−ᾱ)·x_0.
At a given x_t each is a linear function of the others. So a sampler (sampling.py) sees all of them
at once, as a `ModelOutput`.

Steps are 0-based here, t = 0..T−1, as in the code of the papers. Their formulas count 1..T. ᾱ
"before step 0" is 1.
Shapes: x (B, ...) of any kind (images, embeddings); t (B,) integer.
References: DDPM (2006.11239); improved DDPM (2102.09672) for the cosine schedule, the learned
variance and L_hybrid; min-SNR weighting (2303.09556). Read next: sampling.py.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from .runtime.checks import check_choice, check_positive, check_range
# For those who look for the noise ε beside the process that adds it.
from .runtime.noise import randn_like  # noqa: F401

SCHEDULES = ("cosine", "linear")
# What a network may predict.
OBJECTIVES = ("eps", "x_start", "v")
# Weights of the squared error; see GaussianDiffusion.loss.
# mini: the paper gives all t the same weight, "none". "min_snr" bounds the weight of nearly clean
# x_t, where there is least to learn.
# mini: "snr_plus_1" also keeps some weight where x_t is nearly noise. There the network decides
# what the picture shows.
WEIGHTINGS = ("none", "min_snr", "snr_plus_1")


class ModelOutput(NamedTuple):
    """What a denoiser knows at x_t. All three have the shape of x_t.

    frac: 0 gives the variance β̃_t, 1 gives β_t, None gives β̃_t.
    """

    x_start: torch.Tensor
    eps: torch.Tensor
    frac: torch.Tensor | None = None


def make_betas(schedule, num_timesteps):
    """Return β_t, float64 (T,), of the schedule "linear" (DDPM §4) or "cosine" (improved DDPM).

    linear: evenly from 1e-4 to 0.02 at T = 1000, rescaled by 1000/T.
    cosine: ᾱ(u) = cos²((u + 0.008) / 1.008 · π/2), β capped at 0.999 (improved DDPM Eq. 17).
    """
    check_choice("schedule", schedule, SCHEDULES)
    if schedule == "linear":
        scale = 1000 / num_timesteps
        if num_timesteps <= 20:
            raise ValueError(f"the linear schedule needs more than 20 timesteps, "
                             f"not {num_timesteps}: β would reach 1")
        return np.linspace(scale * 1e-4, scale * 0.02, num_timesteps, dtype=np.float64)
    u = np.arange(num_timesteps + 1, dtype=np.float64) / num_timesteps
    alpha_bar = np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)


class GaussianDiffusion(nn.Module):
    """The fixed numbers of a diffusion process and the formulas that need them.

    The numbers are computed in float64 and kept in float32. With `timesteps` (ascending indices
    into the full schedule) this is the *strided* process over these steps only (improved DDPM §4).
    ᾱ stays, β'_k = 1 − ᾱ_{S_k} / ᾱ_{S_{k−1}}, and `timestep_map` gives the original index, which
    the network is shown.
    """

    def __init__(self, schedule="cosine", num_timesteps=1000, timesteps=None):
        super().__init__()
        self.schedule = schedule
        self.full_length = num_timesteps
        kept = list(range(num_timesteps)) if timesteps is None else list(timesteps)
        self.num_timesteps = len(kept)
        betas = make_betas(schedule, num_timesteps)
        alphas_cumprod = np.cumprod(1 - betas)[kept]
        alphas_cumprod_prev = np.append(1.0, alphas_cumprod[:-1])
        betas = 1 - alphas_cumprod / alphas_cumprod_prev
        self.register_buffer("timestep_map", torch.tensor(kept), persistent=False)
        self.keep("betas", betas)
        self.keep("alphas_cumprod", alphas_cumprod)
        self.keep("alphas_cumprod_prev", alphas_cumprod_prev)
        # In float32 this difference would lose its digits.
        self.keep("one_minus_alphas_cumprod_prev", 1 - alphas_cumprod_prev)
        self.keep("sqrt_alphas_cumprod", np.sqrt(alphas_cumprod))
        self.keep("sqrt_one_minus_alphas_cumprod", np.sqrt(1 - alphas_cumprod))
        self.keep("snr", alphas_cumprod / (1 - alphas_cumprod))
        self.keep("log_betas", np.log(betas))
        # The posterior q(x_{t−1} | x_t, x_0), DDPM Eq. 6-7.
        posterior_variance = betas * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        self.keep("posterior_variance", posterior_variance)
        self.keep("posterior_mean_coef1",
                  betas * np.sqrt(alphas_cumprod_prev) / (1 - alphas_cumprod))
        self.keep("posterior_mean_coef2",
                  np.sqrt(1 - betas) * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod))
        # The posterior variance is 0 at the first step. Its logarithm takes the second step's value
        # there (improved DDPM's code), so that it stays finite.
        if len(kept) > 1:
            clipped = np.append(posterior_variance[1], posterior_variance[1:])
        else:
            clipped = np.maximum(betas, 1e-20)
        self.keep("posterior_log_variance", np.log(clipped))

    def keep(self, name, value):
        """Keep an array (T,) as a float32 buffer, which is no part of checkpoints."""
        value = torch.tensor(np.asarray(value), dtype=torch.float32)
        self.register_buffer(name, value, persistent=False)

    def strided(self, timesteps):
        """Return the process over these original indices (ascending), on the same device."""
        process = GaussianDiffusion(self.schedule, self.full_length, timesteps)
        return process.to(self.betas.device)

    # ------------------------------------------------------------ forward process and posterior

    def q_sample(self, x_start, t, noise):
        """x_t = √ᾱ_t·x_0 + √(1−ᾱ_t)·ε (DDPM Eq. 4): x_start, noise (B, ...), t (B,)."""
        a = at(self.sqrt_alphas_cumprod, t, x_start)
        b = at(self.sqrt_one_minus_alphas_cumprod, t, x_start)
        return a * x_start + b * noise

    def q_posterior(self, x_start, x_t, t):
        """Return mean and (clipped) log variance of q(x_{t−1} | x_t, x_0) (DDPM Eq. 6-7)."""
        of_x_start = at(self.posterior_mean_coef1, t, x_t)
        of_x_t = at(self.posterior_mean_coef2, t, x_t)
        mean = of_x_start * x_start + of_x_t * x_t
        return mean, at(self.posterior_log_variance, t, x_t).expand_as(x_t)

    # ------------------------------------------------------------ from ε, x_0 or v to the others

    def x_start_from_eps(self, x_t, t, eps):
        """x_0 = (x_t − √(1−ᾱ)·ε) / √ᾱ."""
        a = at(self.sqrt_alphas_cumprod, t, x_t)
        b = at(self.sqrt_one_minus_alphas_cumprod, t, x_t)
        return (x_t - b * eps) / a

    def eps_from_x_start(self, x_t, t, x_start):
        """ε = (x_t − √ᾱ·x_0) / √(1−ᾱ)."""
        a = at(self.sqrt_alphas_cumprod, t, x_t)
        b = at(self.sqrt_one_minus_alphas_cumprod, t, x_t)
        return (x_t - a * x_start) / b

    def v_from(self, x_start, t, noise):
        """v = √ᾱ·ε − √(1−ᾱ)·x_0 (2202.00512 App. D)."""
        a = at(self.sqrt_alphas_cumprod, t, noise)
        b = at(self.sqrt_one_minus_alphas_cumprod, t, noise)
        return a * noise - b * x_start

    def x_start_from_v(self, x_t, t, v):
        """x_0 = √ᾱ·x_t − √(1−ᾱ)·v."""
        a = at(self.sqrt_alphas_cumprod, t, x_t)
        b = at(self.sqrt_one_minus_alphas_cumprod, t, x_t)
        return a * x_t - b * v

    def interpret(self, raw, x_t, t, objective="eps", learned_variance=False, clip=None):
        """Turn a network's raw output into a ModelOutput.

        raw (B, C, ...); with a learned variance (B, 2C, ...), first the prediction, then v in
        frac = (v + 1) / 2. clip: bound |x̂_0| by this number. ε is then computed again to agree,
        because DDIM would drift otherwise.
        """
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
        if objective == "eps" and clip is None:
            eps = raw
        else:
            eps = self.eps_from_x_start(x_t, t, x_start)
        return ModelOutput(x_start, eps, frac)

    def p_mean_variance(self, out, x_t, t):
        """Return mean and log variance of p(x_{t−1} | x_t).

        A learned variance lies in log Σ = frac·log β_t + (1−frac)·log β̃_t (improved DDPM Eq. 15).
        """
        mean, min_log = self.q_posterior(out.x_start, x_t, t)
        if out.frac is None:
            return mean, min_log
        max_log = at(self.log_betas, t, x_t)
        return mean, out.frac * max_log + (1 - out.frac) * min_log

    # ------------------------------------------------------------ losses

    def loss(self, raw, x_start, x_t, t, noise, objective="eps", weighting="none",
             vlb_weight=None):
        """Return the loss of each example, (B,): weighted L_simple, or L_hybrid.

        vlb_weight: for a network that also learns the variance. L_hybrid adds vlb_weight · T · L_t,
        in which the mean is detached (the paper's weight is 0.001). None: no learned variance.
        weighting "none": plain squared error of what the network predicts (DDPM Eq. 14 for ε, the
        paper's L_prior for x_0).
        weighting "min_snr": the x_0 error has the weight min(SNR, 5), whatever the network predicts
        (2303.09556).
        weighting "snr_plus_1": the x_0 error has the weight min(SNR + 1, 5). This is v's plain
        error (2202.00512 §4), but cut where only fine noise is left.
        """
        check_choice("objective", objective, OBJECTIVES)
        learned_variance = vlb_weight is not None
        prediction = raw.chunk(2, dim=1)[0] if learned_variance else raw
        if objective == "eps":
            target = noise
        elif objective == "x_start":
            target = x_start
        else:
            target = self.v_from(x_start, t, noise)
        loss = (prediction - target).square().flatten(1).mean(1)           # (B,)
        loss = loss * self.loss_weight(t, objective, weighting)
        if learned_variance:
            # The variance learns from L_vlb, the mean does not.
            variance = raw.chunk(2, dim=1)[1]
            frozen = torch.cat([prediction.detach(), variance], dim=1)
            out = self.interpret(frozen, x_t, t, objective, learned_variance=True)
            loss = loss + vlb_weight * self.num_timesteps * self.vlb_term(out, x_start, x_t, t)
        return loss

    def loss_weight(self, t, objective, weighting):
        """Return the factor (B,) on the squared error of what the network predicts; see `loss`."""
        check_choice("loss weighting", weighting, WEIGHTINGS)
        if weighting == "none":
            return torch.ones_like(t, dtype=torch.float32)
        check_choice("objective", objective, OBJECTIVES)
        snr = self.snr[t]
        wanted = snr if weighting == "min_snr" else snr + 1
        # The x_0 error is the error of ε divided by SNR, and the error of v divided by SNR + 1.
        own = {"eps": snr, "x_start": torch.ones_like(snr), "v": snr + 1}[objective]
        return wanted.clamp(max=5.0) / own

    def vlb_term(self, out, x_start, x_t, t):
        """Return one term of the variational bound per example, in bits per dimension, (B,).

        It is KL(q‖p) for t > 0, and −log p(x_0 | x_1) at t = 0.
        """
        true_mean, true_log_var = self.q_posterior(x_start, x_t, t)
        mean, log_var = self.p_mean_variance(out, x_t, t)
        kl = normal_kl(true_mean, true_log_var, mean, log_var)
        nll = -discretized_gaussian_log_likelihood(x_start, mean, 0.5 * log_var)
        term = torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1))
        return term / math.log(2)


def check_diffusion(cfg):
    """Raise ValueError unless the diffusion settings that a configuration has can work."""
    for key, choices in (("schedule", SCHEDULES), ("objective", OBJECTIVES),
                         ("weighting", WEIGHTINGS)):
        if hasattr(cfg, key):
            check_choice(key, getattr(cfg, key), choices)
    check_positive(cfg, "num_timesteps")
    check_range(cfg, 1, cfg.num_timesteps, "sampling_steps")
    # The linear schedule has a condition of its own.
    make_betas(cfg.schedule, cfg.num_timesteps)


def at(buffer, t, like):
    """Return buffer[t] for t (B,), shaped (B, 1, ..., 1) so that it multiplies `like`."""
    return buffer[t].view(-1, *[1] * (like.dim() - 1))


def normal_kl(mean1, log_var1, mean2, log_var2):
    """Return KL(N(mean1, e^log_var1) ‖ N(mean2, e^log_var2)) per element, in nats."""
    return 0.5 * (log_var2 - log_var1 - 1 + (log_var1 - log_var2).exp()
                  + (mean1 - mean2).square() * (-log_var2).exp())


def discretized_gaussian_log_likelihood(x, mean, log_scale):
    """Return the log-probability per element, in nats, of 8-bit images x in [-1, 1].

    It is the Gaussian's mass in x ± 1/255, with open tails at ±1 (DDPM Eq. 13).
    """
    def cdf(z):
        # Exact far into the left tail, unlike ½(1 + erf).
        return 0.5 * torch.erfc(-z / math.sqrt(2))

    precision = (-log_scale).exp()
    error = x - mean
    # All mass below the bin's upper edge, and all mass above its lower edge.
    lower_tail = cdf((error + 1 / 255) * precision)
    upper_tail = cdf((1 / 255 - error) * precision)
    # By symmetry the bin is taken on the left side, where floats still tell small tails apart.
    left = -error.abs()
    inside = cdf((left + 1 / 255) * precision) - cdf((left - 1 / 255) * precision)
    mass = torch.where(x < -0.999, lower_tail, torch.where(x > 0.999, upper_tail, inside))
    return mass.clamp(min=1e-12).log()
