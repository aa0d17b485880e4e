"""The degradations against closed forms, brute force and their own statistics."""

import io
import math
from collections import Counter

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from mini_dalle2 import degradation
from mini_dalle2.degradation import (
    BSR_FULL,
    BSR_LIGHT,
    bsr_order,
    degrade,
    filter2d,
    gaussian_kernel,
    jpeg,
    random_noise,
    resize,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def smooth_pictures(n, size, seed=0):
    """Pictures with soft and hard edges, (n, 3, size, size) in [-1, 1]."""
    coarse = torch.rand(n, 3, 5, 5, generator=rng(seed)) * 2 - 1
    soft = F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1)
    soft[:, :, size // 4 : size // 2, size // 4 : size // 2] = coarse[:, :, :1, :1].expand(
        -1, -1, size // 4, size // 4
    )
    return soft


def centre_of_mass(x):
    """(row, column) of the weight in x (H, W)."""
    rows, columns = torch.arange(x.shape[0]).to(x), torch.arange(x.shape[1]).to(x)
    return ((x.sum(1) * rows).sum() / x.sum()).item(), ((x.sum(0) * columns).sum() / x.sum()).item()


# ---------------------------------------------------------------------- kernels


def test_first_upsamplers_kernel_has_its_closed_form():
    side = math.exp(-0.5 / 0.6**2)
    row = torch.tensor([side, 1.0, side]) / (1 + 2 * side)
    assert torch.allclose(gaussian_kernel(3, 0.6), row[:, None] * row, atol=1e-7)


@pytest.mark.parametrize(
    "size, sigma, sigma2, theta",
    [(3, 0.6, None, 0.0), (13, 1.4, 0.3, 0.7), (25, 2.0, 2.8, 2.5), (7, 0.0, 0.0, 1.0)],
)
def test_kernels_sum_to_one_and_are_point_symmetric(size, sigma, sigma2, theta):
    kernel = gaussian_kernel(size, sigma, sigma2, theta)
    assert kernel.shape == (size, size) and kernel.min() >= 0
    assert kernel.sum().item() == pytest.approx(1, abs=1e-6)
    assert torch.allclose(kernel, kernel.flip(0, 1), atol=1e-7)


def test_anisotropic_kernel_has_the_covariance_it_was_asked_for():
    sigma, sigma2, theta = 2.0, 1.2, 0.6
    kernel = gaussian_kernel(31, sigma, sigma2, theta).double()
    d = torch.arange(31) - 15.0
    xx = (kernel * d[None] ** 2).sum()
    yy = (kernel * d[:, None] ** 2).sum()
    xy = (kernel * d[None] * d[:, None]).sum()
    c, s = math.cos(theta), math.sin(theta)
    assert xx.item() == pytest.approx(c * c * sigma**2 + s * s * sigma2**2, rel=1e-3)
    assert yy.item() == pytest.approx(s * s * sigma**2 + c * c * sigma2**2, rel=1e-3)
    assert xy.item() == pytest.approx(c * s * (sigma**2 - sigma2**2), rel=1e-3)


def test_shifted_kernel_has_its_centre_there():
    row, column = centre_of_mass(gaussian_kernel(25, 1.5, shift=1.5))
    assert row == pytest.approx(12 + 1.5, abs=1e-3) and column == pytest.approx(12 + 1.5, abs=1e-3)


def test_blur_is_the_sum_written_out():
    x, kernel = torch.rand(2, 3, 7, 6, generator=rng()), gaussian_kernel(5, 1.3, 0.5, 0.4)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)), mode="reflect")
    expected = np.zeros(x.shape)
    for i in range(7):
        for j in range(6):
            for u in range(5):
                for v in range(5):
                    expected[:, :, i, j] += kernel[u, v].item() * padded[:, :, i + u, j + v]
    assert np.allclose(filter2d(x, kernel).numpy(), expected, atol=1e-6)


def test_blur_leaves_a_flat_picture_flat_even_one_too_small_to_mirror():
    for side in (3, 20):
        flat = torch.full((1, 3, side, side), 0.3)
        assert torch.allclose(filter2d(flat, gaussian_kernel(13, 2.0)), flat, atol=1e-6)


# ---------------------------------------------- the first upsampler's degradation


def test_blur_degradation_is_shrink_then_blur_or_shrink_alone():
    high = smooth_pictures(64, 32)
    shrunk = high.unflatten(3, (8, 4)).unflatten(2, (8, 4)).mean(dim=(3, 5))
    blurred = filter2d(shrunk, gaussian_kernel(3, 0.6))
    mixed = degrade(high, "blur", 4, rng())
    is_blurred = (mixed - blurred).abs().amax(dim=(1, 2, 3)) < 1e-5
    is_sharp = (mixed - shrunk).abs().amax(dim=(1, 2, 3)) < 1e-5
    # 32 ± 3.5 standard deviations of 64 coin tosses.
    assert (is_blurred | is_sharp).all() and 18 <= is_blurred.sum() <= 46


