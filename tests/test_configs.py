"""Configurations: the paper's numbers, overrides and their errors, JSON there and back."""

import dataclasses
import json

import pytest
import torch

from mini_dalle2 import configs
from mini_dalle2.clip import CLIP
from mini_dalle2.configs import FOLLOWS, MODELS, PRESETS, changed, get, preset
from mini_dalle2.training.overrides import from_dict, kinds, override, to_dict
from mini_dalle2.decoder import Decoder, DecoderConfig
from mini_dalle2.diffusion import GaussianDiffusion, OBJECTIVES, WEIGHTINGS
from mini_dalle2.ar_prior import ARPrior
from mini_dalle2.prior import DiffusionPrior, PriorConfig
from mini_dalle2.tricks.sketch import Sketch
from mini_dalle2.configs import TrainConfig
from mini_dalle2.upsampler import Upsampler
from mini_dalle2.training import overrides

CLASSES = {"clip": CLIP, "prior": DiffusionPrior, "ar_prior": ARPrior, "sketch": Sketch, "decoder": Decoder, "upsampler1": Upsampler, "upsampler2": Upsampler}


@pytest.fixture(scope="module")
def tiny():
    return preset("tiny")


def failure(config, *arguments):
    """The message of an override that must fail: one line."""
    with pytest.raises(ValueError) as error:
        override(config, list(arguments))
    assert "\n" not in str(error.value)
    return str(error.value)


# ---------------------------------------------------------------------------------------------------------------- presets

def test_paper_is_table_3():
    """unCLIP Table 3, row by row (App. C); the AR prior's column is below."""
    c = preset("paper")
    columns = (c.prior, c.decoder, c.upsampler1, c.upsampler2)
    models, trains = [stage.model for stage in columns], [stage.train for stage in columns]
    assert [m.num_timesteps for m in models] == [1000] * 4
    assert [m.schedule for m in models] == ["cosine", "cosine", "cosine", "linear"]
    assert [m.sampling_steps for m in models] == [64, 250, 27, 15]
    assert [m.crop_fraction for m in models[2:]] == [0.25, 0.25]
    assert [m.model_channels for m in models[1:]] == [512, 320, 192]
    assert [m.num_res_blocks for m in models[1:]] == [3, 3, 2]
    assert [m.channel_mult for m in models[1:]] == [(1, 2, 3, 4), (1, 2, 3, 4), (1, 1, 2, 2, 4, 4)]
    assert (models[1].head_dim, models[1].attn_resolutions) == (64, (32, 16, 8))
    assert [(m.context_length, m.width, m.layers, m.heads) for m in models[:1]] == [(256, 2048, 24, 32)]
    assert [(m.context_length, m.text_width, m.text_layers, m.text_heads) for m in models[1:2]] == [(256, 2048, 24, 32)]
    assert [m.dropout for m in models[1:]] == [0.1, 0.1, 0.0]
    assert [t.weight_decay for t in trains] == [6.0e-2, 0, 0, 0]
    assert [t.batch_size for t in trains] == [4096, 2048, 1024, 512]
    assert [t.steps for t in trains] == [600_000, 800_000, 1_000_000, 1_000_000]
    assert [t.lr for t in trains] == [1.1e-4, 1.2e-4, 1.2e-4, 1.0e-4]
    assert [t.beta1 for t in trains] == [0.9] * 4 and [t.beta2 for t in trains] == [0.96, 0.999, 0.999, 0.999]
    assert [t.eps for t in trains] == [1e-6, 1e-8, 1e-8, 1e-8]
    assert [t.ema for t in trains] == [0.9999] * 4
    assert (models[2].degradation, models[3].degradation) == ("blur", "bsr_full")
    assert (models[1].z_drop, models[1].caption_drop, models[0].text_drop, models[0].candidates) == (0.1, 0.5, 0.1, 2)
    assert (models[1].image_size, models[2].high_size, models[3].high_size) == (64, 256, 1024)


def test_paper_is_table_3_for_the_autoregressive_prior_too():
    m, t = preset("paper").ar_prior.model, preset("paper").ar_prior.train
    assert (m.text_width, m.text_layers, m.text_heads, m.context_length) == (2048, 24, 32, 256)
    assert (m.width, m.layers, m.heads, m.buckets, m.pca_error, m.top, m.text_drop) == (1664, 24, 26, 1024, 0.01, 0.5, 0.1)
    assert (t.steps, t.batch_size, t.lr, t.beta1, t.beta2, t.eps) == (1_000_000, 4096, 1.6e-4, 0.9, 0.91, 1e-10)
    assert (t.weight_decay, t.ema) == (4.0e-2, 0.999)
    assert preset("paper").prior.model.sampler == "analytic"


