"""tables.py: our modules compute what the originals compute, weight for weight, with nothing left over.

The oracles are `transformers` (CLIP) and `diffusers` (Karlo), with random weights of small width; and the lists of names and shapes in
Karlo's own checkpoints (tests/karlo), which no file at hand has to agree with.
"""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mini_dalle2 import configs, pretrained
from mini_dalle2.pretrained.clip import load_clip
from mini_dalle2.pretrained.karlo_models import (
    KarloCLIP, KarloDecoder, KarloPrior, KarloUpsampler)
from mini_dalle2.pretrained.rows import fill, to_ours, to_theirs
from public_models import (
    D, EOT, L, close, random_weights, small_karlo, their_clip, their_decoder, their_prior, their_text_proj, their_upsampler, tokens_for)

KEYS = Path(__file__).parent / "karlo"


def filled(model, rows, *theirs):
    """Our model with their weights; of several modules, each with its prefix."""
    state = {}
    for prefix, module in theirs:
        state |= {prefix + name: value for name, value in module.state_dict().items() if name not in ("clip_mean", "clip_std")}
    return fill(model, rows, state, "theirs")


def our_prior(theirs):
    cfg = small_karlo().prior.model
    prior = filled(KarloPrior(cfg), pretrained.prior_diffusers(cfg), ("", theirs))
    prior.whitening.set(theirs.clip_mean[0].detach(), theirs.clip_std[0].detach())
    return prior


def our_decoder(projection, unet):
    cfg = small_karlo().decoder.model
    return filled(KarloDecoder(cfg), pretrained.decoder_diffusers(cfg), ("text_proj.", projection), ("decoder.", unet))


# ---------------------------------------------------------------------------------------------------------------- the same numbers

@torch.no_grad()
def test_clip_is_that_of_transformers():
    theirs = their_clip()
    ours = load_clip(theirs.state_dict(), "quick_gelu")
    assert (ours.cfg.image_size, ours.cfg.patch_size, ours.cfg.vision_heads, ours.cfg.text_layers, ours.cfg.eot_id) == (32, 8, 2, 2, EOT)
    images, tokens = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, tokens_for(3)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (pretrained.OPENAI_MEAN, pretrained.OPENAI_STD))
    out = theirs(input_ids=tokens, pixel_values=((images + 1) / 2 - mean) / std)
    assert close(ours.encode_image(images), out.image_embeds) and close(ours.encode_text(tokens), out.text_embeds)
    with pytest.raises(ValueError, match="images are torch.uint8"):
        ours.encode_image(images.to(torch.uint8))
    assert close(ours(images, tokens), out.logits_per_image)
    assert close(ours.text.states(tokens), out.text_model_output.last_hidden_state)


def test_gradients_of_clip_are_those_of_transformers():
    theirs = their_clip()
    ours = load_clip(theirs.state_dict(), "quick_gelu").requires_grad_(True)
    images, tokens = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1, tokens_for(3)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (pretrained.OPENAI_MEAN, pretrained.OPENAI_STD))
    theirs(input_ids=tokens, pixel_values=((images + 1) / 2 - mean) / std).logits_per_image.diagonal().sum().backward()
    ours(images, tokens).diagonal().sum().backward()
    expected = to_ours(pretrained.clip_hf(ours.cfg), {name: p.grad for name, p in theirs.named_parameters()},
                       {name: p.shape for name, p in ours.named_parameters()}, "gradients")
    for name, p in ours.named_parameters():
        error = (p.grad - expected[name]).abs().max() / max(expected[name].abs().max(), 1e-6)
        assert error < 2e-4 if expected[name].abs().max() < 1e-4 else error < 1e-5, (name, error)


