"""The captioned shapes: fixed numbers, determinism, disjoint splits, agreement across sizes."""

import math
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch

from mini_dalle2.data import shapes
from mini_dalle2.data.shapes import CaptionedShapes, render

HELD_OUT = {
    ("red", "star"),
    ("green", "ring"),
    ("blue", "cross"),
    ("yellow", "triangle"),
    ("purple", "square"),
}


def scenes(split, n=1500, seed=0):
    dataset = CaptionedShapes(split, seed=seed, length=n)
    return [dataset.scene(i) for i in range(n)]


def kind(scene):
    if re.fullmatch(r"a (small|large) \w+ \w+", scene.text):
        return "size"
    return "count" if scene.text.split()[0] in ("two", "three", "four") else "relation"


def test_golden_scenes():
    """A few examples, written down once.

    If these change, every figure ever reported on this data set changes its meaning.
    """
    texts = {
        split: [CaptionedShapes(split).scene(i).text for i in range(4)]
        for split in ("train", "val", "held_out")
    }
    assert texts["train"] == [
        "a small cyan square",
        "a green square above a black star",
        "a yellow circle right of an orange ring",
        "four orange rings",
    ]
    assert texts["val"] == [
        "three orange squares",
        "a blue star right of an orange triangle",
        "an orange ring below a blue square",
        "a yellow star left of an orange circle",
    ]
    assert texts["held_out"] == [
        "a cyan triangle above a green ring",
        "three purple squares",
        "three green rings",
        "a large green ring",
    ]
    thing = CaptionedShapes("train").scene(0).things[0]
    assert (round(thing.x, 6), round(thing.y, 6), round(thing.r, 6)) == (
        0.16183,
        0.828458,
        0.121522,
    )


def test_same_index_same_picture_in_any_order_and_process():
    a, b = CaptionedShapes("val", 32), CaptionedShapes("val", 32)
    for i in (5, 0, 999):
        assert (
            a[i]["text"] == b[i]["text"]
            and a[i]["scene"] == b[i]["scene"]
            and torch.equal(a[i]["image"], b[i]["image"])
        )
    code = "from mini_dalle2.data import CaptionedShapes as C; print(C('val').scene(7))"
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.strip() == repr(a.scene(7))
    assert a.scene(7) == CaptionedShapes("val", 512, length=8).scene(7), (
        "neither size nor length may change a scene"
    )
    assert a[-1]["scene"] == a[999]["scene"]


def test_splits_and_seeds_are_disjoint_streams():
    seen = [
        scene.things
        for split in ("train", "val", "held_out")
        for seed in (0, 1)
        for scene in scenes(split, 500, seed)
    ]
    assert len(set(seen)) == len(seen)


def test_held_out_pairs():
    for split in ("train", "val"):
        pairs = {(t.colour, t.shape) for s in scenes(split, 4000) for t in s.things}
        assert len(pairs) == 8 * 6 - 5 and not pairs & HELD_OUT
    held = scenes("held_out", 2000)
    assert all({(t.colour, t.shape) for t in s.things} & HELD_OUT for s in held)
    assert {(t.colour, t.shape) for s in held for t in s.things} >= HELD_OUT
    # Held-out pairs stand first and second about equally often.
    first = [
        (s.things[0].colour, s.things[0].shape) in HELD_OUT for s in held if kind(s) == "relation"
    ]
    assert 0.45 < np.mean(first) < 0.65


@pytest.mark.parametrize("split", ["train", "val", "held_out"])
def test_every_number_of_the_definition(split):
    found = scenes(split, 3000)
    mix = Counter(map(kind, found))
    for name, share in (("size", 0.35), ("relation", 0.45), ("count", 0.20)):
        assert abs(mix[name] / len(found) - share) < 4 * math.sqrt(
            share * (1 - share) / len(found)
        ), mix
    greys = [s.background for s in found]
    assert min(greys) == 170 and max(greys) == 250
    for scene in found:
        words, things = scene.text.split(), scene.things
        named = [w for w in words if w in shapes.COLOURS]
        assert scene.text == scene.text.lower() and not re.search(
            r"\ba [aeiou]|\ban [^aeiou]", scene.text
        )
        for t in things:  # all of it inside the canvas
            reach = t.r * {"square": 0.8}.get(t.shape, 1)
            assert reach <= t.x <= 1 - reach and reach <= t.y <= 1 - reach, scene
        if kind(scene) == "size":
            low, high = {"small": (0.12, 0.15), "large": (0.26, 0.32)}[words[1]]
            assert (
                len(things) == 1
                and low <= things[0].r <= high
                and words[2:] == [things[0].colour, things[0].shape]
            )
        elif kind(scene) == "relation":
            a, b = things
            assert [a.colour, b.colour] == named and a.colour != b.colour
            assert all(0.15 <= t.r <= 0.19 for t in things)
            dx, dy = {"above": (0, -1), "below": (0, 1), "left": (-1, 0), "right": (1, 0)}[
                words[3 if words[3] != "of" else 2]
            ]
            for t, sign in ((a, 1), (b, -1)):
                assert abs((t.x - 0.5) * dx + (t.y - 0.5) * dy - sign * 0.24) <= 0.03
        else:
            assert len(things) == {"two": 2, "three": 3, "four": 4}[words[0]]
            assert {
                (t.colour, t.shape + ("es" if t.shape == "cross" else "s")) for t in things
            } == {tuple(words[1:])}
            assert all(0.12 <= t.r <= 0.14 for t in things)


