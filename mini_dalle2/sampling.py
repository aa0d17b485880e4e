"""From noise back to data: which steps to visit, the rule of one step, the loop, and guidance.

    x_T ~ N(0, I);   for t = T−1 .. 0:   x_{t−1} = step(denoise(x_t, t), x_t, noise)

`denoise(x, t) -> ModelOutput` is a closure that a model builds. It hides what the network is
conditioned on, and its guidance. The step rule is passed in: `ddpm_step` samples from the learned
reverse process, `ddim_step(eta)` follows this process with less noise, or none. Fewer steps than
the process has are taken by a *strided* process over some of its indices (improved DDPM §4).

`ddim_invert` goes the other way, from data to its noise. `flow_edit` says how an example changes
when its condition does. `keep_known` wraps a denoiser so that part of a picture stays as it is.

Steps are 0-based, t = 0..T−1. Shapes: x (B, ...) of any kind (images, embeddings); t (B,) integer.
References: DDPM (2006.11239) Alg. 2; improved DDPM (2102.09672); DDIM (2010.02502); Analytic-DPM
(2201.06503); inversion in ADM (2105.05233) App. F and unCLIP (2204.06125) §3; FlowEdit (2412.08629)
Alg. 1; classifier-free guidance as in GLIDE (2112.10741) §2.3. Read next: prior.py, unet.py.
"""

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from .runtime.device import off_mps
from .runtime.noise import randn_like


def strided_timesteps(num_timesteps, steps):
    """Choose `steps` of the `num_timesteps` indices, evenly spaced with both ends.

    Returns round(i (T−1) / (K−1)), an ascending list of int.
    """
    if not 1 <= steps <= num_timesteps:
        raise ValueError(f"{steps} sampling steps: it must be between 1 and {num_timesteps}")
    if steps == 1:
        return [num_timesteps - 1]
    return [round(i * (num_timesteps - 1) / (steps - 1)) for i in range(steps)]


def ddpm_step(diffusion, out, x_t, t, noise):
    """Take an ancestral step: x_{t−1} = μ + √Σ·n (DDPM Alg. 2).

    t: index (int) into `diffusion`. noise(): draws n. There is no noise at the last step, t = 0.
    """
    index = torch.full((len(x_t),), t, device=x_t.device)
    mean, log_var = diffusion.p_mean_variance(out, x_t, index)
    return mean if t == 0 else mean + (0.5 * log_var).exp() * noise()


def ddim_step(eta=0.0):
    """Return DDIM's step rule (DDIM Eq. 12).

    x_s = √ᾱ_s·x̂_0 + √(1−ᾱ_s−σ²)·ε̂ + σ·n,   σ = η √((1−ᾱ_s)/(1−ᾱ_t)) √(1−ᾱ_t/ᾱ_s).
    η = 0 is deterministic. η = 1 is as random as DDPM with the variance β̃.
    """

    def step(diffusion, out, x_t, t, noise):
        a_s = diffusion.alphas_cumprod_prev[t]
        # The formula's σ at η = 1 is √β̃_t.
        sigma = eta * diffusion.posterior_variance[t].sqrt()
        rest = (diffusion.one_minus_alphas_cumprod_prev[t] - sigma ** 2).clamp(min=0)
        x_s = a_s.sqrt() * out.x_start + rest.sqrt() * out.eps
        return x_s if eta == 0 or t == 0 else x_s + sigma * noise()

    return step


def analytic_step(cov):
    """Return the ancestral step with the best variance for this network (Analytic-DPM).

    σ² = β̃_t + c²·cov_t, where c is the posterior's weight of x_0. cov (T,) is the variance per
    dimension of x_0 given x_t, at every step of the full schedule; cov = 0 gives `ddpm_step` with
    β̃. The posterior of DDPM Eq. 6 takes x_0 to be known and leaves out this variance. It matters
    more, the fewer the steps.
    """

    def step(diffusion, out, x_t, t, noise):
        index = torch.full((len(x_t),), t, device=x_t.device)
        mean, _ = diffusion.p_mean_variance(out._replace(frac=None), x_t, index)
        c = diffusion.posterior_mean_coef1[t]
        variance = diffusion.posterior_variance[t] + c ** 2 * cov[diffusion.timestep_map[t]]
        return mean if t == 0 else mean + variance.sqrt() * noise()

    return step


def sample_loop(diffusion, denoise, x_T, step, timesteps, generator=None, progress=False):
    """Go from noise x_T (B, ...) down to x_0 (B, ...) by one step rule.

    timesteps: original indices, an ascending list of int. denoise(x, t) is shown the original t
    (B,). generator: one, or a list with one per example (see runtime/noise.py).
    """
    strided = diffusion.strided(timesteps)
    x = x_T
    indices = reversed(range(len(timesteps)))
    for k in tqdm(indices, total=len(timesteps), disable=not progress, leave=False,
                  desc="sampling"):
        t = strided.timestep_map[k].expand(len(x))
        out = denoise(x, t)
        x = step(strided, out, x, k, noise=lambda: randn_like(x, generator))
    return x


# Of a step of the inversion.
TOLERANCE = 1e-6


