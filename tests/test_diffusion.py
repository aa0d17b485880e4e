"""diffusion.py, the fixed process and its losses, against mathematics: published anchors, Bayes' rule in float64, torch.distributions.

How the samplers behave is in test_sampling.py.
"""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from mini_dalle2.diffusion import (
    GaussianDiffusion, ModelOutput, discretized_gaussian_log_likelihood, make_betas, normal_kl)
from mini_dalle2.sampling import strided_timesteps

T = 1000


def cosine_betas(num_timesteps):
    """The schedule as its definition says it, one number at a time."""
    f = lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return [min(1 - f((i + 1) / num_timesteps) / f(i / num_timesteps), 0.999) for i in range(num_timesteps)]


# ---------------------------------------------------------------------- schedules

def test_schedules_meet_the_known_anchors():
    cosine, linear = make_betas("cosine", T), make_betas("linear", T)
    assert cosine[0] == pytest.approx(4.12842e-5, rel=1e-5) and cosine[998] == pytest.approx(0.749999, abs=1e-6) and cosine[999] == 0.999
    assert linear[0] == pytest.approx(1e-4) and linear[999] == pytest.approx(0.02)
    cosine, linear = GaussianDiffusion("cosine", T), GaussianDiffusion("linear", T)
    assert cosine.alphas_cumprod[499].item() == pytest.approx(0.493844, abs=1e-6)
    assert cosine.alphas_cumprod[999].item() == pytest.approx(2.43e-9, rel=2e-3)
    assert linear.alphas_cumprod[499].item() == pytest.approx(0.0785872, rel=1e-5)
    assert linear.alphas_cumprod[999].item() == pytest.approx(4.03583e-5, rel=1e-5)


@pytest.mark.parametrize("steps", [50, 1000])
def test_cosine_schedule_equals_its_definition(steps):
    np.testing.assert_allclose(make_betas("cosine", steps), cosine_betas(steps), rtol=1e-12)
    np.testing.assert_allclose(make_betas("linear", steps).sum(), 1000 / steps * (1e-4 + 0.02) / 2 * steps, rtol=1e-12)
    assert GaussianDiffusion("cosine", steps).alphas_cumprod.dtype == torch.float32


def test_strided_timesteps_are_the_published_lists():
    assert strided_timesteps(T, 25) == [0, 42, 83, 125, 166, 208, 250, 291, 333, 375, 416, 458, 500, 541, 583, 624, 666, 708, 749, 791, 832,
                                        874, 916, 957, 999]                # Karlo's prior and decoder
    assert strided_timesteps(T, 7) == [0, 166, 333, 500, 666, 832, 999]    # Karlo's upsampler; 499.5 -> 500, 832.5 -> 832
    assert strided_timesteps(T, 64)[:6] == [0, 16, 32, 48, 63, 79] and strided_timesteps(T, 250)[:3] == [0, 4, 8]
    for steps in (2, 7, 25, 50, 64, 250, 1000):
        expected = (np.arange(steps) * (T - 1) / (steps - 1)).round().astype(int).tolist()
        assert strided_timesteps(T, steps) == expected and expected[0] == 0 and expected[-1] == T - 1
    assert strided_timesteps(T, 1) == [T - 1]


def test_strided_process_keeps_alpha_bar_and_recomputes_beta():
    full, kept = GaussianDiffusion("cosine", T), strided_timesteps(T, 25)
    short = full.strided(kept)
    assert short.timestep_map.tolist() == kept and short.num_timesteps == 25
    assert torch.equal(short.alphas_cumprod, full.alphas_cumprod[kept])
    alpha_bar = np.cumprod(1 - np.array(cosine_betas(T)))
    expected = [1 - alpha_bar[k] / (alpha_bar[j] if j is not None else 1.0) for j, k in zip([None] + kept[:-1], kept)]
    np.testing.assert_allclose(short.betas, expected, rtol=1e-6)
    np.testing.assert_allclose(full.strided(range(T)).betas, full.betas, rtol=1e-6)


