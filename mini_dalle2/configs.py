"""Configurations: every number of a run in one object, and the presets.

    Config = data + tokenizer + seven stages, each a Stage(model: its sizes, train: its TrainConfig)

`preset("paper")` is Table 3 of the unCLIP paper (App. C), to the digit where the paper gives one.
`small` is the same method with smaller models. `tiny` and `micro` also use the tricks of tricks/.
The type of a model's configuration says which class of model it is for (`MODELS`).

Some numbers must be the same in several stages. Each has one owner, and the others follow
(`FOLLOWS`): clip.clip_dim is also the priors' and the decoder's, the decoder's image_size is what
upsampler1 enlarges. training/overrides.py applies settings like `--decoder.lr=3e-4`.

    python -m mini_dalle2.configs [PRESET]         the parameters of each model, beside the paper's

References: unCLIP Table 3 (2204.06125); CLIP §2.5 (2103.00020) for CLIP's own training.
Read next: train.py.
"""

import difflib
import importlib
import math
import sys
from dataclasses import asdict, dataclass, replace

import torch

from .ar_prior import ARPrior, ARPriorConfig
from .clip import CLIP, CLIPConfig
from .decoder import Decoder, DecoderConfig
from .prior import DiffusionPrior, PriorConfig
from .runtime.checks import brief, check_bounds, check_types, fits
from .runtime.files import FLOATS
from .runtime.settings import (
    DataConfig, Stage, TokenizerConfig, TrainConfig, get, has, holder)
from .tricks.patches import PatchUpsamplerConfig
from .tricks.redrawing import RedrawingCLIP, RedrawingCLIPConfig
from .tricks.sketch import Sketch, SketchConfig
from .tricks.sketched import SketchedDecoder, SketchedDecoderConfig
from .tricks.small_priors import (
    SmallARPrior, SmallARPriorConfig, SmallPrior, SmallPriorConfig)
from .upsampler import Upsampler, UpsamplerConfig


@dataclass(frozen=True)
class Config:
    """A whole run. The sketch is trained only if the decoder is shown one.

    Raises ValueError when stages do not fit together.
    """

    preset: str
    data: DataConfig
    tokenizer: TokenizerConfig
    clip: Stage
    prior: Stage
    ar_prior: Stage
    sketch: Stage
    decoder: Stage
    upsampler1: Stage
    upsampler2: Stage

    def __post_init__(self):
        if self.clip.train.shard:
            raise ValueError("clip.shard must be false: CLIP's temperature is a single number, "
                             "which fully_shard cannot divide")
        if self.clip.train.accumulate > 1:
            raise ValueError("clip.accumulate must be 1: CLIP tells the pictures and captions of a "
                             "whole batch apart, and parts of it would be an easier task; "
                             "clip.recompute=true saves memory too")
        for key, owner in FOLLOWS.items():
            if has(self, key) and get(self, key) != get(self, owner):
                raise ValueError(f"{key} is {get(self, key)}, but must be equal to {owner}, "
                                 f"which is {get(self, owner)}")


# {stage: {configuration class: model class}}, in the order of training. The paper's class comes
# first, then the one with tricks. Karlo's are in pretrained/karlo_models.py.
MODELS = {
    "clip": {CLIPConfig: CLIP, RedrawingCLIPConfig: RedrawingCLIP},
    "prior": {PriorConfig: DiffusionPrior, SmallPriorConfig: SmallPrior},
    "ar_prior": {ARPriorConfig: ARPrior, SmallARPriorConfig: SmallARPrior},
    "sketch": {SketchConfig: Sketch},
    "decoder": {DecoderConfig: Decoder, SketchedDecoderConfig: SketchedDecoder},
    "upsampler1": {UpsamplerConfig: Upsampler, PatchUpsamplerConfig: Upsampler},
    "upsampler2": {UpsamplerConfig: Upsampler, PatchUpsamplerConfig: Upsampler}}
STAGES = ("tokenizer", *MODELS)
# Each checkpoint records it. Raise it when weights of before would be read with another meaning.
# Checkpoints without a record are from before there was one, and still mean the same.
VERSION = 1
# What only an evaluation needs, and the stage that each is a variant of (training/variants.py).
VARIANTS = {"judge": "clip", "glide": "decoder", "with_sam": "clip", "without_sam": "clip",
            "without_sam_half": "clip", "without_sam_quarter": "clip"}
