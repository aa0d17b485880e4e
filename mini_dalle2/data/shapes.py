"""Data: captioned shapes drawn on demand, a folder of captioned images, and the picture helpers that everything else shares.

The paper trains on pairs (x, y) of an image and its caption (§2); its 650 million pairs are not public. Two stand-ins live here.
`CaptionedShapes` is a world of coloured shapes with an exact caption grammar: small enough to learn on a laptop, and every answer can be
checked (`metrics.grade` reads a finished picture back into objects). It asks for just what §7 of the paper finds hard: binding a colour to
the right shape, and counting. `CaptionedFolder` (in `folder.py`) reads your own pictures;
`python -m mini_dalle2.data emoji --out FOLDER` builds a folder of real ones (`emoji.py`).

    a small red circle · a large orange star                35 %    size
    a red circle above a blue square                        45 %    relation: above, below, left of, right of
    two cyan rings · three black crosses                    20 %    count: two, three, four

Where an object sits, its exact size and the grey behind it are never in the caption: that freedom is what variations (§3.1) may vary.
Five (colour, shape) pairs never occur in training; the split `held_out` asks for nothing else, so it measures composition.

Shapes: B batch, N pictures in a table, S side of a square picture in pixels. Images are (3, S, S), float in [-1, 1], or uint8 in tables.
Lengths in a `Scene` are fractions of the canvas side; x grows to the right and y downwards.
References: ShapeWorld (Kuhnle and Copestake 2017), CLEVR (Johnson et al. 2017).
Read next: `folder.py` (your own pictures), `tokenizer.py` (what becomes of a caption), `metrics.py` (the grader).
"""

import itertools
import math
import random
import re
from dataclasses import dataclass

from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from .. import data
from .pixels import from_pil, to_float


COLOURS = {
    "red": (220, 40, 40), "orange": (245, 140, 30), "yellow": (240, 210, 50), "green": (40, 170, 70),
    "cyan": (60, 200, 220), "blue": (50, 80, 220), "purple": (140, 60, 180), "black": (25, 25, 25),
}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "star": "stars", "cross": "crosses", "ring": "rings"}
SIZES = {"small": (0.12, 0.15), "large": (0.26, 0.32)}                     # circumradius over canvas side
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}   # the first object, seen from the second
COUNTS = {"two": 2, "three": 3, "four": 4}
RELATION_RADIUS, COUNT_RADIUS = (0.15, 0.19), (0.12, 0.14)
BACKGROUND = (170, 250)                                                    # grey level, both ends included
HELD_OUT = (("red", "star"), ("green", "ring"), ("blue", "cross"), ("yellow", "triangle"), ("purple", "square"))
SEEN = tuple(pair for pair in itertools.product(COLOURS, SHAPES) if pair not in HELD_OUT)
LENGTHS = {"train": 40_000, "val": 1_000, "held_out": 1_000}               # default number of examples
MARGIN, GAP = 0.02, 0.03                                                   # to the canvas edge, and between counted objects
REACH = {"square": 0.8 * 2 ** 0.5, "cross": math.hypot(1, 0.35)}           # farthest point in units of r; 1 for the others


@dataclass(frozen=True)
class Thing:
    """One object: colour and shape by name, centre (x, y) and circumradius r as fractions of the canvas side."""
    colour: str
    shape: str
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Scene:
    """What is in one picture: its caption, the grey level behind (0..255) and the objects in the order in which the caption names them."""
    text: str
    background: int
    things: tuple


def outline(shape):
    """Corners of a polygonal shape with r = 1 around (0, 0), y downwards: list of (x, y); None for circle and ring."""
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "cross":
        a = 0.35                                                           # half of the arm's width
        return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    if shape in ("triangle", "star"):
        radii = [1] if shape == "triangle" else [1, 0.45]                  # the star alternates between tip and notch
        n = 3 if shape == "triangle" else 10
        return [(radii[i % len(radii)] * math.sin(2 * math.pi * i / n), -radii[i % len(radii)] * math.cos(2 * math.pi * i / n))
                for i in range(n)]
    return None


