"""What a configuration's values must be: the checks that the models' configurations share, each
failing with one plain sentence.

A configuration is checked where it is made, in its `__post_init__`: `python train.py
--decoder.objective=foo` stops at once, and not in the third hour, when the decoder's turn comes.
What only one configuration asks for stands there; what several do stands here.
"""

import math


def check_choice(name, value, choices):
    """Raises ValueError unless `value` is one of the words `choices`; `name` says of what."""
    if value not in choices:
        raise ValueError(f"unknown {name} '{value}': it is one of {', '.join(choices)}")


def given(cfg, keys):
    """(key, number) for each number in these fields; a tuple holds several, None, for "not given",
    none."""
    for key in keys:
        value = getattr(cfg, key)
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None:
                yield key, item


def check_range(cfg, low, high, *keys):
    """Raises ValueError unless each of these fields (each item, if it is a tuple) lies in [low,
    high]; None, for "not given", passes."""
    for key, item in given(cfg, keys):
        if not low <= item <= high:                                        # also false for a float that is no number
            wanted = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{key} must be {wanted}, not {item}")


def check_positive(cfg, *keys):
    """Raises ValueError unless each of these whole numbers (each item, if it is a tuple) is at
    least 1."""
    check_range(cfg, 1, math.inf, *keys)


def check_above_zero(cfg, *keys):
    """Raises ValueError unless each of these numbers (each item, if it is a tuple) is above 0;
    None passes."""
    for key, item in given(cfg, keys):
        if not item > 0:
            raise ValueError(f"{key} must be above 0, not {item}")


def check_captions(cfg):
    """Raises ValueError unless `vocab_size`, `context_length` and `eot_id` of a model that reads
    captions can work."""
    check_range(cfg, 2, math.inf, "vocab_size", "context_length")          # start and end of text are always there
    check_range(cfg, 0, cfg.vocab_size - 1, "eot_id")


def check_divisible(cfg, key, divisor):
    """Raises ValueError unless the field `key` is a whole multiple of the field `divisor`."""
    if getattr(cfg, key) % getattr(cfg, divisor):
        raise ValueError(f"{key} {getattr(cfg, key)} is not divisible by {divisor} {getattr(cfg, divisor)}")
