"""checks.py: values from a file are checked for type and size before anything is made of them."""

from dataclasses import dataclass

import pytest

from mini_dalle2 import configs
from mini_dalle2.runtime.checks import brief, check_bounds, check_types, fits
from mini_dalle2.runtime.settings import DataConfig, TrainConfig


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
    ({"channel_mult": (1,) * 17}, "channel_mult has 17 numbers, and at most 16 are taken")])
def test_sizes_that_no_machine_could_build(values, said):
    with pytest.raises(ValueError, match=said):
        check_bounds(values)


@pytest.mark.parametrize("name", configs.PRESETS)
def test_every_preset_is_far_below_the_bounds(name):
    config = configs.preset(name)
    for stage in configs.MODELS:
        part = getattr(config, stage)
        check_bounds(vars(part.model))
        check_types(type(part.model), vars(part.model))
        check_types(TrainConfig, vars(part.train))
    check_types(DataConfig, vars(config.data))


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