def ddim_invert(diffusion, denoise, x_0, timesteps, refine=0, progress=False):
    """Find the noise that DDIM with η = 0 turns into x_0 (B, ...): DDIM run backwards.

    x_{t+1} = √ᾱ_{t+1}·x̂_0 + √(1−ᾱ_{t+1})·ε̂, with x̂_0 and ε̂ seen at x_t (ADM App. F).
    timesteps: original indices, an ascending list of int.

    The formula is exact only for small steps. So each step but the first is corrected, at most
    `refine` times: x_{t+1} is moved until DDIM's own step from there misses x_t by less than
    TOLERANCE (root mean square of the worst example). TOLERANCE is small, because the way back
    magnifies a miss where a picture is still undecided.
    """
    strided = diffusion.strided(timesteps)
    step = ddim_step(0.0)
    # The noise of the first step is unknown and left out. The first step gets no correction: DDIM
    # arrives at what the network makes of an almost clean picture, not at the picture itself.
    x = strided.alphas_cumprod[0].sqrt() * x_0
    for k in tqdm(range(1, len(timesteps)), disable=not progress, leave=False, desc="inverting"):
        a = strided.alphas_cumprod[k]
        seen = denoise(x, strided.timestep_map[k - 1].expand(len(x)))
        noise = strided.sqrt_one_minus_alphas_cumprod[k] * seen.eps
        above = a.sqrt() * seen.x_start + noise
        for _ in range(refine):
            out = denoise(above, strided.timestep_map[k].expand(len(x)))
            # DDIM's step from `above` should give x.
            miss = x - step(strided, out, above, k, None)
            if miss.square().flatten(1).mean(1).sqrt().max() < TOLERANCE:
                break
            above = above + miss
        x = above
    return x


def flow_edit(diffusion, source, target, x_0, timesteps, generator=None):
    """Find the change d (B, ...) that turns x_0 (B, ...), examples of one condition, to another.

    source, target: denoise(x, t) under either condition. timesteps: original indices, an ascending
    list of int. d starts at 0. At each timestep new noise is drawn, the same for x_0 and x_0 + d.
    Δ is the difference of the two predictions of x_0. At the noisy end, Δ is the difference of the
    conditions' means; later, the noised example says what the change is for itself. From the noise
    level σ = √((1−ᾱ)/ᾱ) to the next level σ', in the end 0, d moves as DDIM would:

        d' = Δ + σ'/σ · (d − Δ)

    This is FlowEdit's Alg. 1 for x_t / √ᾱ = x_0 + σ·n, from the noisiest step on (n_max) and with
    one draw of noise per step (n_avg = 1).
    """
    strided = diffusion.strided(timesteps)
    d = torch.zeros_like(x_0)
    for k in reversed(range(len(timesteps))):
        t = strided.timestep_map[k].expand(len(x_0))
        x_t = diffusion.q_sample(x_0, t, randn_like(x_0, generator))
        of_target = target(x_t + strided.sqrt_alphas_cumprod[k] * d, t).x_start
        change = of_target - source(x_t, t).x_start
        # σ'/σ.
        left = (strided.snr[k] / strided.snr[k - 1]).sqrt() if k > 0 else 0.0
        d = change + left * (d - change)
    return d


def keep_known(denoise, diffusion, known, mask):
    """Return a denoiser that only invents what the mask asks for.

    known (B, C, S, S) in [-1, 1], mask (B or 1, 1, S, S), 1 where something new is wanted. Outside
    the mask x̂_0 is the known picture. ε̂ is changed to agree, so that DDIM carries the known part
    along, noised as x_t should be.
    """
    # mini: GLIDE trains a network for inpainting, which also sees the masked picture and the mask
    # (GLIDE §4). unCLIP does not say how it inpaints, and here no network is trained for it.
    def denoise_known(x, t):
        out = denoise(x, t)
        x_start = torch.where(mask > 0.5, out.x_start, known)
        return out._replace(x_start=x_start, eps=diffusion.eps_from_x_start(x, t, x_start))

    return denoise_known


def slerp(a, b, theta):
    """Go along the great circle from a to b: theta 0 gives a, 1 gives b.

    sin((1−θ)Ω)/sin Ω·a + sin(θΩ)/sin Ω·b, where Ω is their angle. a, b (B, ...) may have different
    lengths; theta is a number or (B,). Nearly parallel or opposite vectors have no great circle, or
    no single one: there the way is a straight line.
    """
    theta = torch.as_tensor(theta, dtype=a.dtype, device=a.device).expand(len(a))
    theta = off_mps(theta)
    flat_a = off_mps(a.flatten(1))
    flat_b = off_mps(b.flatten(1))
    cosine = F.cosine_similarity(flat_a.double(), flat_b.double(), dim=1).clamp(-1, 1)
    # In float64: near 1, acos has few digits.
    omega = cosine.acos()                                                  # (B,)
    straight = omega.sin() < 1e-4
    # Any angle will do where it is not used.
    omega = torch.where(straight, torch.ones_like(omega), omega)
    of_a = torch.where(straight, 1 - theta, ((1 - theta) * omega).sin() / omega.sin())
    of_b = torch.where(straight, theta, (theta * omega).sin() / omega.sin())
    return (of_a[:, None] * flat_a + of_b[:, None] * flat_b).to(a.dtype).to(a.device).view_as(a)


def guide(cond, null, scale, learned_variance=False):
    """Apply classifier-free guidance to raw outputs: null + scale·(cond − null) (GLIDE §2.3).

    Scale 1 is unguided. The formula is linear, so it is the same whether the network predicts ε,
    x_0 or v. Variance channels are the conditional ones, never extrapolated.
    """
    if not learned_variance:
        return null + scale * (cond - null)
    mean_cond, variance = cond.chunk(2, dim=1)
    mean_null, _ = null.chunk(2, dim=1)
    return torch.cat([mean_null + scale * (mean_cond - mean_null), variance], dim=1)
