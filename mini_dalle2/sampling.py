"""From noise back to data: which steps to visit, the rule of one step, the loop over them, and guidance.

    x_T ~ N(0, I);   for t = T−1 .. 0:   x_{t−1} = step(denoise(x_t, t), x_t, noise)

`denoise(x, t) -> ModelOutput` is a closure that a model builds: what the network is conditioned on, and its guidance, are hidden in it.
The step rule is passed in: `ddpm_step` draws from the learned reverse process, `ddim_step(eta)` follows it with less noise, or none.
Fewer steps than the process has are taken by a *strided* process over some of its indices (improved DDPM §4).

Steps are 0-based, t = 0..T−1. Shapes: x (B, ...) of any kind (images, embeddings); t (B,) integer.
References: DDPM (2006.11239) Alg. 2; improved DDPM (2102.09672); DDIM (2010.02502); classifier-free guidance as in GLIDE (2112.10741) §2.3.
Read next: prior.py, unet.py.
"""

import torch
from tqdm.auto import tqdm

from .diffusion import randn_like


def strided_timesteps(num_timesteps, steps):
    """`steps` of the `num_timesteps` indices, evenly spaced with both ends: round(i (T−1) / (K−1)); ascending list of int."""
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"{steps} sampling steps: it must be between 1 and {num_timesteps}")
    if steps == 1:
        return [num_timesteps - 1]
    return [round(i * (num_timesteps - 1) / (steps - 1)) for i in range(steps)]


def ddpm_step(diffusion, out, x_t, t, noise):
    """Ancestral step: x_{t−1} = μ + √Σ·n (DDPM Alg. 2). t: index (int) into `diffusion`; noise(): draws n; none at the last step, t = 0."""
    index = torch.full((len(x_t),), t, device=x_t.device)
    mean, log_var = diffusion.p_mean_variance(out, x_t, index)
    return mean if t == 0 else mean + (0.5 * log_var).exp() * noise()


def ddim_step(eta=0.0):
    """DDIM rule (DDIM Eq. 12), η = 0 deterministic, η = 1 as random as DDPM with variance β̃:
    x_s = √ᾱ_s·x̂_0 + √(1−ᾱ_s−σ²)·ε̂ + σ·n,   σ = η √((1−ᾱ_s)/(1−ᾱ_t)) √(1−ᾱ_t/ᾱ_s)."""

    def step(diffusion, out, x_t, t, noise):
        a_s = diffusion.alphas_cumprod_prev[t]
        sigma = eta * diffusion.posterior_variance[t].sqrt()               # the formula's σ at η = 1 is √β̃_t
        direction = (diffusion.one_minus_alphas_cumprod_prev[t] - sigma ** 2).clamp(min=0).sqrt() * out.eps
        x_s = a_s.sqrt() * out.x_start + direction
        return x_s if eta == 0 or t == 0 else x_s + sigma * noise()

    return step


def sample_loop(diffusion, denoise, x_T, step, timesteps, generator=None, progress=False):
    """From noise x_T (B, ...) down to x_0 (B, ...) over the original indices `timesteps` (ascending list), with one step rule.

    denoise(x, t) is shown the original t (B,). Noise is drawn from `generator` (one, or a list with one per picture; see randn_like).
    """
    strided = diffusion.strided(timesteps)
    x = x_T
    for k in tqdm(reversed(range(len(timesteps))), total=len(timesteps), disable=not progress, leave=False, desc="sampling"):
        t = strided.timestep_map[k].expand(len(x))
        out = denoise(x, t)
        x = step(strided, out, x, k, noise=lambda: randn_like(x, generator))
    return x


def guide(cond, null, scale, learned_variance=False):
    """Classifier-free guidance on raw outputs: null + scale·(cond − null), scale 1 is unguided (GLIDE §2.3).

    Linear, so it is the same whether the network predicts ε, x_0 or v. Variance channels are the conditional ones, never extrapolated.
    """
    if not learned_variance:
        return null + scale * (cond - null)
    (mean_cond, variance), (mean_null, _) = cond.chunk(2, dim=1), null.chunk(2, dim=1)
    return torch.cat([mean_null + scale * (mean_cond - mean_null), variance], dim=1)
