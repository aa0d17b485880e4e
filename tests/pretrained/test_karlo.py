"""karlo.py: a whole picture is that of diffusers, from each layout of Karlo's files; and each mistake is one sentence."""

import json
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import exact_tables
from diffusers import UnCLIPPipeline, UnCLIPScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

import sample
from mini_dalle2 import configs, pretrained
from mini_dalle2.diffusion import make_betas
from mini_dalle2.pretrained.karlo import load_karlo
from mini_dalle2.tokenizer import BPETokenizer
from public_models import D, L, MERGES, small_karlo


# ---------------------------------------------------------------------------------------------------------------- the whole pipeline

def unclip_scheduler(**options):
    """Their scheduler with tables as exact as ours (in float32, 1 − ᾱ_0 = 4e-5 has lost four digits, and the last step 5e-4 of x_0)."""
    return exact_tables(UnCLIPScheduler(1000, **options), make_betas("cosine", 1000))


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


@pytest.mark.parametrize("preset, said", [("paper", "3,563,695,622   3.5 billion"), ("karlo", "893,318,086"), ("karlo", "Karlo has none")])
def test_a_command_prints_how_large_the_models_are(preset, said, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["configs", preset])
    assert configs.main() == 0 and said in capsys.readouterr().out


def test_the_command_knows_no_other_presets(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["configs", "papre"])
    assert configs.main() == 2 and "closest is paper" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- original files

def test_original_files_and_diffusers_folder_draw_the_same(original_folder, diffusers_folder):
    pictures = [load_karlo(folder, "cpu", small_karlo()).text_to_image("a corgi", progress=False)[0][0]
                for folder in (original_folder, diffusers_folder[0])]
    a, b = (np.asarray(picture).astype(int) for picture in pictures)
    assert np.abs(a - b).max() <= 1 and a.std() > 10


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


# ---------------------------------------------------------------------------------------------------------------- layouts of a folder

@pytest.fixture(scope="module")
def plain(diffusers_folder):
    """Karlo from the folder as diffusers wrote it."""
    return load_karlo(diffusers_folder[0], "cpu", small_karlo())


def linked(folder, copy):
    """A copy of a folder that costs nothing: links to what lies in it."""
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).symlink_to(path)
    return copy


def own(folder, name):
    """Make one folder in a linked copy a true one."""
    path = folder / name
    files = path.resolve()
    path.unlink()
    return linked(files, path)


def state_file(folder, name):
    return own(folder, name) / "diffusion_pytorch_model.safetensors"


def index_of(text_proj):
    """Write model_index.json as some release of diffusers does, which names the class text_proj."""
    def change(folder):
        told = {"_class_name": "UnCLIPPipeline", "text_proj": text_proj}
        (folder / "model_index.json").write_text(json.dumps(told))
    return change


def in_pieces(folder):
    """The prior in two pieces of half precision: its index has the variant behind, as diffusers' have."""
    path = state_file(folder, "prior")
    weights = load_file(path)
    names = sorted(weights)
    index = {}
    for i, part in enumerate((names[::2], names[1::2]), 1):
        file = f"diffusion_pytorch_model.fp16-0000{i}-of-00002.safetensors"
        save_file({name: weights[name] for name in part}, path.with_name(file))
        index |= dict.fromkeys(part, file)
    path.unlink()
    told = {"metadata": {}, "weight_map": index}
    path.with_name("diffusion_pytorch_model.safetensors.index.fp16.json").write_text(json.dumps(told))


def half_file(folder):
    path = state_file(folder, "text_proj")
    path.rename(path.with_name("diffusion_pytorch_model.fp16.safetensors"))


def as_bin(folder):
    path = state_file(folder, "decoder")
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()


def old_text_encoder(folder):
    """As Karlo's own folder has it: the end of text is said to be 2, and places are numbered."""
    path = own(folder, "text_encoder")
    told = json.loads((path / "config.json").read_text()) | {"eos_token_id": 2}
    (path / "config.json").unlink()
    (path / "config.json").write_text(json.dumps(told))
    weights = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(weights | {"text_model.embeddings.position_ids": torch.arange(L)[None]}, path / "pytorch_model.bin")


def tokenizer_of_transformers_5(folder):
    """Saved again by transformers 5, there is neither merges.txt nor vocab.json."""
    path = folder / "tokenizer"
    merges = path.resolve() / "merges.txt"
    path.unlink()
    ids = BPETokenizer.from_clip_merges(MERGES).ids
    pairs = [tuple(line.split()) for line in merges.read_text().splitlines()[1:]]
    CLIPTokenizer(ids, pairs, pad_token="!", model_max_length=L).save_pretrained(path)
    assert not (path / "merges.txt").exists()


