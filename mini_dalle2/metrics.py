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

import math
import re
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from . import data

GRID = 128                     # larger pictures are averaged down to this side before they are read; smaller ones are read as they are
MIN_AREA = 0.004               # of the canvas: anything smaller is a stray speck; the smallest object, a counted star, covers 0.019
MAX_CLUTTER = 0.015            # of the canvas: more than this that the objects do not explain spoils a picture
MIN_OVERLAP = 0.80             # intersection over union with the best shape
MAX_COLOUR_ERROR = 55.0        # distance in RGB levels; the two closest palette entries, orange and yellow, are 73 apart
SIZE_TOLERANCE = 0.03          # radius, beyond the range that the data set draws from
ASPECTS = ("all", "colours", "shapes", "layout")    # of a grade, as tables have them
KINDS = ("size", "relation", "count")                                      # of captions


# ---------------------------------------------------------------------------------------------------------------- what the caption asks for

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


# ---------------------------------------------------------------------------------------------------------------- what the picture shows

def to_array(image):
    """PIL image or tensor (3, S, S) in [-1, 1] -> float64 (s, s, 3), 0..255, s = min(S, GRID). Raises ValueError unless square, S ≥ 24."""
    image = image.convert("RGB") if isinstance(image, Image.Image) else data.to_pil(torch.as_tensor(image))
    if image.width != image.height or image.width < 24:
        raise ValueError(f"grade needs a square picture of at least 24 pixels, got {image.width} x {image.height}")
    if image.width > GRID:
        image = image.resize((GRID, GRID), Image.Resampling.BOX)
    return np.asarray(image, dtype=np.float64)


def unmix(pixels, background):
    """Explain each pixel as (1−α)·background + α·colour: (α (K, s, s) in [0, 1] for all K colours, index of the best colour (s, s))."""
    lines = np.array(list(data.COLOURS.values()), dtype=np.float64) - background           # (K, 3)
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
    mask, (left, top) = data.coverage(shape, x, y, r, size)
    drawn = np.asarray(mask, dtype=np.float64) / 255
    left, top = left - corner[0], top - corner[1]
    y0, x0 = max(top, 0), max(left, 0)
    inside = alpha[y0:top + drawn.shape[0], x0:left + drawn.shape[1]] if min(top + drawn.shape[0], left + drawn.shape[1]) > 0 else alpha[:0]
    common = np.minimum(inside, drawn[y0 - top:y0 - top + inside.shape[0], x0 - left:x0 - left + inside.shape[1]]).sum()
    return common / (alpha.sum() + drawn.sum() - common)


UNIT_AREA = {shape: np.asarray(data.coverage(shape, 0.5, 0.5, 0.4, 512)[0], dtype=np.float64).sum() / 255 / (0.4 * 512) ** 2
             for shape in data.SHAPES}                                                     # area at r = 1


def fit(alpha, corner, size):
    """Name a soft mask: (shape, x, y, r, overlap) of the best of all shapes, as fractions of the canvas side.

    The mask's centroid and area give centre and radius (each shape's centroid is its centre); a short search then polishes the best two.
    """
    total = alpha.sum()
    rows, columns = np.arange(alpha.shape[0]) + 0.5, np.arange(alpha.shape[1]) + 0.5
    x = (corner[0] + (alpha.sum(0) @ columns) / total) / size
    y = (corner[1] + (alpha.sum(1) @ rows) / total) / size
    found = []
    for shape in data.SHAPES:
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
    if np.ptp(background) > 40 or not data.BACKGROUND[0] - 25 <= background.mean() <= 255:
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
        distance = {name: np.linalg.norm(pure - rgb) for name, rgb in data.COLOURS.items()}
        name = min(distance, key=distance.get)
        shape, x, y, r, score = fit(alpha, corner, size)
        objects.append({"colour": name if distance[name] <= MAX_COLOUR_ERROR else None, "shape": shape if score >= MIN_OVERLAP else None,
                        "x": float(x), "y": float(y), "r": float(r), "overlap": float(score)})
        mask, (left, top) = data.coverage(shape, x, y, r, size)
        sheet = Image.new("L", (size, size))
        sheet.paste(mask, (left, top))
        redrawn += np.asarray(sheet)[..., None] / 255 * (pure - background)
    unlike = np.abs(pixels - redrawn).max(-1) > 64
    return sorted(objects, key=lambda o: -o["r"]), float(unlike.mean())