def test_wrong_settings_are_named():
    for call in (lambda: make_betas("sigmoid", 10), lambda: strided_timesteps(T, 0), lambda: strided_timesteps(T, T + 1),
                 lambda: make_betas("linear", 20)):                        # β would be 1 and ᾱ 0
        with pytest.raises(ValueError):
            call()
    diffusion, x, t = GaussianDiffusion(), torch.zeros(1, 3), torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError):
        diffusion.interpret(x, x, t, objective="score")
    for setting in ({"weighting": "maximal"}, {"objective": "score"}, {"objective": "score", "weighting": "min_snr"}):
        with pytest.raises(ValueError):
            diffusion.loss(x, x, x, t, x, **setting)


# ---------------------------------------------------------------------- forward process and posterior

def test_q_sample_is_the_chain_of_single_steps():
    diffusion, t = GaussianDiffusion("cosine", T), torch.tensor([0, 1, 300, 700])
    scale, variance, expected = 1.0, 0.0, {}
    for i, beta in enumerate(cosine_betas(T)):                             # x_i = √(1−β) x_{i−1} + √β n
        scale, variance = math.sqrt(1 - beta) * scale, (1 - beta) * variance + beta
        expected[i] = scale, math.sqrt(variance)
    ones, zeros = torch.ones(4, 2, 3), torch.zeros(4, 2, 3)
    signal, noise = diffusion.q_sample(ones, t, zeros), diffusion.q_sample(zeros, t, ones)
    for row, i in enumerate(t.tolist()):
        np.testing.assert_allclose(signal[row], expected[i][0], rtol=1e-6)
        np.testing.assert_allclose(noise[row], expected[i][1], rtol=1e-6)


