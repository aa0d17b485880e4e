"""The limits that the project has set itself, and that no taste can move; see measure.py."""

import ast
import dataclasses

import measure
from mini_dalle2.decoder import DecoderConfig
from test_graph import COMPONENTS, TOGETHER

FILES = measure.sources()


def test_the_top_of_the_package_shows_the_paper():
    top = measure.modules_on_top()
    assert len(top) <= 15 and set(top) == {*COMPONENTS, *TOGETHER}


def test_the_loop_stands_in_train():
    frames = measure.frames_to_backward()
    assert frames[0] == "main" and len(frames) <= 4
    assert "loss.backward()" in FILES["train.py"]


def test_scripts_are_short():
    assert len(FILES["train.py"].splitlines()) <= 200
    assert len(FILES["sample.py"].splitlines()) <= 180


def test_lines_are_narrow():
    width, wide = measure.widths(FILES)
    assert width <= 100 and wide <= 0.02


def test_functions_take_few_parameters():
    assert measure.most_parameters(FILES)[0] <= 8


def test_decoder_config_is_small():
    assert len(dataclasses.fields(DecoderConfig)) <= 28


def test_classes_are_short():
    assert measure.longest(FILES, ast.ClassDef)[0][0] <= 300


def test_functions_fit_on_a_screen():
    assert measure.longest(FILES, measure.FUNCTIONS)[0][0] <= 60


def test_readme_is_for_one_sitting():
    page = measure.readme()
    assert page["lines"] <= 250 and page["bytes"] <= 18_000 and page["line links"] == 0
    assert page["median sentence"] <= 20


def test_a_name_means_one_thing():
    """No name has owners in several rooms."""
    shared = {name: measure.owners(FILES, name) for name in measure.SHARED_NAMES}
    assert {name: places for name, places in shared.items() if len(places) > 1} == {}


# ------------------------------------------------------------------------------ can they fail?

SAMPLE = {"a.py": '''class Long:
    def first(self, a, b, *rest, key=None, **more):
        x = 1

        def inner(x):
            return x


def wrap():
    pass


class DALLE2:
    def load(self, a, b, c, d, e, f):
        pass
'''}


def test_figures_of_a_sample():
    assert measure.most_parameters(SAMPLE) == (5, "a.py", "Long.first")
    assert measure.longest(SAMPLE, ast.ClassDef) == [(6, "a.py", "Long")]
    assert measure.longest(SAMPLE, measure.FUNCTIONS)[0] == (5, "a.py", "Long.first")
    assert measure.owners(SAMPLE, "inner") == ["a.py: Long.first.inner"]
    assert measure.owners(SAMPLE, "wrap") == ["a.py: wrap"] and measure.owners(SAMPLE, "x") == []
    assert measure.widths({"a": "1234567890\n" * 9 + "x" * 101}) == (101, 0.1)
    assert measure.long_files({"a": "x\n\n" * 331, "b": "x\n" * 330}) == [(331, "a")]
