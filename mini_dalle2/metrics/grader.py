"""Metrics: did the picture come out right, and does the crowd of pictures look like the real crowd?

`grade` judges one picture of captioned shapes against its caption, object by object. The others are the field's usual figures (§5 of the
paper): Fréchet distance (Table 2), precision and recall (Figure 13), CLIP score and retrieval. All take features or embeddings that some
model has computed already: no network lives here.

    FID = |μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2·(Σ_a·Σ_b)^½)

How `grade` reads a picture. Each pixel is taken as a mixture (1−α)·background + α·colour, the colour being the palette entry whose line
through the background passes closest; regions of one colour with α > ½ are the objects; and an object's soft mask α is compared with each
shape, drawn by the same code that draws the data set, at the centre and radius that fit best. Best overlap names the shape. Last, the
scene so found is drawn and held against the picture: holes, dirt and missing parts show up as clutter.

A number measured on some pictures is not the number of all pictures: `bootstrap` and `share` say how far off it may be. The Fréchet distance
is worse: of few pictures it comes out far too large, of two crowds of the same kind too. `bootstrap` can take most of that away.

Shapes: N pictures, D feature width, S side of a picture. Features are (N, D) arrays or tensors; sums are done in float64.
References: Heusel et al. 2017 (FID); Kynkäänniemi et al. 2019, arXiv 1904.06991 (precision and recall); Hessel et al. 2021 (CLIP score);
Chong and Forsyth 2020, arXiv 1911.07023 (extrapolated FID); Efron 1979 (bootstrap); Wilson 1927, Agresti and Min 2005, and Newcombe 1998
(intervals of a share, and of the difference of two, to the same questions and to different ones).
Read next: `data.py` (what is graded), `pipeline.py` (what gets graded).
"""

import numpy as np
import torch
from PIL import Image

from ..data.pixels import to_pil
from ..data.shapes import (
    BACKGROUND, COLOURS, RELATIONS, SHAPES, SIZES, coverage, parse_caption)


GRID = 128                     # larger pictures are averaged down to this side before they are read; smaller ones are read as they are
MIN_AREA = 0.004               # of the canvas: anything smaller is a stray speck; the smallest object, a counted star, covers 0.019
MAX_CLUTTER = 0.015            # of the canvas: more than this that the objects do not explain spoils a picture
MIN_OVERLAP = 0.80             # intersection over union with the best shape
MAX_COLOUR_ERROR = 55.0        # distance in RGB levels; the two closest palette entries, orange and yellow, are 73 apart
SIZE_TOLERANCE = 0.03          # radius, beyond the range that the data set draws from
ASPECTS = ("all", "colours", "shapes", "layout")    # of a grade, as tables have them
KINDS = ("size", "relation", "count")                                      # of captions


def to_array(image):
    """PIL image or tensor (3, S, S) in [-1, 1] -> float64 (s, s, 3), 0..255, s = min(S, GRID). Raises ValueError unless square, S ≥ 24."""
    image = image.convert("RGB") if isinstance(image, Image.Image) else to_pil(torch.as_tensor(image))
    if image.width != image.height or image.width < 24:
        raise ValueError(f"grade needs a square picture of at least 24 pixels, got {image.width} x {image.height}")
    if image.width > GRID:
        image = image.resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float64)


def unmix(pixels, background):
    """Explain each pixel as (1−α)·background + α·colour: (α (K, s, s) in [0, 1] for all K colours, index of the best colour (s, s))."""
    lines = np.array(list(COLOURS.values()), dtype=np.float64) - background           # (K, 3)
    delta = pixels - background                                                            # (s, s, 3)
    alphas = np.einsum("yxc,kc->kyx", delta, lines) / (lines ** 2).sum(1)[:, None, None]   # (K, s, s)
    alphas = alphas.clip(0, 1)
    # |δ − α·l|² = |δ|² − 2α δ·l + α²|l|², of which |δ|² is the same for all colours
    error = [((delta - a[..., None] * line) ** 2).sum(-1) for a, line in zip(alphas, lines)]
    return alphas, np.argmin(error, axis=0)