OUTLINES = {shape: outline(shape) for shape in SHAPES}


def inset(u):
    """What to take off a polygon's coordinate: Pillow numbers pixels and paints both ends, so a right edge at 8 means "up to pixel 7"."""
    return 1.0 if u > 1e-9 else 0.0 if u < -1e-9 else 0.5


def coverage(shape, x, y, r, size):
    """How much of each pixel a shape covers.

    Drawn several times finer and then averaged over boxes, so that a picture at 32 px is the area average of the one at 512 px.
    x, y, r are fractions of the side of a canvas of `size` pixels. Returns (L image, 0..255, just large enough; its corner (left, top)).
    """
    left, top = math.floor((x - r) * size), math.floor((y - r) * size)
    width, height = math.ceil((x + r) * size) - left, math.ceil((y + r) * size) - top
    k = max(4, 512 // size)                                                # sub-pixels along a pixel's side
    mask = Image.new("L", (width * k, height * k), 0)
    draw = ImageDraw.Draw(mask)
    cx, cy, radius = (x * size - left) * k, (y * size - top) * k, r * size * k
    if OUTLINES[shape] is not None:                                        # see `inset`; without it shapes grow by a sub-pixel
        draw.polygon([(round(cx + radius * u - inset(u)), round(cy + radius * v - inset(v))) for u, v in OUTLINES[shape]], fill=255)
    else:
        for part, fill in ((1.0, 255),) if shape == "circle" else ((1.0, 255), (0.55, 0)):
            e = radius * part
            draw.ellipse((round(cx - e), round(cy - e), round(cx + e) - 1, round(cy + e) - 1), fill=fill)
    return mask.reduce(k), (left, top)


def render(scene, size):
    """Draw a scene: RGB image, size × size."""
    image = Image.new("RGB", (size, size), (scene.background,) * 3)
    for thing in scene.things:
        mask, corner = coverage(thing.shape, thing.x, thing.y, thing.r, size)
        image.paste(COLOURS[thing.colour], corner, mask)
    return image


def article(colour):
    """The colour with its indefinite article: "a red", "an orange"."""
    return ("an " if colour[0] in "aeiou" else "a ") + colour


def relation_caption(first, relation, second):
    """Two (colour, shape) and how the first lies from the second: "a red circle above a blue square"."""
    return f"{article(first[0])} {first[1]} {relation} {article(second[0])} {second[1]}"


class Draw:
    """Random choices for one example. Built on `random.random()` alone, the one stream that Python promises never to change."""

    def __init__(self, key):
        self.random = random.Random(key).random

    def uniform(self, low, high):
        """A real number in [low, high)."""
        return low + (high - low) * self.random()

    def choice(self, items):
        """One of the items, each equally likely."""
        return items[int(self.random() * len(items))]


def scattered(rng, pairs, radii):
    """Objects at random places inside the canvas, at least GAP apart: tuple of `Thing`. Starts afresh when it gets stuck."""
    while True:
        things = []
        for (colour, shape), (low, high) in zip(pairs, radii):
            r = rng.uniform(low, high)
            reach = r * REACH.get(shape, 1) + MARGIN
            x, y = rng.uniform(reach, 1 - reach), rng.uniform(reach, 1 - reach)
            apart = (r * REACH.get(shape, 1) + GAP + t.r * REACH.get(t.shape, 1) <= math.hypot(x - t.x, y - t.y) for t in things)
            if not all(apart):
                break
            things.append(Thing(colour, shape, x, y, r))
        else:
            return tuple(things)


def make_scene(rng, pairs):
    """One random scene of things from `pairs` of (colour, shape): SEEN, or HELD_OUT, where a relation needs only one of them."""
    background = int(rng.uniform(BACKGROUND[0], BACKGROUND[1] + 1))
    colour, shape = pair = rng.choice(pairs)
    kind = rng.random()
    if kind < 0.35:
        size = rng.choice(tuple(SIZES))
        return Scene(f"a {size} {colour} {shape}", background, scattered(rng, [pair], [SIZES[size]]))
    if kind >= 0.80:
        word = rng.choice(tuple(COUNTS))
        n = COUNTS[word]
        return Scene(f"{word} {colour} {SHAPES[shape]}", background, scattered(rng, [pair] * n, [COUNT_RADIUS] * n))
    relation = rng.choice(tuple(RELATIONS))
    # With held-out pairs one object is held out and the other is anything, in either order.
    others = [p for p in (SEEN if pairs is SEEN else SEEN + HELD_OUT) if p[0] != colour]
    two = [pair, rng.choice(others)]
    if rng.random() < 0.5:
        two.reverse()
    dx, dy = RELATIONS[relation]
    things = []
    for (c, s), sign in zip(two, (1, -1)):
        along, across = sign * (0.24 + rng.uniform(-0.025, 0.025)), rng.uniform(-0.10, 0.10)
        x, y = 0.5 + dx * along + abs(dy) * across, 0.5 + dy * along + abs(dx) * across
        things.append(Thing(c, s, x, y, rng.uniform(*RELATION_RADIUS)))
    return Scene(relation_caption(two[0], relation, two[1]), background, tuple(things))


class CaptionedShapes(Dataset):
    """Pictures of coloured shapes with their captions; example i is a function of (split, seed, i) alone, drawn when asked for.

    split: "train", "val" (unseen pictures of pairs that training saw) or "held_out" (each caption names a pair that training never saw).
    size: side in pixels; the scene does not depend on it. length: number of examples, 40,000 for train and 1,000 otherwise.
    `[i]` gives {"image": (3, S, S) float in [-1, 1], "text": str, "scene": Scene}.
    Raises ValueError for an unknown split or a size or length below one, IndexError outside the length.
    """

    def __init__(self, split="train", size=32, seed=0, length=None):
        if split not in LENGTHS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(LENGTHS)}")
        self.split, self.size, self.seed = split, int(size), int(seed)
        self.length = LENGTHS[split] if length is None else int(length)
        if self.size < 1 or self.length < 1:
            raise ValueError(f"size and length must be at least 1, got {size} and {length}")

    def __len__(self):
        return self.length

    def scene(self, index):
        """The scene of one example, without drawing it."""
        index = range(self.length)[index]                                  # IndexError outside; negative ones count from the end
        return make_scene(Draw(f"{self.split} {self.seed} {index}"), HELD_OUT if self.split == "held_out" else SEEN)

    def __getitem__(self, index):
        scene = self.scene(index)
        return {"image": to_float(from_pil(render(scene, self.size))), "text": scene.text, "scene": scene}


def parse_caption(caption):
    """Caption of the shapes -> ("size" | "relation" | "count", the word, [(colour, shape), ...]). Raises ValueError for another text."""
    colours, shapes = "|".join(data.COLOURS), "|".join(data.SHAPES)
    text = caption.strip().lower()
    if m := re.fullmatch(rf"a ({'|'.join(data.SIZES)}) ({colours}) ({shapes})", text):
        return "size", m[1], [(m[2], m[3])]
    if m := re.fullmatch(rf"an? ({colours}) ({shapes}) ({'|'.join(data.RELATIONS)}) an? ({colours}) ({shapes})", text):
        return "relation", m[3], [(m[1], m[2]), (m[4], m[5])]
    if m := re.fullmatch(rf"({'|'.join(data.COUNTS)}) ({colours}) ({'|'.join(data.SHAPES.values())})", text):
        singular = {plural: shape for shape, plural in data.SHAPES.items()}[m[3]]
        return "count", m[1], [(m[2], singular)] * data.COUNTS[m[1]]
    raise ValueError(f"not a caption of the shapes data set: {caption!r}")
