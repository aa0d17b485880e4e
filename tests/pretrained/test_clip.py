"""clip.py: every public layout of a CLIP gives what its own library computes, or says why not.

Each row of LAYOUTS writes small random weights as a library or a person leaves them, and names
the model that they came from. OpenAI's names are tried against OpenAI's own class, which with
plain GELU is also what open_clip builds for LAION; Hugging Face's against transformers.
"""

import copy
import importlib.util
import json
import warnings
from importlib import metadata
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig as TheirCLIPConfig
from transformers import (
    CLIPImageProcessor, CLIPModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection,
    ViTConfig, ViTModel)

from mini_dalle2.clip import CLIP
from mini_dalle2.pretrained import OPENAI_MEAN, OPENAI_STD, clip, load_clip
from mini_dalle2.pretrained.clip import OPENAI_NAMES
from public_models import random_weights

SIDE, VOCAB, LENGTH, DIM = 16, 600, 9, 24
EOT = VOCAB - 1


# ------------------------------------------------------------------------------ their models

def hugging_face(seed=0, vocab=VOCAB, eos=EOT, **both):
    """A CLIPModel of transformers; `both` are settings of both towers."""
    text = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=1, intermediate_size=256,
                vocab_size=vocab, projection_dim=DIM, max_position_embeddings=LENGTH,
                eos_token_id=eos, bos_token_id=EOT - 1, pad_token_id=0) | both
    vision = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2,
                  intermediate_size=512, image_size=SIDE, patch_size=8, projection_dim=DIM) | both
    config = TheirCLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM)
    return random_weights(CLIPModel(config), seed)