@pytest.mark.parametrize("kept", [None, [0, 10, 150, 400, 640, 999]])
def test_posterior_is_bayes_rule(kept):
    """q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0): the two densities multiplied on a fine grid in float64."""
    diffusion = GaussianDiffusion("cosine", T, kept)
    alpha_bar = np.cumprod(1 - np.array(cosine_betas(T)))
    kept = kept or list(range(T))
    x_start, x_t = 0.37, -0.81
    for k in [1, 2, len(kept) // 2, len(kept) - 2]:
        a_t, a_s = alpha_bar[kept[k]], alpha_bar[kept[k - 1]]
        step = a_t / a_s
        width = 1 / math.sqrt(1 / (1 - a_s) + step / (1 - step))           # only to place the grid
        guess = width ** 2 * (math.sqrt(a_s) * x_start / (1 - a_s) + math.sqrt(step) * x_t / (1 - step))
        grid = guess + np.linspace(-12, 12, 20001) * width
        log_q = -(x_t - math.sqrt(step) * grid) ** 2 / (2 * (1 - step)) - (grid - math.sqrt(a_s) * x_start) ** 2 / (2 * (1 - a_s))
        q = np.exp(log_q - log_q.max())
        mean = (q * grid).sum() / q.sum()
        variance = (q * (grid - mean) ** 2).sum() / q.sum()
        ours, log_var = diffusion.q_posterior(torch.tensor([x_start]), torch.tensor([x_t]), torch.tensor([k]))
        assert ours.item() == pytest.approx(mean, abs=2e-6)
        assert log_var.exp().item() == pytest.approx(variance, rel=1e-5)
        assert diffusion.posterior_variance[k].item() == pytest.approx(variance, rel=1e-5)


def test_posterior_at_the_first_step_is_x_start_and_its_log_variance_is_cut():
    diffusion, t = GaussianDiffusion("cosine", T), torch.zeros(2, dtype=torch.long)
    x_start, x_t = torch.randn(2, 3), torch.randn(2, 3)
    mean, log_var = diffusion.q_posterior(x_start, x_t, t)
    torch.testing.assert_close(mean, x_start, atol=1e-5, rtol=1e-5)
    assert diffusion.posterior_variance[0] == 0 and torch.all(log_var == diffusion.posterior_variance[1].log())


# ---------------------------------------------------------------------- parametrisations

def test_eps_x_start_and_v_are_read_alike():
    torch.manual_seed(0)
    diffusion, t = GaussianDiffusion("cosine", T).double(), torch.tensor([0, 1, 250, 500, 900, 998])
    x_start, noise = torch.randn(2, 6, 3, 4, dtype=torch.float64).unbind(0)
    x_t, v = diffusion.q_sample(x_start, t, noise), diffusion.v_from(x_start, t, noise)
    for objective, raw in (("eps", noise), ("x_start", x_start), ("v", v)):
        out = diffusion.interpret(raw, x_t, t, objective)
        torch.testing.assert_close(out.x_start, x_start, atol=3e-4, rtol=0)
        torch.testing.assert_close(out.eps, noise, atol=3e-4, rtol=0)
        assert out.frac is None
    torch.testing.assert_close(diffusion.eps_from_x_start(x_t, t, diffusion.x_start_from_eps(x_t, t, noise)), noise)
    angle = torch.atan2(diffusion.sqrt_one_minus_alphas_cumprod[t], diffusion.sqrt_alphas_cumprod[t]).view(-1, 1, 1)
    torch.testing.assert_close(v, angle.cos() * noise - angle.sin() * x_start, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("objective", ["eps", "x_start", "v"])
def test_clipped_x_start_and_eps_still_explain_x_t(objective):
    torch.manual_seed(0)
    diffusion, t = GaussianDiffusion("cosine", T), torch.tensor([10, 400, 800])
    x_t, raw = torch.randn(3, 3, 4, 4), 2 * torch.randn(3, 6, 4, 4)
    out = diffusion.interpret(raw, x_t, t, objective, learned_variance=True, clip=1.0)
    assert out.x_start.abs().max() == 1.0
    torch.testing.assert_close(diffusion.q_sample(out.x_start, t, out.eps), x_t, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(out.frac, (raw[:, 3:] + 1) / 2)


def test_learned_variance_at_its_two_ends():
    diffusion, t = GaussianDiffusion("cosine", T), torch.tensor([0, 1, 500, 999])
    alpha_bar = np.cumprod(1 - np.array(cosine_betas(T)))
    betas = np.array(cosine_betas(T))[t]
    small = np.array([(1 - alpha_bar[i - 1]) / (1 - alpha_bar[i]) * cosine_betas(T)[i] for i in (1, 1, 500, 999)])   # 0 borrows 1's
    x_t, mean = torch.randn(4, 1, 2, 2), torch.zeros(4, 1, 2, 2)
    for v, expected in ((-1.0, small), (1.0, betas), (0.0, np.sqrt(small * betas)), (3.0, betas ** 2 / small)):
        out = diffusion.interpret(torch.cat([mean, mean + v], dim=1), x_t, t, "x_start", learned_variance=True)
        _, log_var = diffusion.p_mean_variance(out, x_t, t)
        np.testing.assert_allclose(log_var[:, 0, 0, 0].double().exp(), expected, rtol=2e-5)
    _, log_var = diffusion.p_mean_variance(ModelOutput(mean, mean), x_t, t)
    np.testing.assert_allclose(log_var[:, 0, 0, 0].double().exp(), small, rtol=2e-5)


# ---------------------------------------------------------------------- losses

def vlb_by_torch_distributions(diffusion, raw, x_start, x_t, t, objective):
    """The bound's term in bits per dimension, float64, from torch.distributions and the 8-bit bins."""
    alpha_bar = np.cumprod(1 - np.array(cosine_betas(diffusion.full_length)))
    terms = []
    for i, step in enumerate(t.tolist()):
        a, a_s = alpha_bar[step], alpha_bar[step - 1] if step else 1.0
        beta, b = 1 - a / a_s, 1 - a
        small = (1 - a_s) / b * beta if step else (1 - alpha_bar[0]) / (1 - alpha_bar[1]) * (1 - alpha_bar[1] / alpha_bar[0])
        prediction, v = raw[i].double().chunk(2)
        x, x_0 = x_t[i].double(), x_start[i].double()
        guess = {"eps": (x - math.sqrt(b) * prediction) / math.sqrt(a), "x_start": prediction,
                 "v": math.sqrt(a) * x - math.sqrt(b) * prediction}[objective]
        mu = lambda start: (math.sqrt(a_s) * beta * start + math.sqrt(a / a_s) * (1 - a_s) * x) / b
        share = (v + 1) / 2
        model = Normal(mu(guess), (0.5 * (share * math.log(beta) + (1 - share) * math.log(small))).exp())
        if step:
            term = kl_divergence(Normal(mu(x_0), math.sqrt(small) * torch.ones_like(x)), model)
        else:
            upper = torch.where(x_0 > 0.999, 1.0, model.cdf(x_0 + 1 / 255))
            lower = torch.where(x_0 < -0.999, 0.0, model.cdf(x_0 - 1 / 255))
            term = -(upper - lower).clamp(min=1e-12).log()
        terms.append(term.mean() / math.log(2))
    return torch.stack(terms)


def hybrid_problem(num_timesteps=T):
    """A batch with t = 0 in it, pictures on the 8-bit grid with black and white among them, and a plausible raw output."""
    torch.manual_seed(0)
    diffusion, t = GaussianDiffusion("cosine", num_timesteps), torch.tensor([0, 0, 1, num_timesteps // 2, num_timesteps - 100])
    x_start = torch.randint(0, 256, (5, 2, 4, 4)) / 127.5 - 1
    x_start[:, :, 0, 0], x_start[:, :, 0, 1] = -1.0, 1.0
    noise = torch.randn_like(x_start)
    x_t = diffusion.q_sample(x_start, t, noise)
    error = torch.randn(5, 2, 4, 4) * torch.where(t == 0, 0.005, 0.1).view(-1, 1, 1, 1)
    return diffusion, t, x_start, noise, x_t, error, torch.randn(5, 2, 4, 4) * 0.5


@pytest.mark.parametrize("objective", ["eps", "x_start", "v"])
@pytest.mark.parametrize("num_timesteps", [1000, 250])
def test_hybrid_loss_is_mean_square_plus_a_thousandth_of_the_bound(objective, num_timesteps):
    diffusion, t, x_start, noise, x_t, error, v = hybrid_problem(num_timesteps)
    target = {"eps": noise, "x_start": x_start, "v": diffusion.v_from(x_start, t, noise)}[objective]
    raw = torch.cat([target + error, v], dim=1)
    bits = vlb_by_torch_distributions(diffusion, raw, x_start, x_t, t, objective)
    out = diffusion.interpret(raw, x_t, t, objective, learned_variance=True)
    torch.testing.assert_close(diffusion.vlb_term(out, x_start, x_t, t).double(), bits, atol=1e-4, rtol=2e-3)
    expected = error.square().flatten(1).mean(1).double() + 0.001 * num_timesteps * bits
    loss = diffusion.loss(raw, x_start, x_t, t, noise, objective, vlb_weight=0.001)
    torch.testing.assert_close(loss.double(), expected, atol=1e-4, rtol=2e-3)
    loss = diffusion.loss(raw, x_start, x_t, t, noise, objective, vlb_weight=0.03)
    torch.testing.assert_close(loss.double(), expected + 0.029 * num_timesteps * bits, atol=1e-3, rtol=2e-3)


def test_the_bound_teaches_the_variance_only():
    diffusion, t, x_start, noise, x_t, error, v = hybrid_problem()
    raw = torch.cat([noise + error, v], dim=1).requires_grad_()
    (grad,) = torch.autograd.grad(diffusion.loss(raw, x_start, x_t, t, noise, vlb_weight=0.001).sum(), raw)
    plain = (noise + error).requires_grad_()
    (simple,) = torch.autograd.grad(diffusion.loss(plain, x_start, x_t, t, noise).sum(), plain)
    torch.testing.assert_close(grad[:, :2], simple)                        # the mean hears of L_simple alone
    (bound,) = torch.autograd.grad(vlb_by_torch_distributions(diffusion, raw, x_start, x_t, t, "eps").sum(), raw)
    torch.testing.assert_close(grad[:, 2:], bound[:, 2:].float(), atol=1e-4, rtol=5e-3)
    assert (grad[:, 2:].abs().flatten(1).sum(1) > 0).all() and (bound[:, :2].abs().sum() > 0)


@pytest.mark.parametrize("weighting, plus", [("min_snr", 0), ("snr_plus_1", 1)])
def test_weightings_weigh_the_same_x_start_error_alike(weighting, plus):
    diffusion, t = GaussianDiffusion("cosine", T), torch.tensor([30, 300, 500, 900])
    x_start, noise, other = torch.randn(3, 4, 3, 2, 2).unbind(0)
    x_t = diffusion.q_sample(x_start, t, noise)
    eps = diffusion.eps_from_x_start(x_t, t, other)                        # one wrong guess at x_0, said in three languages
    raws = {"x_start": other, "eps": eps, "v": diffusion.v_from(other, t, eps)}
    snr = diffusion.alphas_cumprod[t].double() / (1 - diffusion.alphas_cumprod[t].double())
    expected = (other - x_start).square().flatten(1).mean(1) * (snr + plus).clamp(max=5).float()
    for objective, raw in raws.items():
        loss = diffusion.loss(raw, x_start, x_t, t, noise, objective, weighting=weighting)
        torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)
    assert snr[0] > 5 > snr[1] > snr[3]


def test_discretised_likelihood_is_a_distribution_over_256_values():
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)
    for mean in (-1.3, -0.999, -0.2, 0.0, 0.5, 1.0):
        for scale in (0.001, 0.01, 0.2, 3.0):
            log_p = discretized_gaussian_log_likelihood(values, torch.full_like(values, mean), torch.full_like(values, math.log(scale)))
            assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-6)  # the clamp at 1e-12 adds at most 256e-12
            assert values[log_p.argmax()].item() == pytest.approx(min(max(mean, -1), 1), abs=1 / 255) or scale > 1


def test_discretised_likelihood_is_as_exact_above_the_mean_as_below():
    scale, sigmas = 0.02, torch.tensor([-6.0, -4.0, -1.0, 0.0, 1.0, 4.0, 6.0])                    # in float32 Φ(6) is 1
    x = (0.1 + sigmas * scale).double()
    normal = Normal(0.1, torch.tensor(scale, dtype=torch.float64))
    lower, upper = -(x - 0.1).abs() - 1 / 255 + 0.1, -(x - 0.1).abs() + 1 / 255 + 0.1
    expected = (normal.cdf(upper) - normal.cdf(lower)).log()
    ours = discretized_gaussian_log_likelihood(x.float(), torch.full((7,), 0.1), torch.full((7,), math.log(scale)))
    torch.testing.assert_close(ours.double(), expected, atol=1e-3, rtol=1e-3)


def test_normal_kl_is_torch_distributions():
    torch.manual_seed(0)
    m1, v1, m2, v2 = torch.randn(4, 50, dtype=torch.float64).unbind(0)
    torch.testing.assert_close(normal_kl(m1, v1, m2, v2), kl_divergence(Normal(m1, (v1 / 2).exp()), Normal(m2, (v2 / 2).exp())))
