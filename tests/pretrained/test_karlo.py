"""pretrained.py: our modules compute what the originals compute, weight for weight, and load what exists in public.

The oracles are `transformers` (CLIP) and `diffusers` (Karlo), with random weights of small width; and the lists of names and shapes in
Karlo's own checkpoints (tests/karlo), which no file at hand has to agree with.
"""

import gzip
import importlib.util
import json
import os
import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import exact_tables
from diffusers import PriorTransformer, UnCLIPPipeline, UnCLIPScheduler, UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.deprecated.unclip.text_proj import UnCLIPTextProjModel
from PIL import Image
from transformers import CLIPConfig as TheirCLIPConfig
from transformers import CLIPModel, CLIPTextModelWithProjection, CLIPTokenizer, CLIPVisionModelWithProjection

import sample
from mini_dalle2 import configs, pretrained
from mini_dalle2.diffusion import make_betas
from mini_dalle2.pretrained.clip import load_clip
from mini_dalle2.pretrained.karlo import load_karlo
from mini_dalle2.pretrained.karlo_models import (
    KarloCLIP, KarloDecoder, KarloPrior, KarloUpsampler)
from mini_dalle2.pretrained.tables import fill, to_ours, to_theirs
from mini_dalle2.tokenizer import BPETokenizer

KEYS = Path(__file__).parent / "karlo"
MERGES = Path(importlib.util.find_spec("clip").origin).parent / "bpe_simple_vocab_16e6.txt.gz"
VOCAB, EOT, L, D = 49408, 49407, 77, 24


def small_karlo():
    """The preset `karlo`, an eighth as wide or less: same structure, all its peculiarities."""
    config, shared = configs.preset("karlo"), dict(clip_dim=D)
    unet = dict(model_channels=32, channel_mult=(1, 2), num_res_blocks=2)
    return replace(
        config,
        clip=replace(config.clip, model=replace(config.clip.model, image_size=32, patch_size=8, vision_width=128, vision_layers=2, vision_heads=2,
                                                text_width=64, text_layers=2, text_heads=1, **shared)),
        prior=replace(config.prior, model=replace(config.prior.model, width=128, layers=2, heads=2, frozen_text=64, sampling_steps=5, **shared)),
        ar_prior=replace(config.ar_prior, model=replace(config.ar_prior.model, **shared)),
        sketch=replace(config.sketch, model=replace(config.sketch.model, image_size=16, clip_dim=D)),
        decoder=replace(config.decoder, model=replace(config.decoder.model, image_size=16, attn_resolutions=(8,), head_dim=16, text_width=48,
                                                      frozen_text=64, sampling_steps=4, dropout=0.0, **unet, **shared)),
        upsampler1=replace(config.upsampler1, model=replace(config.upsampler1.model, low_size=16, high_size=64, sampling_steps=3, **unet)),
        upsampler2=replace(config.upsampler2, model=replace(config.upsampler2.model, low_size=64, high_size=256)))


