"""Settings of a run that belong to no model: its data, its tokenizer, its training.

A setting has a name "section.key", such as "decoder.lr". A section is data, tokenizer or a stage;
a stage has the settings of its model and of its training. ../configs.py puts all of them together.

Read next: ../configs.py.
"""

import math
from dataclasses import dataclass

from .checks import check_choice, check_positive, check_range


@dataclass(frozen=True)
class DataConfig:
    """What is learned from, and how much of it is held in memory.

    source is "shapes", drawn here, or a folder of captioned pictures. images are for CLIP, priors
    and decoder. val_images are never trained on. A folder gives at most these numbers, and at most
    a tenth of its pictures as val_images. near_misses: CLIP is also shown captions that are almost
    right. Large pictures are few, because each gives many crops. seed is that of the drawn
    pictures, and of everything random in training. outside: read also what links and metadata files
    of a folder name outside the folder.
    """

    source: str = "shapes"
    images: int = 40000
    val_images: int = 1000
    near_misses: bool = False
    upsampler1_images: int = 4000
    upsampler2_images: int = 400
    seed: int = 0
    outside: bool = False

    def __post_init__(self):
        if not self.source:
            raise ValueError('source is empty: it is "shapes" or a folder')
        check_positive(self, "images", "val_images", "upsampler1_images", "upsampler2_images")
        # What torch takes, less one for the second random stream.
        check_range(self, 0, 2 ** 63 - 2, "seed")


@dataclass(frozen=True)
class TokenizerConfig:
    """How many ids the tokenizer may learn. Few captions may yield fewer; models follow that."""

    vocab_size: int = 640

    def __post_init__(self):
        # 256 bytes, as many at a word's end, start and end of text.
        check_range(self, 514, math.inf, "vocab_size")


@dataclass(frozen=True)
class TrainConfig:
    """How one stage is trained. Raises ValueError for a value that cannot work.

    steps: optimiser steps in all. batch_size: examples per step. lr: the peak learning rate.
    beta1, beta2, eps: Adam's (beta1 is 0.9 in every stage of the paper). weight_decay: decoupled,
    on the matrices of linear and convolution layers only. ema: decay of the EMA weights.
    warmup: steps of linear warm-up. decay: "cosine" to zero at the last step, or "none".
    grad_clip: the largest gradient norm; 0: no clipping. sam_rho: SAM's ρ; 0: plain gradients.
    accumulate: parts that a batch is computed in, for less memory. recompute: gradient
    checkpointing (transformer.run_block). dtype "bf16": matrices are multiplied in bfloat16.
    shard: each of several processes keeps a part of the weights. compile: torch.compile.
    save_every, log_every: steps between checkpoints, and between lines of metrics.jsonl.
    """

    steps: int = 1000
    batch_size: int = 64
    lr: float = 3e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    ema: float = 0.9999
    # mini: the paper names neither warm-up, decay nor clipping. Ours are CLIP's warm-up and cosine,
    # and the usual clipping to norm 1.
    warmup: int = 100
    decay: str = "cosine"
    grad_clip: float = 1.0
    sam_rho: float = 0.0
    accumulate: int = 1
    recompute: bool = False
    dtype: str = "fp32"
    shard: bool = False
    compile: bool = False
    save_every: int = 500
    log_every: int = 20

    def __post_init__(self):
        check_choice("decay", self.decay, ("cosine", "none"))
        check_choice("dtype", self.dtype, ("fp32", "bf16"))
        check_positive(self, "steps", "batch_size", "save_every", "log_every", "accumulate")
        check_range(self, 0, math.inf, "eps", "weight_decay", "warmup", "grad_clip", "sam_rho")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by "
                             f"accumulate {self.accumulate}")
        if self.sam_rho and self.accumulate > 1:
            raise ValueError("sam_rho needs the gradient of the whole batch at once: "
                             "accumulate must be 1")
        if self.sam_rho and self.shard:
            raise ValueError("sam_rho needs each process's own gradient, which a sharded model "
                             "does not have: shard must be false")
        for key in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 0 and below 1, not {getattr(self, key)}")


@dataclass(frozen=True)
class Stage:
    """One model and its training. The type of `model` says which class it is for."""

    model: object
    train: TrainConfig


def holder(config, key):
    """Find "section.key": (section, "model" | "train" | "" for a section that is no stage)."""
    section, name = key.split(".")
    part = getattr(config, section)
    if not isinstance(part, Stage):
        return section, ""
    return section, "model" if hasattr(part.model, name) else "train"


def get(config, key):
    """Return the value of "section.key". Raises AttributeError if the section has no such key."""
    section, inner = holder(config, key)
    part = getattr(config, section)
    return getattr(getattr(part, inner) if inner else part, key.split(".")[1])


def has(config, key):
    """Return whether there is a "section.key"; not every class of a stage has every setting."""
    try:
        get(config, key)
        return True
    except AttributeError:
        return False