def shifted(array, dy, dx, fill):
    """The array moved by (dy, dx) pixels, -1, 0 or 1 each; what comes in from outside is `fill`."""
    padded = np.pad(array, 1, constant_values=fill)
    return padded[1 - dy:padded.shape[0] - 1 - dy, 1 - dx:padded.shape[1] - 1 - dx]


def regions(labels):
    """Connected regions (four neighbours) of equal label: array of region ids, each the largest pixel number in it; 0 where the label is 0.

    Each pixel starts with a number of its own and keeps taking over the largest among its neighbours of equal label, until nothing changes.
    """
    ids = np.where(labels > 0, np.arange(1, labels.size + 1).reshape(labels.shape), 0)
    same = [(d, shifted(labels, *d, 0) == labels) for d in ((0, 1), (1, 0), (0, -1), (-1, 0))]
    while True:
        before = ids
        for d, equal in same:
            ids = np.maximum(ids, np.where(equal, shifted(ids, *d, 0), 0))
        # A pixel may also jump to whatever its region's current chief has become: halves the distance left each round.
        flat = np.concatenate([[0], ids.ravel()])
        ids = flat[ids]
        if (ids == before).all():
            return ids


def overlap(alpha, corner, shape, x, y, r, size):
    """Intersection over union of a soft mask, whose upper left pixel is `corner` (left, top), with a drawn shape: Σ min / Σ max."""
    mask, (left, top) = coverage(shape, x, y, r, size)
    drawn = np.asarray(mask, dtype=np.float64) / 255
    left, top = left - corner[0], top - corner[1]
    y0, x0 = max(top, 0), max(left, 0)
    inside = alpha[y0:top + drawn.shape[0], x0:left + drawn.shape[1]] if min(top + drawn.shape[0], left + drawn.shape[1]) > 0 else alpha[:0]
    common = np.minimum(inside, drawn[y0 - top:y0 - top + inside.shape[0], x0 - left:x0 - left + inside.shape[1]]).sum()
    return common / (alpha.sum() + drawn.sum() - common)


UNIT_AREA = {shape: np.asarray(coverage(shape, 0.5, 0.5, 0.4, 512)[0], dtype=np.float64).sum() / 255 / (0.4 * 512) ** 2
             for shape in SHAPES}                                                     # area at r = 1


def fit(alpha, corner, size):
    """Name a soft mask: (shape, x, y, r, overlap) of the best of all shapes, as fractions of the canvas side.

    The mask's centroid and area give centre and radius (each shape's centroid is its centre); a short search then polishes the best two.
    """
    total = alpha.sum()
    rows, columns = np.arange(alpha.shape[0]) + 0.5, np.arange(alpha.shape[1]) + 0.5
    x = (corner[0] + (alpha.sum(0) @ columns) / total) / size
    y = (corner[1] + (alpha.sum(1) @ rows) / total) / size
    found = []
    for shape in SHAPES:
        place = (x, y, (total / UNIT_AREA[shape]) ** 0.5 / size)
        found.append((overlap(alpha, corner, shape, *place, size), shape, place))
    best = []
    for score, shape, place in sorted(found, reverse=True)[:2]:
        for step in (0.5 / size, 0.25 / size):
            tries = [tuple(p + step * d for p, d in zip(place, move)) for move in
                     ((1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1))]
            score, place = max([(score, place)] + [(overlap(alpha, corner, shape, *p, size), p) for p in tries])
        best.append((score, shape, place))
    score, shape, (x, y, r) = max(best)
    return shape, x, y, r, score