def test_counted_objects_keep_apart():
    """The nearest covered pixels of two objects are at least 0.03 apart, as the pixels show."""
    checked = 0
    for scene in scenes("train", 600):
        if kind(scene) != "count":
            continue
        masks = []
        for t in scene.things:
            mask, (left, top) = shapes.coverage(t.shape, t.x, t.y, t.r, 128)
            rows, columns = np.nonzero(np.asarray(mask) > 127)
            masks.append(np.stack([rows + top, columns + left], axis=1)[::2])
        for i, a in enumerate(masks):
            for b in masks[:i]:
                assert np.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).min() >= 0.03 * 128 - 0.5
        checked += 1
        if checked == 12:
            break
    assert checked == 12


def test_colours():
    assert shapes.COLOURS == {
        "red": (220, 40, 40),
        "orange": (245, 140, 30),
        "yellow": (240, 210, 50),
        "green": (40, 170, 70),
        "cyan": (60, 200, 220),
        "blue": (50, 80, 220),
        "purple": (140, 60, 180),
        "black": (25, 25, 25),
    }
    for i in range(20):
        scene = CaptionedShapes("train").scene(i)
        pixels = np.asarray(render(scene, 256)).reshape(-1, 3)
        found = {
            tuple(map(int, rgb))
            for rgb, n in zip(*np.unique(pixels, axis=0, return_counts=True))
            if n > 400
        }
        assert found == {shapes.COLOURS[t.colour] for t in scene.things} | {(scene.background,) * 3}


@pytest.mark.parametrize("size, tolerance", [(32, 0.025), (128, 0.025), (512, 0.01)])
def test_areas_against_geometry(size, tolerance):
    r = 0.171
    exact = {
        "circle": math.pi,
        "square": 1.6**2,
        "triangle": 3 * math.sqrt(3) / 4,
        "star": 10 * 0.5 * 0.45 * math.sin(math.pi / 5),
        "cross": 2 * 2 * 0.7 - 0.7**2,
        "ring": math.pi * (1 - 0.55**2),
    }
    for shape, area in exact.items():
        places = [(0.5, 0.5), (0.41, 0.537), (0.613, 0.377)]
        masks = [
            np.asarray(shapes.coverage(shape, x, y, r, size)[0], dtype=float) / 255
            for x, y in places
        ]
        measured = np.mean([mask.sum() for mask in masks]) / (r * size) ** 2
        assert measured == pytest.approx(area, rel=tolerance), shape


@pytest.mark.parametrize(
    "shape, inside, outside",
    [
        ("circle", [(0, 0), (0.68, 0.68)], [(0.73, 0.73)]),
        ("square", [(0.75, 0.75), (-0.75, 0.75)], [(0.85, 0), (0, -0.85)]),
        (
            "triangle",
            [(0, -0.93), (0.8, 0.46), (-0.8, 0.46)],
            [(0, 0.55), (0.45, -0.5), (0, -1.05)],
        ),
        ("star", [(0, -0.9), (0, 0), (0.9, -0.29)], [(0, 0.5), (0.33, -0.6), (0.55, -0.55)]),
        ("cross", [(0, -0.95), (0.95, 0.3), (0.3, 0.95)], [(0.4, 0.4), (0.4, -0.9)]),
        ("ring", [(0.6, 0), (0, -0.95)], [(0, 0), (0.5, 0), (0.73, 0.73)]),
    ],
)
def test_which_points_a_shape_covers(shape, inside, outside):
    mask, (left, top) = shapes.coverage(shape, 0.5, 0.45, 0.3, 1024)
    mask = np.asarray(mask)
    for points, value in ((inside, 255), (outside, 0)):
        for u, v in points:
            row, column = int((0.45 + 0.3 * v) * 1024) - top, int((0.5 + 0.3 * u) * 1024) - left
            inside_box = 0 <= row < mask.shape[0] and 0 <= column < mask.shape[1]
            assert (mask[row, column] if inside_box else 0) == value, (shape, u, v)


def test_sizes_agree():
    """A small picture is the area average of a large one, up to how finely edges are drawn."""
    for i in range(12):
        scene = CaptionedShapes("train").scene(i)
        at = {size: np.asarray(render(scene, size), dtype=float) for size in (32, 128, 512)}
        for small, large in ((32, 128), (32, 512), (128, 512)):
            k = large // small
            average = at[large].reshape(small, k, small, k, 3).mean((1, 3))
            difference = np.abs(average - at[small])
            assert difference.mean() < 0.5 and difference.max() < (30 if small == 32 else 60), (
                i,
                small,
                large,
            )


def test_bad_arguments():
    with pytest.raises(ValueError, match="unknown split 'test'"):
        CaptionedShapes("test")
    with pytest.raises(ValueError, match="at least 1"):
        CaptionedShapes(size=0)
    with pytest.raises(IndexError):
        CaptionedShapes("val", length=3)[3]
    assert len(list(CaptionedShapes("val", length=3))) == 3
