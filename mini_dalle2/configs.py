"""Configurations: every number of a run in one object; presets, command-line overrides, and JSON there and back.

    Config = data + tokenizer + seven stages, each a Stage(model: its sizes, train: its TrainConfig)

`preset("paper")` is Table 3 of the unCLIP paper (App. C), to the digit where the paper gives one; the others are the same models, narrower.
An override `--decoder.lr=3e-4` is looked up in the stage's model, then in its training. Numbers that stages must share have one owner, and
the others follow it (`FOLLOWS`): clip.clip_dim is also the priors' and the decoder's; the decoder's image_size is what upsampler1 enlarges.

References: unCLIP Table 3 (2204.06125); CLIP §2.5 (2103.00020) for CLIP's own training. Read next: train.py.
"""

import difflib
import math
import sys
from dataclasses import asdict, dataclass, replace

import torch

from .ar_prior import ARPrior, ARPriorConfig
from .clip import CLIP, CLIPConfig
from .decoder import Decoder, DecoderConfig
from .prior import DiffusionPrior, PriorConfig
from .runtime.checks import check_choice, check_positive, check_range
from .tricks.sketch import Sketch, SketchConfig
from .upsampler import Upsampler, UpsamplerConfig


@dataclass(frozen=True)
class DataConfig:
    """What is learned from, and how much of it is held in memory."""
    source: str = "shapes"              # "shapes": drawn; otherwise a folder of captioned pictures
    images: int = 40000                 # for CLIP, prior and decoder (folder: at most)
    val_images: int = 1000              # never trained on; for the pictures after each stage (folder: at most a tenth)
    near_misses: bool = False           # CLIP is also shown captions that are almost right (near_misses.py)
    upsampler1_images: int = 4000       # large pictures are few: each gives many crops
    upsampler2_images: int = 400
    seed: int = 0                       # of the drawn pictures, and of everything random in training

    def __post_init__(self):
        if not self.source:
            raise ValueError('source is empty: it is "shapes" or a folder')
        check_positive(self, "images", "val_images", "upsampler1_images", "upsampler2_images")
        check_range(self, 0, 2 ** 63 - 2, "seed")                          # what torch takes, and one more for the second stream


@dataclass(frozen=True)
class TokenizerConfig:
    """How many ids the tokenizer may learn; few captions may yield fewer, and the models then take what came out."""
    vocab_size: int = 640

    def __post_init__(self):
        check_range(self, 514, math.inf, "vocab_size")                     # 256 bytes, as many at a word's end, start and end of text


@dataclass(frozen=True)
class TrainConfig:
    """How one stage is trained. Raises ValueError for a value that cannot work."""
    steps: int = 1000               # optimiser steps in all
    batch_size: int = 64            # examples per step
    lr: float = 3e-4                # peak learning rate
    beta1: float = 0.9              # Adam's decay of the gradient's mean (0.9 in every stage of the paper)
    beta2: float = 0.999            # Adam's decay of the squared gradient's mean
    eps: float = 1e-8               # Adam's denominator
    weight_decay: float = 0.0       # decoupled, on the matrices of linear and convolution layers only
    ema: float = 0.9999             # d of the moving average, reached after a warm-up (see EMA)
    # mini: the paper names neither warm-up, decay nor clipping; ours are CLIP's (warm-up, cosine) and the usual clipping to norm 1.
    warmup: int = 100               # steps of linear warm-up
    decay: str = "cosine"           # "cosine": to zero at the last step; "none": constant after the warm-up
    grad_clip: float = 1.0          # largest gradient norm; 0 = no clipping
    sam_rho: float = 0.0            # SAM's ρ; 0 = plain gradient (one backward pass instead of two)
    accumulate: int = 1             # parts that a batch is computed in, one after the other: less memory for the same gradient
    recompute: bool = False         # gradient checkpointing: less memory for a third more time (transformer.run_block)
    dtype: str = "fp32"             # "bf16": matrices are multiplied in bfloat16 (autocast); weights and optimiser stay in float32
    shard: bool = False             # several processes: each keeps a part of the weights only, for models too large for one GPU
    compile: bool = False           # torch.compile: the first steps take minutes, the others are faster on a GPU
    save_every: int = 500           # steps between checkpoints
    log_every: int = 20             # steps per line of metrics.jsonl

    def __post_init__(self):
        check_choice("decay", self.decay, ("cosine", "none"))
        check_choice("dtype", self.dtype, ("fp32", "bf16"))
        check_positive(self, "steps", "batch_size", "save_every", "log_every", "accumulate")
        check_range(self, 0, math.inf, "eps", "weight_decay", "warmup", "grad_clip", "sam_rho")
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")
        if self.batch_size % self.accumulate:
            raise ValueError(f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}")
        if self.sam_rho and self.accumulate > 1:
            raise ValueError("sam_rho needs the gradient of the whole batch at once: accumulate must be 1")
        if self.sam_rho and self.shard:
            raise ValueError("sam_rho needs each process's own gradient, which a sharded model does not have: shard must be false")
        for key in ("beta1", "beta2", "ema"):
            if not 0 <= getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 0 and below 1, not {getattr(self, key)}")


