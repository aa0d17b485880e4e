"""The grader: is everything in a picture of captioned shapes as its caption says?

`grade` reads a picture back into objects, in four steps.

1. A pixel is a mixture (1−α)·background + α·colour. Its colour is the palette entry whose line
   through the background passes closest.
2. Connected regions of one colour with α > ½ are the objects.
3. An object's soft mask α is compared with each shape, drawn by the code that draws the data set,
   at the centre and radius that fit best. The best overlap names the shape.
4. The scene so found is drawn and compared with the picture. Holes, dirt and missing parts show up
   as clutter.

Shapes: s side of the picture read, K colours of the palette, h × w window around an object.
References: the data set, data/shapes.py. Read next: sets.py.
"""

import numpy as np
import torch
from PIL import Image

from ..data.pixels import to_pil, to_rgb
from ..data.shapes import (
    BACKGROUND, COLOURS, RELATIONS, SHAPES, SIZES, coverage, parse_caption)
from ..runtime.checks import check_images

# Larger pictures are averaged down to this side; smaller ones are read as they are.
GRID = 128
# Of the canvas: anything smaller is a stray speck. The smallest object, a counted star, covers
# 0.019.
MIN_AREA = 0.004
# Of the canvas: a picture with more that the objects do not explain is not right.
MAX_CLUTTER = 0.015
# Intersection over union with the best shape.
MIN_OVERLAP = 0.80
# Distance in RGB levels. Orange and yellow, the closest entries of the palette, are 73 apart.
MAX_COLOUR_ERROR = 55.0
# Of a radius, beyond the range that the data set has.
SIZE_TOLERANCE = 0.03
# Of a grade, as tables have them.
ASPECTS = ("all", "colours", "shapes", "layout")
# Of captions.
KINDS = ("size", "relation", "count")
# (dy, dx) of the four neighbours of a pixel
NEIGHBOURS = ((0, 1), (1, 0), (0, -1), (-1, 0))


# ---------------------------------------------------------------- pixels

def to_array(image):
    """Turn a PIL image or a tensor (3, S, S) into float64 (s, s, 3), 0 to 255.

    A tensor is uint8, or float in [-1, 1]. s = min(S, GRID). Raises ValueError unless the image is
    square and S ≥ 24.
    """
    if isinstance(image, Image.Image):
        image = to_rgb(image)
    else:
        image = torch.as_tensor(image)
        if image.is_floating_point() and image.ndim == 3:
            check_images(image[None], image.shape[-1])
        image = to_pil(image)
    if image.width != image.height or image.width < 24:
        raise ValueError("grade needs a square picture of at least 24 pixels, got "
                         f"{image.width} x {image.height}")
    if image.width > GRID:
        image = image.resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float64)


def background_of(pixels):
    """The background colour (3,) of pixels (s, s, 3); None if it is not one light grey.

    It is the median of the border: objects never fill half of the border.
    """
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    background = np.median(border, axis=0)
    if np.ptp(background) > 40 or not BACKGROUND[0] - 25 <= background.mean() <= 255:
        return None
    return background


def unmix(pixels, background):
    """Explain each pixel as (1−α)·background + α·colour.

    Return (α (K, s, s) in [0, 1] for each of the colours, the number of the best colour (s, s)).
    """
    lines = np.array(list(COLOURS.values()), dtype=np.float64) - background    # (K, 3)
    delta = pixels - background                                                # (s, s, 3)
    lengths = (lines ** 2).sum(1)                                              # (K,)
    alphas = np.einsum("yxc,kc->kyx", delta, lines) / lengths[:, None, None]   # (K, s, s)
    alphas = alphas.clip(0, 1)
    error = [((delta - alpha[..., None] * line) ** 2).sum(-1)
             for alpha, line in zip(alphas, lines)]
    return alphas, np.argmin(error, axis=0)


# ---------------------------------------------------------------- regions

def shifted(array, dy, dx, fill):
    """Move an array by (dy, dx) pixels, each -1, 0 or 1; what comes in from outside is `fill`."""
    padded = np.pad(array, 1, constant_values=fill)
    return padded[1 - dy:padded.shape[0] - 1 - dy, 1 - dx:padded.shape[1] - 1 - dx]


