"""sampling.py on a world that can be solved exactly, and step for step against diffusers' schedulers.

The Gaussian world: if the data are N(m, s²), then x_t is N(√ᾱ m, ᾱs² + 1−ᾱ) and the perfect denoiser is known in closed form,
    E[x_0 | x_t] = m + √ᾱ s² / (ᾱs² + 1−ᾱ) · (x_t − √ᾱ m),   Var[x_0 | x_t] = s² (1−ᾱ) / (ᾱs² + 1−ᾱ),
so every sampler must turn noise back into N(m, s²), and the variational bound must equal the entropy. No training is involved.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import exact_tables
from diffusers import DDIMScheduler, DDPMScheduler, UnCLIPScheduler

from mini_dalle2.diffusion import (
    GaussianDiffusion, ModelOutput, make_betas)
from mini_dalle2.runtime.noise import randint, randn_like
from mini_dalle2.sampling import (
    analytic_step, ddim_invert, ddim_step, ddpm_step, flow_edit, guide, keep_known, sample_loop,
    slerp, strided_timesteps)

T = 1000


def gaussian_denoiser(diffusion, m, s, frac=None):
    """The perfect denoise(x, t) for data N(m, s²), one number per row; `frac` is what the variance channel says."""

    def denoise(x, t):
        a, x = diffusion.alphas_cumprod.double()[t][:, None], x.double()
        x_start = m + a.sqrt() * s ** 2 / (a * s ** 2 + 1 - a) * (x - a.sqrt() * m)
        eps = (x - a.sqrt() * x_start) / (1 - a).sqrt()
        return ModelOutput(x_start.float(), eps.float(), None if frac is None else torch.full_like(x, frac).float())

    return denoise


def exact_step(s):
    """Ancestral rule with the true variance of p(x_s | x_t) for data of variance s² (what "analytic" sampling estimates)."""

    def step(diffusion, out, x_t, t, noise):
        mean, log_var = diffusion.p_mean_variance(out, x_t, torch.full((len(x_t),), t))
        a = diffusion.alphas_cumprod[t]
        spread = s ** 2 * (1 - a) / (a * s ** 2 + 1 - a) * diffusion.posterior_mean_coef1[t] ** 2
        return mean if t == 0 else mean + (log_var.exp() + spread).sqrt() * noise()

    return step


# ---------------------------------------------------------------------- on an exactly solvable Gaussian

@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_deterministic_ddim_carries_noise_to_the_data(schedule):
    """DDIM is then an affine map of x_T; three points show where it sends the mean and the standard deviation."""
    diffusion, m, s = GaussianDiffusion(schedule, T), 0.4, 0.3
    a = diffusion.alphas_cumprod[-1].double()
    start = (a.sqrt() * m + torch.tensor([[0.0], [1.0], [-2.0]]) * (a * s ** 2 + 1 - a).sqrt()).float()
    errors = []
    for steps in (10, 50, 250, 1000):
        end = sample_loop(diffusion, gaussian_denoiser(diffusion, m, s), start, ddim_step(), strided_timesteps(T, steps))[:, 0]
        assert end[0].item() == pytest.approx(m, abs=1e-4)
        assert (end[2] - end[0]).item() == pytest.approx(-2 * (end[1] - end[0]).item(), abs=1e-4)
        errors.append(abs((end[1] - end[0]).item() - s))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.005 and errors[-1] < errors[0] / 20


@pytest.mark.parametrize("step", [ddpm_step, ddim_step(1.0), ddim_step(0.5)], ids=["ddpm", "eta1", "eta0.5"])
def test_random_samplers_return_the_data_distribution(step):
    diffusion, m, s = GaussianDiffusion("cosine", T), -0.3, 0.5
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(20000, 1, generator=generator)
    x = sample_loop(diffusion, gaussian_denoiser(diffusion, m, s), x_T, step, strided_timesteps(T, 500), generator)
    assert x.mean().item() == pytest.approx(m, abs=0.015) and x.std().item() == pytest.approx(s, rel=0.03)


def test_reverse_variance_decides_what_few_steps_return():
    """Data N(0, 0.29), 8 steps: the exact reverse variance gives 0.290; β̃ is too little, 0.154; β too much, 0.364."""
    diffusion, s = GaussianDiffusion("cosine", T), math.sqrt(0.29)

    def variance(step, frac):
        generator = torch.Generator().manual_seed(0)
        x_T = torch.randn(200000, 1, generator=generator)
        denoise = gaussian_denoiser(diffusion, 0.0, s, frac)
        return sample_loop(diffusion, denoise, x_T, step, strided_timesteps(T, 8), generator).var().item()

    assert variance(exact_step(s), None) == pytest.approx(0.290, abs=0.004)
    assert variance(ddpm_step, None) == variance(ddpm_step, 0.0) == pytest.approx(0.154, abs=0.003)
    assert variance(ddpm_step, 1.0) == pytest.approx(0.364, abs=0.005)


def test_analytic_variance_returns_the_data_variance_for_any_number_of_steps():
    """unCLIP's embeddings have a variance of 0.29 per coordinate; with 8 steps β̃ returns 0.154, β 0.364 (calculated by recursion)."""
    diffusion, s = GaussianDiffusion("cosine", T), math.sqrt(0.29)
    a = diffusion.alphas_cumprod
    cov = s ** 2 * (1 - a) / (a * s ** 2 + 1 - a)                          # Var[x_0 | x_t]
    x_T = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(0))
    for steps in (2, 8, 64):
        for rule, frac, expected in ((analytic_step(cov), None, 0.29), (ddpm_step, 0.0, 0.154), (ddpm_step, 1.0, 0.364)):
            if steps == 8 or frac is None:
                end = sample_loop(diffusion, gaussian_denoiser(diffusion, 0.0, s, frac), x_T, rule, strided_timesteps(T, steps),
                                  torch.Generator().manual_seed(1))
                assert end.var().item() == pytest.approx(expected, rel=0.015)