def test_paper_clip():
    """ViT-H/16 and a text transformer of 24 × 1024 (App. C), trained as in CLIP §2.5, with SAM."""
    m, t = preset("paper").clip.model, preset("paper").clip.train
    assert (m.image_size, m.patch_size, m.vision_width, m.vision_layers, m.text_width, m.text_layers) == (256, 16, 1280, 32, 1024, 24)
    assert (m.vision_width // m.vision_heads, m.text_width // m.text_heads, m.clip_dim) == (64, 64, 1024)
    assert (t.batch_size, t.lr, t.sam_rho, t.warmup, t.weight_decay, t.beta2, t.eps) == (32768, 3e-4, 0.1, 2000, 0.2, 0.98, 1e-6)
    assert t.steps == pytest.approx(32 * 650e6 / 32768, rel=1e-5)


@pytest.mark.parametrize("stage, millions", [("clip", 632 + 354), ("prior", 1327), ("decoder", 3565),
                                             ("upsampler1", 730), ("upsampler2", 282)])
def test_paper_parameter_counts(stage, millions):
    """On the meta device, that is, without memory; the figures follow from Table 3's sizes by hand."""
    with torch.device("meta"):
        model = CLASSES[stage](getattr(preset("paper"), stage).model)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, rel=2e-3)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_can_be_built(name):
    config = preset(name)
    with torch.device("meta"):
        for stage, cls in CLASSES.items():
            cls(getattr(config, stage).model)
    assert config.preset == name


def test_sizes_of_the_cascades():
    sizes = {name: (c.decoder.model.image_size, c.upsampler1.model.high_size, c.upsampler2.model.high_size)
             for name in PRESETS for c in [preset(name)]}
    assert sizes == {"micro": (16, 32, 64), "tiny": (32, 128, 512), "small": (64, 256, 1024), "karlo": (64, 256, 1024),
                     "paper": (64, 256, 1024)}


def test_unknown_preset_names_the_closest():
    with pytest.raises(ValueError, match="closest is tiny"):
        preset("tinny")


# ---------------------------------------------------------------------------------------------------------------- overrides

def test_override_finds_model_and_training(tiny):
    c = override(tiny, ["--decoder.lr=3e-4", "--decoder.channel_mult=1,2,4", "--decoder.position_embedding=true", "--prior.steps=7",
                        "--decoder.objective=v", "--data.images=12", "--upsampler2.degradation=bsr_full", "--clip.sam_rho=0.1"])
    assert c.decoder.train.lr == 3e-4 and c.decoder.model.channel_mult == (1, 2, 4) and c.decoder.model.position_embedding is True
    assert c.prior.train.steps == 7 and c.decoder.model.objective == "v" and c.data.images == 12 and c.clip.train.sam_rho == 0.1
    assert c.upsampler2.model.degradation == "bsr_full"
    assert tiny == preset("tiny")                                          # the original is untouched
    assert override(preset("micro"), ["--decoder.attn_resolutions="]).decoder.model.attn_resolutions == ()
    assert override(tiny, []) == tiny


def test_values_by_type():
    assert overrides.parse_value("None", int | None, "a.b") is None and overrides.parse_value("3", int | None, "a.b") == 3
    assert overrides.parse_value("(1, 2)", tuple[int, ...], "a.b") == (1, 2)
    assert overrides.parse_value("a=b", str, "a.b") == "a=b"
    for text, kind in (("1.5", int), ("x", float), ("nan", float), ("inf", float), ("maybe", bool), ("1,x", tuple[int, ...]), ("", int)):
        with pytest.raises(ValueError, match="--a.b takes"):
            overrides.parse_value(text, kind, "a.b")