# These stages learn from the embeddings of the run's CLIP.
ON_CLIP = ("prior", "ar_prior", "sketch", "decoder")
# {setting: the setting that it follows}.
FOLLOWS = {
    f"{stage}.{key}": f"clip.{key}" for stage in ("prior", "ar_prior", "decoder")
    for key in ("clip_dim", "vocab_size", "context_length", "eot_id")}
FOLLOWS |= {
    "sketch.clip_dim": "clip.clip_dim", "sketch.image_size": "decoder.image_size",
    "decoder.sketch_width": "sketch.width", "decoder.sketch_layers": "sketch.layers",
    "upsampler1.low_size": "decoder.image_size", "upsampler2.low_size": "upsampler1.high_size"}
# What the tokenizer turned out to be.
LEARNED = ("clip.vocab_size", "clip.eot_id")
# How a model is taught and sampled from. Its weights mean the same with another value.
HABITS = ("text_drop", "z_drop", "caption_drop", "z_noise", "z_noise_from", "dropout", "weighting",
          "vlb_weight", "sampling_steps", "sampler", "eta", "guidance", "candidates", "top",
          "temperature")
# Settings that not every class of a stage has, or none any more, and the value that means "off".
OFF = {
    "whiten_z": False, "head_layers": 0, "head_width": 512, "place_width": 0, "places": 0,
    "picture_weight": 0.0, "sketch": False, "sketch_width": 512, "sketch_layers": 4,
    "z_noise": 0.0, "z_noise_from": 0.75, "patch_size": 1, "position_embedding": False,
    "emb_channels": None, "frozen_text": None, "z_scale": None, "unit_norm": True,
    "clip_x_start": None, "learned_null": False, "last_unet": False, "use_adagn": True,
    "sampler": "ddim", "timestep_sampling": "uniform"}


# What a setting may be.
PLAIN = tuple[float | str | None, ...] | float | str | bool | None


def karlo_module(name):
    """Import a module of pretrained/ by its name.

    A plain import would close a circle, because these modules import this file. Only calls that
    are about Karlo come here.
    """
    return importlib.import_module(f"{__package__}.pretrained.{name}")


def kinds(stage):
    """Yield a stage's configuration classes: the paper's, the one with tricks, Karlo's."""
    yield from MODELS[stage]
    yield from karlo_module("karlo_models").MODELS.get(stage, ())


def build(model):
    """Make a new model from its configuration, by the type of the configuration."""
    for classes in MODELS.values():
        if type(model) in classes:
            return classes[type(model)](model)
    for classes in karlo_module("karlo_models").MODELS.values():
        if type(model) in classes:
            return classes[type(model)](model)
    raise TypeError(f"{type(model).__name__} is no configuration of a model")


def model_config(stage, values):
    """Make the configuration of a stage's model from a dict, by the first class that can say it.

    values: a checkpoint's "model_config", or a stage's "model" in config.json. Older ones have the
    settings of all classes; a setting that a class does not have is left out where it is off.
    Raises KeyError for an unknown stage, TypeError or ValueError for values of no class, and for
    sizes that no machine could build.
    """
    # Lists from JSON were tuples. Everything is plain before it is compared or written out.
    values = {key: tuple(value) if isinstance(value, list) else value
              for key, value in values.items()}
    for key, value in values.items():
        if not fits(key, str) or not fits(value, PLAIN):
            raise TypeError(f"{brief(key)} is {brief(value)}")
    unknown = []
    for kind in kinds(stage):
        understood = OFF | getattr(kind, "IMPLIED", {})
        known = {key: value for key, value in values.items() if key in kind.__dataclass_fields__}
        others = [key for key in values if key not in known
                  and not (key in understood and values[key] == understood[key])]
        if not others:
            check_types(kind, known)
            check_bounds(known)
            return kind(**known)
        unknown.append(others)
    raise TypeError(f"no class of the stage {stage} has the setting "
                    f"{min(unknown, key=len)[0][:40]}")