def regions(labels):
    """Find connected regions (four neighbours) of equal label: an array of region numbers.

    A region's number is the largest pixel number in it; 0 where the label is 0. Each pixel starts
    with a number of its own, and takes over the largest among its neighbours of equal label until
    nothing changes.
    """
    numbers = np.arange(1, labels.size + 1).reshape(labels.shape)
    ids = np.where(labels > 0, numbers, 0)
    same = [(d, shifted(labels, *d, 0) == labels) for d in NEIGHBOURS]
    while True:
        before = ids
        for d, equal in same:
            ids = np.maximum(ids, np.where(equal, shifted(ids, *d, 0), 0))
        # A pixel may also take over what the pixel of its number has become. This halves the way
        # that is left, each round.
        flat = np.concatenate([[0], ids.ravel()])
        ids = flat[ids]
        if (ids == before).all():
            return ids


def owners(ids, least):
    """Which large region each pixel belongs to (s, s), 0 for none; and the regions' numbers.

    Regions of less than `least` pixels are specks. The pixels of soft edges, up to two pixels wide,
    belong to the region beside them.
    """
    names, areas = np.unique(ids, return_counts=True)
    kept = [i for i, area in zip(names, areas) if i > 0 and area >= least]
    owner = np.where(np.isin(ids, kept), ids, 0)
    for _ in range(2):
        for d in NEIGHBOURS:
            owner = np.where(owner > 0, owner, shifted(owner, *d, 0))
    return owner, kept


# ---------------------------------------------------------------- shapes

def overlap(alpha, corner, shape, place, size):
    """Intersection over union, Σ min / Σ max, of a soft mask with a drawn shape.

    alpha: (h, w); corner: (left, top), its upper left pixel; place: (x, y, r) of the shape, as
    fractions of the side, which has `size` pixels.
    """
    mask, (left, top) = coverage(shape, *place, size)
    drawn = np.asarray(mask, dtype=np.float64) / 255
    left, top = left - corner[0], top - corner[1]
    y0, x0 = max(top, 0), max(left, 0)
    y1, x1 = top + drawn.shape[0], left + drawn.shape[1]
    inside = alpha[y0:y1, x0:x1] if min(y1, x1) > 0 else alpha[:0]
    there = drawn[y0 - top:y0 - top + inside.shape[0], x0 - left:x0 - left + inside.shape[1]]
    common = np.minimum(inside, there).sum()
    return common / (alpha.sum() + drawn.sum() - common)


def unit_area(shape):
    """The area of a shape with r = 1."""
    mask = np.asarray(coverage(shape, 0.5, 0.5, 0.4, 512)[0], dtype=np.float64)
    return mask.sum() / 255 / (0.4 * 512) ** 2


UNIT_AREA = {shape: unit_area(shape) for shape in SHAPES}


def best_shape(alpha, corner, size):
    """Name a soft mask (h, w): (shape, x, y, r, overlap) of the shape that fits best.

    x, y, r are fractions of the side. The mask's centroid and area give centre and radius, because
    each shape's centroid is its centre. A short search then improves the best two.
    """
    total = alpha.sum()
    rows, columns = np.arange(alpha.shape[0]) + 0.5, np.arange(alpha.shape[1]) + 0.5
    x = (corner[0] + (alpha.sum(0) @ columns) / total) / size
    y = (corner[1] + (alpha.sum(1) @ rows) / total) / size
    found = []
    for shape in SHAPES:
        place = (x, y, (total / UNIT_AREA[shape]) ** 0.5 / size)
        found.append((overlap(alpha, corner, shape, place, size), shape, place))
    best = []
    for score, shape, place in sorted(found, reverse=True)[:2]:
        for step in (0.5 / size, 0.25 / size):
            tries = [(score, place)]
            tries += [(overlap(alpha, corner, shape, near, size), near)
                      for near in around(place, step)]
            score, place = max(tries)
        best.append((score, shape, place))
    score, shape, (x, y, r) = max(best)
    return shape, x, y, r, score


def around(place, step):
    """The six places (x, y, r) that differ from a place by one step in one number."""
    found = []
    for axis in range(3):
        for sign in (1, -1):
            moved = list(place)
            moved[axis] = place[axis] + step * sign
            found.append(tuple(moved))
    return found


# ---------------------------------------------------------------- objects

