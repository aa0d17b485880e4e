"""checks.py: values from a file are checked for type and size before anything is made of them."""

from dataclasses import dataclass

import pytest

from mini_dalle2 import configs
from mini_dalle2.runtime.checks import brief, check_bounds, check_types, fits
from mini_dalle2.runtime.settings import DataConfig, TokenizerConfig, TrainConfig
from mini_dalle2.training import overrides


def endless():
    """A list that holds itself."""
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize("value, text", [
    (3, "3"), (2.5, "2.5"), (None, "None"), (True, "True"), ("fast", "'fast'"),
    ("x" * 1000, repr("x" * 40 + "…")), (10 ** 1000, "a value of the type int"),
    ([1], "a value of the type list"), (endless(), "a value of the type list"),
    ({"a": 1}, "a value of the type dict"), (float("inf"), "a value of the type float")])
def test_a_foreign_value_is_never_written_out_whole(value, text):
    assert brief(value) == text


@pytest.mark.parametrize("value, kind, right", [
    (3, int, True), (3, float, True), (2.5, int, False), (True, int, False), (True, bool, True),
    (1, bool, False), ("a", str, True), (b"a", str, False), ("x" * 20_000, str, False),
    ((1, 2), tuple[int, ...], True), ((1, "a"), tuple[int, ...], False),
    ([1], tuple[int, ...], False), ((1,) * 17, tuple[int, ...], False), (None, int | None, True),
    ("none", int | None, False), (endless(), tuple[int, ...], False)])
def test_fits(value, kind, right):
    assert fits(value, kind) is right


@dataclass
class Toy:
    """Whoever makes one has not checked the types."""

    layers: int = 1
    lr: float = 1.0

    def __post_init__(self):
        pytest.fail("it was made")


@pytest.mark.parametrize("values, said", [
    ({"layers": "3"}, "layers is '3'"), ({"layers": endless()}, "layers is a value of the type list"),
    ({"depth": 3}, "there is no setting 'depth'"), ({endless: 3}, "no setting a value of the type")])
def test_types_come_first(values, said):
    with pytest.raises(TypeError, match=said):
        check_types(Toy, values)


@pytest.mark.parametrize("values, said", [
    ({"vision_layers": 10 ** 8}, "vision_layers must be at most 500, not 100000000"),
    ({"num_res_blocks": 501}, "num_res_blocks must be at most 50, not 501"),
    ({"width": 10 ** 7}, "width must be at most 1000000"),
    ({"width": -10 ** 7}, "width must be at most 1000000"),
    ({"channel_mult": (1, 10 ** 9)}, "channel_mult must be at most 1000000"),
    ({"batch_size": 10 ** 400}, "batch_size must be at most 1000000, not a value of the type int"),
    ({"sampling_steps": 10 ** 10}, "sampling_steps must be at most 1000000000"),
    ({"num_timesteps": 10 ** 9}, "num_timesteps must be at most 1000000"),
    ({"seed": 2 ** 63}, "seed must be at most"),
    ({"lr": float("inf")}, "lr must be a finite number, not inf"),
    ({"image_mean": (0.5, float("nan"), 0.5)}, "image_mean must be a finite number, not nan"),
    ({"channel_mult": (1,) * 17}, "channel_mult has 17 numbers, and at most 16 are taken")])
def test_sizes_that_no_machine_could_build(values, said):
    with pytest.raises(ValueError, match=said):
        check_bounds(values)


def test_a_long_training_is_within_the_bounds():
    check_bounds({"steps": 10 ** 9, "save_every": 10 ** 9, "images": 10 ** 9, "warmup": 10 ** 8,
                  "lr": 1e300, "emb_channels": None, "seed": 2 ** 63 - 2})


@pytest.mark.parametrize("kind", [TrainConfig, DataConfig, TokenizerConfig])
def test_no_number_of_any_setting_is_without_a_bound(kind):
    for key, value in vars(kind()).items():
        if isinstance(value, (bool, str)):
            continue
        for foreign in (10 ** 30, 10 ** 400):
            with pytest.raises(ValueError, match=f"{key} must be at most"):
                overrides.checked(kind, {key: foreign})


@pytest.mark.parametrize("name", configs.PRESETS)
def test_every_preset_is_far_below_the_bounds(name):
    config = configs.preset(name)
    for stage in configs.MODELS:
        part = getattr(config, stage)
        check_bounds(vars(part.model))
        check_types(type(part.model), vars(part.model))
        check_types(TrainConfig, vars(part.train))
        check_bounds(vars(part.train))
    check_types(DataConfig, vars(config.data))
    check_bounds(vars(config.data) | vars(config.tokenizer))


@pytest.mark.parametrize("stage", configs.MODELS)
def test_a_model_is_not_made_of_foreign_values(stage):
    values = vars(getattr(configs.preset("micro"), stage).model)
    for key, value in values.items():
        for foreign in (endless(), {"a": endless()}, b"x", object(), 10 ** 30, "x" * 10 ** 6):
            if isinstance(value, float) and foreign == 10 ** 30:
                continue
            with pytest.raises((TypeError, ValueError)) as error:
                configs.model_config(stage, values | {key: foreign})
            assert len(str(error.value)) < 300
    with pytest.raises(TypeError, match="has the setting depth"):
        configs.model_config(stage, values | {"depth": 3})
    with pytest.raises(TypeError):
        configs.model_config(stage, values | {endless: 3})
