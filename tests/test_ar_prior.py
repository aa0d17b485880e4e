"""ar_prior.py: codes against numpy's singular values, who sees whom, the cache against the whole sequence, a batch learned by heart."""

import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import lively, three_words

from mini_dalle2 import configs
from mini_dalle2.tricks.heads import PlaceNetworks
from mini_dalle2.ar_prior import ARPriorConfig, Codes, sample_bucket

EOT, L, D = 20, 6, 16
TINY = ARPriorConfig(clip_dim=D, width=32, layers=2, heads=2, vocab_size=30, context_length=L, eot_id=EOT, text_width=16, text_layers=1,
                     text_heads=2, buckets=32, pca_error=0.02)


def batch(n, seed=1):
    """z_img, z_txt (n, D) of unit norm, captions (n, L). z_img is wide in some directions, narrow in others."""
    generator = torch.Generator().manual_seed(seed)
    z_img = torch.randn(n, D, generator=generator) * 0.6 ** torch.arange(D) @ torch.linalg.qr(torch.randn(D, D, generator=generator))[0]
    z_img = F.normalize(z_img + 0.5, dim=1)
    z_txt = F.normalize(z_img + 0.3 * torch.randn(n, D, generator=generator), dim=1)
    return z_img, z_txt, three_words(n, L, EOT, generator)


def build(**changes):
    """A model of TINY's sizes with these settings, of the class that they ask for."""
    return configs.build(configs.model_config("ar_prior", asdict(TINY) | changes))


def tiny(seed=0, amount=0.2, **changes):
    """A small prior, fitted to a batch, lively."""
    torch.manual_seed(seed)
    prior = build(**changes)
    prior.measure(*batch(200)[:2])
    return lively(prior, amount).eval()