@pytest.mark.parametrize("argument, said", [
    ("--decoder.lrr=1", "closest is --decoder.lr"), ("--decodr.batch_size=1", "closest is --decoder.batch_size"),
    ("--clip.vison_width=1", "closest is --clip.vision_width"), ("--nonsense=1", "there is no setting --nonsense"),
    ("--lr=1e-3", "there is no setting --lr"),
    ("--decoder.lr", "needs a value, as in --decoder.lr="), ("decoder.lr=1", "is not understood"), ("3e-4", "is not understood"),
    ("--decoder.lr=fast", 'takes a finite number, not "fast"'), ("--decoder.steps=1e3", "takes a whole number"),
    ("--decoder.position_embedding=maybe", "takes true or false"), ("--decoder.channel_mult=1,b", "takes a whole number"),
    ("--prior.clip_dim=64", "follows --clip.clip_dim"), ("--decoder.eot_id=3", "follows --tokenizer.vocab_size"),
    ("--clip.vocab_size=3", "follows --tokenizer.vocab_size"), ("--upsampler2.low_size=64", "follows --upsampler1.high_size"),
    ("--decoder.ema=1.0", "decoder: ema must be at least 0 and below 1"), ("--data.images=0", "data: images must be at least 1"),
    ("--upsampler1.high_size=100", "upsampler1: high_size 100 is not a whole multiple")])
def test_override_errors(tiny, argument, said):
    assert said in failure(tiny, argument)


@pytest.mark.parametrize("argument, said", [
    ("clip.image_size=18", "image_size 18 is not divisible by patch_size 4"),
    ("clip.vision_heads=7", "vision_width 32 is not divisible by"),
    ("clip.text_heads=3", "text_width 32 is not divisible by text_heads 3"),
    ("clip.text_layers=0", "text_layers must be at least 1, not 0"),
    ("clip.context_length=1", "context_length must be at least 2, not 1"), ("clip.clip_dim=-4", "clip_dim must be at least 1, not -4"),
    ("prior.heads=3", "width 32 is not divisible by heads 3"), ("prior.width=33", "width 33 is not divisible by heads 2"),
    ("prior.schedule=sigmoid", "unknown schedule 'sigmoid': it is one of cosine, linear"),
    ("prior.candidates=0", "candidates must be at least 1"), ("prior.num_timesteps=0", "num_timesteps must be at least 1"),
    ("prior.sampling_steps=0", "sampling_steps must be from 1 to 1000, not 0"),
    ("prior.text_drop=1.5", "text_drop must be from 0 to 1, not 1.5"), ("prior.std_per_dim=0", "std_per_dim must be above 0"),
    ("prior.guidance=-1", "guidance must be at least 0"),
    ("decoder.objective=foo", "unknown objective 'foo': it is one of eps, x_start, v"),
    ("decoder.weighting=foo", "unknown weighting 'foo'"), ("decoder.schedule=foo", "unknown schedule 'foo'"),
    ("decoder.sampler=euler", "unknown sampler 'euler': it is one of ddpm, ddim"),
    ("decoder.sampling_steps=1001", "sampling_steps must be from 1 to 1000, not 1001"),
    ("decoder.z_drop=-0.1", "z_drop must be from 0 to 1"), ("decoder.caption_drop=2", "caption_drop must be from 0 to 1"),
    ("decoder.eta=-1", "eta must be at least 0"), ("decoder.vlb_weight=-1", "vlb_weight must be at least 0"),
    ("decoder.text_heads=5", "text_width 32 is not divisible by text_heads 5"),
    ("decoder.norm_groups=3", "not divisible by norm_groups 3"), ("decoder.head_dim=5", "not divisible by head_dim 5"),
    ("decoder.model_channels=0", "model_channels must be at least 1"), ("decoder.channel_mult=", "channel_mult is empty"),
    ("decoder.channel_mult=1,0", "channel_mult must be at least 1, not 0"),
    ("decoder.attn_resolutions=8,5", "levels have the sides [16, 8]"),
    ("decoder.patch_size=3", "patch_size · 2^(levels − 1) = 6 must divide them"),
    ("decoder.patch_size=0", "patch_size must be at least 1"), ("decoder.dropout=1.1", "dropout must be from 0 to 1"),
    ("decoder.emb_channels=0", "emb_channels must be at least 1"), ("upsampler1.objective=foo", "unknown objective 'foo'"),
    ("upsampler2.degradation=fog", "it is one of blur, bsr, bsr_full"),
    ("upsampler1.crop_fraction=0", "crop_fraction must be above 0 and at most 1"),
    ("upsampler1.crop_fraction=1.5", "crop_fraction must be"), ("upsampler1.crop_fraction=0.3", "crops of 9 pixels"),
    ("upsampler1.high_size=0", "high_size must be at least 1"),
    ("upsampler2.sampling_steps=9999", "sampling_steps must be from 1 to 1000"),
    ("upsampler2.num_timesteps=20", "needs more than 20 timesteps"), ("upsampler1.model_channels=7", "model_channels 7 is odd"),
    ("upsampler1.norm_groups=5", "not divisible by norm_groups 5"), ("decoder.lr=0", "lr must be above 0, not 0.0"),
    ("decoder.lr=-1", "lr must be above 0"), ("prior.steps=0", "steps must be at least 1"),
    ("prior.batch_size=-3", "batch_size must be at least 1"), ("clip.beta2=1", "beta2 must be at least 0 and below 1"),
    ("clip.decay=step", "unknown decay 'step': it is one of cosine, none"), ("clip.grad_clip=-1", "grad_clip must be at least 0"),
    ("data.val_images=0", "val_images must be at least 1"), ("data.seed=-1", "seed must be from 0"), ("data.source=", "source is empty"),
    ("tokenizer.vocab_size=513", "vocab_size must be at least 514, not 513")])