@dataclass(frozen=True)
class Stage:
    """One model and its training."""
    model: CLIPConfig | PriorConfig | ARPriorConfig | SketchConfig | DecoderConfig | UpsamplerConfig
    train: TrainConfig


@dataclass(frozen=True)
class Config:
    """A whole run. Raises ValueError when stages do not fit together."""
    preset: str
    data: DataConfig
    tokenizer: TokenizerConfig
    clip: Stage
    prior: Stage
    ar_prior: Stage
    sketch: Stage                       # trained if decoder.sketch
    decoder: Stage
    upsampler1: Stage
    upsampler2: Stage

    def __post_init__(self):
        if self.clip.train.shard:
            raise ValueError("clip.shard must be false: CLIP's temperature is a single number, which fully_shard cannot divide")
        if self.clip.train.accumulate > 1:
            raise ValueError("clip.accumulate must be 1: CLIP tells the pictures and captions of a whole batch apart, and parts of it would be an "
                             "easier task; clip.recompute=true saves memory too")
        for key, owner in FOLLOWS.items():
            if get(self, key) != get(self, owner):
                raise ValueError(f"{key} is {get(self, key)}, but must be equal to {owner}, which is {get(self, owner)}")


# {stage: {configuration class: model class}}, in the order of training. The paper's own come first.
MODELS = {
    "clip": {CLIPConfig: CLIP},
    "prior": {PriorConfig: DiffusionPrior},
    "ar_prior": {ARPriorConfig: ARPrior},
    "sketch": {SketchConfig: Sketch},
    "decoder": {DecoderConfig: Decoder},
    "upsampler1": {UpsamplerConfig: Upsampler},
    "upsampler2": {UpsamplerConfig: Upsampler}}
MODEL_CONFIGS = {stage: next(iter(kinds)) for stage, kinds in MODELS.items()}          # going: iterate over MODELS
STAGES = ("tokenizer", *MODELS)                                            # in the order of training
# Settings that checkpoints of before name, though their class no longer has them: the value that means "off".
OFF = {"timestep_sampling": "uniform"}
# What only an evaluation needs, and the stage that each is a variant of (training/variants.py).
VARIANTS = {"judge": "clip", "glide": "decoder", "with_sam": "clip", "without_sam": "clip",
            "without_sam_half": "clip", "without_sam_quarter": "clip"}