def weights_for(model, state):
    """Return a checkpoint's state dict without the whitening that this model no longer has.

    Older checkpoints keep a whitening where nothing is whitened: the identity times √D. It may be
    left out, because the model scales by √D itself. Raises RuntimeError for one that does whiten.
    """
    surplus = {name for name in state.keys() - model.state_dict().keys()
               if name.startswith("whitening")}
    for name in surplus:
        if name.endswith(".matrix"):
            D = model.cfg.clip_dim
            # The shape comes first: an identity of other sizes would only take memory.
            same = state[name].shape == (D, D)
            if not same or not torch.equal(state[name].cpu(), torch.eye(D) * math.sqrt(D)):
                raise RuntimeError(f"{name} whitens, but this model has no whitening: "
                                   f"its configuration must have whiten_z")
    return {name: value for name, value in state.items() if name not in surplus}


def check_weights(ours, theirs):
    """Raise RuntimeError unless two state dicts have the same names, shapes and kinds of numbers.

    Half precision is fine. Whole numbers and floats of eight bits are not turned into weights.
    """
    if ours.keys() != theirs.keys():
        names = ", ".join(map(brief, sorted(ours.keys() ^ theirs.keys(), key=str)[:3]))
        raise RuntimeError(f"these weights are missing or left over: {names}")
    for name, value in theirs.items():
        if not isinstance(value, torch.Tensor) or value.layout != torch.strided or value.is_meta:
            raise RuntimeError(f"{name} is no plain tensor")
        if value.shape != ours[name].shape:
            raise RuntimeError(f"{name} has the shape {tuple(value.shape)}, and this model's has "
                               f"{tuple(ours[name].shape)}")
        kinds = FLOATS if ours[name].is_floating_point() else (ours[name].dtype,)
        if value.dtype not in kinds:
            raise RuntimeError(f"{name} holds {value.dtype}, and this model's {ours[name].dtype}")


def load_weights(model, state):
    """Put a checkpoint's weights (a state dict) into a model. RuntimeError if they do not fit."""
    state = weights_for(model, state)
    check_weights(model.state_dict(), state)
    model.load_state_dict(state)


def is_shown_sketch(model):
    """Return whether a decoder's configuration shows it a sketch."""
    return getattr(model, "sketch", False)


def stages(config):
    """Return the STAGES that a run with this config trains."""
    return [stage for stage in STAGES
            if stage != "sketch" or is_shown_sketch(config.decoder.model)]


def sizes(model):
    """Return a model's settings that its weights are made for, as a dict.

    Left out are its habits and whatever is off.
    """
    return {name: value for name, value in asdict(model).items()
            if name not in HABITS and not (name in OFF and OFF[name] == value)}


def changed(config, values):
    """Return the config with {"section.key": value} replaced and followers moved along.

    Everything is checked again. Raises ValueError.
    """
    values = values | {key: values[owner] for key, owner in FOLLOWS.items()
                       if owner in values and has(config, key)}
    grouped = {}
    for key, value in values.items():
        grouped.setdefault(holder(config, key), {})[key.split(".")[1]] = value
    parts = {}
    # All settings of one dataclass are replaced at once, because they may only fit together.
    for (section, inner), new in grouped.items():
        part = parts.get(section, getattr(config, section))
        try:
            check_bounds(new)
            if inner == "model":
                model = replace(part.model, **new)
                # Without any of its tricks a configuration is the paper's.
                new = {"model": model_config(section, asdict(model))}
            elif inner == "train":
                new = {"train": replace(part.train, **new)}
            parts[section] = replace(part, **new)
        except ValueError as error:
            raise ValueError(f"{section}: {error}") from None
    return replace(config, **parts)


SKETCH = TrainConfig(steps=6000, batch_size=128, lr=2e-3, ema=0.99, log_every=100)


def no_sketch(clip_dim, image_size):
    """Return the sketch's stage for a preset whose decoder is shown none. It is not trained."""
    return Stage(SketchConfig(clip_dim, image_size), SKETCH)


