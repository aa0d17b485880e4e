"""decoder.py: where z_img and the caption enter, what dropping them means, how guidance is done, and a batch learned by heart."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import lively, three_words

from mini_dalle2 import configs
from mini_dalle2.decoder import Condition, Decoder, DecoderConfig
from mini_dalle2.sampling import strided_timesteps

EOT, L, D, W = 20, 6, 12, 16
TINY = DecoderConfig(image_size=8, clip_dim=D, model_channels=16, channel_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), head_dim=8,
                     norm_groups=8, vocab_size=30, context_length=L, eot_id=EOT, text_width=W, text_layers=2, text_heads=2)


def build(**changes):
    """A model of TINY's sizes with these settings, of the class that they ask for."""
    return configs.build(configs.model_config("decoder", asdict(TINY) | changes))


def tiny(seed=0, **changes):
    """A small decoder, lively."""
    torch.manual_seed(seed)
    return lively(build(**changes), 0.1)


def batch(n, seed=1):
    """images (n, 3, 8, 8) in [-1, 1], z_img (n, D) of unit norm, captions (n, L)."""
    generator = torch.Generator().manual_seed(seed)
    images = (torch.rand(n, 3, 2, 2, generator=generator) * 2 - 1).repeat_interleave(4, 2).repeat_interleave(4, 3)
    z_img = F.normalize(torch.randn(n, D, generator=generator), dim=1)
    return images, z_img, three_words(n, L, EOT, generator)


def differ(a, b, threshold=1e-5):
    """For each row of a leading dimension: do a and b differ there?"""
    return ((a - b).abs().flatten(1).amax(1) > threshold).tolist()


# ---------------------------------------------------------------------- what the U-Net is told

@torch.no_grad()
def test_z_img_enters_the_embedding_and_four_tokens_and_the_caption_the_rest():
    model, (_, z, tokens) = tiny(), batch(1)
    emb, context, *_ = model.condition(z, tokens)
    assert emb.shape == (1, 64) and context.shape == (1, 4 + L, W)
    emb_z, context_z, *_ = model.condition(-z, tokens)
    assert differ(emb, emb_z) == [True] and differ(context[0], context_z[0]) == [True] * 4 + [False] * L
    other = tokens.clone()
    other[0, 2] = 5
    emb_text, context_text, *_ = model.condition(z, other)
    assert differ(emb, emb_text) == [True] and differ(context[0], context_text[0]) == [False] * 4 + [True] * L   # text is bidirectional
    state = model.ln_final(model.transformer(model.caption(tokens)))       # (1, L, W)
    torch.testing.assert_close(context[:, 4:], state)
    torch.testing.assert_close(emb, model.z_to_emb(z * D ** 0.5) + model.text_to_emb(state[:, -1]))
    torch.testing.assert_close(context[0, :4].flatten(), model.z_to_tokens(z * D ** 0.5)[0])


def test_both_ways_in_reach_the_picture():
    model, (x, z, tokens), t = tiny(), batch(2), torch.tensor([50, 900])
    z.requires_grad_()
    emb, context, *_ = model.condition(z, tokens)
    out = model(x, t, Condition(emb, context))
    assert out.shape == (2, 6, 8, 8)
    d_emb, d_context = torch.autograd.grad(out.square().sum(), (emb, context), retain_graph=True)
    assert (d_emb.abs() > 0).all() and (d_context.abs().amax(-1) > 0).all()
    by_emb, = torch.autograd.grad(emb.square().sum(), z, retain_graph=True)
    by_tokens, = torch.autograd.grad(context[:, :4].square().sum(), z)
    assert (by_emb.abs() > 0).all() and (by_tokens.abs() > 0).all()