def random_weights(model, seed=0):
    """Fills a module with numbers large enough for each to matter (no zero layers, no gains of one), small enough to keep rounding small."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            spread = 0.1 if p.dim() < 2 else p[0].numel() ** -0.5
            p.copy_(spread * torch.randn(p.shape, generator=generator) + (0.8 if p.dim() == 1 and name.endswith("weight") else 0.0))
    return model.eval()


def their_clip():
    text = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=256, vocab_size=VOCAB, projection_dim=D,
                max_position_embeddings=L, eos_token_id=EOT, bos_token_id=EOT - 1, pad_token_id=0, hidden_act="quick_gelu")
    vision = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512, image_size=32, patch_size=8,
                  projection_dim=D, hidden_act="quick_gelu")
    return random_weights(CLIPModel(TheirCLIPConfig(text_config=text, vision_config=vision, projection_dim=D)))


def their_prior(seed=1):
    prior = PriorTransformer(num_attention_heads=2, attention_head_dim=64, num_layers=2, embedding_dim=D, num_embeddings=L, additional_embeddings=4)
    # Karlo's states are as wide as its embeddings (768); where they differ, as in these small ones, this layer takes other states.
    prior.encoder_hidden_states_proj = torch.nn.Linear(64, 128)
    random_weights(prior, seed)
    with torch.no_grad():
        prior.clip_std.copy_(prior.clip_std.abs() + 0.1)
    return prior


def their_text_proj(seed=2):
    projection = UnCLIPTextProjModel(clip_embeddings_dim=D, time_embed_dim=128, cross_attention_dim=48)
    projection.encoder_hidden_states_proj = torch.nn.Linear(64, 48)
    return random_weights(projection, seed)


def their_decoder(seed=3):
    return random_weights(UNet2DConditionModel(
        sample_size=16, in_channels=3, out_channels=6, down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn", up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        block_out_channels=(32, 64), layers_per_block=2, cross_attention_dim=48, attention_head_dim=16, resnet_time_scale_shift="scale_shift",
        class_embed_type="identity", norm_num_groups=32), seed)


def their_upsampler(seed=4):
    return random_weights(UNet2DModel(
        sample_size=64, in_channels=6, out_channels=3, down_block_types=("ResnetDownsampleBlock2D",) * 2, add_attention=False,
        up_block_types=("ResnetUpsampleBlock2D",) * 2, block_out_channels=(32, 64), layers_per_block=2, norm_num_groups=32), seed)


def tokens_for(n, seed=0):
    """Random captions of different lengths, (n, L), as CLIP's tokenizer lays them out."""
    rows = torch.zeros(n, L, dtype=torch.long)
    generator = torch.Generator().manual_seed(seed)
    for i, row in enumerate(rows):
        length = 3 + 7 * i
        row[1:1 + length] = torch.randint(1, EOT - 1, (length,), generator=generator)
        row[0], row[1 + length] = EOT - 1, EOT
    return rows


def close(ours, theirs, tolerance=1e-5):
    """The largest difference, relative to the scale of theirs, is within the tolerance; and theirs is no constant."""
    assert ours.shape == theirs.shape and theirs.std() > 1e-3
    error = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    assert error <= tolerance, error
    return True


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
    ours = load_clip(theirs.state_dict())
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
    ours = load_clip(theirs.state_dict()).requires_grad_(True)
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


# ---------------------------------------------------------------------------------------------------------------- the whole pipeline

def unclip_scheduler(**options):
    """Their scheduler with tables as exact as ours (in float32, 1 − ᾱ_0 = 4e-5 has lost four digits, and the last step 5e-4 of x_0)."""
    return exact_tables(UnCLIPScheduler(1000, **options), make_betas("cosine", 1000))


@pytest.fixture(scope="module")
def diffusers_folder(tmp_path_factory):
    """A tiny Karlo of random weights in the diffusers layout, and the modules in it."""
    folder, clip = tmp_path_factory.mktemp("karlo") / "diffusers", their_clip()
    text = CLIPTextModelWithProjection(clip.config.text_config)
    text.load_state_dict({name: value for name, value in clip.state_dict().items() if name.startswith("text_")})
    vision = CLIPVisionModelWithProjection(clip.config.vision_config)
    vision.load_state_dict({name: value for name, value in clip.state_dict().items() if name.startswith("visi") or name.startswith("visual_")})
    modules = {"prior": their_prior(), "decoder": their_decoder(), "text_proj": their_text_proj(), "text_encoder": text.eval(),
               "super_res_first": their_upsampler(4), "super_res_last": their_upsampler(5), "image_encoder": vision.eval()}
    for name, module in modules.items():
        module.save_pretrained(folder / name)
    (folder / "tokenizer").mkdir()
    merges = gzip.decompress(MERGES.read_bytes()).decode().split("\n")[1:48895]              # as Hugging Face keeps them, with a line before
    (folder / "tokenizer" / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder, modules


def test_clip_is_read_from_a_folder(tmp_path):
    theirs = their_clip()
    theirs.save_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(load_clip(tmp_path).parameters(), load_clip(theirs.state_dict()).parameters()))