def openai_module():
    """OpenAI's file model.py. Importing its package would import torchvision."""
    path = metadata.distribution("clip-anytorch").locate_file("clip/model.py")
    spec = importlib.util.spec_from_file_location("openai_clip_model", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module



def openai(gelu=False, heads=2, eps=1e-5, vision_width=128):
    """OpenAI's CLIP; with plain GELU, other heads or another epsilon it is one of open_clip's."""
    module = openai_module()
    theirs = module.CLIP(DIM, SIDE, 2, vision_width, 8, LENGTH, VOCAB, 64, 1, 2)
    theirs.visual = module.VisionTransformer(SIDE, 8, vision_width, 2, heads, DIM)
    for name, part in list(theirs.named_modules()):
        if gelu and name.endswith("mlp.gelu"):
            theirs.get_submodule(name.rpartition(".")[0]).gelu = nn.GELU()
        if isinstance(part, nn.LayerNorm):
            part.eps = eps
    return random_weights(theirs)


def open_clip_config(gelu=True, head_width=64, vision_width=128, **both):
    """What open_clip writes beside such weights."""
    size = dict(image_size=SIDE, layers=2, width=vision_width, head_width=head_width, patch_size=8)
    words = dict(context_length=LENGTH, vocab_size=VOCAB, width=64, heads=1, layers=2)
    model = dict(embed_dim=DIM, vision_cfg=size | both, text_cfg=words | both)
    if not gelu:
        model["quick_gelu"] = True
    return {"model_cfg": model, "preprocess_cfg": {"mean": OPENAI_MEAN, "std": OPENAI_STD}}


@pytest.fixture(scope="module")
def models():
    """{name: model}, built once."""
    return SimpleNamespace(
        quick=hugging_face(hidden_act="quick_gelu"), gelu=hugging_face(hidden_act="gelu"),
        # Numbers that are exact in half precision.
        short=hugging_face(hidden_act="gelu").half().float(),
        eps=hugging_face(hidden_act="gelu", layer_norm_eps=1e-3),
        openai=openai(), laion=openai(gelu=True), laion_eps=openai(gelu=True, eps=1e-3),
        # As in ViT-H-14: heads of another width than 64.
        laion_h=openai(gelu=True, heads=4))


@torch.no_grad()
def embeddings(theirs, images, tokens):
    """z_img and z_txt of unit norm, as the library computes them from normalised pixels."""
    if isinstance(theirs, CLIPModel):
        out = theirs(input_ids=tokens, pixel_values=images)
        return out.image_embeds, out.text_embeds
    return tuple(F.normalize(z, dim=-1) for z in (
        theirs.encode_image(images), theirs.encode_text(tokens)))


def write(path, value):
    """Write weights or a configuration, by the suffix. Returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(value))
    elif path.suffix == ".safetensors":
        save_file({name: x.detach().clone().contiguous() for name, x in value.items()}, path)
    else:
        torch.save(value, path)
    return path


# ------------------------------------------------------------------------------ the layouts

def marked(theirs):
    """The state dict of OpenAI's files: with three numbers that are no weights."""
    return theirs.state_dict() | {
        "input_resolution": torch.tensor(SIDE), "context_length": torch.tensor(LENGTH),
        "vocab_size": torch.tensor(VOCAB)}


def torchscript(folder, m):
    """OpenAI's own files are programs."""
    class Holder(nn.Module):
        def forward(self, x):
            return x
    holder = Holder()
    for name, value in marked(m.openai).items():
        at = holder
        *path, last = name.split(".")
        for step in path:
            if not hasattr(at, step):
                setattr(at, step, Holder())
            at = getattr(at, step)
        at.register_buffer(last, value.detach().clone())
    torch.jit.script(holder).save(str(folder / "ViT-B-32.pt"))
    return folder / "ViT-B-32.pt"


def saved(folder, theirs, **options):
    """Save as transformers does. Returns the folder."""
    theirs.save_pretrained(folder, **options)
    return folder


def half(theirs):
    """A copy in half precision."""
    return copy.deepcopy(theirs).half()


def transformers_4(folder, m):
    """An old folder: a .bin with position_ids, and each tower's settings twice."""
    told = saved(folder, m.gelu).joinpath("config.json")
    config = json.loads(told.read_text())
    for tower in ("text", "vision"):
        settings = config[f"{tower}_config"]
        config[f"{tower}_config_dict"] = dict(settings)
        # transformers, too, reads the other one.
        settings["hidden_act"] = "quick_gelu"
    config["text_config_dict"]["eos_token_id"] = 2
    told.write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    weights["text_model.embeddings.position_ids"] = torch.arange(LENGTH)[None]
    (folder / "model.safetensors").unlink()
    write(folder / "pytorch_model.bin", weights)
    return folder


def slim(folder, m):
    """A config.json that leaves out what is the library's default."""
    config = json.loads(saved(folder, m.quick).joinpath("config.json").read_text())
    for tower in ("text", "vision"):
        for key in ("hidden_act", "layer_norm_eps", "eos_token_id"):
            config[f"{tower}_config"].pop(key, None)
    write(folder / "config.json", config)
    return folder


def left_over_index(folder, m):
    """A whole file, beside the index of pieces that are gone."""
    saved(folder, m.quick)
    write(folder / "model.safetensors.index.json", {"weight_map": {"logit_scale": "gone.bin"}})
    return folder


def beside(folder, weights, config, name="open_clip_pytorch_model.bin"):
    """A file of open_clip and its configuration. Returns the file."""
    write(folder / "open_clip_config.json", config)
    return write(folder / name, weights)


def prefixed(weights, prefix):
    return {prefix + name: value for name, value in weights.items()}


def custom_text(theirs):
    """The names of open_clip's CustomTextCLIP: the text tower has a prefix too."""
    return {name if name.startswith("visual.") or name == "logit_scale" else f"text.{name}": value
            for name, value in theirs.state_dict().items()}


def compiled_inside(theirs):
    """The names after torch.compile of the image tower's transformer alone."""
    return {name.replace("visual.transformer.", "visual.transformer._orig_mod."): value
            for name, value in theirs.state_dict().items()}


def both_layouts(folder, m):
    """LAION's folders hold the model twice, in two layouts, each with its configuration."""
    saved(folder, m.gelu)
    return beside(folder, m.laion.state_dict(), open_clip_config(), "open_clip_model.safetensors")


GELU = open_clip_config()

# (name, the model in `models`, function of (folder, models) that returns what load_clip is given).
LAYOUTS = [
    ("OpenAI, TorchScript", "openai", torchscript),
    ("OpenAI, state dict in a file", "openai", lambda f, m: write(f / "a.pt", marked(m.openai))),
    ("OpenAI, beside another configuration", "openai",
     lambda f, m: beside(f, marked(m.openai), GELU, "ViT-B-32.pt")),
    ("OpenAI, in memory", "openai", lambda f, m: marked(m.openai)),
    ("OpenAI, in memory, wrapped", "openai", lambda f, m: {"state_dict": marked(m.openai)}),
    ("OpenAI, wrapped twice", "openai", lambda f, m: {
        "epoch": 3, "model": {"state_dict": prefixed(marked(m.openai), "module._orig_mod.")}}),
    ("transformers 5, folder", "quick", lambda f, m: saved(f, m.quick)),
    ("transformers 5, named as a file", "gelu",
     lambda f, m: saved(f, m.gelu) / "model.safetensors"),
    ("transformers 5, another epsilon", "eps", lambda f, m: saved(f, m.eps)),
    ("transformers 4, folder", "gelu", transformers_4),
    ("transformers, defaults left out", "quick", slim),
    ("transformers, pieces", "gelu", lambda f, m: saved(f, m.gelu, max_shard_size="300KB")),
    ("transformers, pieces in half precision", "short",
     lambda f, m: saved(f, half(m.short), max_shard_size="150KB", variant="fp16")),
    ("transformers, index named", "gelu", lambda f, m: saved(
        f, m.gelu, max_shard_size="300KB") / "model.safetensors.index.json"),
    ("transformers, whole in half precision", "short",
     lambda f, m: saved(f, half(m.short), variant="fp16")),
    ("transformers, index left over", "quick", left_over_index),
    ("LAION, file beside its configuration", "laion",
     lambda f, m: beside(f, m.laion.state_dict(), GELU)),
    ("LAION, folder", "laion", lambda f, m: beside(
        f, m.laion.state_dict(), GELU, "open_clip_model.safetensors").parent),
    ("LAION, both layouts in a folder", "laion", both_layouts),
    ("LAION, configuration of model_configs", "laion",
     lambda f, m: beside(f, m.laion.state_dict(), GELU["model_cfg"])),
    ("LAION, ViT-H's heads", "laion_h", lambda f, m: beside(
        f, m.laion_h.state_dict(), open_clip_config(head_width=32))),
    ("LAION, another epsilon", "laion_eps", lambda f, m: beside(
        f, m.laion_eps.state_dict(), open_clip_config(norm_kwargs={"eps": 1e-3}))),
    ("open_clip, QuickGELU", "openai",
     lambda f, m: beside(f, m.openai.state_dict(), open_clip_config(gelu=False))),
    ("open_clip, checkpoint of DDP", "laion", lambda f, m: beside(
        f, {"epoch": 1, "name": "x", "state_dict": prefixed(m.laion.state_dict(), "module."),
            "optimizer": {"state": {}}}, GELU, "epoch_1.pt")),
    ("open_clip, compiled", "laion",
     lambda f, m: beside(f, prefixed(m.laion.state_dict(), "_orig_mod."), GELU)),
    ("open_clip, compiled inside", "laion", lambda f, m: beside(f, compiled_inside(m.laion), GELU)),
    ("open_clip, text tower apart", "laion", lambda f, m: beside(f, custom_text(m.laion), GELU)),
    ("Lightning", "laion", lambda f, m: beside(
        f, {"state_dict": prefixed(m.laion.state_dict(), "model.")}, GELU, "last.ckpt"))]


@torch.no_grad()
@pytest.mark.parametrize("name, model, layout", LAYOUTS, ids=[row[0] for row in LAYOUTS])
def test_each_public_layout_gives_what_its_library_gives(models, tmp_path, name, model, layout):
    source = layout(tmp_path, models)
    with warnings.catch_warnings():
        warnings.simplefilter("error")                                     # nothing is assumed
        ours = load_clip(source)
    assert isinstance(ours, CLIP) and not ours.training
    same_embeddings(ours, getattr(models, model))


def same_embeddings(ours, theirs, vocab_end=EOT):
    """Compare both embeddings of three pictures and captions, to 1e-5."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(3, 3, SIDE, SIDE, generator=generator)
    tokens = torch.randint(1, EOT - 1, (3, LENGTH), generator=generator)
    for row, end in enumerate((2, 5, LENGTH - 1)):
        tokens[row, end] = vocab_end
        tokens[row, end + 1:] = 0
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (ours.cfg.image_mean, ours.cfg.image_std))
    z_img, z_txt = embeddings(theirs, (images - mean) / std, tokens)
    # The epsilons and activations that are tried differ by 1e-3 and more.
    assert (ours.encode_image(images * 2 - 1) - z_img).abs().max() < 1e-5
    assert (ours.encode_text(tokens) - z_txt).abs().max() < 1e-5


@torch.no_grad()
def test_what_is_tried_can_be_told_apart(models):
    """The wrong activation, epsilon or heads would not pass for the right ones."""
    right = load_clip(models.laion.state_dict(), "gelu")
    for other in (models.openai, models.laion_eps, models.laion_h):
        with pytest.raises(AssertionError):
            same_embeddings(right, other)


# ------------------------------------------------------------------------------ what is assumed

@torch.no_grad()
@pytest.mark.parametrize("file, model, said", [
    ("clip.bin", "openai", "quick_gelu"), ("CLIP-ViT-L-14-laion2B/clip.bin", "laion", "gelu"),
    ("vit_b_32-quickgelu-laion400m_e32.pt", "openai", "quick_gelu"),
    ("datacomp_xl.pt", "laion", "gelu")])
def test_where_nothing_says_the_activation_it_is_said_what_was_assumed(
        models, tmp_path, file, model, said):
    path = write(tmp_path / file, getattr(models, model).state_dict())
    with pytest.warns(UserWarning, match=f"taken to have the activation {said} "):
        ours = load_clip(path)
    same_embeddings(ours, getattr(models, model))


@torch.no_grad()
def test_an_activation_that_is_given_is_used(models):
    # The heads are still assumed.
    with pytest.warns(UserWarning, match=r"taken to have \d+ heads for pictures and \d+ for texts"):
        ours = load_clip(models.gelu.state_dict(), activation="gelu")
    same_embeddings(ours, models.gelu)
    with pytest.raises(ValueError, match="unknown activation 'relu'"):
        load_clip(models.gelu.state_dict(), activation="relu")


def test_what_is_no_input_of_a_clip_is_said_in_one_sentence(models, tmp_path):
    ours = load_clip(models.gelu.state_dict())
    with pytest.raises(ValueError, match="images are a list: give a tensor"):
        ours.encode_image([Image.new("RGB", (SIDE, SIDE))])
    with pytest.raises(ValueError, match="tokens are a list: give captions to a BPETokenizer"):
        ours.encode_text(["a cat"])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="is a configuration: name the weights beside it"):
        load_clip(tmp_path / "config.json")


def test_the_heads_of_vit_h_are_known_without_a_configuration():
    theirs = openai_module().CLIP(DIM, SIDE, 1, 1280, 8, LENGTH, VOCAB, 64, 1, 1).state_dict()
    assert load_clip(theirs, "gelu").cfg.vision_heads == 16


@torch.no_grad()
def test_end_of_text_is_found_among_added_tokens(tmp_path):
    """Behind CLIP's own 49,408 tokens lie two more. Old files do not say which one is the end."""
    theirs = hugging_face(vocab=49410, eos=49407, hidden_act="gelu")
    config = saved(tmp_path, theirs) / "config.json"
    for eos in (49407, 2):
        told = json.loads(config.read_text())
        told["text_config"]["eos_token_id"] = eos
        write(config, told)
        ours = load_clip(tmp_path)
        assert ours.cfg.eot_id == 49407 and ours.cfg.vocab_size == 49410
        same_embeddings(ours, theirs, vocab_end=49407)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["processor", "open_clip"])
