"""Captioned shapes: a world of coloured shapes, drawn on demand, with an exact caption grammar.

    a small red circle · a large orange star        35 %   size
    a red circle above a blue square                45 %   relation: above, below, left of, right of
    two cyan rings · three black crosses            20 %   count: two, three, four

The data set is small enough to learn on a laptop, and every answer can be checked:
`metrics.grade` reads a finished picture back into objects. The captions ask for what §7 of the
paper finds hard: binding a colour to the right shape, and counting.

The caption never says where an object lies, how large it is exactly, or how grey the background
is. Variations (§3.1) may change these three.

Five pairs of colour and shape never occur in training. The split `held_out` asks for nothing
else, so it measures composition.

Shapes: S side of a square picture in pixels. Images are (3, S, S), float in [-1, 1].
Lengths in a `Scene` are fractions of the canvas side; x grows to the right and y downwards.
References: ShapeWorld (Kuhnle and Copestake 2017), CLEVR (Johnson et al. 2017).
Read next: folder.py (your own pictures), ../tokenizer.py (what becomes of a caption),
../metrics/grader.py (the grader).
"""

import itertools
import math
import random
import re
from dataclasses import dataclass

from PIL import Image, ImageDraw
from torch.utils.data import Dataset

from .pixels import from_pil, to_float

COLOURS = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (240, 210, 50),
    "green": (40, 170, 70),
    "cyan": (60, 200, 220),
    "blue": (50, 80, 220),
    "purple": (140, 60, 180),
    "black": (25, 25, 25),
}
# Each shape with its plural.
SHAPES = {
    "circle": "circles",
    "square": "squares",
    "triangle": "triangles",
    "star": "stars",
    "cross": "crosses",
    "ring": "rings",
}
# The range of the circumradius, as a fraction of the canvas side.
SIZES = {"small": (0.12, 0.15), "large": (0.26, 0.32)}
RELATION_RADIUS = (0.15, 0.19)
COUNT_RADIUS = (0.12, 0.14)
# The direction (x, y) in which the first object lies, seen from the second.
RELATIONS = {"above": (0, -1), "below": (0, 1), "left of": (-1, 0), "right of": (1, 0)}
COUNTS = {"two": 2, "three": 3, "four": 4}
# The grey levels of a background, both ends included.
BACKGROUND = (170, 250)
HELD_OUT = (
    ("red", "star"), ("green", "ring"), ("blue", "cross"), ("yellow", "triangle"),
    ("purple", "square"))
SEEN = tuple(pair for pair in itertools.product(COLOURS, SHAPES) if pair not in HELD_OUT)
# Examples of a split, unless the caller says another number.
LENGTHS = {"train": 40_000, "val": 1_000, "held_out": 1_000}
# The least distance from an object to the canvas edge, and between two counted objects.
MARGIN = 0.02
GAP = 0.03
# The farthest point of a shape from its centre, in units of r; 1 for shapes not listed.
REACH = {"square": 0.8 * 2 ** 0.5, "cross": math.hypot(1, 0.35)}
# A ring's hole and half of a cross's arm, in units of r.
HOLE = 0.55
HALF_ARM = 0.35


# ------------------------------------------------------------------------------ scenes

@dataclass(frozen=True)
class Thing:
    """One object: colour and shape by name, centre (x, y) and circumradius r.

    x, y and r are fractions of the canvas side.
    """
    colour: str
    shape: str
    x: float
    y: float
    r: float


@dataclass(frozen=True)
class Scene:
    """What one picture shows: caption, grey level of the background (0..255), and objects.

    The objects stand in the order in which the caption names them.
    """
    text: str
    background: int
    things: tuple


# ------------------------------------------------------------------------------ drawing

def outline(shape):
    """Return the corners of a shape with r = 1 around (0, 0): list of (x, y), y downwards.

    A circle and a ring have no corners: None.
    """
    if shape == "square":
        return [(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]
    if shape == "cross":
        a = HALF_ARM
        return [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a),
                (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)]
    if shape == "triangle":
        radii = [1] * 3
    elif shape == "star":
        # A star alternates between tip and notch.
        radii = [1, 0.45] * 5
    else:
        return None
    corners = []
    for i, radius in enumerate(radii):
        angle = 2 * math.pi * i / len(radii)
        corners.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return corners


OUTLINES = {shape: outline(shape) for shape in SHAPES}