def test_without_a_variance_of_its_own_the_analytic_step_is_the_ancestral_one():
    diffusion = GaussianDiffusion("cosine", T)
    ends = [sample_loop(diffusion, gaussian_denoiser(diffusion, 0.4, 0.3), torch.randn(5, 1, generator=torch.Generator().manual_seed(0)),
                        step, strided_timesteps(T, 20), torch.Generator().manual_seed(1)) for step in (analytic_step(torch.zeros(T)), ddpm_step)]
    assert torch.allclose(*ends, atol=1e-6)


# ---------------------------------------------------------------------- backwards, and in part

@pytest.mark.parametrize("refine", [0, 3])
def test_inversion_finds_the_noise_that_gives_the_data(refine):
    """On the Gaussian, DDIM's x_T of x_0 is known: as many standard deviations from the mean of x_T as x_0 is from its own."""
    diffusion, m, s, steps = GaussianDiffusion("cosine", T), 0.4, 0.3, strided_timesteps(T, 250)
    denoise = gaussian_denoiser(diffusion, m, s)
    x_0 = m + torch.tensor([[0.0], [1.0], [-2.0]]) * s
    x_T = ddim_invert(diffusion, denoise, x_0, steps, refine)
    assert torch.allclose(x_T, torch.tensor([[0.0], [1.0], [-2.0]]), atol=0.1)
    back = sample_loop(diffusion, denoise, x_T, ddim_step(), steps)
    assert (back - x_0).abs().max() < (1e-3 if refine else 0.03)


def test_corrections_make_a_coarse_inversion_exact():
    diffusion, steps = GaussianDiffusion("cosine", T), strided_timesteps(T, 12)
    denoise, x_0 = gaussian_denoiser(diffusion, 0.1, 0.5), torch.tensor([[0.9], [-0.6]])
    errors = [(sample_loop(diffusion, denoise, ddim_invert(diffusion, denoise, x_0, steps, refine), ddim_step(), steps) - x_0).abs().max().item()
              for refine in (0, 2, 20)]
    assert errors[0] > 0.02 and errors[1] < errors[0] / 3 and errors[2] < 2e-3


def points_denoiser(diffusion, points):
    """The perfect denoise(x, t) if x_0 is one of these points (P, D), each as likely: a softmax by distance, weighing them."""
    def denoise(x, t):
        a = diffusion.alphas_cumprod[t][:, None]
        weights = (-(x[:, None] - a[..., None].sqrt() * points).square().sum(-1) / (2 * (1 - a))).softmax(dim=1)
        return ModelOutput(weights @ points, x)

    return denoise


