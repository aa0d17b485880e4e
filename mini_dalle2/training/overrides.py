"""Settings from the command line, and configurations as JSON and back.

Read next: run.py.
"""

import difflib
import math
import types
import typing
from dataclasses import asdict, fields

from ..configs import (
    Config, DataConfig, FOLLOWS, LEARNED, MODELS, Stage, TokenizerConfig, TrainConfig, changed,
    get, model_config, no_sketch)


def kinds(config):
    """Everything that can be set: {"section.key": type}, in order."""
    found = {}
    for section in fields(config)[1:]:
        part = getattr(config, section.name)
        for inner in (part.model, part.train) if isinstance(part, Stage) else (part,):
            found |= {f"{section.name}.{name}": kind for name, kind in typing.get_type_hints(type(inner)).items()}
    return found


def parse_value(text, kind, key):
    """Text -> value of type `kind`: int, float, bool, str, tuple[int, ...] ("1,2,4"), X | None ("none"). Raises ValueError naming `key`."""
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = typing.get_args(kind)[0]
    if kind is str:
        return text
    if typing.get_origin(kind) is tuple:
        return tuple(parse_value(item.strip(), typing.get_args(kind)[0], key) for item in text.strip("()[] ").split(",") if item.strip())
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        if not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        wanted = {bool: "true or false", int: "a whole number", float: "a finite number"}[kind]
        raise ValueError(f'--{key} takes {wanted}, not "{text[:40]}"') from None


def override(config, arguments):
    """Applies ["--decoder.lr=3e-4", ...]; returns the new config.

    Raises ValueError for an argument of another form, an unknown key (naming the closest), a wrong type, a value that cannot work.
    """
    known, values = kinds(config), {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise ValueError(f'"{argument}" is not understood: settings look like --decoder.lr=3e-4, and --help shows the rest')
        if key not in known:
            same_section = [k for k in known if k.split(".")[0] == key.split(".")[0]]
            closest = difflib.get_close_matches(key, same_section or known, n=1, cutoff=0)[0]
            raise ValueError(f"there is no setting --{key}; the closest is --{closest}")
        if not equals:
            raise ValueError(f"--{key} needs a value, as in --{key}={as_text(get(config, key))}")
        owner = FOLLOWS.get(key, key)
        if owner in LEARNED or owner != key:
            owner = "tokenizer.vocab_size" if owner in LEARNED else owner
            raise ValueError(f"--{key} is not set by itself: it follows --{owner}")
        values[key] = parse_value(text, known[key], key)
    return changed(config, values)


def as_text(value):
    """A value as one would type it after "="."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def to_dict(config):
    """Plain dicts and values, for config.json and checkpoints."""
    return asdict(config)


def fits(value, kind):
    """Whether a value is of a type that `parse_value` can make; a whole number is also a float."""
    if isinstance(kind, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(item, typing.get_args(kind)[0]) for item in value)
    return isinstance(value, (int, float) if kind is float else kind) and (kind is bool or not isinstance(value, bool))


def from_dict(saved):
    """The inverse of `to_dict`, after JSON too (which turns tuples into lists). Raises ValueError for anything else."""
    def checked(make, values):
        values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        part = make(values)
        for key, kind in typing.get_type_hints(type(part)).items():
            if key in values and not fits(values[key], kind):
                raise TypeError(f"{key} is {values[key]!r:.40}")
        return part

    def build(cls, values):
        return checked(lambda values: cls(**values), values)

    def build_model(stage, values):
        return checked(lambda values: model_config(stage, values), values)
    try:
        if "sketch" not in saved:                                          # runs from before there were any
            saved = saved | {"sketch": asdict(no_sketch(saved["clip"]["model"]["clip_dim"], saved["decoder"]["model"]["image_size"]))}
        parts = {name: Stage(build_model(name, saved[name]["model"]), build(TrainConfig, saved[name]["train"]))
                 for name in MODELS}
        return Config(saved["preset"], build(DataConfig, saved["data"]), build(TokenizerConfig, saved["tokenizer"]), **parts)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"this is not the configuration of a run: {error}") from None