def inset(u):
    """Return what to take off a polygon's coordinate u, so that shapes keep their exact size.

    Pillow numbers pixels and paints both ends of a line. A right edge at 8 therefore means "up
    to pixel 7". Without this, shapes grow by one sub-pixel.
    """
    if u > 1e-9:
        return 1.0
    if u < -1e-9:
        return 0.0
    return 0.5


def coverage(shape, x, y, r, size):
    """Draw how much of each pixel a shape covers: (mask, corner).

    x, y, r: centre and circumradius, as fractions of the side of a canvas of `size` pixels.
    mask: an L image, 0..255, just large enough for the shape. corner: the pixel (left, top) of
    the canvas where the mask begins.

    The shape is drawn several times finer and averaged over boxes. So a picture at 32 px is the
    area average of the same picture at 512 px.
    """
    left = math.floor((x - r) * size)
    top = math.floor((y - r) * size)
    width = math.ceil((x + r) * size) - left
    height = math.ceil((y + r) * size) - top
    # Sub-pixels along a pixel's side.
    k = max(4, 512 // size)
    mask = Image.new("L", (width * k, height * k), 0)
    pen = ImageDraw.Draw(mask)
    cx = (x * size - left) * k
    cy = (y * size - top) * k
    radius = r * size * k

    def ellipse(e, fill):
        corners = (round(cx - e), round(cy - e), round(cx + e) - 1, round(cy + e) - 1)
        pen.ellipse(corners, fill=fill)

    if OUTLINES[shape] is not None:
        corners = [(round(cx + radius * u - inset(u)), round(cy + radius * v - inset(v)))
                   for u, v in OUTLINES[shape]]
        pen.polygon(corners, fill=255)
    else:
        ellipse(radius, fill=255)
        if shape == "ring":
            ellipse(radius * HOLE, fill=0)
    return mask.reduce(k), (left, top)


def render(scene, size):
    """Draw a scene: RGB image, size × size pixels."""
    image = Image.new("RGB", (size, size), (scene.background,) * 3)
    for thing in scene.things:
        mask, corner = coverage(thing.shape, thing.x, thing.y, thing.r, size)
        image.paste(COLOURS[thing.colour], corner, mask)
    return image


# ------------------------------------------------------------------------------ captions

def article(colour):
    """Put the indefinite article before a colour: "a red", "an orange"."""
    return ("an " if colour[0] in "aeiou" else "a ") + colour


def relation_caption(first, relation, second):
    """Say how the first pair lies from the second: "a red circle above a blue square".

    first, second: (colour, shape). relation: a key of RELATIONS.
    """
    return f"{article(first[0])} {first[1]} {relation} {article(second[0])} {second[1]}"


def parse_caption(caption):
    """Read a caption of the shapes: (kind, word, pairs).

    kind: "size", "relation" or "count". word: the size, the relation or the number, as the
    caption has it. pairs: one (colour, shape) per object. Raises ValueError for another text.
    """
    def one_of(words):
        return f"({'|'.join(words)})"

    text = caption.strip().lower()
    thing = f"{one_of(COLOURS)} {one_of(SHAPES)}"
    if m := re.fullmatch(f"a {one_of(SIZES)} {thing}", text):
        return "size", m[1], [(m[2], m[3])]
    if m := re.fullmatch(f"an? {thing} {one_of(RELATIONS)} an? {thing}", text):
        return "relation", m[3], [(m[1], m[2]), (m[4], m[5])]
    if m := re.fullmatch(f"{one_of(COUNTS)} {one_of(COLOURS)} {one_of(SHAPES.values())}", text):
        singular = {many: one for one, many in SHAPES.items()}[m[3]]
        return "count", m[1], [(m[2], singular)] * COUNTS[m[1]]
    raise ValueError(
        f"{caption!r} is not a caption of the shapes data set: "
        f'write one such as "a red circle above a blue square"')


# ------------------------------------------------------------------------------ random scenes

class RandomChoices:
    """Random choices for one example: equal seeds give equal choices, on any machine.

    Built on `random.random()` alone, the one stream that Python promises never to change.
    """

    def __init__(self, seed):
        self.random = random.Random(seed).random

    def uniform(self, low, high):
        """Return a real number in [low, high)."""
        return low + (high - low) * self.random()

    def choice(self, items):
        """Return one of the items, each equally likely."""
        return items[int(self.random() * len(items))]


def overlaps(thing, other):
    """Tell whether two objects come closer than GAP."""
    apart = thing.r * REACH.get(thing.shape, 1) + GAP + other.r * REACH.get(other.shape, 1)
    return math.hypot(thing.x - other.x, thing.y - other.y) < apart


def scatter(rng, pairs, radii):
    """Place objects at random inside the canvas, at least GAP apart: tuple of `Thing`.

    pairs: one (colour, shape) per object. radii: the range (low, high) of the radius of each.
    An object that overlaps an earlier one makes the function start afresh.
    """
    while True:
        things = []
        for (colour, shape), (low, high) in zip(pairs, radii):
            r = rng.uniform(low, high)
            reach = r * REACH.get(shape, 1) + MARGIN
            x = rng.uniform(reach, 1 - reach)
            y = rng.uniform(reach, 1 - reach)
            thing = Thing(colour, shape, x, y, r)
            if any(overlaps(thing, other) for other in things):
                break
            things.append(thing)
        if len(things) == len(pairs):
            return tuple(things)


def make_scene(rng, pairs):
    """Make one random scene.

    rng: `RandomChoices`. pairs: the (colour, shape) to choose from, SEEN or HELD_OUT. With
    HELD_OUT, one of the two objects of a relation is held out and the other is any.
    """
    background = int(rng.uniform(BACKGROUND[0], BACKGROUND[1] + 1))
    pair = rng.choice(pairs)
    colour, shape = pair
    kind = rng.random()
    if kind < 0.35:
        size = rng.choice(tuple(SIZES))
        text = f"a {size} {colour} {shape}"
        return Scene(text, background, scatter(rng, [pair], [SIZES[size]]))
    if kind >= 0.80:
        word = rng.choice(tuple(COUNTS))
        n = COUNTS[word]
        text = f"{word} {colour} {SHAPES[shape]}"
        return Scene(text, background, scatter(rng, [pair] * n, [COUNT_RADIUS] * n))
    return relation_scene(rng, background, pair, SEEN if pairs is SEEN else SEEN + HELD_OUT)


def relation_scene(rng, background, pair, pairs):
    """Make a scene of `pair` and another of `pairs` of another colour, in a random relation.

    The two objects stand in either order. Each lies about 0.24 from the middle of the canvas.
    """
    relation = rng.choice(tuple(RELATIONS))
    others = [other for other in pairs if other[0] != pair[0]]
    two = [pair, rng.choice(others)]
    if rng.random() < 0.5:
        two.reverse()
    dx, dy = RELATIONS[relation]
    things = []
    for (colour, shape), sign in zip(two, (1, -1)):
        along = sign * (0.24 + rng.uniform(-0.025, 0.025))
        across = rng.uniform(-0.10, 0.10)
        x = 0.5 + dx * along + abs(dy) * across
        y = 0.5 + dy * along + abs(dx) * across
        things.append(Thing(colour, shape, x, y, rng.uniform(*RELATION_RADIUS)))
    return Scene(relation_caption(two[0], relation, two[1]), background, tuple(things))


class CaptionedShapes(Dataset):
    """Pictures of coloured shapes with their captions, drawn when asked for.

    Example i depends on (split, seed, i) alone.

    split: "train", "val" (new pictures of pairs that training saw) or "held_out" (each caption
    names a pair that training never saw).
    size: side in pixels. The scene does not depend on it.
    length: number of examples, by default 40,000 for "train" and 1,000 otherwise.
    `[i]` gives {"image": (3, S, S) float in [-1, 1], "text": str, "scene": Scene}.
    Raises ValueError for an unknown split or for a size or length below one, and IndexError
    outside the length.
    """

    def __init__(self, split="train", size=32, seed=0, length=None):
        if split not in LENGTHS:
            raise ValueError(f"unknown split {split!r}: choose one of {', '.join(LENGTHS)}")
        self.split = split
        self.size = int(size)
        self.seed = int(seed)
        self.length = LENGTHS[split] if length is None else int(length)
        if self.size < 1 or self.length < 1:
            raise ValueError(f"size is {size}, length is {length}: both must be at least 1")

    def __len__(self):
        return self.length

    def scene(self, index):
        """Return the scene of one example, without drawing it."""
        # IndexError outside the length; negative numbers count from the end.
        index = range(self.length)[index]
        rng = RandomChoices(f"{self.split} {self.seed} {index}")
        return make_scene(rng, HELD_OUT if self.split == "held_out" else SEEN)

    def __getitem__(self, index):
        scene = self.scene(index)
        image = to_float(from_pil(render(scene, self.size)))
        return {"image": image, "text": scene.text, "scene": scene}