@torch.no_grad()
def test_the_prior_is_that_of_diffusers():
    theirs = their_prior()
    ours, tokens = our_prior(theirs), tokens_for(3)
    generator = torch.Generator().manual_seed(0)
    states, z_txt, x_t, t = (torch.randn(3, L, 64, generator=generator), torch.randn(3, D, generator=generator),
                             torch.randn(3, D, generator=generator), torch.tensor([0, 400, 999]))
    ours.caption.encoder = lambda tokens: (states, z_txt)
    mask = torch.arange(L) <= (tokens == EOT).int().argmax(1)[:, None]
    expected = theirs(x_t, t, z_txt, states, attention_mask=mask).predicted_image_embedding
    assert close(ours(x_t, t, ours.condition(tokens, z_txt)), expected)
    assert close(ours.unscale(x_t), theirs.post_process_latents(x_t))


@torch.no_grad()
def test_the_decoder_is_that_of_diffusers():
    projection, unet, tokens = their_text_proj(), their_decoder(), tokens_for(3)
    ours, generator = our_decoder(projection, unet), torch.Generator().manual_seed(0)
    states, z_txt, z_img, x_t = (torch.randn(*shape, generator=generator) for shape in ((3, L, 64), (3, D), (3, D), (3, 3, 16, 16)))
    ours.caption.encoder = lambda tokens: (states[:len(tokens)], z_txt[:len(tokens)])
    t = torch.tensor([0, 400, 999])
    mask = F.pad(torch.arange(L) <= (tokens == EOT).int().argmax(1)[:, None], (4, 0), value=True)
    for guided in (False, True):                                           # theirs puts the learned null in front when there is guidance
        twice = (lambda x: torch.cat([x, x])) if guided else (lambda x: x)
        hidden, emb = projection(image_embeddings=z_img, prompt_embeds=twice(z_txt), text_encoder_hidden_states=twice(states),
                                 do_classifier_free_guidance=guided)
        expected = unet(twice(x_t), twice(t), hidden, class_labels=emb, attention_mask=twice(mask)).sample
        assert close(ours(x_t, t, ours.condition(z_img, tokens)), expected[-3:])
        if guided:
            found = ours(x_t, t, ours.condition(z_img, tokens, keep_z=torch.zeros(3, dtype=torch.bool)))
            assert close(found, expected[:3])