# ---------------------------------------------------------------------- BSR


@pytest.mark.parametrize("kind", ["blur", "bsr", "bsr_full"])
@pytest.mark.parametrize("factor, size", [(4, 48), (2, 8), (4, 16)])
def test_size_range_and_repeatability(kind, factor, size):
    high = smooth_pictures(6, size)
    low = degrade(high, kind, factor, rng(5))
    assert low.shape == (6, 3, size // factor, size // factor) and low.dtype == torch.float32
    assert low.min() >= -1 - 1e-6 and low.max() <= 1 + 1e-6 and low.isfinite().all()
    assert torch.equal(low, degrade(high, kind, factor, rng(5)))
    assert not torch.equal(low, degrade(high, kind, factor, rng(6)))


def test_a_picture_is_degraded_the_same_way_in_any_company():
    high = smooth_pictures(5, 32)
    low = degrade(high, "bsr", 4, rng(3))
    others = torch.cat([high[:2], -high[2:]])
    assert torch.equal(degrade(others, "bsr", 4, rng(3))[:2], low[:2])
    assert torch.equal(degrade(high[:1], "bsr", 4, rng(3)), low[:1])


def test_equal_pictures_are_degraded_differently():
    low = degrade(smooth_pictures(1, 32).expand(8, -1, -1, -1), "bsr", 4, rng())
    assert all(not torch.equal(low[i], low[j]) for i in range(8) for j in range(i))


@pytest.mark.parametrize("kind, error", [("bsr", 0.10), ("bsr_full", 0.27)])
def test_degraded_pictures_show_the_same_thing_in_the_same_place(kind, error):
    # Grey: JPEG halves the resolution of colour.
    high = smooth_pictures(200, 64)[:, :1].expand(-1, 3, -1, -1)
    shrunk, low = F.avg_pool2d(high, 4), degrade(high, kind, 4, rng(1))
    difference = low - shrunk
    assert difference.square().mean(dim=(1, 2, 3)).sqrt().mean().item() == pytest.approx(
        error, rel=0.15
    )
    # Neither lighter nor darker.
    assert abs(difference.mean().item()) < 0.005
    slopes = torch.stack([torch.gradient(shrunk, dim=d)[0].flatten() for d in (2, 3)], dim=1)
    # First order: low(p) = shrunk(p + shift).
    shift = torch.linalg.lstsq(slopes, difference.flatten()[:, None]).solution
    # Nor moved, in pixels of the small picture.
    assert shift.abs().max() < 0.03


def test_order_varies_and_the_final_resize_is_always_after_the_intermediate_one():
    g, seen, first = rng(), set(), Counter()
    for _ in range(2000):
        order = bsr_order(1, g)
        assert sorted(order) == ["blur", "downsample", "jpeg", "noise", "resize"]
        assert order.index("downsample") < order.index("resize")
        seen.add(tuple(order))
        first[order[0]] += 1
    # 5! orders, half of them forbidden.
    assert len(seen) == 60
    assert abs(first["noise"] / 2000 - 0.2) < 0.05 and abs(first["downsample"] / 2000 - 0.4) < 0.05
    assert bsr_order(BSR_FULL.blurs, g).count("blur") == 2


def test_subsampling_branch_does_not_move_the_picture():
    dot = torch.zeros(1, 3, 64, 64)
    # Exactly pixel (5, 8) of the small picture.
    dot[:, :, 20:24, 32:36] = 1.0
    for seed in range(5):
        low = degradation.random_downsample(dot, 4, 0.0, rng(seed))
        assert low.shape == (1, 3, 16, 16)
        row, column = centre_of_mass(low[0, 0])
        assert row == pytest.approx(5, abs=0.02) and column == pytest.approx(8, abs=0.02)


def test_intermediate_sizes_follow_one_over_uniform():
    image, g = torch.rand(1, 3, 128, 128, generator=rng()), rng(1)
    sides = np.array(
        [degradation.random_downsample(image, 4, 1.0, g).shape[-1] for _ in range(400)]
    )
    assert sides.min() >= 16 and sides.max() <= 128
    # U(1, 8) is above 4 four times in seven.
    assert (sides < 32).mean() == pytest.approx(4 / 7, abs=0.1)
    taken = [
        degradation.random_downsample(image, 4, BSR_LIGHT.resize_prob, g).shape[-1] == 32
        for _ in range(400)
    ]
    # Gaussian and subsampling gives exactly 32.
    assert np.mean(taken) == pytest.approx(0.2, abs=0.08)


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "area"])
def test_resize_keeps_flat_pictures_and_the_mean(mode):
    flat = torch.full((1, 3, 30, 30), 0.6)
    assert torch.allclose(resize(flat, 7, 11, mode), torch.full((1, 3, 7, 11), 0.6), atol=1e-5)
    assert torch.allclose(resize(flat, 40, 41, mode), torch.full((1, 3, 40, 41), 0.6), atol=1e-5)
    picture = (smooth_pictures(1, 32) + 1) / 2
    assert resize(picture, 16, 16, mode).mean().item() == pytest.approx(
        picture.mean().item(), abs=0.02
    )
    if mode == "area":
        assert torch.allclose(resize(picture, 8, 8, mode), F.avg_pool2d(picture, 4), atol=1e-6)