def micro():
    """Return the preset for tests: 16 → 32 → 64, in seconds on one core. It learns next to nothing.
    """
    text = dict(clip_dim=32, vocab_size=640, context_length=32, eot_id=639)
    train = TrainConfig(steps=30, batch_size=16, lr=1e-3, warmup=5, ema=0.9, save_every=20,
                        log_every=5)
    unet = dict(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8,
                objective="v")
    return Config(
        "micro",
        DataConfig(images=256, near_misses=True, val_images=64, upsampler1_images=32,
                   upsampler2_images=16),
        TokenizerConfig(640),
        Stage(RedrawingCLIPConfig(
            image_size=16, patch_size=4, vision_width=32, vision_layers=2, vision_heads=2,
            text_width=32, text_layers=2, text_heads=2, picture_weight=10.0, **text), train),
        Stage(SmallPriorConfig(
            width=32, layers=2, heads=2, sampling_steps=8, whiten_z=True, **text), train),
        Stage(SmallARPriorConfig(
            width=32, layers=2, heads=2, text_width=32, text_layers=1, text_heads=2, buckets=64,
            place_width=8, whiten_z=True, **text), train),
        Stage(SketchConfig(clip_dim=32, image_size=16, width=32, layers=2), train),
        Stage(SketchedDecoderConfig(
            image_size=16, attn_resolutions=(8,), head_dim=16, text_width=32, text_layers=1,
            text_heads=2, sketch=True, z_noise=0.5, sketch_width=32, sketch_layers=2,
            sampling_steps=8, whiten_z=True, **unet, **text), train),
        Stage(UpsamplerConfig(low_size=16, high_size=32, sampling_steps=4, **unet), train),
        Stage(UpsamplerConfig(
            low_size=32, high_size=64, schedule="linear", degradation="bsr", sampling_steps=3,
            **unet), train))


def tiny():
    """Return the default preset, for a laptop: 32 → 128 → 512, in half an hour on two CPU cores."""
    text = dict(clip_dim=128, vocab_size=640, context_length=16, eot_id=639)
    # mini: the paper's U-Nets see pixels and predict ε. Those of `tiny` see patches and predict
    # x_0, because a narrow layer cannot pass on the noise of every pixel of a patch.
    # mini: the paper's decoder has four levels with attention. `tiny`'s has one level and attention
    # in the middle alone, which learns as fast in less time.
    # mini: L_vlb belongs to the scale of ε. In `tiny`, which predicts x_0, its weight is smaller,
    # and pictures are sampled by DDIM with η = 1, whose variance β̃ is not learned.
    patches = dict(objective="x_start", norm_groups=8, num_res_blocks=1)
    on_text = dict(eps=1e-6, ema=0.99, warmup=50)
    return Config(
        "tiny",
        DataConfig(images=60000, near_misses=True, upsampler1_images=3000, upsampler2_images=300),
        TokenizerConfig(640),
        Stage(RedrawingCLIPConfig(
            image_size=32, patch_size=8, vision_width=128, vision_layers=4, vision_heads=4,
            text_width=128, text_layers=2, text_heads=4, picture_weight=50.0, **text),
            TrainConfig(steps=2000, batch_size=128, lr=2e-3, beta2=0.98, weight_decay=0.2,
                        **on_text)),
        Stage(SmallPriorConfig(
            width=128, layers=1, heads=4, head_layers=4, head_width=512, whiten_z=True, **text),
            TrainConfig(steps=6500, batch_size=256, lr=2e-3, beta2=0.96, weight_decay=6e-2,
                        **on_text)),
        # mini: the paper gives no temperature. `tiny`'s is low, because so short a training leaves
        # some probability on wrong codes everywhere.
        Stage(SmallARPriorConfig(
            width=128, layers=1, heads=4, text_width=128, text_layers=1, text_heads=4,
            place_width=128, places=48, temperature=0.3, whiten_z=True, **text),
            TrainConfig(steps=250, batch_size=128, lr=3e-3, beta2=0.96, weight_decay=4e-2,
                        **on_text)),
        Stage(SketchConfig(clip_dim=128, image_size=32), SKETCH),
        # mini: the paper drops every second caption. `tiny` drops every fifth, as GLIDE did (§4):
        # where z_img is a little off, only the caption says how many objects there are.
        Stage(SketchedDecoderConfig(
            image_size=32, patch_size=2, model_channels=64, channel_mult=(1,), attn_resolutions=(),
            head_dim=32, emb_channels=256, position_embedding=True, sketch=True, z_noise=0.5,
            caption_drop=0.2, text_width=128, text_layers=3, text_heads=4, vlb_weight=1e-5,
            weighting="snr_plus_1", sampler="ddim", eta=1.0, sampling_steps=50, guidance=2.0,
            whiten_z=True, **patches, **text),
            TrainConfig(steps=3100, batch_size=16, lr=2e-3, ema=0.999, grad_clip=0.1)),
        Stage(PatchUpsamplerConfig(
            low_size=32, high_size=128, model_channels=32, channel_mult=(1, 2), patch_size=2,
            **patches),
            TrainConfig(steps=600, batch_size=32, lr=1e-3, ema=0.99, warmup=50)),
        Stage(PatchUpsamplerConfig(
            low_size=128, high_size=512, model_channels=32, channel_mult=(1, 2), patch_size=4,
            schedule="linear", degradation="bsr", sampling_steps=15, **patches),
            TrainConfig(steps=450, batch_size=8, lr=2e-3, ema=0.99, warmup=50)))


