"""Configurations: every number of a run in one object; presets, command-line overrides, and JSON there and back.

    Config = data + tokenizer + five stages, each Stage(model: its sizes, train: its TrainConfig)

`preset("paper")` is Table 3 of the unCLIP paper (App. C), to the digit where the paper gives one; the others are the same models, narrower.
An override `--decoder.lr=3e-4` is looked up in the stage's model, then in its training. Numbers that stages must share have one owner and
follow it (`FOLLOWS`): clip.clip_dim is also the prior's and the decoder's, the decoder's image_size is the first upsampler's low_size.

References: unCLIP Table 3 (2204.06125); CLIP §2.5 (2103.00020) for CLIP's own numbers. Read next: train.py.
"""
import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field

import torch

from .clip import CLIP, CLIPConfig
from .decoder import Decoder, DecoderConfig
from .prior import DiffusionPrior, PriorConfig
from .training import TrainConfig, load_checkpoint
from .upsampler import Upsampler, UpsamplerConfig


@dataclass(frozen=True)
class DataConfig:
    """What is learned from, and how much of it is held in memory."""
    source: str = "shapes"              # "shapes": drawn; otherwise a folder of captioned pictures
    images: int = 40000                 # for CLIP, prior and decoder (folder: at most)
    val_images: int = 1000              # never trained on; for the pictures after each stage
    upsampler1_images: int = 4000       # large pictures are few: each gives many crops
    upsampler2_images: int = 400
    seed: int = 0                       # of the drawn pictures and of everything random in training

    def __post_init__(self):
        for key in ("images", "val_images", "upsampler1_images", "upsampler2_images"):
            if getattr(self, key) < 1:
                raise ValueError(f"data.{key} must be at least 1, not {getattr(self, key)}")


@dataclass(frozen=True)
class TokenizerConfig:
    """`vocab_size` is what is asked for; few captions may yield fewer merges, and then the models take what came out."""
    vocab_size: int = 640


@dataclass(frozen=True)
class Stage:
    """One model and its training."""
    model: object
    train: TrainConfig


@dataclass(frozen=True)
class Config:
    """A whole run. Raises ValueError when stages do not fit together."""
    preset: str
    data: DataConfig
    tokenizer: TokenizerConfig
    clip: Stage
    prior: Stage
    decoder: Stage
    upsampler1: Stage
    upsampler2: Stage

    def __post_init__(self):
        for key, (section, owner) in FOLLOWS.items():
            mine, name = key.split(".")
            if (have := getattr(getattr(self, mine).model, name)) != (want := getattr(_part(self, section, owner), owner)):
                raise ValueError(f"{key} is {have}, but must be equal to {section}.{owner}, which is {want}")


MODELS = {"clip": (CLIP, CLIPConfig), "prior": (DiffusionPrior, PriorConfig), "decoder": (Decoder, DecoderConfig),
          "upsampler1": (Upsampler, UpsamplerConfig), "upsampler2": (Upsampler, UpsamplerConfig)}
STAGES = ("tokenizer", *MODELS)                            # in the order of training
FOLLOWS = {"prior.clip_dim": ("clip", "clip_dim"), "decoder.clip_dim": ("clip", "clip_dim"),
           "prior.vocab_size": ("clip", "vocab_size"), "decoder.vocab_size": ("clip", "vocab_size"),
           "prior.eot_id": ("clip", "eot_id"), "decoder.eot_id": ("clip", "eot_id"),
           "upsampler1.low_size": ("decoder", "image_size"), "upsampler2.low_size": ("upsampler1", "high_size")}


def _part(config, section, key):
    """The dataclass that holds `section.key`: a stage's model or its training, or the section itself."""
    part = getattr(config, section)
    if not isinstance(part, Stage):
        return part
    return part.model if hasattr(part.model, key) else part.train


def changed(config, values):
    """The config with {"section.key": value} replaced, followers moved along, and everything checked."""
    values = dict(values)
    parts = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for key, (section, owner) in FOLLOWS.items():          # in this order: upsampler1 has moved before upsampler2 looks at it
        if f"{section}.{owner}" in values:
            values[key] = values[f"{section}.{owner}"]
    grouped = {}
    for key, value in values.items():
        section, name = key.split(".")
        where = "" if not isinstance(parts[section], Stage) else "model" if hasattr(parts[section].model, name) else "train"
        grouped.setdefault((section, where), {})[name] = value
    for (section, where), new in grouped.items():          # all of one dataclass at once: they may only fit together
        try:
            part = dataclasses.replace(getattr(parts[section], where) if where else parts[section], **new)
        except ValueError as error:
            raise ValueError(f"{section}: {error}") from None
        parts[section] = dataclasses.replace(parts[section], **{where: part}) if where else part
    return Config(**parts)


def with_tokenizer(config, tokenizer):
    """The config with the models' vocabulary and end-of-text taken from the tokenizer that was really learned."""
    return changed(config, {"clip.vocab_size": tokenizer.vocab_size, "clip.eot_id": tokenizer.eot_id})