def test_pixels_are_normalised_as_the_configuration_says(models, tmp_path, kind):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    if kind == "processor":
        CLIPImageProcessor(image_mean=mean, image_std=std).save_pretrained(tmp_path)
        path, theirs = saved(tmp_path, models.gelu), models.gelu
    else:
        told = GELU | {"preprocess_cfg": {"mean": mean, "std": std}}
        path, theirs = beside(tmp_path, models.laion.state_dict(), told), models.laion
    ours = load_clip(path)
    assert ours.cfg.image_mean == pytest.approx(mean) and ours.cfg.image_std == pytest.approx(std)
    same_embeddings(ours, theirs)


# ------------------------------------------------------------------------------ what is refused

def told(change):
    """A layout whose configuration is changed by a function."""
    def layout(folder, m):
        config = json.loads(saved(folder, m.quick).joinpath("config.json").read_text())
        change(config)
        write(folder / "config.json", config)
        return folder
    return layout


def told_open_clip(change):
    """The same for open_clip."""
    def layout(folder, m):
        config = copy.deepcopy(GELU)
        change(config)
        return beside(folder, m.laion.state_dict(), config)
    return layout


def both_towers(**settings):
    def change(config):
        for tower in ("text_config", "vision_config"):
            config[tower].update(settings)
    return change