ON_CLIP = ("prior", "ar_prior", "sketch", "decoder")                       # these learn from the embeddings of the run's CLIP
SHARED = ("clip_dim", "vocab_size", "context_length", "eot_id")            # by all models that read captions
FOLLOWS = {f"{stage}.{key}": f"clip.{key}" for stage in ("prior", "ar_prior", "decoder") for key in SHARED}
FOLLOWS |= {"sketch.clip_dim": "clip.clip_dim", "sketch.image_size": "decoder.image_size"}
FOLLOWS |= {"decoder.sketch_width": "sketch.width", "decoder.sketch_layers": "sketch.layers"}
FOLLOWS |= {"upsampler1.low_size": "decoder.image_size", "upsampler2.low_size": "upsampler1.high_size"}
LEARNED = ("clip.vocab_size", "clip.eot_id")                               # what the tokenizer turned out to be
# How a model is taught, and drawn from if one does not say: its weights mean the same with another value.
HABITS = ("text_drop", "z_drop", "caption_drop", "z_noise", "z_noise_from", "dropout", "weighting", "vlb_weight", "timestep_sampling",
          "sampling_steps", "sampler", "eta", "guidance", "candidates", "top", "temperature")


def stages(config):
    """Those of STAGES that a run with this config trains: the sketch only if its decoder is shown one."""
    return [stage for stage in STAGES if stage != "sketch" or config.decoder.model.sketch]


def build(model):
    """A new model from its configuration: the type of the configuration says which class."""
    kinds = {config: made for kinds in MODELS.values() for config, made in kinds.items()}
    return kinds[type(model)](model)


def model_config(stage, values):
    """The configuration of a stage's model from a checkpoint's "model_config", or from the "model" of a stage in config.json.

    The first of the stage's classes that can say all of it is taken. A setting that a class does not have is left out where it is off
    (`OFF`). Raises KeyError for an unknown stage, TypeError and ValueError for values that no class of this stage takes.
    """
    for kind in MODELS[stage]:
        known = {name: value for name, value in values.items() if name in kind.__dataclass_fields__}
        if all(name in OFF and value == OFF[name] for name, value in values.items() if name not in known):
            return kind(**known)
    raise TypeError(f"a {stage} has no settings of the kind {', '.join(map(str, values))}")


def load_weights(model, state):
    """Puts a checkpoint's weights (a state dict) into a model. Raises RuntimeError when they do not fit."""
    model.load_state_dict(state)


def sizes(model):
    """A model's configuration without its habits, as a dict: what its weights are made for. What is off is left out."""
    return {name: value for name, value in asdict(model).items()
            if name not in HABITS and not (name in OFF and value == OFF[name])}


def holder(config, key):
    """Where "section.key" lives: (section, "model" | "train" | "" for a section that is no stage)."""
    section, name = key.split(".")
    part = getattr(config, section)
    return section, ("model" if hasattr(part.model, name) else "train") if isinstance(part, Stage) else ""


def get(config, key):
    """The value of "section.key"."""
    section, inner = holder(config, key)
    part = getattr(config, section)
    return getattr(getattr(part, inner) if inner else part, key.split(".")[1])


def changed(config, values):
    """The config with {"section.key": value} replaced, followers moved along, and everything checked again. Raises ValueError."""
    values = values | {key: values[owner] for key, owner in FOLLOWS.items() if owner in values}
    grouped = {}
    for key, value in values.items():
        grouped.setdefault(holder(config, key), {})[key.split(".")[1]] = value
    parts = {}
    for (section, inner), new in grouped.items():                          # all of one dataclass at once: they may only fit together
        part = parts.get(section, getattr(config, section))
        try:
            parts[section] = replace(part, **{inner: replace(getattr(part, inner), **new)}) if inner else replace(part, **new)
        except ValueError as error:
            raise ValueError(f"{section}: {error}") from None
    return replace(config, **parts)


SKETCH = TrainConfig(steps=6000, batch_size=128, lr=2e-3, ema=0.99, log_every=100)


def no_sketch(clip_dim, image_size):
    """The stage of a preset whose decoder is shown no sketch: not trained, unless --decoder.sketch=true asks for it."""
    return Stage(SketchConfig(clip_dim, image_size), SKETCH)