# ---------------------------------------------------------------------------------------------------------------- the command line

def parse_value(text, kind, key):
    """Text -> value of type `kind`: int, float, bool, str, tuple[...] ("1,2,4"), or X | None ("None"). Raises ValueError naming `key`."""
    if isinstance(kind, types.UnionType) or typing.get_origin(kind) is typing.Union:
        if text.lower() == "none":
            return None
        kind = next(k for k in typing.get_args(kind) if k is not types.NoneType)
    if kind is str:
        return text
    if typing.get_origin(kind) is tuple:
        inner = typing.get_args(kind)[0]
        return tuple(parse_value(item.strip(), inner, key) for item in text.strip("()[] ").split(",") if item.strip())
    try:
        if kind is bool:
            return {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}[text.lower()]
        if kind is float and not math.isfinite(float(text)):
            raise ValueError
        return kind(text)
    except (ValueError, KeyError):
        raise ValueError(f'--{key}="{text}" is not {"a number" if kind is float else "true or false" if kind is bool else "a whole number"}') from None


def kinds(config):
    """All that can be set: {"section.key": type}, in the order of the sections."""
    found = {}
    for section in dataclasses.fields(config)[1:]:
        part = getattr(config, section.name)
        for holder in (part.model, part.train) if isinstance(part, Stage) else (part,):
            for name, kind in typing.get_type_hints(type(holder)).items():
                found.setdefault(f"{section.name}.{name}", kind)
    return found


def override(config, arguments):
    """Applies ["--decoder.lr=3e-4", ...]. Raises ValueError for what is not of that form, unknown (naming the closest key) or of a wrong type."""
    known, values = kinds(config), {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or "." not in key:
            raise ValueError(f'"{argument}" is not understood: an override looks like --decoder.lr=3e-4, --help shows the rest')
        if key not in known:
            section, _, name = key.partition(".")
            near = [k for k in known if k.startswith(section + ".")] or list(known)
            close = difflib.get_close_matches(key, near, 1, 0.5) or difflib.get_close_matches(key, known, 1, 0.0)
            raise ValueError(f"there is no setting --{key}; the closest is --{close[0]}")
        if not equals:
            raise ValueError(f"--{key} needs a value: --{key}={_example(config, key)}")
        if key in FOLLOWS or key in ("clip.vocab_size", "clip.eot_id"):
            owner = ".".join(FOLLOWS[key]) if key in FOLLOWS and FOLLOWS[key][0] != "clip" or key.endswith("clip_dim") else "tokenizer.vocab_size"
            raise ValueError(f"--{key} follows {owner}: set --{owner} instead")
        values[key] = parse_value(text, known[key], key)
    return changed(config, values)


def _example(config, key):
    """The present value of a setting as one would type it."""
    value = getattr(_part(config, *key.split(".")), key.split(".")[1])
    return ",".join(map(str, value)) if isinstance(value, tuple) else value


# ---------------------------------------------------------------------------------------------------------------- JSON, checkpoints

def to_dict(config):
    """Plain dicts, lists and values, ready for JSON and for a checkpoint."""
    def plain(value):
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        return list(map(plain, value)) if isinstance(value, (tuple, list)) else value
    return plain(dataclasses.asdict(config))


def from_dict(saved):
    """The inverse of `to_dict`. Raises ValueError when keys are missing, unknown, or do not fit together."""
    def build(cls, values):
        unknown = set(values) - {f.name for f in dataclasses.fields(cls)}
        if unknown:
            raise ValueError(f"unknown setting {sorted(unknown)[0]} in {cls.__name__}")
        return cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
    try:
        stages = {name: Stage(build(MODELS[name][1], saved[name]["model"]), build(TrainConfig, saved[name]["train"])) for name in MODELS}
        return Config(saved["preset"], build(DataConfig, saved["data"]), build(TokenizerConfig, saved["tokenizer"]), **stages)
    except (KeyError, TypeError) as error:
        raise ValueError(f"this is not the configuration of a run: {error}") from None


def load_model(path, device="cpu"):
    """Builds the model of a checkpoint STAGE.pt with its averaged weights, in eval mode: (model, checkpoint without the weights).

    The checkpoint's "config" is the run's (`from_dict` reads it), "tokenizer" goes to BPETokenizer.from_state_dict.
    Raises FileNotFoundError, ValueError.
    """
    checkpoint = load_checkpoint(path)
    try:
        stage, config, weights = checkpoint["stage"], from_dict(checkpoint["config"]), checkpoint.pop("ema")
        model = MODELS[stage][0](getattr(config, stage).model)
        model.load_state_dict(weights)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"{path} does not hold a model that can be sampled from: {str(error).splitlines()[0]}") from None
    return model.to(device=device, memory_format=torch.channels_last).eval(), checkpoint


# ---------------------------------------------------------------------------------------------------------------- presets