@torch.no_grad()
def test_the_upsampler_is_that_of_diffusers():
    first, last, cfg = their_upsampler(4), their_upsampler(5), small_karlo().upsampler1.model
    ours = filled(KarloUpsampler(cfg), pretrained.upsampler_diffusers(cfg), ("super_res_first.", first), ("super_res_last.", last))
    x_t, enlarged = torch.randn(2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    for t, theirs in ((333, first), (0, last)):
        t = torch.full((2,), t)
        assert close(ours(x_t, t, enlarged), theirs(torch.cat([x_t, enlarged], 1), t).sample)


def test_dropped_captions_are_the_empty_one():
    ours, seen = our_prior(their_prior()), []
    ours.caption.encoder = lambda tokens: seen.append(tokens) or (torch.zeros(len(tokens), L, 64), torch.zeros(len(tokens), D))
    ours.condition(tokens_for(2), torch.zeros(2, D), torch.tensor([True, False]))
    assert torch.equal(seen[0][0], tokens_for(2)[0]) and seen[0][1].tolist() == [EOT - 1, EOT] + [0] * 75


# ---------------------------------------------------------------------------------------------------------------- names and shapes

def listed(name):
    """{name: shape} of one of Karlo's checkpoints."""
    lines = (KEYS / f"karlo_{name}_keys.txt").read_text().splitlines()
    return {key: tuple(int(n) for n in re.findall(r"\d+", shape)) for key, shape in (line.split("\t") for line in lines)}


def upsampler_list():
    """Karlo's upsampler has two equal networks; one is listed."""
    first = listed("sr_one")
    return first | {name.replace("model_first_steps.", "model_last_step."): shape for name, shape in first.items()}


@pytest.mark.parametrize("stage, build, table, keys, count", [
    ("prior", KarloPrior, "prior_karlo", lambda: listed("prior"), 1_022_028_544),
    ("decoder", KarloDecoder, "decoder_karlo", lambda: listed("decoder"), 893_318_086),
    ("upsampler1", KarloUpsampler, "upsampler_karlo", upsampler_list, 2 * 691_579_523)])
def test_karlos_checkpoints_map_onto_the_preset(stage, build, table, keys, count):
    """With nothing left over on either side, and as many parameters as they have."""
    cfg = getattr(configs.preset("karlo"), stage).model
    with torch.device("meta"):
        model = build(cfg)
        theirs = {name: torch.empty(shape) for name, shape in keys().items()}
    ours = to_ours(getattr(pretrained, table)(cfg), theirs, {name: p.shape for name, p in model.named_parameters()}, stage)
    assert sum(p.numel() for p in model.parameters()) == sum(x.numel() for x in ours.values()) == count
    assert {name: tuple(x.shape) for name, x in to_theirs(getattr(pretrained, table)(cfg), ours).items()} == keys()


@pytest.mark.parametrize("stage, build, karlo, diffusers", [
    ("prior", KarloPrior, "prior_karlo", "prior_diffusers"), ("decoder", KarloDecoder, "decoder_karlo", "decoder_diffusers"),
    ("upsampler1", KarloUpsampler, "upsampler_karlo", "upsampler_diffusers"), ("clip", KarloCLIP, "clip_openai", "clip_hf")])
def test_round_trips_are_exact(stage, build, karlo, diffusers):
    """Original names → ours → diffusers' → ours → original names, bit for bit."""
    cfg = getattr(small_karlo(), stage).model
    model = random_weights(build(cfg))
    ours, shapes = dict(model.named_parameters()), {name: p.shape for name, p in model.named_parameters()}
    karlo, diffusers = (getattr(pretrained, name)(cfg) for name in (karlo, diffusers))
    original = to_theirs(karlo, ours)
    there = to_theirs(diffusers, to_ours(karlo, original, shapes, "original"))
    back = to_theirs(karlo, to_ours(diffusers, there, shapes, "diffusers"))
    assert original.keys() == back.keys() and all(torch.equal(original[name], back[name]) for name in original)
    assert not original.keys() & there.keys() or stage == "clip"


def test_names_and_layouts_are_those_of_diffusers_converter():
    """From Karlo's names to diffusers' by rules written down apart from our tables: as the public converter moves each tensor."""
    cfg = small_karlo().decoder.model
    rows, unet = pretrained.decoder_karlo(cfg), cfg.unet()
    ours = dict(random_weights(KarloDecoder(cfg)).named_parameters())
    generator = torch.Generator().manual_seed(0)
    theirs = {name: torch.randn(x.shape, generator=generator) for name, x in to_theirs(rows, ours).items()}
    found = to_theirs(pretrained.decoder_diffusers(cfg), to_ours(rows, theirs, {name: p.shape for name, p in ours.items()}, "it"))
    inside = [("in_layers.0", "norm1"), ("in_layers.2", "conv1"), ("emb_layers.1", "time_emb_proj"), ("out_layers.0", "norm2"),
              ("out_layers.3", "conv2"), ("skip_connection", "conv_shortcut")]
    # Levels 0 (without attention) and 1, two blocks each: where the public list has every block of them.
    blocks = {"input_blocks.1.0": "down_blocks.0.resnets.0", "input_blocks.2.0": "down_blocks.0.resnets.1",
              "input_blocks.3.0": "down_blocks.0.downsamplers.0", "input_blocks.4.0": "down_blocks.1.resnets.0",
              "input_blocks.5.0": "down_blocks.1.resnets.1", "middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1",
              "output_blocks.0.0": "up_blocks.0.resnets.0", "output_blocks.1.0": "up_blocks.0.resnets.1",
              "output_blocks.2.0": "up_blocks.0.resnets.2", "output_blocks.2.2": "up_blocks.0.upsamplers.0",
              "output_blocks.3.0": "up_blocks.1.resnets.0", "output_blocks.4.0": "up_blocks.1.resnets.1", "output_blocks.5.0": "up_blocks.1.resnets.2"}
    attentions = {"input_blocks.4.1": "down_blocks.1.attentions.0", "input_blocks.5.1": "down_blocks.1.attentions.1",
                  "middle_block.1": "mid_block.attentions.0", **{f"output_blocks.{i}.1": f"up_blocks.0.attentions.{i}" for i in range(3)}}
    expected = {}
    for at, to in blocks.items():
        for a, b in inside:
            expected |= {f"decoder.{to}.{b}.{kind}": theirs[f"model.{at}.{a}.{kind}"] for kind in ("weight", "bias") if f"model.{at}.{a}.{kind}" in theirs}
    for at, to in attentions.items():
        d, at, to = unet.head_dim, f"model.{at}", f"decoder.{to}"
        for kind in ("weight", "bias"):
            expected[f"{to}.group_norm.{kind}"] = theirs[f"{at}.norm.{kind}"]
            for name, parts in (("qkv", ["to_q", "to_k", "to_v"]), ("encoder_kv", ["add_k_proj", "add_v_proj"])):
                x = theirs[f"{at}.{name}.{kind}"].reshape(-1, len(parts), d, *theirs[f"{at}.{name}.{kind}"].shape[1:2])
                for j, part in enumerate(parts):
                    expected[f"{to}.{part}.{kind}"] = x[:, j].flatten(0, 1)
            expected[f"{to}.to_out.0.{kind}"] = theirs[f"{at}.proj_out.{kind}"].reshape(found[f"{to}.to_out.0.{kind}"].shape)
    for a, b in (("time_embed.0", "decoder.time_embedding.linear_1"), ("time_embed.2", "decoder.time_embedding.linear_2"),
                 ("input_blocks.0.0", "decoder.conv_in"), ("out.0", "decoder.conv_norm_out"), ("out.2", "decoder.conv_out"),
                 ("text_seq_proj.0", "text_proj.encoder_hidden_states_proj"), ("text_seq_proj.1", "text_proj.text_encoder_hidden_states_norm"),
                 ("clip_tok_proj", "text_proj.clip_extra_context_tokens_proj"), ("text_feat_proj", "text_proj.embedding_proj"),
                 ("clip_emb", "text_proj.clip_image_embeddings_project_to_time_embeddings")):
        expected |= {f"{b}.{kind}": theirs[f"model.{a}.{kind}"] for kind in ("weight", "bias")}
    expected["text_proj.learned_classifier_free_guidance_embeddings"] = theirs["model.cf_param"]
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    prior = small_karlo().prior.model
    model = random_weights(KarloPrior(prior))
    theirs = to_theirs(pretrained.prior_karlo(prior), dict(model.named_parameters()))
    found = to_theirs(pretrained.prior_diffusers(prior), dict(model.named_parameters()))
    x = theirs["model.transformer.resblocks.1.attn.c_qkv.weight"].view(2, 3, 64, 128)
    assert all(torch.equal(found[f"transformer_blocks.1.attn1.to_{part}.weight"], x[:, j].reshape(128, 128)) for j, part in enumerate("qkv"))


def test_tensors_that_do_not_fit_are_named():
    clip = load_clip(their_clip().state_dict(), "quick_gelu")
    rows, shapes = pretrained.clip_hf(clip.cfg), {name: p.shape for name, p in clip.named_parameters()}
    state = to_theirs(rows, dict(clip.named_parameters()))
    for change, said in (({"visual_projection.weight": None}, "is missing visual_projection.weight"), ({"extra": torch.zeros(1)}, "holds extra"),
                         ({"visual_projection.weight": torch.zeros(D, 64)}, "visual_projection.weight should become our visual.projection.weight")):
        changed = {name: value for name, value in (state | change).items() if value is not None}
        with pytest.raises(ValueError, match=said):
            to_ours(rows, changed, shapes, "it")