def test_an_edit_moves_between_conditions_of_one_spread_by_their_means():
    """Gaussians N(m, s²) and N(m', s²): d solves dd/dσ = σ (d − δ) / (s² + σ²), so that d = δ(1 − s/√(s² + σ_T²)), δ = m' − m, for any x_0."""
    diffusion, s = GaussianDiffusion("linear", T), 0.5
    source, target = gaussian_denoiser(diffusion, 0.3, s), gaussian_denoiser(diffusion, 2.3, s)
    x_0 = torch.tensor([[-1.0], [0.3], [5.0]])
    last = 1 / diffusion.snr[-300].item()                                  # starting lower than T − 1, so that something is lost
    d = flow_edit(diffusion, source, target, x_0, list(range(T - 299)), torch.Generator().manual_seed(0))
    assert torch.allclose(d, torch.full_like(d, 2 * (1 - s / math.sqrt(s * s + last))), atol=5e-3)
    assert torch.allclose(flow_edit(diffusion, source, target, x_0, strided_timesteps(T, 50)), torch.full_like(d, 2.0), atol=0.02)
    assert not flow_edit(diffusion, source, source, x_0, strided_timesteps(T, 50)).any()


def test_an_edit_asks_what_this_example_needs():
    """Left, far above or far below, becomes right, a little above or below, each on its own side; the difference of the means misses both."""
    diffusion = GaussianDiffusion("cosine", T)
    left, right = torch.tensor([[-1.0, 2.0], [-1.0, -2.0]]), torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    source, target = points_denoiser(diffusion, left), points_denoiser(diffusion, right)
    x_0 = left.repeat(50, 1)
    edited = x_0 + flow_edit(diffusion, source, target, x_0, strided_timesteps(T, 100), torch.Generator().manual_seed(0))
    found, by_means = torch.cdist(edited, right), torch.cdist(x_0 + right.mean(0) - left.mean(0), right)
    assert by_means.min() > 0.9
    assert found.min(dim=1).values.median() < 0.05
    assert (found.argmin(dim=1) == torch.tensor([0, 1]).repeat(50)).float().mean() > 0.95


def test_what_is_known_stays_and_the_rest_is_drawn():
    diffusion, steps = GaussianDiffusion("cosine", T), strided_timesteps(T, 20)
    free = gaussian_denoiser(diffusion, 0.4, 0.0)                          # whatever it is shown, it says 0.4
    known, mask = torch.linspace(-1, 1, 12).view(1, 3, 2, 2), torch.tensor([1.0, 0, 0, 1]).view(1, 1, 2, 2)

    def denoise(x, t):
        out = free(x.reshape(1, -1), t)
        return ModelOutput(out.x_start.view_as(x), out.eps.view_as(x))

    steps_without_dice = ddim_step(0.0)
    for step in (steps_without_dice, ddim_step(1.0), ddpm_step):
        seen = []
        watched = keep_known(lambda x, t: seen.append((x, t)) or denoise(x, t), diffusion, known, mask)
        end = sample_loop(diffusion, watched, torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(0)), step, steps,
                          torch.Generator().manual_seed(1))
        outside = mask.expand_as(end) == 0
        assert torch.equal(end[outside], known[outside]) and torch.allclose(end[~outside], torch.tensor(0.4), atol=1e-5)
        # On the way, the known part is noised as q_sample would have it; without dice by the very noise that it started from.
        noises = torch.stack([((x - diffusion.sqrt_alphas_cumprod[t] * known) / diffusion.sqrt_one_minus_alphas_cumprod[t])[outside]
                              for x, t in seen])
        assert 0.5 < noises[1:].square().mean() < 2
        if step is steps_without_dice:
            assert torch.allclose(noises, noises[:1].expand_as(noises), atol=1e-3)


def test_slerp_goes_along_the_circle_at_even_speed():
    a, b = torch.tensor([[1.0, 0, 0]]).expand(5, -1), torch.tensor([[0.0, 2, 0]]).expand(5, -1)
    way = slerp(a, F.normalize(b, dim=1), torch.linspace(0, 1, 5))
    angles = torch.atan2(way[:, 1], way[:, 0])
    assert torch.allclose(angles, torch.linspace(0, math.pi / 2, 5), atol=1e-6) and torch.allclose(way.norm(dim=1), torch.ones(5))
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 4, 3, 8, 8, generator=generator)
    assert torch.equal(slerp(a, b, 0.0), a) and torch.allclose(slerp(a, b, 1.0), b, atol=1e-6) and slerp(a, b, 0.3).shape == a.shape
    assert slerp(a, b, 0.5).std() == pytest.approx(1, abs=0.05)            # the middle of two noises is noise, which their mean is not


@pytest.mark.parametrize("factor", [1.0, -1.0, 1.0 + 1e-7])
def test_slerp_of_parallel_vectors_is_the_straight_line(factor):
    a = torch.tensor([[0.6, 0.8]])
    assert torch.allclose(slerp(a, a * factor, 0.25), a * (0.75 + 0.25 * factor), atol=1e-6)