@pytest.fixture(scope="module")
def their_pipeline(diffusers_folder):
    """diffusers' pipeline of the same modules, with the tokenizer that Karlo's folder has: padded with "!", id 0.

    (A "!" in a caption becomes padding there. Karlo itself, which reads captions with OpenAI's code, and ours know better: 256.)
    """
    folder, modules = diffusers_folder
    tokenizer = BPETokenizer.from_clip_merges(MERGES)
    (folder / "tokenizer" / "vocab.json").write_text(json.dumps(tokenizer.ids))
    theirs = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=L, pad_token="!")
    pipeline = UnCLIPPipeline(
        tokenizer=theirs, prior_scheduler=unclip_scheduler(variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0),
        decoder_scheduler=unclip_scheduler(variance_type="learned_range", prediction_type="epsilon"),
        super_res_scheduler=unclip_scheduler(variance_type="fixed_small_log", prediction_type="epsilon"),
        **{name: modules[name] for name in ("prior", "decoder", "text_encoder", "text_proj", "super_res_first", "super_res_last")})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@torch.no_grad()
@pytest.mark.parametrize("noise", ["away from nought", "any"])
def test_a_whole_picture_is_that_of_the_unclip_pipeline(diffusers_folder, their_pipeline, monkeypatch, noise):
    """The same captions and noise through their pipeline and ours: from the text to the last pixel, eight pictures.

    At t = 999 a network that predicts ε gives x̂_0 = (x − ε) / 5e-5, cut to ±1: where x − ε is nought but rounding, its sign is chance.
    From noise that keeps away from nought, as ε of these networks does not, no pixel is such, and all of every picture agrees. From any
    noise a few pixels are, and others feel them; the rest agrees, and a picture without them does as a whole.
    """
    config = small_karlo()
    config = replace(config, prior=replace(config.prior, model=replace(config.prior.model, clip_x_start=5.0)))     # what diffusers bounds at
    ours, captions, whole = load_karlo(diffusers_folder[0], "cpu", config), ["a corgi playing a flame throwing trumpet", "Two RINGS, please"], 0
    for seed in range(4):
        generator, latents = torch.Generator().manual_seed(seed), {}
        if noise == "away from nought":
            side = config.decoder.model.image_size
            for module, name, size in (("decoder", "decoder_latents", side), ("upsampler", "super_res_latents", 4 * side)):
                x_T = torch.randn(2, 3, size, size, generator=generator)
                latents[name] = x_T + 3 * x_T.sign()
                monkeypatch.setattr(f"mini_dalle2.{module}.randn", lambda *wanted, x_T=latents[name]: x_T)
        expected = their_pipeline(captions, prior_num_inference_steps=5, decoder_num_inference_steps=4, super_res_num_inference_steps=3,
                                  generator=torch.Generator().manual_seed(seed), output_type="np", **latents).images
        expected = torch.from_numpy(expected).permute(0, 3, 1, 2) * 2 - 1
        tokens, generator = ours.tokens(captions), torch.Generator().manual_seed(seed)     # ours draws in the same order from one generator
        z_img = ours.prior.sample(tokens, ours.clip.encode_text(tokens), generator=generator)
        base = ours.decoder.sample(z_img, tokens, generator=generator)
        error = (ours.upsamplers[0].sample(base, generator=generator) - expected).abs()
        assert (expected.abs() < 0.99).float().mean() > 0.3                # not black and white alone
        if noise == "away from nought":
            assert error.max() <= 1e-4                                     # seen: 2e-5; pictures are in [-1, 1]
        else:
            assert (error > 1e-4).float().mean() < 0.02 and error.max() < 0.1
            whole += bool(error.max() <= 1e-4)
    assert whole >= 1 or noise == "away from nought"


def test_a_folder_without_image_encoder_still_draws(diffusers_folder, tmp_path):
    folder = tmp_path / "text only"
    shutil.copytree(diffusers_folder[0], folder)
    shutil.rmtree(folder / "image_encoder")
    model = load_karlo(folder, "cpu", small_karlo())
    (picture,), = model.text_to_image("a corgi", progress=False)
    assert picture.size == (64, 64)
    with pytest.raises(ValueError, match="no image encoder"):
        model.encode_image(picture)


@torch.no_grad()
@pytest.mark.parametrize("verb", [lambda m, i: m.variations(i, n=2, progress=False), lambda m, i: m.interpolate(i, i.rotate(90), n=3, progress=False),
                                  lambda m, i: m.textdiff(i, "a cat", "a dog", theta=[0.0, 0.5], progress=False)], ids=("variations", "interpolate", "textdiff"))