def micro():
    """For tests: 16 → 32 → 64, the whole chain in seconds on one core. It learns next to nothing."""
    text = dict(clip_dim=32, vocab_size=640, context_length=32, eot_id=639)
    fast = dict(steps=30, batch_size=16, lr=1e-3, warmup=5, ema=0.9, save_every=20, log_every=5)
    small = dict(model_channels=16, channel_mult=(1, 2), num_res_blocks=1, norm_groups=8, objective="v")
    return Config(
        "micro", DataConfig(images=256, near_misses=True, val_images=64, upsampler1_images=32, upsampler2_images=16), TokenizerConfig(640),
        Stage(CLIPConfig(image_size=16, patch_size=4, vision_width=32, vision_layers=2, vision_heads=2, text_width=32, text_layers=2,
                         text_heads=2, picture_weight=10.0, **text), TrainConfig(**fast)),
        Stage(PriorConfig(width=32, layers=2, heads=2, sampling_steps=8, whiten_z=True, **text), TrainConfig(**fast)),
        Stage(ARPriorConfig(width=32, layers=2, heads=2, text_width=32, text_layers=1, text_heads=2, buckets=64, place_width=8,
                            whiten_z=True, **text), TrainConfig(**fast)),
        Stage(SketchConfig(clip_dim=32, image_size=16, width=32, layers=2), TrainConfig(**fast)),
        Stage(DecoderConfig(image_size=16, attn_resolutions=(8,), head_dim=16, text_width=32, text_layers=1, text_heads=2, sketch=True, z_noise=0.5,
                            sketch_width=32, sketch_layers=2, sampling_steps=8, whiten_z=True, **small, **text), TrainConfig(**fast)),
        Stage(UpsamplerConfig(low_size=16, high_size=32, sampling_steps=4, **small), TrainConfig(**fast)),
        Stage(UpsamplerConfig(low_size=32, high_size=64, schedule="linear", degradation="bsr", sampling_steps=3, **small),
              TrainConfig(**fast)))