def test_values_that_cannot_work_are_refused(argument, said):
    message = failure(preset("micro"), f"--{argument}")
    assert message.startswith(argument.split(".")[0] + ": ") and said in message


@pytest.mark.parametrize("weighting", WEIGHTINGS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_objective_and_weighting_that_may_be_asked_for_exists(objective, weighting):
    diffusion, x, t = GaussianDiffusion(), torch.randn(2, 3), torch.tensor([5, 900])
    assert diffusion.loss(x, x, x, t, x, objective, weighting).isfinite().all()


def test_followers_move_along(tiny):
    c = override(tiny, ["--clip.clip_dim=96", "--clip.context_length=24", "--decoder.image_size=16", "--upsampler1.high_size=64"])
    assert (c.prior.model.clip_dim, c.decoder.model.clip_dim) == (96, 96)
    assert (c.prior.model.context_length, c.decoder.model.context_length) == (24, 24)
    assert (c.upsampler1.model.low_size, c.upsampler2.model.low_size) == (16, 64)
    c = override(c, ["--sketch.width=48", "--sketch.layers=3"])
    assert (c.sketch.model.clip_dim, c.sketch.model.image_size, c.decoder.model.sketch_width, c.decoder.model.sketch_layers) == (96, 16, 48, 3)
    # Two numbers that only fit together: 96 is no multiple of the old 32 · 4, nor 128 of 24.
    c = override(tiny, ["--decoder.image_size=24", "--upsampler1.high_size=96", "--upsampler2.high_size=384"])
    assert (c.upsampler1.model.factor, c.upsampler2.model.factor) == (4, 4)
    c = changed(tiny, {"clip.vocab_size": 600, "clip.eot_id": 599})        # what train.py does once the tokenizer is there
    assert {m.vocab_size for m in (c.clip.model, c.prior.model, c.decoder.model)} == {600}
    assert {m.eot_id for m in (c.clip.model, c.prior.model, c.decoder.model)} == {599}


def test_stages_that_do_not_fit_are_refused(tiny):
    bad = dataclasses.replace(tiny.prior, model=dataclasses.replace(tiny.prior.model, clip_dim=7))
    with pytest.raises(ValueError, match="prior.clip_dim is 7, but must be equal to clip.clip_dim, which is 128"):
        dataclasses.replace(tiny, prior=bad)


def test_every_key_is_unambiguous(tiny):
    """No name stands both in a stage's model and in its training, and all types are ones that the command line can give."""
    for cls in (kind for of_stage in MODELS.values() for kind in of_stage):
        assert not {f.name for f in dataclasses.fields(cls)} & {f.name for f in dataclasses.fields(TrainConfig)}
    for key, kind in kinds(tiny).items():
        text = overrides.as_text(get(tiny, key))
        assert overrides.parse_value(text, kind, key) == get(tiny, key)
    assert set(FOLLOWS) | set(FOLLOWS.values()) <= set(kinds(tiny))


# ---------------------------------------------------------------------------------------------------------------- JSON

@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name):
    config = override(preset(name), ["--decoder.lr=0.00012345678901234567", "--data.source=some/folder"])
    text = json.dumps(to_dict(config))
    assert from_dict(json.loads(text)) == config and hash(from_dict(json.loads(text))) == hash(config)


def test_checkpoints_take_it(tmp_path, tiny):
    torch.save(to_dict(tiny), tmp_path / "c.pt")
    assert from_dict(torch.load(tmp_path / "c.pt", weights_only=True)) == tiny


