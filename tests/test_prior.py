"""prior.py against diffusers' PriorTransformer with the same weights, and by perturbation: who sees whom, what is dropped."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from conftest import lively, three_words
from diffusers import PriorTransformer

from mini_dalle2 import configs
from mini_dalle2.diffusion import ModelOutput
from mini_dalle2.prior import DiffusionPrior, PriorConfig
from mini_dalle2.transformer import timestep_embedding

EOT, L, D = 20, 6, 16
TINY = PriorConfig(clip_dim=D, width=32, layers=2, heads=2, vocab_size=30, context_length=L, eot_id=EOT)


def build(**changes):
    """A model of TINY's sizes with these settings, of the class that they ask for."""
    return configs.build(configs.model_config("prior", asdict(TINY) | changes))


def tiny(seed=0, **changes):
    """A small prior, lively."""
    torch.manual_seed(seed)
    return lively(build(**changes), 0.2)


def batch(n, seed=1):
    """z_img, z_txt (n, D) of unit norm, captions (n, L)."""
    generator = torch.Generator().manual_seed(seed)
    z_img, z_txt = (F.normalize(torch.randn(n, D, generator=generator), dim=1) for _ in range(2))
    return z_img, z_txt, three_words(n, L, EOT, generator)


def predict(model, x_t, t, tokens, z_txt, keep=None):
    """The network's answer to x_t at t for these captions."""
    return model(x_t, t, model.condition(tokens, z_txt, keep))


# ---------------------------------------------------------------------- the network