def tiny():
    """For a laptop, the default: 32 → 128 → 512, the whole chain in half an hour on two CPU cores."""
    text = dict(clip_dim=128, vocab_size=640, context_length=16, eot_id=639)
    # mini: the networks see patches (patch_size) and predict x_0: a narrow layer cannot pass on the noise of every pixel of a patch,
    # which predicting ε asks of it, but it can say what the picture is. After 560 steps of a decoder with patches of 4, the squared
    # error of x̂_0 at t = 500 was 0.022, against 0.059 when it predicted v. L_vlb, which belongs to the scale of ε, then weighs less
    # (at 0.001 it drowned L_simple), and pictures are drawn by DDIM with η = 1, whose variance β̃ is not learned. Two levels learn no
    # faster than one here, so that the decoder has no up and down blocks; the upsamplers have them. Nor does attention in every block:
    # with that in the middle alone a step takes 0.68 of the time, and in equal minutes shapes are right half the time, not 42 %.
    patches = dict(objective="x_start", norm_groups=8, num_res_blocks=1)
    return Config(
        "tiny", DataConfig(images=60000, near_misses=True, upsampler1_images=3000, upsampler2_images=300), TokenizerConfig(640),
        Stage(CLIPConfig(image_size=32, patch_size=8, vision_width=128, vision_layers=4, vision_heads=4, text_width=128, text_layers=2,
                         text_heads=4, picture_weight=50.0, **text),
              TrainConfig(steps=2000, batch_size=128, lr=2e-3, beta2=0.98, eps=1e-6, weight_decay=0.2, ema=0.99, warmup=50)),
        Stage(PriorConfig(width=128, layers=1, heads=4, head_layers=4, head_width=512, whiten_z=True, **text),
              TrainConfig(steps=6500, batch_size=256, lr=2e-3, beta2=0.96, eps=1e-6, weight_decay=6e-2, ema=0.99, warmup=50)),
        # mini: a low temperature: so short a training leaves some probability on wrong codes everywhere, and so many draws find it.
        Stage(ARPriorConfig(width=128, layers=1, heads=4, text_width=128, text_layers=1, text_heads=4, place_width=128, places=48,
                            temperature=0.3, whiten_z=True, **text),
              TrainConfig(steps=250, batch_size=128, lr=3e-3, beta2=0.96, eps=1e-6, weight_decay=4e-2, ema=0.99, warmup=50)),
        Stage(SketchConfig(clip_dim=128, image_size=32), SKETCH),
        # mini: every fifth picture is learned without its caption, as GLIDE learned (§4), not every second: where z_img is off, only the caption
        # says how many there are.
        Stage(DecoderConfig(image_size=32, patch_size=2, model_channels=64, channel_mult=(1,), attn_resolutions=(), head_dim=32,
                            emb_channels=256, position_embedding=True, sketch=True, z_noise=0.5, caption_drop=0.2, text_width=128,
                            text_layers=3, text_heads=4, vlb_weight=1e-5, weighting="snr_plus_1", sampler="ddim", eta=1.0,
                            sampling_steps=50, guidance=2.0, whiten_z=True,
                            **patches, **text),
              TrainConfig(steps=3100, batch_size=16, lr=2e-3, ema=0.999, warmup=100, grad_clip=0.1)),
        Stage(UpsamplerConfig(low_size=32, high_size=128, model_channels=32, channel_mult=(1, 2), patch_size=2, **patches),
              TrainConfig(steps=600, batch_size=32, lr=1e-3, ema=0.99, warmup=50)),
        Stage(UpsamplerConfig(low_size=128, high_size=512, model_channels=32, channel_mult=(1, 2), patch_size=4, schedule="linear",
                              degradation="bsr", sampling_steps=15, **patches),
              TrainConfig(steps=450, batch_size=8, lr=2e-3, ema=0.99, warmup=50)))


def small():
    """For one GPU and real captions: 64 → 256 → 1024, about an hour."""
    text = dict(clip_dim=256, vocab_size=8192, context_length=48, eot_id=8191)
    train = dict(beta2=0.99, weight_decay=1e-2, ema=0.9995, warmup=500, log_every=50, save_every=1000)
    return Config(
        "small", DataConfig(images=100000, upsampler1_images=20000, upsampler2_images=2000), TokenizerConfig(8192),
        Stage(CLIPConfig(image_size=64, patch_size=8, vision_width=384, vision_layers=8, vision_heads=6, text_width=384, text_layers=6,
                         text_heads=6, **text),
              TrainConfig(steps=10000, batch_size=1024, lr=5e-4, **train | dict(beta2=0.98, eps=1e-6, weight_decay=0.2))),
        Stage(PriorConfig(width=512, layers=10, heads=8, **text),
              TrainConfig(steps=15000, batch_size=512, lr=3e-4, **train | dict(beta2=0.96, eps=1e-6, weight_decay=6e-2))),
        Stage(ARPriorConfig(width=512, layers=10, heads=8, text_width=512, text_layers=4, text_heads=8, **text),
              TrainConfig(steps=15000, batch_size=256, lr=3e-4, **train | dict(beta2=0.96, eps=1e-6, weight_decay=4e-2))),
        no_sketch(clip_dim=256, image_size=64),
        Stage(DecoderConfig(image_size=64, model_channels=128, channel_mult=(1, 2, 3, 4), attn_resolutions=(32, 16, 8), head_dim=64,
                            text_width=512, text_layers=6, text_heads=8, dropout=0.1, weighting="min_snr", sampling_steps=100, **text),
              TrainConfig(steps=20000, batch_size=128, lr=2e-4, **train)),
        Stage(UpsamplerConfig(low_size=64, high_size=256, model_channels=96, channel_mult=(1, 2, 3), norm_groups=32),
              TrainConfig(steps=8000, batch_size=64, lr=2e-4, **train)),
        Stage(UpsamplerConfig(low_size=256, high_size=1024, model_channels=64, channel_mult=(1, 2, 3), norm_groups=32, patch_size=2,
                              objective="x_start", schedule="linear", degradation="bsr", sampling_steps=15),
              TrainConfig(steps=6000, batch_size=16, lr=2e-4, **train)))