def one_piece(folder, m):
    saved(folder, m.quick, max_shard_size="300KB")
    return sorted(folder.glob("*-00002-of-*"))[0]


def piece_missing(folder, m):
    one_piece(folder, m).unlink()
    return folder


def index_of_a_missing_piece(folder, m):
    return piece_missing(folder, m) / "model.safetensors.index.json"


def pointer(path):
    """Exchange a file for what a clone without git-lfs holds. Returns the path."""
    path.write_text("version https://git-lfs.github.com/spec/v1\n"
                    f"oid sha256:{'0' * 64}\nsize 605247071\n")
    return path


def flipped(path):
    """Flip a bit of a file, in its middle. Returns the path."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    return path


def tiny_vit():
    return ViTModel(ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                              intermediate_size=8, image_size=SIDE, patch_size=8))


def other_program(path):
    """A TorchScript file that is no CLIP. Returns the path."""
    torch.jit.script(nn.Linear(2, 2)).save(str(path))
    return path


def holds_itself():
    """A checkpoint whose model is the checkpoint."""
    loop = {}
    loop["model"] = loop
    return loop


REFUSED = [
    ("another GELU", told(both_towers(hidden_act="gelu_new")), "has the activation 'gelu_new'"),
    ("towers that differ", told(lambda c: c["text_config"].update(hidden_act="gelu")),
     "image tower has hidden_act 'quick_gelu' and the text tower 'gelu'"),
    ("norms that differ", told(lambda c: c["text_config"].update(layer_norm_eps=1e-6)),
     "layer_norm_eps"),
    ("another model", told(lambda c: c.update(model_type="siglip")), "of the type 'siglip'"),
    ("other weights", told(lambda c: c["text_config"].update(hidden_size=512)),
     "about other weights: text_width is 512 there and 64 here"),
    ("heads that do not divide", told(lambda c: c["vision_config"].update(num_attention_heads=3)),
     "not divisible"),
    ("heads that are a word",
     told(lambda c: c["vision_config"].update(num_attention_heads="many")),
     "cannot be used: vision_heads is 'many'"),
    ("an end of text that is a list", told(lambda c: c["text_config"].update(eos_token_id=[[]])),
     "cannot be used: eot_id is a value of the type list"),
    ("an epsilon that is a very long word",
     told(both_towers(layer_norm_eps="x" * 10 ** 5)), "layer_norm_eps is 'x{40}…'"),
    ("pixels that are a number", lambda f, m: beside(
        f, m.laion.state_dict(), GELU | {"preprocess_cfg": 3}), "no configuration of pixels"),
    ("whole numbers for weights", lambda f, m: beside(
        f, m.laion.state_dict() | {"ln_final.weight": torch.ones(64, dtype=torch.int8)}, GELU),
     "ln_final.weight holds torch.int8, and weights are floats"),
    ("weights of eight bits", lambda f, m: beside(
        f, m.laion.state_dict() | {"ln_final.weight": torch.ones(64).to(torch.float8_e4m3fn)},
        GELU), "ln_final.weight holds torch.float8_e4m3fn, and weights are floats"),
    ("a number that stands for many", lambda f, m: write(f / "a.pt", m.laion.state_dict() | {
        "ln_final.weight": torch.ones(1).expand(64)}), "ln_final.weight is not whole"),
    ("heads without end", told(lambda c: c["vision_config"].update(num_attention_heads=10 ** 400)),
     "vision_heads must be at most 1000000"),
    ("a mean without end", lambda f, m: (saved(f, m.quick), write(
        f / "preprocessor_config.json", {"image_mean": [1, 1, float("inf")]}))[0],
     "image_mean must be a finite number"),
    ("a wrapper that holds itself", lambda f, m: holds_itself(), "holds no weights of a model"),
    ("an index of files elsewhere", lambda f, m: write(
        f / "model.safetensors.index.json", {"weight_map": {"logit_scale": "../a.bin"}}),
     "no index of pieces"),
    ("an index of an endless name", lambda f, m: write(
        f / "model.safetensors.index.json", {"weight_map": {"logit_scale": "x" * 10 ** 5}}),
     "no index of pieces"),
    ("weights that are no numbers", lambda f, m: beside(
        f, m.laion.state_dict() | {"ln_final.weight": torch.full((64,), float("nan"))}, GELU),
     "ln_final.weight is not whole, or not finite"),
    ("a flipped bit", lambda f, m: flipped(beside(f, m.laion.state_dict(), GELU)),
     "cannot be read as weights: it is damaged"),
    ("a projection without a shape", lambda f, m: m.laion.state_dict() | {
        "text_projection": torch.ones(3)}, "its tensors have other shapes"),
    ("no numbers", told(lambda c: c.update(text_config=[1])), "no configuration of a CLIP"),
    ("no JSON", lambda f, m: (saved(f, m.quick), (f / "config.json").write_text("{"))[0],
     "no configuration"),
    ("pixels that are not normalised", lambda f, m: (saved(f, m.quick), write(
        f / "preprocessor_config.json", {"do_normalize": False}))[0], "pixels are not put"),
    ("pixels without numbers", lambda f, m: (saved(f, m.quick), write(
        f / "preprocessor_config.json", {"image_std": "abc"}))[0], "three numbers each, not 'abc'"),
    ("open_clip without a causal mask",
     told_open_clip(lambda c: c["model_cfg"]["text_cfg"].update(no_causal_mask=True)),
     "no_causal_mask True"),
    ("open_clip with average pooling",
     told_open_clip(lambda c: c["model_cfg"]["vision_cfg"].update(pool_type="avg")),
     "pool_type 'avg'"),
    ("open_clip with a tower of timm",
     told_open_clip(lambda c: c["model_cfg"]["vision_cfg"].update(timm_model_name="vit")),
     "timm_model_name 'vit'"),
    ("open_clip with settings of GELU", told_open_clip(
        lambda c: c["model_cfg"]["vision_cfg"].update(act_kwargs={"approximate": "tanh"})),
     "act_kwargs"),
    ("layer scale", lambda f, m: beside(f, m.laion.state_dict() | {
        "visual.transformer.resblocks.0.ls_1.gamma": torch.ones(128)}, GELU), "ls_1.gamma"),
    ("one piece", one_piece, "one piece of several"),
    ("a piece missing", piece_missing, "not beside it: copy all pieces"),
    ("a piece missing of a named index", index_of_a_missing_piece, "not beside it: copy all"),
    ("a broken index", lambda f, m: write(f / "model.safetensors.index.json", [1]),
     "no index of pieces"),
    ("a git-lfs pointer", lambda f, m: pointer(saved(f, m.quick) / "model.safetensors"),
     "only stands for the weights, which git-lfs keeps elsewhere: run `git lfs pull`"),
    ("a folder of oddly named weights",
     lambda f, m: write(f / "epoch_1.pt", m.laion.state_dict()).parent,
     "has only epoch_1.pt, .*: name the file itself"),
    ("an empty folder", lambda f, m: f, "has no weights, .*: name a folder"),
    ("a name on a hub", lambda f, m: f / "openai" / "clip-vit-base-patch32",
     "nothing is downloaded, so name a file or a folder of this machine"),
    ("a wider MLP, as of ViT-bigG", lambda f, m: saved(f, hugging_face(intermediate_size=320)),
     r"vision tower has an MLP of 2.5 times its width \(mlp_ratio\), and ours has 4"),
    ("open_clip's wider MLP", lambda f, m: beside(f, m.laion.state_dict() | {
        "transformer.resblocks.0.mlp.c_fc.weight": torch.ones(300, 64)}, GELU),
     "text tower has an MLP of 4.688 times its width"),
    ("a ViT", lambda f, m: saved(f, tiny_vit()), "describes a model of the type 'vit', not clip"),
    ("the image tower alone", lambda f, m: saved(f, CLIPVisionModelWithProjection(
        m.quick.config.vision_config)), "describes one tower, clip_vision_model"),
    ("the text tower alone", lambda f, m: saved(f, CLIPTextModelWithProjection(
        m.quick.config.text_config)) / "model.safetensors", "describes one tower, clip_text_model"),
    ("the image tower alone, in memory", lambda f, m: CLIPVisionModelWithProjection(
        m.quick.config.vision_config).state_dict(), "half of a CLIP: the text tower is missing"),
    ("OpenAI's image tower alone", lambda f, m: {
        name: x for name, x in m.openai.state_dict().items() if name.startswith("visual.")},
     "half of a CLIP: the text tower is missing"),
    ("a pickled model", lambda f, m: write(f / "model.pt", m.quick),
     r"would run code when it is read: it was not read; save its model.state_dict\(\)"),
    ("another program", lambda f, m: other_program(f / "a.pt"),
     "no CLIP with a vision transformer"),
    ("a ResNet", lambda f, m: {
        "visual.layer1.0.conv1.weight": torch.ones(1), "positional_embedding": torch.ones(1)},
     "no CLIP with a vision transformer"),
    ("no weights", lambda f, m: {"state_dict": {}}, "holds no weights"),
    ("plain values", lambda f, m: {"epoch": 1}, "holds no weights"),
    ("a model", lambda f, m: m.quick, "takes a path or a state dict, not CLIPModel")]


def test_no_clip_is_built_of_sizes_that_do_not_agree(models, monkeypatch):
    """One tensor may ask for a CLIP of any width: the others are compared first."""
    monkeypatch.setattr(clip, "fill", lambda *_: pytest.fail("it was built"))
    theirs = models.laion.state_dict()
    patches = theirs["visual.conv1.weight"]
    with pytest.raises(ValueError, match="is of another size"):
        load_clip(theirs | {"visual.conv1.weight": torch.ones(1024, *patches.shape[1:])}, "gelu")
    blocks = {OPENAI_NAMES["text_block"].format(n): torch.ones(1) for n in range(501)}
    with pytest.raises(ValueError, match="text_layers must be at most 500, not 501"):
        load_clip(theirs | blocks, "gelu")


@pytest.mark.parametrize("name, layout, said", REFUSED, ids=[row[0] for row in REFUSED])
def test_what_cannot_be_used_has_a_reason_of_its_own(models, tmp_path, name, layout, said):
    source = layout(tmp_path, models)
    with pytest.raises((ValueError, FileNotFoundError), match=said) as error:
        load_clip(source)
    assert "\n" not in str(error.value)
