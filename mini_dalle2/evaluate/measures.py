"""Measures of generated sets, as Figures: a number with its 95 % interval.

Generated sets are compared with true pictures of other captions. True pictures are compared with
them too: their figures are the best that can be reached.

Shapes: N pictures, D width of the judge's embeddings or features.
References: unCLIP (2204.06125) §5. Read next: quality.py.
"""

import numpy as np
import torch
from torch.nn import functional as F

from ..metrics.intervals import Figure, bootstrap, share, share_gap, wider, wilson
from ..metrics.sets import clip_score, frechet_distance, precision_recall

# Bootstrap samples of what is slow to compute.
TIMES = 200
# Pictures that a claim must rest on, where not all of a set count.
ENOUGH = 20
COLUMNS = {
    "right ↑": "%", "CLIP score ↑": "", "Fréchet distance ↓": "", "precision ↑": "%",
    "recall ↑": "%"}
DIVERSITY = (
    "Diversity: root mean square difference, in grey levels, of two pictures of the same caption. "
    "Of captioned shapes only pairs count where both pictures are right, and nothing is claimed "
    f"from fewer than {ENOUGH // 2} pairs. Background, place and size are what may differ then.")


# -------------------------------------------------------------------- means and differences

def gap(a, b):
    """mean(a) − mean(b) for the same captions, of numbers (N,) or of yes and no: a Figure."""
    if np.asarray(a).dtype == np.asarray(b).dtype == bool:
        return share_gap(a, b)
    both = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    return bootstrap(lambda x, y: x.mean() - y.mean(), both)


def mean_of_known(values):
    """The mean of numbers (N,) without those that are NaN: a Figure, None for fewer than two."""
    known = np.asarray(values, dtype=float)[~np.isnan(values)]
    return bootstrap(np.mean, known) if len(known) > 1 else None


def enough(*rows):
    """Whether each row has so many numbers that are not NaN that a claim can rest on its mean."""
    return all((~np.isnan(row)).sum() >= ENOUGH // 2 for row in rows)


def distance(a, b):
    """Fréchet distance of two sets of features (N, D), (M, D), as if both were infinite: a Figure.

    Near zero, and perhaps below, if they are alike.
    """
    return bootstrap(frechet_distance, a, b, times=TIMES, halves=True, extrapolate=True)


def distance_gap(worse, better, real):
    """How much farther from `real` (M, D) one set (N, D) is than another: a Figure.

    Row i of both sets is for the same caption.
    """
    def difference(a, b, c):
        return frechet_distance(a, c) - frechet_distance(b, c)

    return bootstrap(
        difference, (worse, better), real, times=TIMES, halves=True, extrapolate=True)


def picture_distance_gap(lab, worse, better):
    """The same for two `Seen` and the true pictures, in the judge's features."""
    return distance_gap(worse.features, better.features, lab.others().features)


# -------------------------------------------------------------------- sets of pictures

def set_figures(lab, seen):
    """The Figures of COLUMNS; precision and recall are against as many true pictures."""
    n = len(seen.captions)
    true = lab.others().features
    territories = bootstrap(precision_recall, true[:n], seen.features, times=TIMES, halves=True)
    return [
        share(seen.right),
        bootstrap(clip_score, (seen.z, seen.z_txt)),
        distance(seen.features, true),
        *(within_a_share(figure, n) for figure in territories)]


def within_a_share(figure, n):
    """Widen the interval of a share of n answers by Wilson's, within 0 and 1.

    A bootstrap knows that other samples have other territories, but takes a share of 0 or 1 for
    certain. Wilson's interval does not.
    """
    value, low, high = wider(figure, wilson(figure.value, n))
    return Figure(value, max(0.0, low), min(1.0, high))


def true_figures(lab, n):
    """The Figures of COLUMNS for true pictures of the first n captions: the best there can be."""
    return lab.remembered(("figures", n), lambda: set_figures(lab, lab.true(n)))


def apart(a, b):
    """How far two tables (N, 3, S, S) lie apart: root mean squares (N,) in grey levels."""
    return (a.float() - b.float()).square().flatten(1).mean(1).sqrt().numpy()


def diversity(seen, again):
    """How far two pictures of each caption lie apart, in grey levels (N,).

    again: second pictures, of the first N captions. NaN where the grader finds one of the two
    wrong: pictures differ most where one is wrong.
    """
    n = len(again.captions)
    both = seen.right[:n] & again.right | (not seen.lab.shapes)
    return np.where(both, apart(seen.pictures[:n], again.pictures), np.nan)


def cosine(a, b):
    """Cosines (N,) of embeddings (N, D), row by row."""
    return F.cosine_similarity(a, b).numpy()


# -------------------------------------------------------------------- objects in pictures of shapes

def nearest_object(thing, others, kind):
    """The distance to the nearest of other objects of its kind; NaN if there is none."""
    same = (other for other in others if all(thing[name] == other[name] for name in kind))
    distances = (np.hypot(thing["x"] - other["x"], thing["y"] - other["y"]) for other in same)
    return min(distances, default=np.nan)


def moved(a, b, kind=("colour", "shape")):
    """How far objects lie from the nearest of their kind in other pictures, in pixels (N,).

    a, b: Seen. The mean over the objects of each picture of a; NaN where one has no counterpart.
    """
    found = []
    for ours, theirs in zip(a.grades, b.grades):
        distances = [nearest_object(thing, theirs["objects"], kind) for thing in ours["objects"]]
        found.append(np.mean(distances) if distances else np.nan)
    return a.pictures.shape[-1] * np.array(found)


def backgrounds(seen):
    """The grey of each picture's background, the median of its border: (N,) in grey levels."""
    rows = seen.pictures[..., [0, -1], :].flatten(1)
    columns = seen.pictures[..., [0, -1]].flatten(1)
    return torch.cat([rows, columns], dim=1).float().median(dim=1).values.numpy()
