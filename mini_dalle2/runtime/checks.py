"""Checks of configuration values and of tensors. Each fails with one plain sentence.

A configuration is checked where it is made, in its `__post_init__`. So
`python train.py --decoder.objective=foo` stops at once, and not after hours, when the decoder's
turn comes. A check that only one configuration needs stands in its own file.

Read next: ../diffusion.py.
"""

import math
import types
import typing

import torch

# The most that a whole number may be, by the end of its setting's name. The first end that fits
# counts. The preset paper stays far below.
MOST = {"layers": 500, "res_blocks": 50, "num_timesteps": 10 ** 6, "steps": 10 ** 9,
        "every": 10 ** 9, "warmup": 10 ** 9, "images": 10 ** 9, "seed": 2 ** 63 - 2, "": 10 ** 6}
LONGEST_TUPLE = 16
# As long as a path may be.
LONGEST_TEXT = 4096


def brief(value):
    """Write a value from a file for a message: a number, a short text, or else only its type.

    Values from a file may hold themselves, or fill the memory when they are written out.
    """
    if isinstance(value, (bool, int, float, type(None))) and abs(value or 0) < 10 ** 20:
        return repr(value)
    if isinstance(value, str):
        return repr(value if len(value) <= 40 else value[:40] + "…")
    return f"a value of the type {type(value).__name__}"


def fits(value, kind):
    """Whether a value is of the type that a field has. A whole number is also a float.

    kind: int, float, bool, str, tuple[int, ...], or X | None.
    """
    if isinstance(kind, types.UnionType):
        return any(fits(value, one) for one in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return (isinstance(value, tuple) and len(value) <= LONGEST_TUPLE
                and all(fits(one, item) for one in value))
    # In Python a bool is an int: here it is not.
    if isinstance(value, bool):
        return kind is bool
    if isinstance(value, str) and len(value) > LONGEST_TEXT:
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def check_types(kind, values):
    """Raise TypeError unless values from a file, {field: value}, have the types of a dataclass.

    Call it before the dataclass is made, whose own checks compare numbers.
    """
    hints = typing.get_type_hints(kind)
    for key, value in values.items():
        if key not in hints:
            raise TypeError(f"there is no setting {brief(key)}")
        if not fits(value, hints[key]):
            raise TypeError(f"{key} is {brief(value)}")


def check_bounds(values):
    """Raise ValueError for a number in {setting: value} that no machine could work with."""
    for key, value in values.items():
        if isinstance(value, tuple) and len(value) > LONGEST_TUPLE:
            raise ValueError(f"{key} has {len(value)} numbers, and at most {LONGEST_TUPLE} are "
                             f"taken")
        most = next(most for end, most in MOST.items() if key.endswith(end))
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, int) and not -most <= number <= most:
                raise ValueError(f"{key} must be at most {most}, not {brief(number)}")
            if isinstance(number, float) and not math.isfinite(number):
                raise ValueError(f"{key} must be a finite number, not {number}")


def check_choice(name, value, choices):
    """Raise ValueError unless `value` is one of the words `choices`; `name` says what it is for."""
    if value not in choices:
        raise ValueError(f"unknown {name} {brief(value)}: it is one of {', '.join(choices)}")


def numbers_in(cfg, keys):
    """Yield (key, number) for each number in these fields. A tuple has several, None has none."""
    for key in keys:
        value = getattr(cfg, key)
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None:
                yield key, item


def check_range(cfg, low, high, *keys):
    """Raise ValueError unless every number in these fields lies in [low, high]. None passes."""
    for key, item in numbers_in(cfg, keys):
        # A float that is no number (NaN) fails this comparison too.
        if not low <= item <= high:
            wanted = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{key} must be {wanted}, not {item}")


def check_positive(cfg, *keys):
    """Raise ValueError unless every whole number in these fields is at least 1. None passes."""
    check_range(cfg, 1, math.inf, *keys)


def check_above_zero(cfg, *keys):
    """Raise ValueError unless every number in these fields is above 0. None passes."""
    for key, item in numbers_in(cfg, keys):
        if not item > 0:
            raise ValueError(f"{key} must be above 0, not {item}")


def check_captions(cfg):
    """Raise ValueError unless a caption model's vocab_size, context_length and eot_id can work."""
    # Start and end of text are always there.
    check_range(cfg, 2, math.inf, "vocab_size", "context_length")
    check_range(cfg, 0, cfg.vocab_size - 1, "eot_id")


def check_divisible(cfg, key, divisor):
    """Raise ValueError unless the field `key` is a whole multiple of the field `divisor`."""
    if getattr(cfg, key) % getattr(cfg, divisor):
        raise ValueError(f"{key} {getattr(cfg, key)} is not divisible by "
                         f"{divisor} {getattr(cfg, divisor)}")


def check_images(images, side, most=1.25):
    """Raise ValueError unless a tensor holds pictures: float (B, 3, side, side) in [-1, 1].

    most: the greatest value without its sign. Resizing may go a little beyond 1.
    """
    if not isinstance(images, torch.Tensor):
        raise ValueError(f"images are a {type(images).__name__}: give a tensor "
                         f"(B, 3, {side}, {side}), pixel / 127.5 - 1")
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
        raise ValueError(f"images have shape {tuple(images.shape)}: this model takes "
                         f"(B, 3, {side}, {side})")
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}: give floats in [-1, 1], pixel / 127.5 - 1")
    # A tensor on the device "meta" has shapes and no values.
    if images.numel() == 0 or images.is_meta:
        return
    largest = images.abs().max().item()
    # NaN fails this comparison too.
    if not largest <= most:
        raise ValueError(f"images have values up to {largest:.4g}: give floats in [-1, 1], "
                         "pixel / 127.5 - 1")
