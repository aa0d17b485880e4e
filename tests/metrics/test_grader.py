"""The grader on right and on wrong pictures."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from mini_dalle2.data.pixels import from_pil, to_float
from mini_dalle2.metrics import grader as metrics
from mini_dalle2.data.shapes import (
    COLOURS,
    SHAPES,
    CaptionedShapes,
    Scene,
    Thing,
    parse_caption,
    render,
)
from mini_dalle2.metrics.grader import grade

SIZES = (32, 128, 512)
RED, BLUE = Thing("red", "circle", 0.5, 0.27, 0.17), Thing("blue", "square", 0.5, 0.73, 0.17)
PAIR = "a red circle above a blue square"
TRIO = (
    Thing("black", "cross", 0.25, 0.3, 0.13),
    Thing("black", "cross", 0.7, 0.25, 0.13),
    Thing("black", "cross", 0.5, 0.7, 0.13),
)


def picture(*things, size=32, background=210):
    return render(Scene("", background, things), size)


def verdict(image, caption):
    g = grade(image, caption)
    answers = g["colours"], g["shapes"], g["layout"], g["all"]
    assert all(type(answer) is bool for answer in answers) and isinstance(g["objects"], list)
    return answers


# ---------------------------------------------------------------- right pictures


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("split", ["val", "held_out"])
def test_ground_truth_is_right(split, size):
    """At least 99 % right; what is read back is the scene itself."""
    n = 500 if size == 32 else 100
    dataset, right, errors = CaptionedShapes(split, size, length=500), 0, []
    for i in range(500 - n, 500):
        item = dataset[i]
        g = grade(item["image"], item["text"])
        right += g["all"]
        key = lambda t: (t[0], t[1], round(t[2], 1), t[3])
        found = sorted(
            ((o["colour"], o["shape"], o["x"], o["y"], o["r"]) for o in g["objects"]), key=key
        )
        true = sorted(((t.colour, t.shape, t.x, t.y, t.r) for t in item["scene"].things), key=key)
        if [f[:2] for f in found] == [t[:2] for t in true] and len({t[:2] for t in true}) == len(
            true
        ):
            errors += [abs(a - b) for f, t in zip(found, true) for a, b in zip(f[2:], t[2:])]
    assert right >= 0.99 * n
    assert max(errors) < 0.02, "centre and radius, as fractions of the side"


def test_pil_and_tensor_agree():
    item = CaptionedShapes("val", 32)[3]
    assert grade(item["image"], item["text"]) == grade(render(item["scene"], 32), item["text"])


@pytest.mark.parametrize("size", SIZES)
def test_mild_flaws_are_forgiven(size):
    """What a good model leaves behind: noise and a tint of up to 15 levels, a few stray pixels."""
    rng, n = np.random.default_rng(0), 40
    right = 0
    for i in range(n):
        scene = CaptionedShapes("val").scene(i)
        pixels = (
            np.asarray(render(scene, size), dtype=float)
            + rng.uniform(-15, 15, (size, size, 3))
            + rng.uniform(-15, 15, 3)
        )
        for _ in range(3):
            y, x = rng.integers(0, size, 2)
            pixels[y : y + size // 32, x : x + size // 32] = rng.uniform(0, 255, 3)
        right += grade(Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8)), scene.text)[
            "all"
        ]
    assert right >= 0.95 * n


# ---------------------------------------------------------------- wrong pictures


@pytest.mark.parametrize("size", SIZES)
def test_right_pair_and_each_single_mistake(size):
    cases = {
        "right": ((RED, BLUE), (True, True, True, True)),
        "swapped colours": (
            (replace(RED, colour="blue"), replace(BLUE, colour="red")),
            (False, True, True, False),
        ),
        "swapped places": (
            (replace(RED, y=0.73), replace(BLUE, y=0.27)),
            (True, True, False, False),
        ),
        "swapped shapes": (
            (replace(RED, shape="square"), replace(BLUE, shape="circle")),
            (True, False, True, False),
        ),
        "one wrong colour": ((replace(RED, colour="orange"), BLUE), (False, True, True, False)),
        "one wrong shape": ((RED, replace(BLUE, shape="cross")), (True, False, True, False)),
        "left instead of above": (
            (replace(RED, x=0.27, y=0.5), replace(BLUE, x=0.73, y=0.5)),
            (True, True, False, False),
        ),
        "missing": ((RED,), (False, False, False, False)),
        "extra": (
            (RED, BLUE, Thing("green", "star", 0.85, 0.5, 0.12)),
            (False, False, False, False),
        ),
        "same again": ((RED, BLUE, replace(RED, x=0.15, r=0.13)), (True, True, False, False)),
        "both red": ((RED, replace(BLUE, colour="red")), (False, True, True, False)),
        "nothing": ((), (False, False, False, False)),
    }
    for name, (things, expected) in cases.items():
        assert verdict(picture(*things, size=size), PAIR) == expected, name


@pytest.mark.parametrize("size", SIZES)
def test_counts_and_sizes(size):
    assert verdict(picture(*TRIO, size=size), "three black crosses") == (True, True, True, True)
    assert verdict(picture(*TRIO[:2], size=size), "three black crosses") == (
        True,
        True,
        False,
        False,
    )
    assert verdict(
        picture(*TRIO, replace(TRIO[0], y=0.75, x=0.15), size=size), "three black crosses"
    ) == (True, True, False, False)
    one_red = (replace(TRIO[0], colour="red"),) + TRIO[1:]
    assert verdict(picture(*one_red, size=size), "three black crosses") == (
        False,
        True,
        True,
        False,
    )
    for r, small, large in (
        (0.08, False, False),
        (0.13, True, False),
        (0.2, False, False),
        (0.29, False, True),
        (0.4, False, False),
    ):
        image = picture(Thing("green", "triangle", 0.5, 0.5, r), size=size)
        assert (
            grade(image, "a small green triangle")["all"] == small
            and grade(image, "a large green triangle")["all"] == large
        ), r


@pytest.mark.parametrize("size", [32, 128])
def test_every_colour_and_shape_is_told_from_every_other(size):
    for colour in COLOURS:
        for shape in SHAPES:
            image = picture(Thing(colour, shape, 0.51, 0.48, 0.14), size=size, background=185)
            objects, _ = metrics.read_objects(image)
            right = [
                (c, s)
                for c in COLOURS
                for s in SHAPES
                if all(metrics.compare(objects, *parse_caption(f"a small {c} {s}")))
            ]
            assert right == [(colour, shape)]


@pytest.mark.parametrize("size", SIZES)
def test_pictures_of_nothing(size):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    coarse = np.asarray(
        Image.fromarray(noise[:8, :8]).resize((size, size), Image.Resampling.BICUBIC)
    )
    for pixels in (
        np.full((size, size, 3), 210, np.uint8),
        noise,
        coarse,
        np.zeros_like(noise),
        np.full_like(noise, 255),
    ):
        for caption in (PAIR, "a small red circle", "two black squares"):
            assert verdict(Image.fromarray(pixels), caption)[2:] == (False, False)


@pytest.mark.parametrize("size", SIZES)
def test_damaged_objects_are_refused(size):
    """Blurred beyond recognition, half wiped away, hollowed out, faded, or on a coloured ground."""
    for shape in SHAPES:
        caption = f"a large purple {shape}"
        image = picture(Thing("purple", shape, 0.5, 0.5, 0.29), size=size)
        assert grade(image, caption)["all"]
        assert not grade(image.filter(ImageFilter.GaussianBlur(0.12 * size)), caption)["all"], shape
        pixels = np.array(image)
        half, tint = pixels.copy(), pixels.copy()
        half[:, size // 2 :] = 210
        faded = (pixels * 0.45 + 210 * 0.55).astype(np.uint8)
        tint[(pixels == 210).all(-1)] = (120, 200, 120)
        hole = np.array(picture(Thing("purple", shape, 0.5, 0.5, 0.29), size=size))
        hole[int(0.4 * size) : int(0.56 * size), int(0.4 * size) : int(0.6 * size)] = 210
        cases = dict(half=half, faded=faded, tint=tint) | (
            {} if shape == "ring" else dict(hole=hole)
        )
        for name, wrong in cases.items():
            assert not grade(Image.fromarray(wrong), caption)["all"], (shape, name)


def test_clutter_is_refused():
    """A right object with dirt around it, each speck too small to be an object."""
    pixels = np.array(picture(Thing("red", "circle", 0.3, 0.3, 0.14), size=128))
    assert grade(Image.fromarray(pixels), "a small red circle")["all"]
    pixels[70:120:6, 8:120:6] = pixels[71:120:6, 8:120:6] = (60, 60, 60)
    g = grade(Image.fromarray(pixels), "a small red circle")
    assert g["colours"] and g["shapes"] and g["layout"] and not g["all"] and g["clutter"] > 0.01


def test_captions_are_read_back():
    assert parse_caption("An orange ring left of a cyan star") == (
        "relation",
        "left of",
        [("orange", "ring"), ("cyan", "star")],
    )
    assert parse_caption("two black crosses") == ("count", "two", [("black", "cross")] * 2)
    for split in ("train", "held_out"):
        for i in range(300):
            scene = CaptionedShapes(split).scene(i)
            assert parse_caption(scene.text)[2] == [(t.colour, t.shape) for t in scene.things]
    for text in (
        "a red circle",
        "a pink circle above a red ring",
        "five red rings",
        "a tiny red ring",
        "",
    ):
        with pytest.raises(ValueError, match="not a caption"):
            parse_caption(text)


def test_pictures_that_cannot_be_read():
    for image in (Image.new("RGB", (32, 33)), Image.new("RGB", (16, 16)), torch.zeros(1, 32, 32)):
        with pytest.raises(ValueError):
            grade(image, PAIR)


def test_tensors_of_another_kind_are_refused():
    """A picture of floats from 0 to 255 would be graded as a white one."""
    image = from_pil(picture(RED, BLUE))
    assert grade(image, PAIR)["all"] and grade(to_float(image), PAIR)["all"]
    for wrong, said in (
        (image.float(), r"values up to 2\d\d: give floats in \[-1, 1\]"),
        (image.long(), "give it uint8, or float"),
        (to_float(image) * torch.nan, "up to nan"),
        (image[None], "give it one image"),
        (image.permute(1, 2, 0), "give it one image"),
    ):
        with pytest.raises(ValueError, match=said):
            grade(wrong, PAIR)


def test_transparent_and_deep_pictures_are_graded_as_they_look():
    glass = picture(RED, BLUE).convert("RGBA")
    hidden = Image.new("RGBA", glass.size, (0, 0, 0, 0))
    hidden.paste(glass, (0, 0), Image.new("L", glass.size, 255))
    assert grade(hidden, PAIR)["all"]
    # What is transparent looks white, whatever colour lies under it.
    alpha = Image.eval(glass.convert("L"), lambda value: 0 if value == 210 else 255)
    hidden.putalpha(alpha)
    black = Image.composite(hidden, Image.new("RGBA", glass.size, (0, 0, 0, 0)), alpha)
    assert grade(black, PAIR)["colours"]