FOLDERS = [
    ("diffusers, old index", index_of(["unclip", "UnCLIPTextProjModel"])),
    ("diffusers, new index", index_of(["diffusers", "UnCLIPTextProjModel"])),
    ("a prior in pieces", in_pieces), ("a variant fp16", half_file), ("a .bin", as_bin),
    ("transformers 4", old_text_encoder), ("transformers 5", tokenizer_of_transformers_5)]


def weights_of(model):
    return {f"{i}.{name}": value for i, part in enumerate((model.clip, model.prior, model.decoder, *model.upsamplers))
            for name, value in part.state_dict().items()}


@pytest.mark.parametrize("name, change", FOLDERS, ids=[row[0] for row in FOLDERS])
def test_each_layout_of_a_folder_is_the_same_model(diffusers_folder, plain, tmp_path, name, change):
    folder = linked(diffusers_folder[0], tmp_path / "copy")
    change(folder)
    model = load_karlo(folder, "cpu", small_karlo())
    ours, theirs = weights_of(model), weights_of(plain)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert model.tokens(["a corgi!"]).tolist() == plain.tokens(["a corgi!"]).tolist()


@pytest.mark.parametrize("prefix, wrap", [("module._orig_mod.", "state_dict"), ("_orig_mod.", "model")])
def test_original_files_of_ddp_and_compile_are_read(original_folder, plain, tmp_path, prefix, wrap):
    folder = linked(original_folder, tmp_path / "copy")
    for name in ("prior", "decoder"):
        path = folder / pretrained.KARLO_FILES[name]
        weights = torch.load(path, weights_only=True)["state_dict"]
        path.unlink()
        torch.save({"epoch": 1, wrap: {prefix + key: value for key, value in weights.items()}}, path)
    ours, theirs = weights_of(load_karlo(folder, "cpu", small_karlo())), weights_of(plain)
    # The temperature of the original CLIP is not in the other folder.
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs.keys() - {"0.logit_scale"})


def test_added_tokens_make_the_vocabulary_longer(diffusers_folder, plain, tmp_path):
    folder = linked(diffusers_folder[0], tmp_path / "copy")
    path = own(folder, "text_encoder") / "model.safetensors"
    weights = load_file(path)
    name = "text_model.embeddings.token_embedding.weight"
    weights[name] = torch.cat([weights[name], torch.ones(2, weights[name].shape[1])])
    path.unlink()
    save_file(weights, path)
    tokens = own(folder, "tokenizer")
    (tokens / "added_tokens.json").write_text(json.dumps({"<cat-toy>": 49408, "<dog-toy>": 49409}))
    with pytest.warns(UserWarning, match="added tokens .<cat-toy>, <dog-toy>., which are read letter by letter"):
        model = load_karlo(folder, "cpu", small_karlo())
    assert model.clip.cfg.vocab_size == 49410 and model.clip.cfg.eot_id == 49407
    assert torch.equal(model.encode_text("a corgi"), plain.encode_text("a corgi"))


def without_prior(folder):
    (folder / "prior").unlink()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "UnCLIPImageVariationPipeline"}))


def says(name, **values):
    """Change what a configuration says."""
    def change(folder):
        path = own(folder, name) / "config.json"
        told = json.loads(path.read_text()) | values
        path.unlink()
        path.write_text(json.dumps(told))
    return change


def another_pipeline(folder):
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableUnCLIPPipeline"}))


@pytest.mark.parametrize("change, said", [
    (without_prior, "Karlo for image variations, which has no prior: copy the folder prior"),
    (lambda f: (f / "prior").unlink(), "Karlo for image variations, which has no prior"),
    (another_pipeline, "the pipeline 'StableUnCLIPPipeline', which is another system"),
    (lambda f: (f / "model_index.json").write_text("["), "no configuration"),
    (says("text_encoder", hidden_act="gelu"), "text_encoder has another CLIP than Karlo's .*gelu"),
    (says("text_encoder", layer_norm_eps=1e-6), "text_encoder has another CLIP than Karlo's"),
    (says("image_encoder", num_attention_heads=4), "image_encoder has another CLIP than Karlo's"),
    (says("prior", num_attention_heads=4), "prior/config.json says num_attention_heads 4, but this model has 2"),
    (says("decoder", attention_head_dim=8), "attention_head_dim 8, but this model has 16"),
    (says("super_res_last", norm_eps=1e-6), "norm_eps 1e-06, but this model has 1e-05")])
def test_a_folder_that_is_not_karlos_has_a_reason_of_its_own(diffusers_folder, tmp_path, monkeypatch, change, said):
    monkeypatch.setattr(pretrained.karlo, "load_tokenizer", lambda folder: None)      # which takes longest
    folder = linked(diffusers_folder[0], tmp_path / "copy")
    change(folder)
    with pytest.raises(ValueError, match=said) as error:
        load_karlo(folder, "cpu", small_karlo())
    assert "\n" not in str(error.value)