def paper():
    """unCLIP's Table 3; CLIP from its App. C (ViT-H/16) and, as it says "as in CLIP", CLIP §2.5. For reading and for real clusters."""
    # mini: one row of tokens serves all three models here, so CLIP reads 256 of them too instead of its 77, and the vocabulary is CLIP's.
    text = dict(clip_dim=1024, vocab_size=49408, context_length=256, eot_id=49407)
    # mini: the paper is silent on warm-up, decay and clipping outside CLIP; ADM, whose training it continues, used none of them.
    plain = dict(warmup=0, decay="none", grad_clip=0.0, save_every=5000, log_every=100)
    large = dict(beta2=0.999, eps=1e-8, ema=0.9999, **plain)
    # CLIP sees 650 million pairs 32 times (App. C; CLIP §2.5), 32,768 at once: 634,766 steps. Its weights are not averaged.
    return Config(
        "paper", DataConfig(images=250_000_000, upsampler1_images=250_000_000, upsampler2_images=250_000_000), TokenizerConfig(49408),
        Stage(CLIPConfig(image_size=256, patch_size=16, vision_width=1280, vision_layers=32, vision_heads=20, text_width=1024,
                         text_layers=24, text_heads=16, **text),
              TrainConfig(steps=634_766, batch_size=32768, lr=3e-4, beta2=0.98, eps=1e-6, weight_decay=0.2, ema=0.0, sam_rho=0.1,
                          **plain | dict(warmup=2000, decay="cosine"))),
        Stage(PriorConfig(width=2048, layers=24, heads=32, sampling_steps=64, **text),
              TrainConfig(steps=600_000, batch_size=4096, lr=1.1e-4, beta2=0.96, eps=1e-6, weight_decay=6e-2, ema=0.9999, **plain)),
        # mini: a context of 384, as Table 3 has it, cannot hold 256 places of caption, two more and 319 codes one after the other; the paper
        # does not say what it does. Here they stand one after the other, as in the others, and the context is as long as it must be.
        Stage(ARPriorConfig(width=1664, layers=24, heads=26, text_width=2048, text_layers=24, text_heads=32, **text),
              TrainConfig(steps=1_000_000, batch_size=4096, lr=1.6e-4, beta2=0.91, eps=1e-10, weight_decay=4e-2, ema=0.999, **plain)),
        no_sketch(clip_dim=1024, image_size=64),
        Stage(DecoderConfig(image_size=64, model_channels=512, channel_mult=(1, 2, 3, 4), num_res_blocks=3, attn_resolutions=(32, 16, 8),
                            head_dim=64, dropout=0.1, text_width=2048, text_layers=24, text_heads=32, sampling_steps=250, guidance=1.25,
                            **text),
              TrainConfig(steps=800_000, batch_size=2048, lr=1.2e-4, **large)),
        Stage(UpsamplerConfig(low_size=64, high_size=256, model_channels=320, channel_mult=(1, 2, 3, 4), num_res_blocks=3, norm_groups=32,
                              dropout=0.1, schedule="cosine", degradation="blur", sampling_steps=27),
              TrainConfig(steps=1_000_000, batch_size=1024, lr=1.2e-4, **large)),
        Stage(UpsamplerConfig(low_size=256, high_size=1024, model_channels=192, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2,
                              norm_groups=32, schedule="linear", degradation="bsr_full", sampling_steps=15),
              TrainConfig(steps=1_000_000, batch_size=512, lr=1.0e-4, **large)))


