"""Pictures, and what is found in them: the grader's verdicts and the judge's embeddings.

`right` measures whether a picture shows its caption. For captioned shapes it is the grader's
verdict on everything in the picture. For other pictures, the judge must find the picture's own
caption among those of the whole set. The paper asked people; nobody is asked here.

Shapes: N pictures (N, 3, S, S) uint8, D = clip_dim of the judge, W its width.
References: unCLIP (2204.06125) §5. Read next: recipes.py.
"""

import functools

import numpy as np
from PIL import Image

from ..data.pixels import to_pil
from ..metrics.grader import grade
from ..metrics.sets import retrieval_hits

# The grader reads no smaller pictures.
LEAST_SIDE = 24


class Seen:
    """Pictures (N, 3, S, S) with their captions; what is found in them is computed when needed."""

    def __init__(self, lab, pictures, captions):
        self.lab = lab
        self.pictures = pictures
        self.captions = captions

    @functools.cached_property
    def images(self):
        """The pictures as PIL images."""
        return [to_pil(picture) for picture in self.pictures]

    @functools.cached_property
    def grades(self):
        """What the grader finds in each picture; for captioned shapes only."""
        return [grade(large_enough(image), caption)
                for image, caption in zip(self.images, self.captions)]

    @functools.cached_property
    def z(self):
        """The judge's embeddings of the pictures (N, D)."""
        return self.lab.embed_pictures(self.pictures)

    @functools.cached_property
    def features(self):
        """The judge's features (N, W), before their projection into CLIP's space.

        Sets of pictures are compared by features: the projection keeps only what captions name.
        """
        return self.lab.features_of(self.pictures)

    @functools.cached_property
    def z_txt(self):
        """The judge's embeddings of the captions (N, D)."""
        return self.lab.embed_captions(self.captions)

    @functools.cached_property
    def right(self):
        """Which pictures show their caption (N,) bool; see the top of this file."""
        if self.lab.shapes:
            return np.array([g["all"] for g in self.grades])
        return np.array(retrieval_hits(self.z, self.z_txt, self.captions))

    def aspect(self, name):
        """For which pictures "colours", "shapes" or "layout" are right (N,) bool; shapes only."""
        return np.array([g[name] for g in self.grades])

    def notes(self):
        """Return each caption; below it, what is wrong with the picture."""
        if not self.lab.shapes:
            return list(self.captions)
        return [note(caption, g) for caption, g in zip(self.captions, self.grades)]


def note(caption, grades):
    """Return a caption of the shapes; below it, what the grader found wrong with its picture."""
    if grades["all"]:
        return caption
    wrong = [name for name in ("colours", "shapes", "layout") if not grades[name]]
    # Right objects and yet not right: the picture has clutter (metrics.grader.MAX_CLUTTER).
    return f"{caption}\nWRONG: {', '.join(wrong) or 'blots or gaps'}"


def large_enough(image):
    """Repeat the pixels of a very small image until the grader takes it."""
    times = -(-LEAST_SIDE // image.width)
    if times == 1:
        return image
    side = times * image.width, times * image.height
    return image.resize(side, Image.Resampling.NEAREST)


def few_colours(image):
    """Reduce an image to 256 colours, rare ones among them: the PNG becomes small.

    Pillow's default method spends nearly all colours on the greys of the backgrounds.
    """
    method, dither = Image.Quantize.MAXCOVERAGE, Image.Dither.NONE
    return image.quantize(256, method, kmeans=3, dither=dither)