def read_objects(image):
    """Read a picture back into objects: (list of objects, the largest first; clutter).

    An object is {"colour", "shape", "x", "y", "r", "overlap"}. Colour or shape is None where
    nothing fits; x, y, r are fractions of the side. Clutter is the fraction of the canvas that
    looks unlike these objects drawn on this background; 1.0 if the background is not one light
    grey.
    """
    pixels = to_array(image)
    size = pixels.shape[0]
    background = background_of(pixels)
    if background is None:
        return [], 1.0
    alphas, colour = unmix(pixels, background)
    solid = np.take_along_axis(alphas, colour[None], 0)[0] > 0.5
    ids = regions(np.where(solid, colour + 1, 0))
    owner, kept = owners(ids, MIN_AREA * size ** 2)
    objects, redrawn = [], np.broadcast_to(background, pixels.shape).copy()
    for i in kept:
        # A region's number is the number of one of its pixels.
        alpha = alphas[colour.ravel()[i - 1]]
        found, pure = read_object(pixels, owner == i, alpha)
        objects.append(found)
        mask = drawn_mask(found, size)
        redrawn += mask[..., None] * (pure - background)
        if found["overlap"] < MIN_OVERLAP:
            found["shape"] = None
    unlike = np.abs(pixels - redrawn).max(-1) > 64
    return sorted(objects, key=lambda thing: -thing["r"]), float(unlike.mean())


def read_object(pixels, own, alpha):
    """Read one object: ({"colour", "shape", …}, its pure colour (3,)).

    pixels: (s, s, 3); own: which of them are the object's (s, s) bool; alpha: (s, s), their share
    of the object's colour.
    """
    ys, xs = np.nonzero(own)
    window = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
    corner = int(xs.min()), int(ys.min())
    alpha = alpha[window] * own[window]
    # The most solid pixels show the pure colour.
    core = pixels[window][alpha >= min(0.9, np.quantile(alpha[alpha > 0.5], 0.7))]
    pure = np.median(core, axis=0)
    distance = {name: np.linalg.norm(pure - rgb) for name, rgb in COLOURS.items()}
    name = min(distance, key=distance.get)
    shape, x, y, r, score = best_shape(alpha, corner, pixels.shape[0])
    found = {
        "colour": name if distance[name] <= MAX_COLOUR_ERROR else None, "shape": shape,
        "x": float(x), "y": float(y), "r": float(r), "overlap": float(score)}
    return found, pure


def drawn_mask(thing, size):
    """Draw an object's shape on a canvas: its mask (size, size) in [0, 1]."""
    mask, (left, top) = coverage(thing["shape"], thing["x"], thing["y"], thing["r"], size)
    sheet = Image.new("L", (size, size))
    sheet.paste(mask, (left, top))
    return np.asarray(sheet) / 255


# ---------------------------------------------------------------- verdicts

def compare(objects, kind, word, asked):
    """Compare objects, in the order of what was asked: (colours, shapes, layout), True or False."""
    colours = {thing["colour"] for thing in objects} == {colour for colour, _ in asked}
    shapes = {thing["shape"] for thing in objects} == {shape for _, shape in asked}
    if len(objects) != len(asked):
        return colours, shapes, False
    if kind == "count":
        return colours, shapes, True
    if kind == "size":
        low, high = SIZES[word]
        return colours, shapes, low - SIZE_TOLERANCE <= objects[0]["r"] <= high + SIZE_TOLERANCE
    colours = all(thing["colour"] == colour for thing, (colour, _) in zip(objects, asked))
    shapes = all(thing["shape"] == shape for thing, (_, shape) in zip(objects, asked))
    return colours, shapes, related(*objects, word)


def related(first, second, word):
    """Whether the first of two objects is "above", "left of", … the second."""
    dx, dy = RELATIONS[word]
    x, y = first["x"] - second["x"], first["y"] - second["y"]
    along = dx * x + dy * y
    across = abs(dy * x) + abs(dx * y)
    return along > 0.15 and along > across


def grade(image, caption):
    """Judge one picture of captioned shapes.

    image: PIL image or tensor (3, S, S), uint8 or float in [-1, 1], S ≥ 24.
    caption: one of the data set's.
    Return {"colours", "shapes", "layout", "all": bool, "objects": list, "clutter": float}.
    colours, shapes: each object has what the caption gives it. layout: there are as many objects as
    asked, and their size or relation is right. all: everything, and no clutter besides. The two
    objects of a relation are compared with the caption in both orders, and the better order
    counts: exchanged colours are then an error in the colours alone. Raises ValueError for another
    caption, or a picture that cannot be read.
    """
    kind, word, asked = parse_caption(caption)
    objects, clutter = read_objects(image)
    orders = [objects, objects[::-1]] if kind == "relation" else [objects]
    verdicts = (compare(order, kind, word, asked) for order in orders)
    colours, shapes, layout = max(verdicts, key=sum)
    return {
        "colours": colours, "shapes": shapes, "layout": layout,
        "all": colours and shapes and layout and clutter <= MAX_CLUTTER,
        "objects": objects, "clutter": clutter}