OPENAI_MEAN, OPENAI_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)       # of CLIP's pictures


def karlo():
    """Karlo v1.0.alpha, a public unCLIP trained by others (see pretrained.py): its sizes, and where it differs from the paper.

    Its training is not published in full; what is, stands here, the rest is the paper's. It has one upsampler, so that the second is ours.
    """
    own, theirs = paper(), dict(clip_dim=768, vocab_size=49408, context_length=77, eot_id=49407)
    unet = dict(model_channels=320, channel_mult=(1, 2, 3, 4), num_res_blocks=3)
    return replace(
        own, preset="karlo",
        clip=replace(own.clip, model=CLIPConfig(
            image_size=224, patch_size=14, vision_width=1024, vision_layers=24, vision_heads=16, text_width=768, text_layers=12, text_heads=12,
            image_mean=OPENAI_MEAN, image_std=OPENAI_STD, unit_norm=False, **theirs)),
        prior=replace(own.prior, model=PriorConfig(
            width=2048, layers=20, heads=32, text_drop=0.2, std_per_dim=1.0, sampling_steps=25, sampler="ddpm", guidance=4.0, candidates=1,
            frozen_text=768, z_scale=1.0, unit_norm=False, clip_x_start=10.0, **theirs)),
        ar_prior=replace(own.ar_prior, model=replace(own.ar_prior.model, **theirs)),
        sketch=no_sketch(clip_dim=768, image_size=64),
        decoder=replace(own.decoder, model=DecoderConfig(
            image_size=64, attn_resolutions=(32, 16, 8), head_dim=64, dropout=0.1, text_width=1536, frozen_text=768, z_scale=1.0,
            learned_null=True, caption_drop=0.3, sampling_steps=50, guidance=8.0, **unet, **theirs)),
        upsampler1=replace(own.upsampler1, model=UpsamplerConfig(
            low_size=64, high_size=256, norm_groups=32, use_adagn=False, sampler="ddpm", sampling_steps=7, last_unet=True, **unet)))


PRESETS = {"micro": micro, "tiny": tiny, "small": small, "karlo": karlo, "paper": paper}


def preset(name):
    """The Config of a preset: "micro", "tiny", "small", "karlo" or "paper". Raises ValueError for another name, naming the closest."""
    if name not in PRESETS:
        closest = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0)[0]
        raise ValueError(f'there is no preset "{name}" (there are {", ".join(PRESETS)}); the closest is {closest}')
    return PRESETS[name]()


PAPER = {"clip": "0.63 + 0.35 billion (ViT-H/16; not given, computed)", "prior": "1 billion", "ar_prior": "1 billion (1.1 without its text encoder)",
         "sketch": "none", "decoder": "3.5 billion", "upsampler1": "0.7 billion", "upsampler2": "0.3 billion"}           # App. C, Table 3
NOT_KARLOS = "; Karlo has none, this is ours"


def parameters(model):
    """How many numbers a model has learned; a decoder's sketch, which is a stage of its own, is not counted again."""
    return sum(p.numel() for name, p in model.named_parameters() if not name.startswith("sketch."))


def counts(config):
    """{stage: number of parameters}, without the memory that they would take."""
    with torch.device("meta"):
        return {stage: parameters(build(getattr(config, stage).model)) for stage in stages(config)[1:]}


def main():
    """python -m mini_dalle2.configs [PRESET]: the parameters of each model, beside the paper's."""
    name = sys.argv[1] if len(sys.argv) > 1 else "paper"
    try:
        found = counts(preset(name))
    except ValueError as error:
        print(f"configs: {error}", file=sys.stderr)
        return 2
    print(f"{name:<12}{'parameters':>16}   the paper's")
    for stage, count in found.items():
        print(f"{stage:<12}{count:>16,}   {PAPER[stage]}{NOT_KARLOS * (name == 'karlo' and stage in ('ar_prior', 'upsampler2'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