def test_noise_has_its_level_and_its_three_kinds():
    flat, g, kinds = torch.full((1, 3, 48, 48), 0.5), rng(), Counter()
    for _ in range(300):
        noise = (random_noise(flat, (20, 20), g) - flat)[0].flatten(1).double()  # (3, pixels)
        level = noise.std().item() * 255
        correlation = torch.corrcoef(noise)[[0, 0, 1], [1, 2, 2]]
        if (correlation > 0.9999).all() and torch.allclose(noise[0], noise[2], atol=1e-6):
            kinds["grey"] += 1
            assert level == pytest.approx(20, rel=0.1)
        elif (correlation.abs() < 0.07).all() and abs(level - 20) < 1:
            kinds["colour"] += 1
        else:
            kinds["correlated"] += 1
            assert level < 20.5
            # No direction has more than the top level.
            assert torch.linalg.eigvalsh(torch.cov(noise)).max().sqrt() * 255 < 21
    for kind, p in (("colour", 0.4), ("grey", 0.4), ("correlated", 0.2)):
        assert kinds[kind] / 300 == pytest.approx(p, abs=0.1), kinds


def test_light_noise_is_one_or_two_grey_levels():
    flat, g = torch.full((1, 3, 48, 48), 0.5), rng()
    levels = [(random_noise(flat, BSR_LIGHT.noise, g) - flat).std().item() * 255 for _ in range(60)]
    assert max(levels) < 2.2
    assert any(abs(x - 1) < 0.1 for x in levels)
    assert any(abs(x - 2) < 0.2 for x in levels)


def test_jpeg_is_a_real_jpeg():
    picture = (smooth_pictures(1, 40) + 1) / 2
    pixels = (picture[0] * 255).round().byte().permute(1, 2, 0).numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=60)
    expected = np.asarray(Image.open(file))
    assert np.array_equal(
        (jpeg(picture, 60)[0] * 255).round().byte().permute(1, 2, 0).numpy(), expected
    )
    errors = [(jpeg(picture, q) - picture).square().mean().item() for q in (30, 60, 95)]
    assert errors[0] > errors[1] > errors[2] > 0


def test_bsr_always_ends_in_a_jpeg_and_mostly_has_another(monkeypatch):
    qualities = []

    def counted(image, quality):
        qualities[-1].append(quality)
        return jpeg(image, quality)

    monkeypatch.setattr(degradation, "jpeg", counted)
    picture = (smooth_pictures(1, 16) + 1) / 2
    for seed in range(300):
        qualities.append([])
        low = degradation.bsr(picture, 4, BSR_LIGHT, rng(seed))
        # Whole grey levels, as a file has them.
        assert torch.allclose(low * 255, (low * 255).round(), atol=1e-4)
    counts = Counter(len(q) for q in qualities)
    assert set(counts) == {1, 2} and counts[2] / 300 == pytest.approx(0.9, abs=0.06)
    drawn = [q for pair in qualities for q in pair]
    assert min(drawn) == 80 and max(drawn) == 95


def test_a_quarter_of_the_pictures_is_halved_first(monkeypatch):
    factors = []
    true_blur = degradation.random_blur

    def noted(image, factor, strength, g):
        factors.append(factor)
        return true_blur(image, factor, strength, g)

    monkeypatch.setattr(degradation, "random_blur", noted)
    picture = (smooth_pictures(1, 16) + 1) / 2
    for seed in range(400):
        degradation.bsr(picture, 4, BSR_LIGHT, rng(seed))
    assert set(factors) == {2, 4} and factors.count(2) / 400 == pytest.approx(0.25, abs=0.07)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="unknown degradation"):
        degrade(torch.zeros(1, 3, 8, 8), "fog", 4)
    with pytest.raises(ValueError, match="evenly"):
        degrade(torch.zeros(1, 3, 10, 8), "bsr", 4)
