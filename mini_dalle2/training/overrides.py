"""Settings from the command line, and configurations as JSON and back.

    --decoder.lr=3e-4     is looked up in the stage's model, then in its TrainConfig

Every setting is checked for name, type and value before anything runs.
Read next: ../configs.py for the numbers, guards.py for the other checks.
"""

import difflib
import math
import types
import typing
from dataclasses import asdict, fields

from ..configs import (
    Config, DataConfig, FOLLOWS, LEARNED, MODELS, SKETCH, Stage, TokenizerConfig, TrainConfig,
    changed, get, model_config)
from ..runtime.checks import brief, check_bounds, check_types, fits

WANTED = {bool: "true or false", int: "a whole number", float: "a finite number"}


# ---------------------------------------------------------------------------- from the command line

def kinds(config):
    """Every setting with its type: {"section.key": type}, in order."""
    found = {}
    # The first field is the name of the preset.
    for section in fields(config)[1:]:
        part = getattr(config, section.name)
        for inner in (part.model, part.train) if isinstance(part, Stage) else (part,):
            for name, kind in typing.get_type_hints(type(inner)).items():
                found[f"{section.name}.{name}"] = kind
    return found


def parse_value(text, kind, key):
    """The value of a setting, of type `kind`.

    kind: int, float, bool, str, tuple[int, ...] ("1,2,4"), or X | None ("none").
    Raises ValueError that names `key`.
    """
    if isinstance(kind, types.UnionType):
        if text.lower() == "none":
            return None
        kind = typing.get_args(kind)[0]
    if kind is str:
        return text
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        words = [word.strip() for word in text.strip("()[] ").split(",")]
        return tuple(parse_value(word, item, key) for word in words if word)
    try:
        value = {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
    except (ValueError, KeyError):
        raise ValueError(f'--{key} takes {WANTED[kind]}, not "{text[:40]}"') from None
    return value


def override(config, arguments):
    """The config with settings such as "--decoder.lr=3e-4" applied.

    Raises ValueError for an unknown setting (naming the closest), a wrong type, or a value that
    cannot work.
    """
    known = kinds(config)
    values = {}
    for argument in arguments:
        key, equals, text = argument.removeprefix("--").partition("=")
        if not argument.startswith("--"):
            raise ValueError(f'"{argument}" is not understood: settings look like '
                             f'--decoder.lr=3e-4, and --help shows the rest')
        if key not in known:
            raise ValueError(f"there is no setting --{key}; the closest is --{closest(key, known)}")
        if not equals:
            raise ValueError(f"--{key} needs a value, as in --{key}={as_text(get(config, key))}")
        owner = owner_of(key)
        if owner != key:
            raise ValueError(f"--{key} is not set by itself: it follows --{owner}")
        values[key] = parse_value(text, known[key], key)
    return changed(config, values)


def closest(key, known):
    """The known setting nearest to an unknown one, of the same section if there is that section."""
    same_section = [name for name in known if name.split(".")[0] == key.split(".")[0]]
    return difflib.get_close_matches(key, same_section or known, n=1, cutoff=0)[0]


def owner_of(key):
    """The setting that decides a setting: most decide themselves."""
    owner = FOLLOWS.get(key, key)
    return "tokenizer.vocab_size" if owner in LEARNED else owner


def as_text(value):
    """A value as a person types it after "="."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


# ---------------------------------------------------------------------------- JSON

def to_dict(config):
    """A configuration as plain dicts and values, for config.json and checkpoints."""
    return asdict(config)


def from_dict(saved):
    """The inverse of `to_dict`, also after JSON, which turns tuples into lists.

    Raises ValueError for anything that is not a configuration.
    """
    try:
        # Runs from before there were sketches do not name one.
        if "sketch" not in saved:
            clip_dim = saved["clip"]["model"]["clip_dim"]
            image_size = saved["decoder"]["model"]["image_size"]
            model = {"clip_dim": clip_dim, "image_size": image_size}
            saved = saved | {"sketch": {"model": model, "train": asdict(SKETCH)}}
        for name in saved.keys() - {section.name for section in fields(Config)}:
            raise KeyError(brief(name))
        data = checked(DataConfig, saved["data"])
        tokenizer = checked(TokenizerConfig, saved["tokenizer"])
        stages = {name: saved_stage(name, saved[name]) for name in MODELS}
        if not fits(saved["preset"], str):
            raise TypeError(f"preset is {brief(saved['preset'])}")
        return Config(saved["preset"], data, tokenizer, **stages)
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"this is not the configuration of a run: {error}") from None


def saved_stage(name, saved):
    """The Stage in {"model": values, "train": values}. The values say which class the model is."""
    return Stage(model_config(name, saved["model"]), checked(TrainConfig, saved["train"]))


def checked(kind, values):
    """kind(**values), a dataclass. Raises TypeError for a value of another type than its field.

    Raises ValueError for a number that no machine could work with.
    """
    check_types(kind, values)
    check_bounds(values)
    return kind(**values)