def test_forward_is_diffusers_prior_transformer():
    """Token order, causal mask, final query, time embedding, as in the public reimplementation, which is fed our embedded caption."""
    ours = tiny()
    theirs = PriorTransformer(num_attention_heads=2, attention_head_dim=16, num_layers=2, embedding_dim=D, num_embeddings=L,
                              additional_embeddings=4)
    theirs.encoder_hidden_states_proj = torch.nn.Identity()
    state = {"prd_embedding": ours.query.view(1, 1, -1), "clip_mean": torch.zeros(1, D), "clip_std": torch.ones(1, D),
             "positional_embedding": F.pad(ours.position, (0, 0, L, 0))[None]}
    pairs = {"time_embedding.linear_1": ours.time_embed[0], "time_embedding.linear_2": ours.time_embed[2], "proj_in": ours.z_img_proj,
             "embedding_proj": ours.z_txt_proj, "norm_out": ours.ln_final, "proj_to_clip_embeddings": ours.out_proj}
    for i, block in enumerate(ours.transformer.blocks):
        at = f"transformer_blocks.{i}."
        pairs |= {at + "norm1": block.ln_1, at + "norm3": block.ln_2, at + "attn1.to_out.0": block.attn.c_proj,
                  at + "ff.net.0.proj": block.mlp.c_fc, at + "ff.net.2": block.mlp.c_proj}
        for key in ("weight", "bias"):
            parts = zip("qkv", getattr(block.attn.c_attn, key).chunk(3))
            state |= {f"{at}attn1.to_{part}.{key}": value for part, value in parts}
    for name, module in pairs.items():
        state |= {f"{name}.{key}": value for key, value in module.state_dict().items()}
    state["embedding_proj.weight"] = state["embedding_proj.weight"] * D ** 0.5                    # ours scales z_txt before the projection
    theirs.load_state_dict({name: value.detach() for name, value in state.items()}, strict=True)
    (x, z_txt, tokens), t = batch(3), torch.tensor([0, 250, 999])
    expected = theirs(x, t, z_txt, ours.caption(tokens), torch.ones(3, L)).predicted_image_embedding
    torch.testing.assert_close(predict(ours, x, t, tokens, z_txt), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(predict(ours, x, t, tokens, z_txt, torch.ones(3, dtype=torch.bool)), expected, atol=1e-4, rtol=1e-4)


def test_the_query_sees_all_and_nothing_sees_what_comes_later():
    model, states = tiny(), []
    model.transformer.register_forward_pre_hook(lambda module, args: states.append(module.blocks[1](module.blocks[0](args[0]))[0]))
    (x, z_txt, tokens), t = batch(1), torch.tensor([300])
    tokens[0, -1] = EOT                                                    # a caption that fills its six places
    tokens[0, 3:5] = torch.tensor([5, 6])
    other = tokens.clone()
    other[0, 3] = 7
    predict(model, x, t, tokens, z_txt)
    for first, changed in ((3, (x, t, other, z_txt)), (L, (x, t, tokens, -z_txt)), (L + 1, (x, t + 9, tokens, z_txt)),
                           (L + 2, (x.flip(1), t, tokens, z_txt))):
        out = predict(model, *changed)
        moved = ((states[-1] - states[0]).abs().amax(-1) > 1e-6).tolist()
        assert moved == [i >= first for i in range(L + 4)]
        assert (out - predict(model, x, t, tokens, z_txt)).abs().max() > 1e-4
    assert states[0].shape == (L + 4, 32)


@torch.no_grad()
def test_the_head_takes_over_from_the_query():
    """By its formula, from what the transformer leaves at the last place; its blocks begin as the identity."""
    model, (x, z_txt, tokens), t = tiny(head_layers=2, head_width=24), batch(3), torch.tensor([0, 400, 999])
    left = []
    model.ln_final.register_forward_hook(lambda module, args, output: left.append(output))
    found = predict(model, x, t, tokens, z_txt)
    query, time = left[0], model.time_embed(timestep_embedding(t, 32))
    h = query @ model.head.enter.weight.T + model.head.enter.bias          # (B, 24)
    for block in model.head.blocks:
        normal = (h - h.mean(1, keepdim=True)) / (h.var(1, correction=0, keepdim=True) + 1e-5).sqrt() * block.ln.weight + block.ln.bias
        inner = normal @ block.c_fc.weight.T + block.c_fc.bias + time @ block.time_proj.weight.T + block.time_proj.bias
        h = h + (inner * inner.sigmoid()) @ block.c_proj.weight.T + block.c_proj.bias
    torch.testing.assert_close(found, model.out_proj(model.head.ln_final(h)), atol=1e-5, rtol=1e-5)
    plain, new = tiny(), build(head_layers=3)
    assert not hasattr(plain, "head") and not any(name.startswith("head") for name in plain.state_dict())
    h, time = torch.randn(2, 512), torch.randn(2, 32)
    assert all(torch.equal(block(h, time), h) for block in new.head.blocks)


@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("changes", [{}, {"frozen_text": 24}, {"head_layers": 1, "head_width": 24}])
@torch.no_grad()
def test_the_text_is_read_once_for_all_steps(guidance, changes):
    """What a sampler calls is the network as training knows it, step after step, though only three places are computed in each."""
    model, (x, z_txt, tokens), lengths, frozen_text = tiny(**changes), batch(3), [], changes.get("frozen_text")
    if frozen_text is not None:                                            # a stand-in for CLIP; its captions are masked, not padded
        states = torch.randn(30, frozen_text, generator=torch.Generator().manual_seed(2))
        model.caption.encoder = lambda tokens: (states[tokens], F.normalize(states[tokens].sum(1)[:, :D], dim=1))
    denoise = model.denoiser(tokens, z_txt, guidance)
    model.transformer.register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    for t in (torch.full((3,), 900), torch.full((3,), 900), torch.full((3,), 20)):
        found = denoise(x, t).x_start
        assert lengths == [3]
        told, untold = (predict(model, x, t, tokens, z_txt, torch.full((3,), kept)) for kept in (True, False))
        torch.testing.assert_close(found, untold + guidance * (told - untold), atol=1e-5, rtol=1e-5)
        assert lengths == [3, L + 4, L + 4]
        lengths.clear()


def test_tokens_behind_the_end_of_text_are_padding():
    model, (x, z_txt, tokens), t = tiny(), batch(2), torch.tensor([100, 800])
    noise = tokens.clone()
    noise[:, 4:] = torch.tensor([29, EOT])
    assert torch.equal(predict(model, x, t, noise, z_txt), predict(model, x, t, tokens, z_txt))
    noise[:, 2] = 3
    assert (predict(model, x, t, noise, z_txt) - predict(model, x, t, tokens, z_txt)).abs().max() > 1e-4


def test_parameter_count_of_the_paper():
    with torch.device("meta"):
        model = DiffusionPrior(PriorConfig(clip_dim=1024, width=2048, layers=24, heads=32, vocab_size=50257, context_length=256))
    count = lambda module: sum(p.numel() for p in module.parameters())
    assert count(model.transformer) == 24 * (12 * 2048 ** 2 + 13 * 2048)   # 1,209M
    assert round((count(model) - 50257 * 2048) / 1e6) == 1224 and round(count(model) / 1e6) == 1327       # "1B"


# ---------------------------------------------------------------------- the loss

def test_embedding_scale_is_the_papers_17_2():
    wide, z_img = DiffusionPrior(replace(TINY, clip_dim=1024, width=2)), torch.nn.functional.normalize(torch.randn(5, 1024), dim=1)
    assert torch.allclose(wide.scale(z_img), 17.2 * z_img, atol=1e-6)
    model, (z_img, _, _) = tiny(), batch(50)
    assert model.scale(z_img).square().mean().sqrt().item() == pytest.approx(17.2 / 32)                   # at every width
    assert torch.allclose(model.unscale(model.scale(z_img)), z_img, atol=1e-6)


def test_loss_is_the_squared_error_of_the_scaled_clean_embedding(monkeypatch):
    model, (z_img, z_txt, tokens), seen = tiny(), batch(8), {}
    x_start = model.scale(z_img)

    def forward(x_t, t, condition):
        seen.update(x_t=x_t, t=t)
        return answer

    monkeypatch.setattr(model, "forward", forward)
    for answer, expected in ((x_start, 0.0), (torch.zeros_like(x_start), 0.5375 ** 2), (x_start + 2, 4.0)):
        assert model.loss(z_img, z_txt, tokens).item() == pytest.approx(expected, abs=1e-5)
    a = model.diffusion.alphas_cumprod[seen["t"]][:, None]
    noise = (seen["x_t"] - a.sqrt() * x_start) / (1 - a).sqrt()            # what the network was shown is the noised embedding
    assert noise.std().item() == pytest.approx(1, abs=0.25) and noise.abs().max() < 6


def test_loss_draws_every_timestep_and_drops_a_tenth_of_the_texts(monkeypatch):
    model, (z_img, z_txt, tokens), seen = tiny(), batch(4000), []
    monkeypatch.setattr(model, "condition", lambda tokens, z_txt, keep=None: keep)
    monkeypatch.setattr(model, "forward", lambda x_t, t, keep: seen.append((t, keep)) or x_t)
    losses = [model.loss(z_img, z_txt, tokens, torch.Generator().manual_seed(seed)).item() for seed in (0, 0, 1)]
    t, keep = seen[0]
    assert 0 <= t.min() < 5 and 994 < t.max() <= 999 and t.float().mean().item() == pytest.approx(499.5, abs=25)
    assert (~keep).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert losses[0] == losses[1] != losses[2]                             # a seed fixes all of it


def test_dropped_text_takes_tokens_and_z_txt_with_it_and_leaves_x_t():
    model, (x, z_txt, tokens), t = tiny(), batch(3), torch.tensor([10, 500, 990])
    keep = torch.tensor([True, False, False])
    out = predict(model, x, t, tokens, z_txt, keep)
    torch.testing.assert_close(out[0], predict(model, x, t, tokens, z_txt)[0])
    torch.testing.assert_close(predict(model, x, t, tokens.roll(1, 0), z_txt.roll(1, 0), keep)[1:], out[1:])
    assert (predict(model, x + 0.1, t, tokens, z_txt, keep) - out).abs().amax(1).min() > 1e-4
    assert (predict(model, x, t - 9, tokens, z_txt, keep) - out).abs().amax(1).min() > 1e-4
    assert (out - predict(model, x, t, tokens, z_txt)).abs().amax(1)[1:].min() > 1e-3


# ---------------------------------------------------------------------- sampling

@torch.no_grad()
def test_guidance_one_is_none_and_others_extrapolate_from_dropped_text():
    model, (x, z_txt, tokens), t = tiny(), batch(3), torch.tensor([10, 500, 990])
    cond, null = predict(model, x, t, tokens, z_txt), predict(model, x, t, tokens, z_txt, torch.zeros(3, dtype=torch.bool))
    for scale in (0.0, 1.0, 1.0 + 1e-7, 4.0):
        out = model.denoiser(tokens, z_txt, scale)(x, t)
        torch.testing.assert_close(out.x_start, null + scale * (cond - null), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(model.diffusion.q_sample(out.x_start, t, out.eps), x, atol=1e-4, rtol=1e-4)
    null_denoise = model.denoiser(tokens, z_txt, 0.0)                      # the unconditional branch alone
    assert (null_denoise(x, t).x_start - null_denoise(x + 0.1, t).x_start).abs().amax(1).min() > 1e-4


def test_sample_keeps_the_candidate_closest_to_the_text(monkeypatch):
    model, (_, z_txt, tokens) = tiny(candidates=3), batch(4)
    guesses, seen = 5 * torch.randn(12, D), []

    def denoiser(tokens, z_txt, guidance):
        seen.append((tokens, z_txt, guidance))
        return lambda x, t: ModelOutput(guesses, x)

    monkeypatch.setattr(model, "denoiser", denoiser)
    z = model.sample(tokens, z_txt, guidance=2.5, steps=1)
    for i in range(4):
        candidates = F.normalize(guesses[3 * i:3 * i + 3], dim=1)
        assert torch.allclose(z[i], candidates[(candidates @ z_txt[i]).argmax()], atol=1e-6)
    assert torch.equal(seen[0][0], tokens.repeat_interleave(3, 0)) and torch.equal(seen[0][1], z_txt.repeat_interleave(3, 0))
    assert seen[0][2] == 2.5 and TINY.candidates == 2


def test_same_seed_same_embedding_alone_or_in_company():
    model, (_, z_txt, tokens) = tiny(), batch(3)
    dice = lambda seeds: [torch.Generator().manual_seed(seed) for seed in seeds]
    draw = lambda rows, seeds, **kw: model.sample(tokens[rows], z_txt[rows], generator=dice(seeds), steps=6, **kw)
    z = draw([0, 1, 2], [5, 6, 7])
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
    assert not z.requires_grad
    torch.testing.assert_close(draw([0, 1, 2], [5, 6, 7]), z)
    torch.testing.assert_close(draw([2], [7]), z[2:], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(draw([1, 0], [6, 5], guidance=1.0), z[[1, 0]], atol=1e-4, rtol=1e-4)
    assert (draw([0], [8]) - z[:1]).abs().max() > 1e-2
    single = lambda seed: model.sample(tokens, z_txt, generator=torch.Generator().manual_seed(seed), steps=3)
    assert torch.equal(single(0), single(0)) and not torch.equal(single(0), single(1))


def test_impossible_numbers_of_steps_are_errors():
    model, (_, z_txt, tokens) = tiny(), batch(1)
    for steps in (0, -1, 1001):
        with pytest.raises(ValueError):
            model.sample(tokens, z_txt, steps=steps)


@pytest.mark.parametrize("changes", [{}, {"layers": 1, "head_layers": 2, "head_width": 64}])
def test_one_batch_is_learned_by_heart(changes):
    torch.manual_seed(0)
    model, (z_img, z_txt, tokens) = build(**changes), batch(16)
    optimizer, generator = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.Generator().manual_seed(0)
    four = z_img.repeat(4, 1), z_txt.repeat(4, 1), tokens.repeat(4, 1)
    losses = []
    for step in range(250):
        loss = model.loss(*four, generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    variance = 0.5375 ** 2                                                 # what a guess of zero costs
    assert losses[0] > 0.8 * variance and sum(losses[-20:]) / 20 < 0.2 * variance    # a tenth of the texts is dropped
    found = model.sample(tokens, z_txt, steps=20, generator=generator) @ z_img.T
    assert found.argmax(1).tolist() == list(range(16)) and found.diagonal().mean() > 0.9


# ---------------------------------------------------------------------- the analytic variance

def perfect(prior, s, mean=0.0):
    """The prior's network replaced by the perfect prediction for embeddings whose scaled coordinates are N(mean, s²)."""
    def forward(x_t, t, condition, cache=None):
        a = prior.diffusion.alphas_cumprod[t][:, None]
        return mean + a.sqrt() * s ** 2 / (a * s ** 2 + 1 - a) * (x_t - a.sqrt() * mean)
    prior.forward = forward
    return prior


def test_measured_variance_is_that_of_the_posterior():
    """Var[x_0 | x_t] = s² (1−ᾱ) / (ᾱs² + 1−ᾱ), from 4,000 embeddings; the paper's coordinates have s² = 0.29."""
    torch.manual_seed(0)
    prior, s2, mean = tiny(), 0.29, 0.7 * torch.randn(D)
    perfect(prior, s2 ** 0.5, mean)
    z_img = (mean + s2 ** 0.5 * torch.randn(4000, D)) / prior.scale(torch.ones(1))
    a = prior.diffusion.alphas_cumprod
    true = s2 * (1 - a) / (a * s2 + 1 - a)
    assert prior.cov.abs().max() == 0                                      # before: β̃
    prior.measure_variance(z_img, z_img, torch.full((4000, L), EOT), torch.Generator().manual_seed(0), points=100)
    assert torch.allclose(prior.cov, true, atol=0.003, rtol=0.05)
    assert (prior.cov <= 1 / prior.diffusion.snr).all() and (prior.cov >= 0).all()


def test_analytic_steps_give_the_spread_that_fixed_variances_lose():
    torch.manual_seed(0)
    prior = tiny(candidates=1)
    perfect(prior, 0.29 ** 0.5)
    tokens, z = torch.full((4000, L), EOT), torch.randn(4000, D) / D ** 0.5
    prior.measure_variance(z, z, tokens, torch.Generator().manual_seed(0), points=100)
    prior.unscale = lambda x: x                                            # the scaled coordinates themselves
    spread = {}
    for sampler in ("analytic", "ddpm"):
        prior.cfg = replace(prior.cfg, sampler=sampler)
        spread[sampler] = prior.sample(tokens, z, steps=8, generator=torch.Generator().manual_seed(1)).var().item()
    assert spread["analytic"] == pytest.approx(0.29, abs=0.006) and spread["ddpm"] == pytest.approx(0.154, abs=0.004)