@pytest.mark.parametrize("spoil", [lambda d: d.pop("prior"), lambda d: d["clip"]["model"].update(colour=3), lambda d: d.update(data=None),
                                   lambda d: d["prior"]["model"].update(clip_dim=5), lambda d: d["decoder"]["train"].update(steps=0)])
def test_damaged_configuration_is_refused(tiny, spoil):
    saved = json.loads(json.dumps(to_dict(tiny)))
    spoil(saved)
    with pytest.raises(ValueError):
        from_dict(saved)


def test_what_is_no_configuration_is_refused():
    for value in ({}, [], None, 3, {"preset": "tiny"}):
        with pytest.raises(ValueError, match="not the configuration of a run"):
            from_dict(value)


# ------------------------------------------------------------ which class, and older checkpoints

# What every configuration of a stage said before tricks and Karlo's habits were subclasses.
FORMER = {
    "clip": {"unit_norm": True, "picture_weight": 0.0},
    "prior": {"whiten_z": False, "head_layers": 0, "head_width": 512, "frozen_text": None,
              "z_scale": None, "unit_norm": True, "clip_x_start": None},
    "ar_prior": {"whiten_z": False, "place_width": 0, "places": 0},
    "sketch": {},
    "decoder": {"patch_size": 1, "position_embedding": False, "emb_channels": None,
                "whiten_z": False, "sketch": False, "z_noise": 0.0, "z_noise_from": 0.75,
                "sketch_width": 512, "sketch_layers": 4, "timestep_sampling": "uniform",
                "frozen_text": None, "z_scale": None, "learned_null": False},
    "upsampler1": {"patch_size": 1, "sampler": "ddim", "last_unet": False, "use_adagn": True},
    "upsampler2": {"patch_size": 1, "sampler": "ddim", "last_unet": False, "use_adagn": True}}
FORMER_KARLO = {
    "clip": {"unit_norm": False},
    "prior": {"z_scale": 1.0, "unit_norm": False},
    "decoder": {"z_scale": 1.0, "learned_null": True},
    "upsampler1": {"sampler": "ddpm", "last_unet": True, "use_adagn": False}}


@pytest.mark.parametrize("name", PRESETS)
def test_settings_of_older_checkpoints_give_the_same_configuration(name):
    """Those had the settings of all classes, and these at "off" where they were not used."""
    config = preset(name)
    for stage in MODELS:
        model = getattr(config, stage).model
        karlo = FORMER_KARLO.get(stage, {}) if name == "karlo" else {}
        assert configs.model_config(stage, FORMER[stage] | karlo | dataclasses.asdict(model)) == model


def test_a_setting_that_is_on_is_never_dropped():
    paper = preset("paper")
    for stage, former in (("prior", {"whiten_z": True}), ("decoder", {"sketch": True})):
        model = getattr(paper, stage).model
        found = configs.model_config(stage, dataclasses.asdict(model) | former)
        assert type(found) is not type(model) and isinstance(found, type(model))
        assert dataclasses.asdict(found) | former == dataclasses.asdict(found)
    with pytest.raises(TypeError, match="timestep_sampling"):
        of_decoder = dataclasses.asdict(paper.decoder.model) | {"timestep_sampling": "loss_aware"}
        configs.model_config("decoder", of_decoder)


def test_a_whitening_that_does_nothing_is_ignored_and_another_is_not(tiny):
    """Older checkpoints of models without whitening keep an unfitted one."""
    cfg = configs.model_config("prior", dataclasses.asdict(tiny.prior.model) | {
        "whiten_z": False, "head_layers": 0, "layers": 1})
    assert type(cfg) is PriorConfig
    model, D = configs.build(cfg), cfg.clip_dim
    state = dict(model.state_dict())
    for name in ("whitening", "whitening_txt"):
        state |= {f"{name}.mean": torch.zeros(D), f"{name}.spread": torch.ones(D),
                  f"{name}.matrix": torch.eye(D) * D ** 0.5}
    configs.load_weights(model, state)
    with pytest.raises(RuntimeError, match="whitening.matrix whitens"):
        configs.load_weights(model, state | {"whitening.matrix": 2 * torch.eye(D)})
    with pytest.raises(RuntimeError, match="missing or left over: 'other'"):
        configs.load_weights(model, state | {"other": torch.zeros(1)})


def test_the_paper_s_configurations_are_short():
    assert len(dataclasses.fields(DecoderConfig)) <= 28