def test_the_decoder_is_given_embeddings_of_clips_own_length(diffusers_folder, monkeypatch, verb):
    model, seen = load_karlo(diffusers_folder[0], "cpu", small_karlo()), []
    image = Image.radial_gradient("L").convert("RGB")
    sample_ = model.decoder.sample
    monkeypatch.setattr(model.decoder, "sample", lambda z, *args, **rest: seen.append(z) or sample_(z, *args, **rest))
    verb(model, image)
    own = model.encode_image(image)
    assert torch.allclose(seen[0][0], own[0], rtol=1e-4) and abs(own.norm() - 1) > 0.2      # not of unit length
    assert torch.allclose(seen[0].norm(dim=1), own.norm(), rtol=0.2)


def test_with_offloading_each_model_is_brought_and_put_back(diffusers_folder, monkeypatch):
    model, moves = load_karlo(diffusers_folder[0], "cpu", small_karlo(), offload=True), []
    for method in ("to", "cpu"):
        plain = getattr(torch.nn.Module, method)
        monkeypatch.setattr(torch.nn.Module, method, lambda self, *args, plain=plain, method=method, **rest:
                            (moves.append((type(self).__name__, method)), plain(self, *args, **rest))[1])
    model.text_to_image("a corgi", progress=False)
    moves = [move for move in moves if move[0] != "GaussianDiffusion"]     # samplers make their own
    assert moves == [("KarloCLIP", "to"), ("KarloPrior", "to"), ("KarloCLIP", "cpu"), ("KarloPrior", "cpu"), ("KarloCLIP", "to"), ("KarloDecoder", "to"),
                     ("KarloCLIP", "cpu"), ("KarloDecoder", "cpu"), ("KarloUpsampler", "to"), ("KarloUpsampler", "cpu")]
    with model.at_work(model.clip):
        model.encode_text("a corgi")                                       # inside, it is there already, and stays
        assert model.here == [model.clip]
    assert model.here == []


@torch.no_grad()
def test_reduced_precision_and_offloading_draw_nearly_the_same(diffusers_folder):
    plain = load_karlo(diffusers_folder[0], "cpu", small_karlo())
    light = load_karlo(diffusers_folder[0], "cpu", small_karlo(), torch.bfloat16, offload=True)
    assert light.decoder.unet.in_conv.weight.dtype == torch.bfloat16 and light.decoder.unet.out_norm.weight.dtype == torch.float32
    tokens = plain.tokens(["a corgi"])
    x, t = torch.randn(1, D, generator=torch.Generator().manual_seed(0)), torch.tensor([500])
    with light.at_work(light.clip, light.prior):
        found = light.prior(x, t, light.prior.condition(tokens, light.encode_text(["a corgi"])))
    expected = plain.prior(x, t, plain.prior.condition(tokens, plain.encode_text(["a corgi"])))
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    (picture,), = light.text_to_image("a corgi", progress=False)
    assert picture.size == (64, 64)


def test_the_command_draws_with_weights(diffusers_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained.karlo, "preset", lambda name: small_karlo())
    assert sample.main(["text", "a corgi", "--n=1", "--weights", str(diffusers_folder[0])]) == 0
    with Image.open("samples/text-001.png") as grid:
        assert grid.width >= 128
    assert sample.main(["text", "a corgi", "--weights", "nowhere"]) == 2
    assert "there is no folder nowhere" in capsys.readouterr().err


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


@pytest.mark.parametrize("preset, said", [("paper", "3,563,695,622   3.5 billion"), ("karlo", "893,318,086"), ("karlo", "Karlo has none")])
def test_a_command_prints_how_large_the_models_are(preset, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["configs", preset])
    assert configs.main() == 0 and said in capsys.readouterr().out


def test_the_command_knows_no_other_presets(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["configs", "papre"])
    assert configs.main() == 2 and "closest is paper" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- original files