# ---------------------------------------------------------------------------------------------------------------- the verdict

def compare(objects, kind, word, asked):
    """Verdict for objects in the order of what was asked: (colours, shapes, layout), each True or False."""
    colours = {o["colour"] for o in objects} == {c for c, _ in asked}
    shapes = {o["shape"] for o in objects} == {s for _, s in asked}
    if len(objects) != len(asked):
        return colours, shapes, False
    if kind == "count":
        return colours, shapes, True
    if kind == "size":
        low, high = data.SIZES[word]
        return colours, shapes, low - SIZE_TOLERANCE <= objects[0]["r"] <= high + SIZE_TOLERANCE
    first, second = objects
    colours = all(o["colour"] == c for o, (c, _) in zip(objects, asked))
    shapes = all(o["shape"] == s for o, (_, s) in zip(objects, asked))
    dx, dy = data.RELATIONS[word]
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


# ---------------------------------------------------------------------------------------------------------------- crowds of pictures

def features(x, name, least=1):
    """Checked float64 copy (N, D) of an array or tensor, on its own device. Raises ValueError if it is not (N ≥ least, D) and finite."""
    x = torch.as_tensor(x).detach().double()
    if x.ndim != 2 or x.shape[0] < least or x.shape[1] < 1:
        raise ValueError(f"{name} must have shape (N, D) with N at least {least}, got {tuple(x.shape)}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} holds values that are not finite")
    return x


def same_width(a, b):
    """Raise ValueError unless both feature sets (N, D) have the same width D."""
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"features of different widths: {a.shape[1]} and {b.shape[1]}")


def frechet_distance(a, b):
    """Squared Fréchet distance of the Gaussians fitted to two feature sets (N_a, D), (N_b, D): a float, 0 for equal mean and covariance.

    |μ_a − μ_b|² + Tr(Σ_a + Σ_b − 2·(Σ_a·Σ_b)^½) (Heusel et al., Eq. 6), covariances over N − 1. It is "FID" only with Inception features,
    and small sets overstate it: see `bootstrap`. Σ_a·Σ_b is not symmetric, but it has the eigenvalues of Σ_a^½·Σ_b·Σ_a^½, which is: no
    complex roots. With fewer rows than columns it is quicker, and the same, to sum up the singular values of A·Bᵀ, of centred A and B.
    Raises ValueError for fewer than two rows, different widths or values that are not finite.
    """
    a, b = features(a, "a", 2), features(b, "b", 2)
    same_width(a, b)
    gap = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (a, b))                         # Σ = xᵀ·x
    if max(len(a), len(b)) < a.shape[1]:
        cross = torch.linalg.svdvals(a @ b.T).sum()                                        # Tr (Σ_a·Σ_b)^½
    else:
        values, vectors = torch.linalg.eigh(a.T @ a)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T                          # Σ_a^½
        cross = torch.linalg.eigvalsh(root @ (b.T @ b) @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(gap + a.square().sum() + b.square().sum() - 2 * cross))


def distances(a, b):
    """Euclidean distances (N_a, N_b), by differences: the quicker |a|² − 2ab + |b|² would lose exactly those of near neighbours."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def covered(points, centres, k=3):
    """Which points (N, D) lie within some ball around a centre (M, D), its radius the distance to its k-th nearest fellow centre: (N,) bool."""
    chunks = centres.split(1024)
    radii = torch.cat([distances(c, centres).topk(k + 1, largest=False).values[:, -1] for c in chunks])   # the nearest of all is itself
    return torch.cat([(distances(p, centres) <= radii).any(1) for p in points.split(1024)])


def precision_recall(real, fake, k=3):
    """Improved precision and recall of fake against real features, (N, D) and (M, D): (precision, recall), both in [0, 1].

    Each set's territory is the union of balls around its points, out to their k-th neighbour. Precision is the share of fakes in the
    territory of the real ones (does it look real?), recall the converse (is everything real also made?). Kynkäänniemi et al., Eq. 1 and 2.
    Raises ValueError for k < 1, sets of k points or fewer, different widths or values that are not finite.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    real, fake = features(real, "real", k + 1), features(fake, "fake", k + 1)
    same_width(real, fake)
    return tuple(float(covered(points, centres, k).double().mean()) for points, centres in ((fake, real), (real, fake)))


