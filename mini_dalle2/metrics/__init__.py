"""metrics: is one picture right, and does a generated set look like the real set?

    grader      is everything in a picture as its caption says?
    sets        Fréchet distance, precision and recall, CLIP score, retrieval (unCLIP §5)
    intervals   how far off a number measured on some pictures may be

No network lives here: all take pictures, or embeddings that some model has computed already.

Read next: grader.py.
"""

from ..data.shapes import parse_caption
from .grader import ASPECTS, KINDS, grade, read_objects
from .intervals import (
    Figure, agrees, bootstrap, mean_change, share, share_apart, share_gap, wider, wilson)
from .sets import (
    clip_score, covered, frechet_distance, precision_recall, retrieval_accuracy, retrieval_hits)

__all__ = [
    "ASPECTS", "KINDS", "Figure", "agrees", "bootstrap", "clip_score", "covered",
    "frechet_distance", "grade", "mean_change", "parse_caption", "precision_recall",
    "read_objects", "retrieval_accuracy", "retrieval_hits", "share", "share_apart", "share_gap",
    "wider", "wilson"]
