"""Checks of configuration values and of tensors. Each fails with one plain sentence.

A configuration is checked where it is made, in its `__post_init__`. So
`python train.py --decoder.objective=foo` stops at once, and not after hours, when the decoder's
turn comes. A check that only one configuration needs stands in its own file.

Read next: ../diffusion.py.
"""

import math

import torch


def check_choice(name, value, choices):
    """Raise ValueError unless `value` is one of the words `choices`; `name` says what it is for."""
    if value not in choices:
        raise ValueError(f"unknown {name} '{value}': it is one of {', '.join(choices)}")


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