def small():
    """Return the preset for one GPU and real captions: 64 → 256 → 1024."""
    text = dict(clip_dim=256, vocab_size=8192, context_length=48, eot_id=8191)
    train = dict(ema=0.9995, warmup=500, log_every=50, save_every=1000)
    decay = dict(beta2=0.99, weight_decay=1e-2, **train)
    return Config(
        "small",
        DataConfig(images=100000, upsampler1_images=20000, upsampler2_images=2000),
        TokenizerConfig(8192),
        Stage(CLIPConfig(
            image_size=64, patch_size=8, vision_width=384, vision_layers=8, vision_heads=6,
            text_width=384, text_layers=6, text_heads=6, **text),
            TrainConfig(steps=10000, batch_size=1024, lr=5e-4, beta2=0.98, eps=1e-6,
                        weight_decay=0.2, **train)),
        Stage(PriorConfig(width=512, layers=10, heads=8, **text),
              TrainConfig(steps=15000, batch_size=512, lr=3e-4, beta2=0.96, eps=1e-6,
                          weight_decay=6e-2, **train)),
        Stage(ARPriorConfig(
            width=512, layers=10, heads=8, text_width=512, text_layers=4, text_heads=8, **text),
            TrainConfig(steps=15000, batch_size=256, lr=3e-4, beta2=0.96, eps=1e-6,
                        weight_decay=4e-2, **train)),
        no_sketch(clip_dim=256, image_size=64),
        Stage(DecoderConfig(
            image_size=64, model_channels=128, channel_mult=(1, 2, 3, 4),
            attn_resolutions=(32, 16, 8), head_dim=64, text_width=512, text_layers=6, text_heads=8,
            dropout=0.1, weighting="min_snr", sampling_steps=100, **text),
            TrainConfig(steps=20000, batch_size=128, lr=2e-4, **decay)),
        Stage(UpsamplerConfig(
            low_size=64, high_size=256, model_channels=96, channel_mult=(1, 2, 3), norm_groups=32),
            TrainConfig(steps=8000, batch_size=64, lr=2e-4, **decay)),
        Stage(PatchUpsamplerConfig(
            low_size=256, high_size=1024, model_channels=64, channel_mult=(1, 2, 3),
            norm_groups=32, patch_size=2, objective="x_start", schedule="linear",
            degradation="bsr", sampling_steps=15),
            TrainConfig(steps=6000, batch_size=16, lr=2e-4, **decay)))


