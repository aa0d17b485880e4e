"""The upsampler as a diffusion model that knows only a small picture: crops, steps, sampling, learning."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mini_dalle2.degradation import degrade
from mini_dalle2.tricks.patches import PatchUpsamplerConfig
from mini_dalle2.unet import AttentionBlock
from mini_dalle2.upsampler import Upsampler, UpsamplerConfig, random_crop, sampling_timesteps

TINY = PatchUpsamplerConfig(low_size=8, high_size=32, model_channels=16, channel_mult=(1, 2), norm_groups=4, patch_size=2,
                       objective="x_start", crop_fraction=0.5, sampling_steps=4)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def centre_of_mass(x):
    """(row, column) of the weight in x (H, W)."""
    rows, columns = torch.arange(x.shape[0]).to(x), torch.arange(x.shape[1]).to(x)
    return ((x.sum(1) * rows).sum() / x.sum()).item(), ((x.sum(0) * columns).sum() / x.sum()).item()


# ---------------------------------------------------------------------- crops and timesteps

@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_random_crops_are_windows_anywhere(dtype):
    row, column = torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    images = torch.stack([row, column, row + column])[None].expand(300, -1, -1, -1).to(dtype)
    crops = random_crop(images, 9, rng())
    assert crops.shape == (300, 3, 9, 9) and crops.dtype == dtype
    top, left = crops[:, 0, 0, 0].long(), crops[:, 1, 0, 0].long()
    assert torch.equal(crops.long(), torch.stack([images[i, :, r:r + 9, c:c + 9].long() for i, (r, c) in enumerate(zip(top, left))]))
    assert set(zip(top.tolist(), left.tolist())) == {(r, c) for r in range(4) for c in range(4)}


def test_hand_tuned_27_steps():
    steps = sampling_timesteps(27, 1000)
    assert len(steps) == 27 and steps == sorted(set(steps))
    assert steps[:10] == [0, 22, 44, 66, 88, 111, 133, 155, 177, 199]
    assert steps[20:] == [400, 500, 599, 600, 799, 800, 997]
    assert [sum(200 * i <= t < 200 * (i + 1) for t in steps) for i in range(5)] == [10, 10, 3, 2, 2]
    assert len(set(sampling_timesteps(27, 50))) == 27                      # a short process still has fifths of ten
    even = sampling_timesteps(15, 1000)
    assert len(even) == 15 and even[0] == 0 and even[-1] == 999 and max(np.diff(even)) - min(np.diff(even)) <= 1


# ---------------------------------------------------------------------- the model

def perturbed(cfg, seed=0):
    """A model whose zero-initialised layers have something to say."""
    torch.manual_seed(seed)
    model = Upsampler(cfg).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.05)
    return model


@pytest.mark.parametrize("cfg", [TINY, UpsamplerConfig()])
def test_no_attention_anywhere(cfg):
    assert not any(isinstance(m, (AttentionBlock, torch.nn.MultiheadAttention)) for m in Upsampler(cfg).modules())


def test_paper_sized_models_have_the_papers_parameters():
    with torch.device("meta"):
        first = Upsampler(UpsamplerConfig(64, 256, 320, (1, 2, 3, 4), 3, 32, dropout=0.1))
        second = Upsampler(UpsamplerConfig(256, 1024, 192, (1, 1, 2, 2, 4, 4), 2, 32, schedule="linear", degradation="bsr"))
    sizes = [sum(p.numel() for p in model.parameters()) / 1e6 for model in (first, second)]
    assert sizes == pytest.approx([730, 282], abs=1)                       # Table 3: 700M and 300M


def test_applied_at_four_times_the_crop():
    model = perturbed(UpsamplerConfig(low_size=16, high_size=64, model_channels=8, norm_groups=4, sampling_steps=2))
    crop = torch.rand(2, 3, 16, 16, generator=rng()) * 2 - 1
    assert model.cfg.crop_size == 16 and model.loss(crop, rng()).isfinite()
    for side in (4, 16, 20):                                               # the crop's small picture, the whole one, a larger one
        out = model.sample(torch.zeros(1, 3, side, side + 4), generator=rng())
        assert out.shape == (1, 3, 4 * side, 4 * side + 16) and out.abs().max() <= 1
    with pytest.raises(ValueError, match="multiples of"):
        perturbed(PatchUpsamplerConfig(low_size=16, high_size=64, model_channels=8, norm_groups=4, patch_size=8)).sample(torch.zeros(1, 3, 6, 6))


def test_sampling_is_repeatable_and_chunks_do_not_change_it(monkeypatch):
    model = perturbed(TINY)
    low = torch.rand(5, 3, 8, 8, generator=rng()) * 2 - 1
    whole = model.sample(low, generator=rng(7))
    assert torch.equal(whole, model.sample(low, generator=rng(7)))
    assert not torch.allclose(whole, model.sample(low, generator=rng(8)), atol=1e-2)
    monkeypatch.setattr(Upsampler, "CHUNK_PIXELS", 2 * 32 * 32)
    assert torch.allclose(whole, model.sample(low, generator=rng(7)), atol=1e-4)
    each = model.sample(low, generator=[rng(i) for i in range(5)])         # a generator per picture: the same in any company
    assert torch.allclose(each[3:], model.sample(low[3:], generator=[rng(3), rng(4)]), atol=1e-4)


def test_the_result_depends_on_the_small_picture_and_each_on_its_own():
    model = perturbed(TINY)
    low = torch.rand(3, 3, 8, 8, generator=rng()) * 2 - 1
    other = low.clone()
    other[1] = -low[1]
    a, b = model.sample(low, generator=rng()), model.sample(other, generator=rng())
    assert torch.allclose(a[[0, 2]], b[[0, 2]], atol=1e-5) and (a[1] - b[1]).abs().max() > 1e-2


def test_enlarging_keeps_flat_pictures_and_positions():
    model = Upsampler(TINY)
    flat = torch.full((1, 3, 8, 8), -0.4)
    assert torch.allclose(model.enlarge(flat), torch.full((1, 3, 32, 32), -0.4), atol=1e-5)
    dot = torch.zeros(1, 3, 8, 8)
    dot[:, :, 3, 4] = 1.0
    row, column = centre_of_mass(model.enlarge(dot)[0, 0].clamp(min=0))
    assert row == pytest.approx(3 * 4 + 1.5, abs=0.05) and column == pytest.approx(4 * 4 + 1.5, abs=0.05)


def test_bad_requests_are_refused():
    with pytest.raises(ValueError, match="does not fit"):
        random_crop(torch.zeros(1, 3, 8, 8), 9)
    with pytest.raises(ValueError, match="whole multiple"):
        UpsamplerConfig(low_size=32, high_size=100)
    with pytest.raises(ValueError, match="unknown degradation"):
        UpsamplerConfig(degradation="fog")
    with pytest.raises(ValueError, match="crops of"):
        PatchUpsamplerConfig(low_size=8, high_size=32, patch_size=8)
    with pytest.raises(ValueError, match="sampling steps"):
        Upsampler(TINY).sample(torch.zeros(1, 3, 8, 8), steps=0)


@pytest.mark.parametrize("objective, weighting", [("eps", "none"), ("v", "min_snr"), ("x_start", "none")])
def test_loss_is_finite_repeatable_and_reaches_every_parameter(objective, weighting):
    cfg = UpsamplerConfig(low_size=8, high_size=32, model_channels=8, norm_groups=4, objective=objective, weighting=weighting,
                          degradation="bsr", schedule="linear", crop_fraction=0.5)
    model, crops = perturbed(cfg), torch.rand(3, 3, 16, 16, generator=rng()) * 2 - 1
    loss = model.loss(crops, rng(1))
    loss.backward()
    assert loss.dim() == 0 and loss.isfinite() and torch.equal(loss, model.loss(crops, rng(1)))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["blur", "bsr"])
def test_it_learns_from_small_pictures_spoilt_as_configured(kind, monkeypatch):
    model, crops, seen = perturbed(replace(TINY, degradation=kind)), torch.rand(3, 3, 16, 16, generator=rng()) * 2 - 1, []
    monkeypatch.setattr(Upsampler, "enlarge", lambda self, low: seen.append(low) or F.interpolate(low, scale_factor=4))
    model.loss(crops, rng(1))
    assert torch.equal(seen[0], degrade(crops, kind, 4, rng(1)))           # the first thing that the generator is asked for
    assert not torch.allclose(seen[0], F.avg_pool2d(crops, 4), atol=0.05)


def test_overfits_one_batch_and_then_beats_interpolation():
    torch.manual_seed(0)
    size = 16
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    edges = torch.stack([(row - 8) * math.cos(a) + (column - 8) * math.sin(a) > b for a, b in ((0.3, 0), (1.1, 2), (2.0, -1), (2.8, 1))])
    high = (edges[:, None].float() * torch.tensor([1.6, -1.2, 0.9])[:, None, None] - 0.5).clamp(-1, 1)   # four hard edges
    model = Upsampler(TINY)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(150):
        loss = model.loss(high.repeat(4, 1, 1, 1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    low = F.avg_pool2d(high, 4)
    trivial = (model.enlarge(low) - high).square().mean().item()           # what interpolation alone leaves
    assert sum(losses[-20:]) / 20 < 0.1 * trivial
    sample = model.sample(low, steps=8, generator=rng())
    assert (sample - high).square().mean().item() < 0.1 * trivial