def read_objects(image):
    """Read a picture back into objects: (list of {"colour", "shape", "x", "y", "r", "overlap"}, largest first; clutter).

    colour or shape is None where nothing fits; x, y, r are fractions of the side; clutter is the fraction of the canvas that looks
    unlike these objects drawn afresh on this background, 1.0 if the background is not one light grey.
    """
    pixels = to_array(image)
    size = pixels.shape[0]
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    background = np.median(border, axis=0)                                                 # objects never fill half of the border
    if np.ptp(background) > 40 or not BACKGROUND[0] - 25 <= background.mean() <= 255:
        return [], 1.0
    alphas, colour = unmix(pixels, background)
    solid = np.take_along_axis(alphas, colour[None], 0)[0] > 0.5
    ids = regions(np.where(solid, colour + 1, 0))
    names, areas = np.unique(ids, return_counts=True)
    kept = [i for i, area in zip(names, areas) if i > 0 and area >= MIN_AREA * size ** 2]
    owner = np.where(np.isin(ids, kept), ids, 0)
    for _ in range(2):                                                                     # soft edges belong to the region beside them
        for d in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            owner = np.where(owner > 0, owner, shifted(owner, *d, 0))
    objects, redrawn = [], np.broadcast_to(background, pixels.shape).copy()
    for i in kept:
        ys, xs = np.nonzero(owner == i)
        window = slice(ys.min(), ys.max() + 1), slice(xs.min(), xs.max() + 1)
        corner = int(xs.min()), int(ys.min())
        line = colour.ravel()[i - 1]                                                       # a region's id is one of its pixels' number
        alpha = alphas[line][window] * (owner[window] == i)
        core = pixels[window][alpha >= min(0.9, np.quantile(alpha[alpha > 0.5], 0.7))]     # the most solid pixels show the pure colour
        pure = np.median(core, axis=0)
        distance = {name: np.linalg.norm(pure - rgb) for name, rgb in COLOURS.items()}
        name = min(distance, key=distance.get)
        shape, x, y, r, score = fit(alpha, corner, size)
        objects.append({"colour": name if distance[name] <= MAX_COLOUR_ERROR else None, "shape": shape if score >= MIN_OVERLAP else None,
                        "x": float(x), "y": float(y), "r": float(r), "overlap": float(score)})
        mask, (left, top) = coverage(shape, x, y, r, size)
        sheet = Image.new("L", (size, size))
        sheet.paste(mask, (left, top))
        redrawn += np.asarray(sheet)[..., None] / 255 * (pure - background)
    unlike = np.abs(pixels - redrawn).max(-1) > 64
    return sorted(objects, key=lambda o: -o["r"]), float(unlike.mean())


def compare(objects, kind, word, asked):
    """Verdict for objects in the order of what was asked: (colours, shapes, layout), each True or False."""
    colours = {o["colour"] for o in objects} == {c for c, _ in asked}
    shapes = {o["shape"] for o in objects} == {s for _, s in asked}
    if len(objects) != len(asked):
        return colours, shapes, False
    if kind == "count":
        return colours, shapes, True
    if kind == "size":
        low, high = SIZES[word]
        return colours, shapes, low - SIZE_TOLERANCE <= objects[0]["r"] <= high + SIZE_TOLERANCE
    first, second = objects
    colours = all(o["colour"] == c for o, (c, _) in zip(objects, asked))
    shapes = all(o["shape"] == s for o, (_, s) in zip(objects, asked))
    dx, dy = RELATIONS[word]
    x, y = first["x"] - second["x"], first["y"] - second["y"]
    along, across = dx * x + dy * y, abs(dy * x) + abs(dx * y)
    return colours, shapes, along > 0.15 and along > across


def grade(image, caption):
    """Judge one picture of captioned shapes: {"colours", "shapes", "layout", "all": bool, "objects": list, "clutter": float}.

    image: PIL image or tensor (3, S, S) in [-1, 1], S ≥ 24. caption: one that `CaptionedShapes` could give, else ValueError.
    colours, shapes: each object has what the caption gives it. layout: as many objects as asked, and their size or relation is right.
    all: everything, and no clutter besides. The two objects of a relation are held against the caption in both orders; the kinder reading
    counts, so that swapped colours are an error in the colours alone.
    """
    kind, word, asked = parse_caption(caption)
    objects, clutter = read_objects(image)
    orders = [objects, objects[::-1]] if kind == "relation" else [objects]
    colours, shapes, layout = max((compare(order, kind, word, asked) for order in orders), key=sum)
    return {"colours": colours, "shapes": shapes, "layout": layout, "all": colours and shapes and layout and clutter <= MAX_CLUTTER,
            "objects": objects, "clutter": clutter}