def paper():
    """Return unCLIP's Table 3, for reading and for real clusters.

    CLIP is from App. C (ViT-H/16), and from CLIP §2.5 where App. C says "as in CLIP".
    """
    # mini: the paper's CLIP reads 77 tokens, the other models 256. Here one row of tokens serves
    # all models, so CLIP reads 256 too. The vocabulary is CLIP's.
    text = dict(clip_dim=1024, vocab_size=49408, context_length=256, eot_id=49407)
    # mini: the paper is silent on warm-up, decay and clipping outside CLIP. ADM, whose training it
    # continues, used none of them.
    plain = dict(warmup=0, decay="none", grad_clip=0.0, save_every=5000, log_every=100)
    large = dict(beta2=0.999, eps=1e-8, ema=0.9999, **plain)
    return Config(
        "paper",
        DataConfig(images=250_000_000, upsampler1_images=250_000_000,
                   upsampler2_images=250_000_000),
        TokenizerConfig(49408),
        # CLIP sees 650 million pairs 32 times (App. C; CLIP §2.5), 32,768 at once: 634,766 steps.
        # It has no EMA weights.
        Stage(CLIPConfig(
            image_size=256, patch_size=16, vision_width=1280, vision_layers=32, vision_heads=20,
            text_width=1024, text_layers=24, text_heads=16, **text),
            TrainConfig(steps=634_766, batch_size=32768, lr=3e-4, beta2=0.98, eps=1e-6,
                        weight_decay=0.2, ema=0.0, sam_rho=0.1, warmup=2000, decay="cosine",
                        grad_clip=0.0, save_every=5000, log_every=100)),
        Stage(PriorConfig(width=2048, layers=24, heads=32, sampling_steps=64, **text),
              TrainConfig(steps=600_000, batch_size=4096, lr=1.1e-4, beta2=0.96, eps=1e-6,
                          weight_decay=6e-2, ema=0.9999, **plain)),
        # mini: Table 3's context of 384 cannot hold 256 places of caption, two more and 319 codes,
        # and the paper does not say how they share it. Here all stand one after the other.
        Stage(ARPriorConfig(
            width=1664, layers=24, heads=26, text_width=2048, text_layers=24, text_heads=32,
            **text),
            TrainConfig(steps=1_000_000, batch_size=4096, lr=1.6e-4, beta2=0.91, eps=1e-10,
                        weight_decay=4e-2, ema=0.999, **plain)),
        no_sketch(clip_dim=1024, image_size=64),
        Stage(DecoderConfig(
            image_size=64, model_channels=512, channel_mult=(1, 2, 3, 4), num_res_blocks=3,
            attn_resolutions=(32, 16, 8), head_dim=64, dropout=0.1, text_width=2048,
            text_layers=24, text_heads=32, sampling_steps=250, guidance=1.25, **text),
            TrainConfig(steps=800_000, batch_size=2048, lr=1.2e-4, **large)),
        Stage(UpsamplerConfig(
            low_size=64, high_size=256, model_channels=320, channel_mult=(1, 2, 3, 4),
            num_res_blocks=3, norm_groups=32, dropout=0.1, schedule="cosine", degradation="blur",
            sampling_steps=27),
            TrainConfig(steps=1_000_000, batch_size=1024, lr=1.2e-4, **large)),
        Stage(UpsamplerConfig(
            low_size=256, high_size=1024, model_channels=192, channel_mult=(1, 1, 2, 2, 4, 4),
            num_res_blocks=2, norm_groups=32, schedule="linear", degradation="bsr_full",
            sampling_steps=15),
            TrainConfig(steps=1_000_000, batch_size=512, lr=1.0e-4, **large)))


def karlo():
    """Return the preset of Karlo v1.0.alpha; see pretrained/karlo.py."""
    return karlo_module("karlo").sizes()


PRESETS = {"micro": micro, "tiny": tiny, "small": small, "karlo": karlo, "paper": paper}


def preset(name):
    """Return the Config of a preset: one of PRESETS.

    Raises ValueError for another name, naming the closest.
    """
    if name not in PRESETS:
        closest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0)[0]
        raise ValueError(f'there is no preset "{name}" (there are {", ".join(PRESETS)}); '
                         f'the closest is {closest}')
    return PRESETS[name]()


# App. C, Table 3.
PAPER = {
    "clip": "0.63 + 0.35 billion (ViT-H/16; not given, computed)", "prior": "1 billion",
    "ar_prior": "1 billion (1.1 without its text encoder)", "sketch": "none",
    "decoder": "3.5 billion", "upsampler1": "0.7 billion", "upsampler2": "0.3 billion"}
NOT_KARLOS = "; Karlo has none, this is ours"


def parameters(model):
    """Count what a model has learned. A decoder's sketch is a stage of its own, counted there."""
    return sum(p.numel() for name, p in model.named_parameters()
               if not name.startswith("sketch."))


def counts(config):
    """Return {stage: number of parameters}, without the memory that they would take."""
    with torch.device("meta"):
        return {stage: parameters(build(getattr(config, stage).model))
                for stage in stages(config)[1:]}


def main():
    """Print the parameters of each model of a preset beside the paper's. Returns the exit code."""
    name = sys.argv[1] if len(sys.argv) > 1 else "paper"
    try:
        found = counts(preset(name))
    except ValueError as error:
        print(f"configs: {error}", file=sys.stderr)
        return 2
    print(f"{name:<12}{'parameters':>16}   the paper's")
    for stage, count in found.items():
        ours = name == "karlo" and stage in ("ar_prior", "upsampler2")
        print(f"{stage:<12}{count:>16,}   {PAPER[stage]}{NOT_KARLOS if ours else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