@torch.no_grad()
def test_no_z_img_is_the_mean_embedding_once_whitening_is_fitted():
    model, (_, z, tokens), (_, known, _) = tiny(whiten_z=True), batch(2), batch(200, seed=2)
    model.whitening.fit(known + 0.1)
    nothing = model.condition(z, tokens, keep_z=torch.zeros(2, dtype=torch.bool))
    mean = model.condition((known + 0.1).mean(0).expand(2, -1), tokens)
    torch.testing.assert_close(nothing[:2], mean[:2], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_no_z_img_is_the_zero_vector_and_no_caption_is_padding():
    model, (_, z, tokens) = tiny(), batch(2)
    keep, drop = torch.tensor([True, False]), torch.zeros(2, dtype=torch.bool)
    emb, context, *_ = model.condition(z, tokens, keep_z=keep)
    zeros_emb, zeros_context, *_ = model.condition(torch.stack([z[0], 0 * z[1]]), tokens)
    torch.testing.assert_close(emb, zeros_emb)
    torch.testing.assert_close(context, zeros_context)
    emb, context, *_ = model.condition(z, tokens, keep_text=keep)
    states = model.ln_final(model.transformer(torch.stack([model.caption(tokens)[0], model.caption.padding])))
    torch.testing.assert_close(context[:, 4:], states)
    torch.testing.assert_close(emb, model.z_to_emb(z * D ** 0.5) + model.text_to_emb(states[:, -1]))
    nothing = model.condition(z, tokens, drop, drop)
    torch.testing.assert_close(nothing[0][0], nothing[0][1])               # all that is left is the same for everybody
    torch.testing.assert_close(nothing[1][0], nothing[1][1])
    noise = tokens.clone()
    noise[:, 4:] = torch.tensor([29, EOT])                                 # behind the end of text nothing counts
    torch.testing.assert_close(model.condition(z, noise)[:2], model.condition(z, tokens)[:2])


def test_parameter_count_of_the_paper():
    with torch.device("meta"):
        model = Decoder(DecoderConfig(image_size=64, clip_dim=1024, model_channels=512, channel_mult=(1, 2, 3, 4), num_res_blocks=3,
                                      attn_resolutions=(32, 16, 8), head_dim=64, vocab_size=50257, context_length=256, eot_id=50256,
                                      text_width=2048, text_layers=24, text_heads=32))
    count = lambda *modules: sum(p.numel() for module in modules for p in module.parameters())
    assert count(model.transformer) == 24 * (12 * 2048 ** 2 + 13 * 2048) and round(count(model.unet) / 1e6) == 2238
    assert count(model.z_to_emb, model.z_to_tokens) == 1025 * 2048 + 1025 * 4 * 2048              # 10.5M
    assert round(count(model.caption, model.text_to_emb, model.ln_final) / 1e6) == 108
    assert round(count(model) / 1e6) == 3565                               # "3.5B"


# ---------------------------------------------------------------------- the loss

def test_z_img_is_dropped_a_tenth_the_caption_half_of_the_time_independently(monkeypatch):
    model, (images, z, tokens), seen = tiny(), batch(6000), []

    def condition(z, tokens, keep_z=None, keep_text=None):
        seen.append((~keep_z, ~keep_text))
        raise InterruptedError

    monkeypatch.setattr(model, "condition", condition)
    with pytest.raises(InterruptedError):
        model.loss(images, z, tokens, torch.Generator().manual_seed(0))
    z_dropped, text_dropped = (flags.float() for flags in seen[0])
    assert z_dropped.mean().item() == pytest.approx(0.1, abs=0.015) and text_dropped.mean().item() == pytest.approx(0.5, abs=0.025)
    assert (z_dropped * text_dropped).mean().item() == pytest.approx(0.05, abs=0.01)


def test_z_img_may_be_noised_in_training(monkeypatch):
    """At most by `z_noise`, each picture's by its own share of it, and the same z_img goes in at every door."""
    (images, z, tokens), seen, model = batch(400), {}, tiny(z_noise=0.5)
    original = model.condition
    for most in (0.0, 0.5):
        monkeypatch.setattr(model, "condition", lambda z, *rest: seen.update({most: z}) or original(z, *rest))
        model.loss(images, z, tokens, torch.Generator().manual_seed(0), z_noise=most)
    assert torch.equal(seen[0.0], z)
    levels = model.whitening(seen[0.5] - z).square().mean(1).sqrt()        # (400,): unfitted, spread is 1 in each coordinate
    assert 0 < levels.min() < 0.05 and levels.max() < 0.5 * 2 and levels.mean().item() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("objective, vlb_weight", [("eps", 0.001), ("v", 0.02)])
def test_loss_is_the_hybrid_loss_of_the_noised_picture(monkeypatch, objective, vlb_weight):
    model, (images, z, tokens), seen = tiny(objective=objective, vlb_weight=vlb_weight), batch(5), {}
    original = model.diffusion.loss

    def loss(raw, x_start, x_t, t, noise, *settings, **named):
        seen.update(raw=raw, x_start=x_start, x_t=x_t, t=t, noise=noise, values=original(raw, x_start, x_t, t, noise, *settings, **named))
        return seen["values"]

    monkeypatch.setattr(model.diffusion, "loss", loss)
    value = model.loss(images, z, tokens, torch.Generator().manual_seed(0))
    assert torch.equal(seen["x_start"], images) and len(set(seen["t"].tolist())) == 5
    torch.testing.assert_close(seen["x_t"], model.diffusion.q_sample(images, seen["t"], seen["noise"]))
    expected = original(seen["raw"], images, seen["x_t"], seen["t"], seen["noise"], objective, "none", vlb_weight)
    torch.testing.assert_close(value, expected.mean())
    value.backward()
    for module in (model.unet, model.transformer, model.caption, model.z_to_emb, model.z_to_tokens):      # the text tower learns too
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    assert torch.equal(model.loss(images, z, tokens, torch.Generator().manual_seed(0)), value.detach())


# ---------------------------------------------------------------------- guidance and sampling

@torch.no_grad()
def test_guidance_one_is_none_and_others_extrapolate_the_prediction_only():
    model, (x, z, tokens), t = tiny(), batch(2), torch.tensor([50, 600])
    drop = torch.zeros(2, dtype=torch.bool)
    cond = model(x, t, model.condition(z, tokens))
    null = lambda x: model(x, t, model.condition(z, tokens, drop, drop))
    for scale in (1.0, 1.0 + 1e-7, 0.0, 3.0):
        out = model.denoiser(z, tokens, scale, clip=None)(x, t)
        torch.testing.assert_close(out.eps, null(x)[:, :3] + scale * (cond - null(x))[:, :3], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(out.frac, (cond[:, 3:] + 1) / 2, atol=1e-4, rtol=1e-4)         # the conditional variance
    unguided = model.denoiser(z, tokens, 0.0, clip=None)
    assert all(differ(unguided(x, t).eps, unguided(x + 0.1, t).eps, 1e-4)) # the unconditional branch denoises this very x_t
    assert model.denoiser(z, tokens, 3.0)(x, t).x_start.abs().max() <= 1


@pytest.mark.parametrize("guidance, encodings", [(1.0, 1), (3.0, 2)])
def test_text_is_encoded_once_a_picture_not_once_a_step(guidance, encodings):
    model, (_, z, tokens), calls = tiny(), batch(2), {"text": 0, "unet": []}
    model.transformer.register_forward_hook(lambda *_: calls.update(text=calls["text"] + 1))
    model.unet.register_forward_hook(lambda module, args, out: calls["unet"].append(args[1].unique().item()))
    model.sample(z, tokens, guidance=guidance, steps=7)
    assert calls["text"] <= encodings and calls["unet"] == strided_timesteps(1000, 7)[::-1]


@pytest.mark.parametrize("sampler, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 1.0)])
def test_same_seed_same_picture_alone_or_in_company(sampler, eta):
    model, (_, z, tokens) = tiny(sampler=sampler), batch(3)
    draw = lambda rows, seeds, **kw: model.sample(z[rows], tokens[rows], steps=5, eta=eta if sampler == "ddim" else None,
                                                  generator=[torch.Generator().manual_seed(s) for s in seeds], **kw)
    pictures = draw([0, 1, 2], [5, 6, 7])
    assert pictures.shape == (3, 3, 8, 8) and pictures.abs().max() <= 1 and not pictures.requires_grad
    assert torch.equal(draw([0, 1, 2], [5, 6, 7]), pictures)
    torch.testing.assert_close(draw([2], [7]), pictures[2:], atol=1e-3, rtol=1e-3)
    assert (draw([2], [8]) - pictures[2:]).abs().max() > 0.05
    x_T = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(9))
    first, second = (draw([0], [seed], x_T=x_T) for seed in (1, 2))
    assert torch.equal(first, second) == (sampler == "ddim" and eta == 0)  # from a given start only these steps need no dice


def test_sampler_obeys_steps_and_guidance():
    model, (_, z, tokens) = tiny(guidance=2.0, sampling_steps=4, sampler="ddim"), batch(1)
    draw = lambda **kw: model.sample(z, tokens, generator=torch.Generator().manual_seed(0), **kw)
    assert torch.equal(draw(), draw(guidance=2.0, steps=4))                # the configuration's own values
    assert not torch.equal(draw(), draw(guidance=1.0)) and not torch.equal(draw(), draw(steps=5))
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError):
            draw(steps=steps)


@torch.no_grad()
def test_none_is_a_condition_dropped():
    decoder, (_, z_img, tokens) = tiny(), batch(3)
    no = torch.zeros(3, dtype=torch.bool)
    for given, kept in (((None, tokens), dict(keep_z=no)), ((z_img, None), dict(keep_text=no))):
        for a, b in zip(decoder.condition(*given)[:2], decoder.condition(z_img, tokens, **kept)):
            assert torch.allclose(a, b, atol=1e-6)
    for given in ((None, tokens), (z_img, None)):
        assert decoder.eval().sample(*given, guidance=2.0, steps=3).shape == (3, 3, 8, 8)


def test_inversion_finds_the_noise_of_a_picture():
    """DDIM from the x_T that is found draws the picture again, from another x_T, or for another z_img, it draws another."""
    torch.manual_seed(0)
    decoder, (_, z_img, _) = lively(Decoder(replace(TINY, objective="v")), 0.05).eval(), batch(3)
    start = 0.3 * torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    options = dict(guidance=1.0, eta=0.0, steps=20)
    images = decoder.sample(z_img, None, x_T=start, **options)             # pictures that it can draw
    x_T = decoder.invert(images, z_img, steps=20)
    error = (decoder.sample(z_img, None, x_T=x_T, **options) - images).square().mean()
    for other in (decoder.sample(z_img, None, x_T=x_T.flip(0), **options), decoder.sample(z_img.flip(0), None, x_T=x_T, **options)):
        assert error < 1e-3 * (other - images).square().mean()


@pytest.mark.parametrize("objective", ["eps", "x_start", "v"])
def test_inversion_with_a_perfect_network(objective):
    """Pixels from N(0, 0.3²) are x_T / 0.3 = z: what DDIM does with the perfect prediction is to scale, and scaling is undone."""
    decoder, s = Decoder(replace(TINY, objective=objective)).eval(), 0.3
    diffusion = decoder.diffusion

    def forward(x_t, t, condition):
        a = diffusion.alphas_cumprod[t].view(-1, 1, 1, 1)
        x_start = a.sqrt() * s ** 2 / (a * s ** 2 + 1 - a) * x_t
        eps = diffusion.eps_from_x_start(x_t, t, x_start)
        raw = {"eps": eps, "x_start": x_start, "v": diffusion.v_from(x_start, t, eps)}[objective]
        return torch.cat([raw, torch.zeros_like(raw)], dim=1)
    decoder.forward = forward
    images, z_img = (s * torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))).clamp(-0.9, 0.9), batch(2)[1]
    x_T = decoder.invert(images, z_img, steps=200)
    assert torch.allclose(x_T, images / s, atol=0.05)
    again = decoder.sample(z_img, None, guidance=1.0, eta=0.0, steps=200, x_T=x_T)
    assert (again - images).abs().max() < 1e-3