def learn(prior, steps, z_img, z_txt, tokens):
    """The loss after so many steps of Adam on one batch."""
    optimizer = torch.optim.Adam([p for p in prior.parameters() if p.requires_grad], lr=3e-3)
    for _ in range(steps):
        loss = prior.loss(z_img, z_txt, tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


# ---------------------------------------------------------------------- codes

@pytest.mark.parametrize("error", [0.3, 0.02, 0.001, 0.0])
def test_the_fewest_principal_components_that_keep_the_error(error):
    """Against numpy's singular value decomposition."""
    z = batch(300)[0]
    codes = Codes(D, 1024)
    kept, lost, rounded = codes.find_components(z, error)
    centred = (z - z.mean(0)).double().numpy()
    energy = np.linalg.svd(centred, full_matrices=False)[1] ** 2
    shares = 1 - np.cumsum(energy) / energy.sum()
    assert shares[kept - 1] <= max(error, 1e-12) and (kept == 1 or shares[kept - 2] > error)
    assert lost == pytest.approx(max(shares[kept - 1], 0), abs=1e-9) and lost <= rounded < lost + 1e-4
    along = (z - z.mean(0)) @ codes.directions
    assert (along.var(0)[:-1] >= along.var(0)[1:] - 1e-9).all()            # the widest first
    assert codes.encode(z).shape == (300, kept)


def test_a_code_is_a_bucket_of_equal_width_and_stands_for_its_middle():
    z = batch(300)[0]
    codes = Codes(D, 64)
    codes.find_components(z, 0.0)
    coordinates, numbers = (z - codes.mean) @ codes.directions, codes.encode(z)
    back = (codes.decode(numbers) - codes.mean) @ codes.directions
    width = (coordinates.amax(0) - coordinates.amin(0)) / 64
    assert ((back - coordinates).abs() <= width / 2 * 1.001 + 1e-6).all()
    assert numbers.min() == 0 and numbers.max() == 63                      # the extremes seen are the ends
    assert torch.equal(codes.encode(codes.decode(numbers)), numbers)
    assert codes.encode(z * 100).min() == 0 and codes.encode(z * 100).max() == 63          # what lies outside goes to the ends


@pytest.mark.parametrize("wobble", [0.0, 1e-8])
def test_copies_of_one_picture_have_one_code_that_loses_nothing(wobble):
    z = batch(1)[0].expand(7, -1) + wobble * torch.randn(7, D, generator=torch.Generator().manual_seed(1))
    codes = Codes(D, 64)
    kept, lost, rounded = codes.find_components(z, 0.01)
    assert (kept, lost) == (1, 0.0) and rounded < 1.0
    assert codes.encode(z).shape == (7, 1) and torch.isfinite(codes.decode(codes.encode(z))).all()
    # half a bucket of an interval of length 1
    assert ((codes.decode(codes.encode(z)) - z).norm(dim=1) <= 0.5 / 64 + 1e-6).all()


def test_projection_keeps_so_many_components():
    z = batch(300)[0]
    codes = Codes(D, 64)
    codes.find_components(z, 0.02)
    errors = [(codes.project(z, k) - z).square().sum(1).mean().item() for k in range(1, D + 1)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-10
    for count in (0, D + 1):
        with pytest.raises(ValueError, match="components"):
            codes.project(z, count)


def test_dot_products_are_quantiles_and_sampling_asks_for_the_top_half(monkeypatch):
    prior, (z_img, z_txt, tokens) = tiny(), batch(200)
    found = prior.bucket((z_img * z_txt).sum(-1))
    assert torch.bincount(found, minlength=32).min() >= 5 and torch.bincount(found, minlength=32).max() <= 8      # 200 / 32 = 6.25
    order = (z_img * z_txt).sum(-1).argsort()
    assert (found[order].diff() >= 0).all()
    seen = []
    hook = prior.dot_embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    prior.sample(tokens, z_txt, generator=torch.Generator().manual_seed(0))
    hook.remove()
    assert seen[0].min() >= 16 and len(seen[0].unique()) == 16             # each of the upper half, none of the lower


def test_with_few_pictures_sampling_asks_only_for_fits_that_were_seen():
    prior, (z_img, z_txt, tokens) = tiny(), batch(20)                      # 32 buckets
    prior.measure(z_img, z_txt)
    dots = (z_img * z_txt).sum(-1)
    trained_on = prior.bucket(dots[dots >= dots.median()])
    seen = []
    hook = prior.dot_embedding.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    for seed in range(10):
        prior.sample(tokens, z_txt, generator=torch.Generator().manual_seed(seed))
    hook.remove()
    assert set(torch.cat(seen).tolist()) == set(trained_on.tolist())


# ---------------------------------------------------------------------- the network

@pytest.mark.parametrize("place_width", [0, 12])
@torch.no_grad()
def test_a_code_depends_on_the_prefix_and_earlier_codes_only(place_width):
    prior, (z_img, z_txt, tokens) = tiny(place_width=place_width), batch(4)
    codes, dot = prior.codes.encode(z_img), torch.tensor([3, 9, 20, 31])
    before, K = prior(codes, dot, tokens, z_txt), codes.shape[1]
    assert before.shape == (4, K, 32)
    for k in range(K):
        changed = codes.clone()
        changed[:, k] = (changed[:, k] + 7) % 32
        moved = (prior(changed, dot, tokens, z_txt) - before).abs().amax((0, 2)) > 1e-6
        assert moved.tolist() == [False] * (k + 1) + [True] * (K - k - 1)
    for other in ((codes, (dot + 5) % 32, tokens, z_txt), (codes, dot, tokens.flip(0), z_txt), (codes, dot, tokens, z_txt.flip(0))):
        assert ((prior(*other) - before).abs().amax(2) > 1e-6).all()


@torch.no_grad()
def test_each_place_has_a_network_of_its_own_that_sees_the_codes_before_it():
    """Against one network after the other, written out; a part of the places is the part of all."""
    torch.manual_seed(0)
    places, values, text = lively(PlaceNetworks(5, 8, 12, text_width=4), 0.3), torch.randn(3, 4), torch.randn(3, 8)
    all_of_them, t = places(values, text), places.text(text)
    for i in range(5):
        h = values[:, :i] @ places.from_values[i, :i] + t @ places.from_text[i] + places.bias[i]
        assert torch.allclose(all_of_them[:, i], F.silu(h) @ places.leave[i], atol=1e-5)
    assert torch.allclose(places(values, text, first=4), all_of_them[:, 4:], atol=1e-6)
    assert torch.allclose(places(values[:, :2], text, first=1), all_of_them[:, 1:3], atol=1e-6)


def test_with_networks_of_places_it_learns_faster():
    """Embeddings from a space of four dimensions: the later codes follow from the earlier ones."""
    generator = torch.Generator().manual_seed(0)
    z_img, z_txt = F.normalize(torch.randn(256, 2, 4, generator=generator) @ torch.randn(4, D, generator=generator), dim=-1).unbind(1)
    tokens, losses = three_words(256, L, EOT, generator), []
    for place_width in (0, 32):
        torch.manual_seed(0)
        prior = build(place_width=place_width, pca_error=0.0)
        prior.measure(z_img, z_txt)
        losses.append(learn(prior, 60, z_img, z_txt, tokens))
    assert losses[1] < losses[0] - 0.5


def test_places_bound_the_codes_and_measuring_says_so(capsys):
    assert tiny(places=3).codes.count == 3 and "3 of 16 components" in (said := capsys.readouterr().out) and "too small" in said
    assert tiny(places=15).codes.count == tiny().codes.count < 15 and "too small" not in capsys.readouterr().out


@torch.no_grad()
def test_dropped_text_takes_tokens_and_z_txt_with_it():
    prior, (z_img, z_txt, tokens) = tiny(place_width=12), batch(4)
    codes, dot, keep = prior.codes.encode(z_img), torch.tensor([3, 9, 20, 31]), torch.tensor([True, False, True, False])
    a, b = prior(codes, dot, tokens, z_txt, keep), prior(codes, dot, tokens.flip(0), z_txt.flip(0), keep)
    assert ((a - b).abs().amax((1, 2)) > 1e-6).tolist() == keep.tolist()


@torch.no_grad()
def test_loss_is_the_negative_log_likelihood_of_the_codes():
    prior, (z_img, z_txt, tokens) = tiny(text_drop=0.0), batch(6)
    codes, dot = prior.codes.encode(z_img), prior.bucket((z_img * z_txt).sum(-1))
    p = prior(codes, dot, tokens, z_txt).double().softmax(-1)
    by_hand = -np.mean([math.log(p[i, k, codes[i, k]]) for i in range(6) for k in range(codes.shape[1])])
    assert prior.loss(z_img, z_txt, tokens).item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("stage", ["micro", "tiny", "paper"])
def test_size_of_the_text_encoder_and_the_decoder(stage):
    """The paper's 24 blocks of 1664 are 0.80 billion weights, its text encoder 1.2 (both by 12 · width² per block)."""
    from mini_dalle2.configs import preset
    cfg = preset(stage).ar_prior.model
    with torch.device("meta"):
        prior = configs.build(cfg)
    decoder, text = (sum(p.numel() for p in part.parameters()) for part in (prior.transformer, prior.text))
    assert decoder == pytest.approx(12 * cfg.layers * cfg.width ** 2, rel=0.05)
    assert text == pytest.approx(12 * cfg.text_layers * cfg.text_width ** 2, rel=0.05)
    if stage == "paper":
        assert decoder / 1e9 == pytest.approx(0.80, abs=0.005) and text / 1e9 == pytest.approx(1.21, abs=0.005)


# ---------------------------------------------------------------------- sampling

@pytest.mark.parametrize("guidance, place_width", [(1.0, 0), (2.5, 0), (2.5, 12)])
def test_the_cache_changes_nothing(guidance, place_width):
    prior, (_, z_txt, tokens) = tiny(place_width=place_width).double(), batch(8)
    options = dict(guidance=guidance)
    a, b = (prior.sample(tokens, z_txt.double(), generator=torch.Generator().manual_seed(3), use_cache=cache, **options)
            for cache in (True, False))
    assert torch.equal(prior.codes.encode(a), prior.codes.encode(b)) and torch.allclose(a, b, atol=1e-10)
    assert torch.allclose(a.norm(dim=1), torch.ones(8, dtype=torch.float64))


def test_with_a_cache_each_code_costs_one_place():
    prior, (_, z_txt, tokens) = tiny(), batch(2)
    lengths = []
    hook = prior.transformer.register_forward_pre_hook(lambda module, inputs: lengths.append(inputs[0].shape[1]))
    K = prior.codes.count
    prior.sample(tokens, z_txt)
    prior.sample(tokens, z_txt, use_cache=False)
    hook.remove()
    assert lengths == [L + 2] + [1] * (K - 1) + [L + 2 + k for k in range(K)]


def test_same_seed_same_embedding_alone_or_in_company():
    prior, (_, z_txt, tokens) = tiny(), batch(5)

    def noise(*seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = prior.sample(tokens, z_txt, generator=noise(0, 1, 2, 3, 4))
    assert torch.allclose(prior.sample(tokens[3:4], z_txt[3:4], generator=noise(3)), together[3:4], atol=1e-5)
    assert not torch.allclose(prior.sample(tokens[3:4], z_txt[3:4], generator=noise(7)), together[3:4], atol=1e-2)


@torch.no_grad()
def test_guidance_is_the_extrapolation_of_logits(monkeypatch):
    prior, (_, z_txt, tokens) = tiny(), batch(3)
    seen = []
    monkeypatch.setattr("mini_dalle2.ar_prior.sample_bucket", lambda logits, u: seen.append(logits) or sample_bucket(logits, u))
    prior.sample(tokens, z_txt, guidance=3.0, generator=torch.Generator().manual_seed(0))
    guided, codes = seen[0], torch.zeros(3, prior.codes.count, dtype=torch.long)
    u = torch.rand(3, prior.codes.count + 1, generator=torch.Generator().manual_seed(0))
    dot = ((1 - 0.5 * u[:, 0]) * 32).long().clamp(max=31)
    kept, dropped = (prior(codes, dot, tokens, z_txt, torch.full((3,), keep))[:, 0] for keep in (True, False))
    assert torch.allclose(guided, dropped + 3 * (kept - dropped), atol=1e-4)


def test_sample_bucket_is_the_inverse_distribution_function():
    p = torch.tensor([0.1, 0.0, 0.4, 0.5])
    u = torch.linspace(0, 1, 1001)[:-1] + 0.0005
    drawn = sample_bucket(p.log().expand(1000, -1), u)
    assert torch.bincount(drawn, minlength=4).tolist() == [100, 0, 400, 500] and (drawn.diff() >= 0).all()


@pytest.mark.parametrize("place_width", [0, 12])
def test_one_batch_is_learned_by_heart(place_width):
    """Different captions, one embedding each: what is drawn for a caption is its own embedding."""
    torch.manual_seed(0)
    z_img, z_txt, tokens = batch(8)
    prior = build(text_drop=0.0, place_width=place_width)
    prior.measure(z_img, z_txt)
    torch.nn.init.zeros_(prior.dot_embedding.weight).requires_grad_(False)                 # or the fit asked for may be that of another
    assert learn(prior, 150, z_img, z_txt, tokens) < 0.05
    cosine = prior.eval().sample(tokens, z_txt, generator=torch.Generator().manual_seed(0)) @ z_img.T
    assert cosine.argmax(1).tolist() == list(range(8)) and cosine.diagonal().mean() > 0.98


@pytest.mark.parametrize("changes, said", [
    (dict(buckets=1), "buckets 1"), (dict(width=33, heads=3), "width 33"), (dict(top=1.5), "top"), (dict(pca_error=-0.1), "pca_error"),
    (dict(text_heads=3), "text_heads"), (dict(guidance=-1.0), "guidance"), (dict(place_width=-1), "place_width"), (dict(places=17), "places")])
def test_impossible_settings_are_errors(changes, said):
    with pytest.raises(ValueError, match=said):
        build(**changes)