def test_the_sum_of_all_terms_is_the_entropy_of_gaussian_data():
    """With the exact reverse process the bound is tight: Σ_t L_t = −E log₂ P(x_0) = ½ log₂(2πe s²) + log₂(255 / 2) bits."""
    torch.manual_seed(0)
    m, s, n = 0.1, 0.25, 8000
    diffusion = GaussianDiffusion("linear", 100)
    bits = 0.0
    for step in range(100):
        t = torch.full((n,), step)
        x_start = ((m + s * torch.randn(n, 1)).clamp(-1, 1) * 127.5).round() / 127.5
        x_t = diffusion.q_sample(x_start, t, torch.randn(n, 1))
        a, small = diffusion.alphas_cumprod[step].double(), diffusion.posterior_variance[step].double()
        exact = small + diffusion.posterior_mean_coef1[step].double() ** 2 * s ** 2 * (1 - a) / (a * s ** 2 + 1 - a)
        low, high = diffusion.posterior_log_variance[step].double(), diffusion.log_betas[step].double()
        out = gaussian_denoiser(diffusion, m, s, ((exact.log() - low) / (high - low)).item())(x_t, t)
        bits += diffusion.vlb_term(out, x_start, x_t, t).mean().item()
    assert bits == pytest.approx(0.5 * math.log2(2 * math.pi * math.e * s ** 2) + math.log2(127.5), abs=0.04)


# ---------------------------------------------------------------------- against diffusers, step for step

def raw_network(channels):
    """A fixed nonsense network: raw output (B, channels, 4, 4) that depends on every pixel of x and on the *original* t."""
    weight = torch.randn(channels, 3, generator=torch.Generator().manual_seed(3)) * 0.5
    return lambda x, t: torch.einsum("oc,bchw->bohw", weight, x.sin()) + (t.float() / T).cos().view(-1, 1, 1, 1) * 0.3


def compare(scheduler_step, timesteps, step, objective, clip, learned=False, schedule="cosine"):
    """Run our loop and theirs side by side with the same network and the same noise -> the largest difference of any intermediate x.

    Relative to its size where that is above 1.
    """
    diffusion, net = GaussianDiffusion(schedule, T), raw_network(6 if learned else 3)
    ours, theirs = [torch.Generator().manual_seed(1) for _ in range(2)]
    x_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(2))
    seen, mine = [], []

    def denoise(x, t):
        seen.append(t.tolist())
        mine.append(x)
        return diffusion.interpret(net(x, t), x, t, objective, learned, clip)

    mine.append(sample_loop(diffusion, denoise, x_T, step, timesteps, ours))
    assert seen == [[t, t] for t in reversed(timesteps)]                   # the network is shown the original steps, falling
    x, theirs_x = x_T, [x_T]
    for k in reversed(range(len(timesteps))):
        raw = net(x.float(), torch.full((2,), timesteps[k]))
        x = scheduler_step(raw, timesteps[k], x, timesteps[k - 1] if k else None, theirs)
        theirs_x.append(x)
    return max(((a.double() - b.double()).abs() / b.double().abs().clamp(min=1)).max().item() for a, b in zip(mine, theirs_x, strict=True))


PREDICTIONS = [("eps", "epsilon"), ("x_start", "sample"), ("v", "v_prediction")]


@pytest.mark.parametrize("objective, prediction", PREDICTIONS)
@pytest.mark.parametrize("learned", [False, True])
def test_ancestral_steps_are_those_of_diffusers_ddpm(objective, prediction, learned):
    scheduler = exact_tables(DDPMScheduler(T, variance_type="learned_range" if learned else "fixed_small", prediction_type=prediction,
                                           clip_sample=True, timestep_spacing="linspace"), make_betas("cosine", T))
    scheduler.set_timesteps(25)
    assert scheduler.timesteps.tolist() == strided_timesteps(T, 25)[::-1]
    step = lambda raw, t, x, before, generator: scheduler.step(raw, t, x, generator).prev_sample
    assert compare(step, strided_timesteps(T, 25), ddpm_step, objective, 1.0, learned) < 1e-5