@pytest.fixture(scope="module")
def original_folder(tmp_path_factory, diffusers_folder):
    """The same weights under Karlo's own names, as its files have them."""
    folder, modules = tmp_path_factory.mktemp("karlo") / "original", diffusers_folder[1]
    folder.mkdir()
    config = small_karlo()
    model = load_karlo(diffusers_folder[0], "cpu", config)
    for name, module, table in (("prior", model.prior, pretrained.prior_karlo), ("decoder", model.decoder, pretrained.decoder_karlo),
                                ("upsampler1", model.upsamplers[0], pretrained.upsampler_karlo)):
        state = to_theirs(table(getattr(config, name).model), dict(module.named_parameters()))
        torch.save({"state_dict": {key: value.detach().clone() for key, value in state.items()}}, folder / pretrained.KARLO_FILES[name])
    torch.save((modules["prior"].clip_mean[0].detach(), modules["prior"].clip_std[0].detach()), folder / pretrained.KARLO_FILES["stats"])
    clip = load_clip(their_clip().state_dict())
    torch.save(to_theirs(pretrained.clip_openai(clip.cfg), dict(clip.named_parameters())) | {"context_length": torch.tensor(L)},
               folder / pretrained.KARLO_FILES["clip"])
    (folder / MERGES.name).write_bytes(MERGES.read_bytes())
    return folder


def test_original_files_and_diffusers_folder_draw_the_same(original_folder, diffusers_folder):
    pictures = [load_karlo(folder, "cpu", small_karlo()).text_to_image("a corgi", progress=False)[0][0]
                for folder in (original_folder, diffusers_folder[0])]
    a, b = (np.asarray(picture).astype(int) for picture in pictures)
    assert np.abs(a - b).max() <= 1 and a.std() > 10


def test_torchscript_archives_are_read(tmp_path):
    """OpenAI's files are programs; only their weights are taken."""
    clip = load_clip(their_clip().state_dict())
    names = to_theirs(pretrained.clip_openai(clip.cfg), dict(clip.named_parameters()))

    class Holder(torch.nn.Module):
        def forward(self, x):
            return x
    holder = Holder()
    for name, value in names.items():
        at = holder
        *path, last = name.split(".")
        for step in path:
            if not hasattr(at, step):
                setattr(at, step, Holder())
            at = getattr(at, step)
        at.register_parameter(last, torch.nn.Parameter(value.detach().clone()))
    torch.jit.script(holder).save(str(tmp_path / "clip.pt"))
    again = load_clip(tmp_path / "clip.pt")
    assert again.cfg == clip.cfg and all(torch.equal(a, b) for a, b in zip(again.parameters(), clip.parameters()))


class Bomb:
    """A pickle that runs a command when it is read."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("spoil, said", [
    (lambda f: f.write_bytes(f.read_bytes()[:5000]), "damaged"), (lambda f: f.write_bytes(b""), "damaged"),
    (lambda f: torch.save({"state_dict": {"a": torch.zeros(2)}}, f), "is missing"), (lambda f: f.unlink(), "has none of"),
    (lambda f: torch.save([1, 2], f), "no weights"), (lambda f: f.write_bytes(pickle.dumps(Bomb(f.parent / "boom"))), "would run code"),
    (lambda f: torch.save({"state_dict": Bomb(f.parent / "boom")}, f), "would run code")])
def test_bad_files_are_one_sentence(original_folder, tmp_path, spoil, said):
    folder = shutil.copytree(original_folder, tmp_path / "copy")
    spoil(folder / pretrained.KARLO_FILES["prior"])
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        load_karlo(folder, "cpu", small_karlo())
    assert "\n" not in str(error.value) and not (folder / "boom").exists()


def test_tensors_that_do_not_fit_are_named():
    clip = load_clip(their_clip().state_dict())
    rows, shapes = pretrained.clip_hf(clip.cfg), {name: p.shape for name, p in clip.named_parameters()}
    state = to_theirs(rows, dict(clip.named_parameters()))
    for change, said in (({"visual_projection.weight": None}, "is missing visual_projection.weight"), ({"extra": torch.zeros(1)}, "holds extra"),
                         ({"visual_projection.weight": torch.zeros(D, 64)}, "visual_projection.weight should become our visual.projection.weight")):
        changed = {name: value for name, value in (state | change).items() if value is not None}
        with pytest.raises(ValueError, match=said):
            to_ours(rows, changed, shapes, "it")