def clip_score(z_img, z_txt):
    """Mean of 2.5·max(cos(z_img, z_txt), 0) over N pairs of embeddings (N, D), (N, D) of any length: a float in [0, 2.5].

    Hessel et al., Eq. 1. Raises ValueError if the two differ in shape or hold values that are not finite.
    """
    z_img, z_txt = features(z_img, "z_img"), features(z_txt, "z_txt")
    if z_img.shape != z_txt.shape:
        raise ValueError(f"clip_score needs one caption embedding per picture, got {tuple(z_img.shape)} and {tuple(z_txt.shape)}")
    return float(2.5 * torch.cosine_similarity(z_img, z_txt, dim=1).clamp(min=0).mean())


def retrieval_hits(z_img, z_txt, captions):
    """Of N pictures, those whose most similar caption embedding is their own, among all N: a list of N booleans.

    z_img, z_txt: (N, D), row i of both belongs to captions[i]. Identical captions count as one: no picture could tell them apart.
    Raises ValueError if the three differ in number.
    """
    z_img, z_txt = features(z_img, "z_img"), features(z_txt, "z_txt")
    if not z_img.shape == z_txt.shape or len(captions) != len(z_img):
        raise ValueError(f"retrieval needs N embeddings of each kind and N captions, got {len(z_img)}, {len(z_txt)} and {len(captions)}")
    z_img, z_txt = (z / z.norm(dim=1, keepdim=True).clamp(min=1e-12) for z in (z_img, z_txt))
    found = torch.cat([(z @ z_txt.T).argmax(1) for z in z_img.split(1024)]).tolist()       # (N,)
    return [captions[i] == caption for i, caption in zip(found, captions)]


def retrieval_accuracy(z_img, z_txt, captions):
    """Share of pictures that find their own caption, a float in [0, 1]; see `retrieval_hits`."""
    hits = retrieval_hits(z_img, z_txt, captions)
    return sum(hits) / len(hits)


# ---------------------------------------------------------------------------------------------------------------- how sure

class Figure(NamedTuple):
    """A measured number and the interval in which, 95 times out of 100, the true one lies."""
    value: float
    low: float
    high: float


def deviations(level):
    """How many standard deviations to either side hold this share of a normal distribution: 1.96 for 95 %."""
    return NormalDist().inv_cdf((1 + level) / 2)


def wilson(p, n, level=0.95):
    """A share p of n answers with Wilson's interval, which holds for few answers and near 0 and 1 too: a Figure.

    (p + z²/2n ± z·√(p(1−p)/n + z²/4n²)) / (1 + z²/n). Raises ValueError for no answers.
    """
    if n < 1:
        raise ValueError("a share of nothing")
    z = deviations(level)
    middle, spread = p + z ** 2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z ** 2 / (4 * n ** 2))
    low, high = ((middle + sign * spread) / (1 + z ** 2 / n) for sign in (-1, 1))
    return Figure(p, max(0.0, min(low, p)), min(1.0, max(high, p)))        # at 0 and 1 rounding may put them on the wrong side


def share(hits, level=0.95):
    """The share of yes-or-no answers (N,) that are yes, with Wilson's interval: a Figure. Raises ValueError for no answers."""
    return wilson(sum(map(bool, hits)) / max(1, len(hits)), len(hits), level)


def share_gap(a, b, level=0.95):
    """The share of yes in a minus that in b, answers (N,) to the same N questions: a Figure, with `mean_change`'s interval. Raises ValueError."""
    a, b = (np.asarray(x, dtype=bool) for x in (a, b))
    if a.shape != b.shape or a.ndim != 1 or len(a) == 0:
        raise ValueError(f"share_gap needs two answers to each question, got {a.shape} and {b.shape}")
    value, low, high = mean_change(a.astype(int) - b, level)
    return Figure(value, max(-1.0, low), min(1.0, high))