@pytest.mark.parametrize("steps, objective, learned, clip", [(25, "x_start", False, 10.0), (50, "eps", True, 1.0), (7, "eps", False, 1.0)])
def test_ancestral_steps_are_those_of_karlo(steps, objective, learned, clip):
    scheduler = exact_tables(UnCLIPScheduler(T, "learned_range" if learned else "fixed_small_log", clip_sample_range=clip,
                                             prediction_type="epsilon" if objective == "eps" else "sample"), make_betas("cosine", T))
    scheduler.set_timesteps(steps)
    assert scheduler.timesteps.tolist() == strided_timesteps(T, steps)[::-1]
    step = lambda raw, t, x, before, generator: scheduler.step(raw, t, x, before, generator).prev_sample
    assert compare(step, strided_timesteps(T, steps), ddpm_step, objective, clip, learned) < 1e-5


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("objective, prediction", PREDICTIONS)
def test_ddim_steps_are_those_of_diffusers(eta, objective, prediction):
    scheduler = exact_tables(DDIMScheduler(T, prediction_type=prediction, clip_sample=True), np.linspace(1e-4, 0.02, T))
    scheduler.set_timesteps(20)                                            # 0, 50, ..., 950

    def step(raw, t, x, before, generator):
        noise = torch.randn(x.shape, generator=generator) if eta else None
        return scheduler.step(raw, t, x, eta, use_clipped_model_output=True, variance_noise=noise).prev_sample

    assert compare(step, scheduler.timesteps.tolist()[::-1], ddim_step(eta), objective, 1.0, schedule="linear") < 1e-5


def test_ddim_with_eta_one_is_the_ancestral_step():
    torch.manual_seed(0)
    diffusion = GaussianDiffusion("cosine", T).strided([3, 200, 600, 901])
    x_t, noise = torch.randn(2, 2, 3, 4).unbind(0)
    for k in range(4):
        out = diffusion.interpret(torch.randn(2, 3, 4), x_t, torch.full((2,), k), "x_start")
        torch.testing.assert_close(ddim_step(1.0)(diffusion, out, x_t, k, lambda: noise),
                                   ddpm_step(diffusion, out, x_t, k, lambda: noise), atol=2e-5, rtol=2e-5)


def test_the_last_step_adds_no_noise_and_a_seed_fixes_the_sample():
    diffusion = GaussianDiffusion("cosine", T)
    denoise = gaussian_denoiser(diffusion, 0.2, 0.5, 0.7)
    x, noise = torch.randn(4, 3), torch.randn(4, 3)
    out = denoise(x, torch.zeros(4, dtype=torch.long))
    for step in (ddpm_step, ddim_step(0.0), ddim_step(1.0)):
        torch.testing.assert_close(step(diffusion, out, x, 0, lambda: noise), out.x_start, atol=1e-5, rtol=1e-5)
    for step, random in ((ddpm_step, True), (ddim_step(1.0), True), (ddim_step(0.0), False)):
        assert torch.equal(step(diffusion, out, x, 5, lambda: noise), step(diffusion, out, x, 5, lambda: -noise)) != random
    draw = lambda seed: sample_loop(diffusion, denoise, x, ddpm_step, strided_timesteps(T, 5), torch.Generator().manual_seed(seed))
    assert torch.equal(draw(0), draw(0)) and not torch.equal(draw(0), draw(1))


def test_noise_of_a_picture_depends_on_its_own_generator_only():
    alone = torch.Generator().manual_seed(7)
    first, second = randn_like(torch.empty(2, 3), alone), randn_like(torch.empty(2, 3), alone)
    both = [torch.Generator().manual_seed(3), torch.Generator().manual_seed(7)]
    assert torch.equal(randn_like(torch.empty(4, 3), both)[2:], first) and torch.equal(randn_like(torch.empty(4, 3), both)[2:], second)
    assert not torch.equal(first, second)
    noise = randn_like(torch.empty(100, 1000), torch.Generator().manual_seed(0))
    assert abs(noise.mean().item()) < 0.02 and noise.std().item() == pytest.approx(1, abs=0.02)
    with pytest.raises(ValueError):
        randn_like(torch.empty(3, 3), both + both)


# ---------------------------------------------------------------------- guidance, and which t to train on

def test_guidance_extrapolates_the_prediction_and_never_the_variance():
    torch.manual_seed(0)
    cond, null = torch.randn(2, 4, 6, 2, 2).unbind(0)
    for scale in (0.0, 1.0, 3.5):
        expected = null + scale * (cond - null)
        torch.testing.assert_close(guide(cond, null, scale), expected)
        out = guide(cond, null, scale, learned_variance=True)
        torch.testing.assert_close(out[:, :3], expected[:, :3])
        assert torch.equal(out[:, 3:], cond[:, 3:])
    torch.testing.assert_close(guide(cond, null, 1.0), cond)


def test_randint_reaches_every_step():
    t = randint(6, (6000,), torch.Generator().manual_seed(0))
    counts = torch.bincount(t, minlength=6)
    assert len(counts) == 6 and counts.min() > 850 and counts.max() < 1150