def test_known_pixels_stay():
    decoder, (images, z_img, tokens) = tiny().eval(), batch(3)
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    drawn = decoder.sample(z_img, tokens, steps=5, known=(images, mask))
    assert torch.equal(drawn[..., 4:], images[..., 4:]) and not torch.allclose(drawn[..., :4], images[..., :4], atol=0.1)


# The second row has what the preset `tiny` has and the paper has not.
@pytest.mark.parametrize("changes", [{}, dict(channel_mult=(1,), objective="x_start", weighting="snr_plus_1", vlb_weight=1e-5, whiten_z=True,
                                              patch_size=2, position_embedding=True, emb_channels=48)])
def test_one_batch_is_learned_by_heart(changes):
    torch.manual_seed(0)
    model, (images, z, tokens) = build(**changes), batch(8)
    if changes:
        model.whitening.fit(batch(200, seed=2)[1])
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=4e-3), torch.Generator().manual_seed(0)
    for _ in range(250):
        loss = model.loss(images.repeat(2, 1, 1, 1), z.repeat(2, 1), tokens.repeat(2, 1), generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    t = torch.full((8,), 500)
    x_t = model.diffusion.q_sample(images, t, torch.randn(images.shape, generator=generator))
    with torch.no_grad():
        guess = model.denoiser(z, tokens)(x_t, t).x_start
        wrong = model.denoiser(z.roll(1, 0), tokens.roll(1, 0))(x_t, t).x_start
    error, others = (guess - images).square().mean().item(), (wrong - images).square().mean().item()
    assert error < 0.05 and others > 2 * error                             # the variance is 1/3; told of another picture it drifts there