def mean_change(d, level=0.95):
    """The mean of what answers to N questions changed by, d (N,) of −1, 0, 1 (or sums of such), with the interval of Agresti and Min: a Figure.

    One more change of half a question each way, and one question more without a change, keep few answers that agree from being a certainty:
    m ± z·√((Σd² + 1)/(N + 2) − m²)/√(N + 2), m = Σd/(N + 2).
    """
    n, d = len(d) + 2, np.asarray(d, dtype=float)
    middle = d.sum() / n
    spread = deviations(level) * math.sqrt((((d ** 2).sum() + 1) / n - middle ** 2) / n)
    return Figure(float(d.mean()), float(middle - spread), float(middle + spread))


def share_apart(a, b, level=0.95):
    """The share of yes in a (N,) minus that in b (M,), answers to different questions, with Newcombe's interval, out of both Wilson's: a Figure."""
    p, q = share(a, level), share(b, level)
    d = p.value - q.value
    return Figure(d, d - math.hypot(p.value - p.low, q.high - q.value), d + math.hypot(p.high - p.value, q.value - q.low))


def wider(figure, *others):
    """A Figure with an interval that also holds those of others. A bootstrap believes a share near 0 or 1 at once; closed forms do not."""
    return Figure(figure.value, min(f.low for f in (figure, *others)), max(f.high for f in (figure, *others)))


def bootstrap(statistic, *samples, times=1000, seed=0, level=0.95, halves=False, extrapolate=False):
    """statistic(*samples) with its percentile interval, from `times` samples drawn out of the samples themselves: a Figure.

    samples: arrays or tensors (N, ...); those in one tuple are drawn together, row by row (pictures and their captions, two models asked the
    same), the others each by itself. A statistic that returns a tuple of numbers gives a list of Figures.
    halves: for what rows drawn twice would spoil, such as distances to neighbours, and what depends on how many rows there are, such as the
    Fréchet distance: instead of N rows with repetition, half of them without, which spread as much as N drawn anew (the variance of a mean
    of half the rows about that of all is σ²/N), moved to where the statistic of all rows is.
    extrapolate: with halves, the statistic of infinitely many rows (Chong and Forsyth). A Fréchet distance F(N) is too large by about c/N, for
    the spread of N rows, and their mean, are off by chance, and being off in any direction is a distance. F(N/2) is then too large by 2c/N, and

        F(∞) = 2·F(N) − F(N/2),   F(N/2) the mean of all halves.

    About 1/10 of the error stays (more with fewer rows than columns), and a true distance near zero may come out below it. To first order
    each row moves F(∞) as much as F(N), so that it has the same interval. Raises ValueError for fewer than two rows.
    """
    groups = [group if isinstance(group, tuple) else (group,) for group in samples]
    for group in groups:
        if len(group[0]) < 2 or any(len(sample) != len(group[0]) for sample in group):
            raise ValueError(f"bootstrap needs at least two rows, as many in all samples of a group, got {[len(sample) for sample in group]}")
    rng = np.random.default_rng(seed)

    def once():
        drawn = []
        for group in groups:
            n = len(group[0])
            rows = rng.permutation(n)[:n // 2] if halves else rng.integers(0, n, n)
            drawn += [sample[torch.from_numpy(rows).to(sample.device)] if torch.is_tensor(sample) else np.asarray(sample)[rows] for sample in group]
        return np.atleast_1d(statistic(*drawn)).astype(np.float64)

    value = statistic(*(sample if torch.is_tensor(sample) else np.asarray(sample) for group in groups for sample in group))
    whole, found = np.atleast_1d(value).astype(np.float64), np.stack([once() for _ in range(times)])       # (K,), (times, K)
    if halves:
        whole, found = 2 * whole - found.mean(0) if extrapolate else whole, found - found.mean(0)
        found = found + whole
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2], axis=0)
    figures = [Figure(*map(float, numbers)) for numbers in zip(whole, low, high)]
    return figures if isinstance(value, tuple) else figures[0]


def agrees(difference):
    """Whether a difference is above zero, as a claim says: "yes" or "no" if its interval lies on one side, else "cannot tell"."""
    return "yes" if difference.low > 0 else "no" if difference.high < 0 else "cannot tell"
