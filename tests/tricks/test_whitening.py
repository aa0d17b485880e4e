"""Whitening against its definition: the covariance of what comes out is the identity, and nothing is lost."""

import pytest
import torch

from mini_dalle2.pipeline import load_model
from mini_dalle2.runtime.files import load_checkpoint
from mini_dalle2.tricks.whitening import Whitening


def embeddings(n=4000, dim=12):
    """Unit vectors whose directions differ in spread by a factor of 300, around a mean that is not zero."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.logspace(0, -2.5, dim)
    mixed = (torch.randn(n, dim, generator=generator) * spread) @ torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    return torch.nn.functional.normalize(mixed + 0.3, dim=1)


def test_unfitted_it_multiplies_by_the_root_of_d():
    z = embeddings(10)
    whitening = Whitening(12)
    assert torch.allclose(whitening(z), 12 ** 0.5 * z)
    assert torch.allclose(whitening.inverse(whitening(z)), z, atol=1e-6)


def test_fitted_without_a_floor_the_covariance_is_the_identity(monkeypatch):
    monkeypatch.setattr(Whitening, "FLOOR", 0.0)
    z, whitening = embeddings(), Whitening(12)
    whitening.fit(z)
    w = whitening(z).double()
    assert torch.allclose(w.T @ w / len(w), torch.eye(12, dtype=torch.float64), atol=1e-3)
    assert w.mean(0).abs().max() < 1e-3


def test_the_floor_holds_narrow_directions_back():
    z, whitening = embeddings(), Whitening(12)
    whitening.fit(z)
    spread = whitening(z).std(0)                                           # in the order of eigh: the narrowest first
    assert (spread.diff() > -1e-3).all() and spread[0] < 0.5 < 1 < spread[-1]
    assert abs(whitening(z).square().mean().item() - 1) < 1e-3


def test_the_inverse_gives_z_back():
    z, whitening = embeddings(), Whitening(12)
    whitening.fit(z)
    assert torch.allclose(whitening.inverse(whitening(z)), z, atol=1e-5)


def test_noise_is_no_wider_than_the_spread():
    """Each coordinate gets `level` times its noise, but one in which all z are nearly alike gets hardly any, even of much noise."""
    z, whitening = embeddings(500), Whitening(12)
    z[:, 0] = 0.2                                                          # the same in all: a direction without any spread
    whitening.fit(z)
    assert whitening.spread.min() < 1e-3 and torch.allclose(whitening.spread, whitening(z).std(0), rtol=2e-3, atol=1e-5)   # n, n − 1
    noise, level = torch.randn(500, 12, generator=torch.Generator().manual_seed(5)), torch.full((500, 1), 0.3)
    level[250:] = 100.0
    added = whitening(whitening.add_noise(z, noise, level)) - whitening(z)
    for rows, width in ((slice(250), whitening.spread.clamp(max=0.3)), (slice(250, 500), whitening.spread)):
        assert torch.allclose(added[rows], noise[rows] * width, atol=1e-4)


def test_it_lies_in_the_checkpoint():
    z, whitening, other = embeddings(), Whitening(12), Whitening(12)
    whitening.fit(z)
    other.load_state_dict(whitening.state_dict())
    assert torch.equal(whitening(z), other(z)) and not torch.allclose(other(z), Whitening(12)(z), atol=0.1)


def test_a_direction_without_spread_is_no_division_by_zero():
    z, whitening = torch.cat([embeddings(100), torch.zeros(100, 1)], dim=1), Whitening(13)
    whitening.fit(z)
    assert whitening(z).isfinite().all() and torch.allclose(whitening.inverse(whitening(z)), z, atol=1e-5)


def test_prior_and_decoder_measure_the_embeddings_they_are_trained_on(run):
    saved, prior, decoder = load_checkpoint(run / "embeddings.pt"), *(load_model(run / f"{stage}.pt")[0] for stage in ("prior", "decoder"))
    for whitening, z in [(prior.whitening, saved["z_img"]), (prior.whitening_txt, saved["z_txt"]), (decoder.whitening, saved["z_img"])]:
        assert whitening(z).mean(0).abs().max() < 1e-3
        assert whitening(z).square().mean().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("wobble", [0.0, 1e-7])
def test_copies_of_one_embedding_are_centred_and_scaled(wobble):
    """Nothing can be measured of copies: w is then √D·(z − mean), also where another whitening was before."""
    z = embeddings(1).expand(5, -1) + wobble * torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    whitening, others = Whitening(12), embeddings(20)
    whitening.fit(others)
    whitening.fit(z)
    assert torch.allclose(whitening(others), 12 ** 0.5 * (others - z.mean(0)), atol=1e-5)
    assert torch.allclose(whitening.inverse(whitening(others)), others, atol=1e-5)
    assert not whitening.spread.any() and torch.allclose(whitening.add_noise(z, torch.ones(5, 12), torch.ones(5, 1)), z, atol=1e-6)
