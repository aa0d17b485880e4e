"""Which pictures a model learns from, and which are kept to look at what it has learned.

    my_pictures/train/  my_pictures/val/  my_pictures/test/     the names of the folders say it
    my_pictures/                                                a hash of each name says it

The folders may lie deeper (images/train/), and their names may have more words (train2017,
train_images, train-00000.tar). Hugging Face's `datasets` reads the names in the same way.

Validation pictures are never trained on, and test pictures are not used at all. A hash depends on
one name only. So a picture that was trained on stays a training picture when others are added.
Of fewer than a hundred pictures, all are trained on. When such a set grows past a hundred, its
first validation pictures are new only to a new model.

Read next: tables.py, which asks for a split.
"""

import hashlib
import os
import re
from pathlib import Path

# What people call the folders of a data set, in lower case. "held_out" is the emoji's test set.
TRAINING = {"train", "training"}
VALIDATION = {"val", "valid", "validation", "dev"}
TEST = {"test", "testing", "eval", "evaluation", "held_out"}
FEWEST = 100
# At most this share of the pictures is spared.
SHARE = 0.1


def splits(files, root, most, seed):
    """Choose the split of each picture: list of "train", "val", "test" and "" for none.

    files: the pictures' paths, below `root`. most: as many validation pictures are enough.
    """
    names = [Path(os.path.relpath(file, root)).as_posix() for file in files]
    chosen = [folder_split(name) for name in names]
    if "train" not in chosen or not {"val", "test"} & set(chosen):
        # "test" or "train" may be a subject here. A split has a folder for training and another.
        chosen = ["train"] * len(names)
    if "val" not in chosen:
        training = [name for name, split in zip(names, chosen) if split == "train"]
        lent = lend(training, most, seed)
        chosen = ["val" if name in lent else split for name, split in zip(names, chosen)]
    return chosen


def folder_split(name):
    """Return the split that a folder of a path names: "train", "val", "test" or "".

    name: the path with slashes. The outermost folder that names a split counts.
    """
    for folder in name.lower().split("/")[:-1]:
        # The separators are those of `datasets`.
        words = {folder, *re.split("[-._ 0-9]+", folder)}
        for split, known in (("train", TRAINING), ("val", VALIDATION), ("test", TEST)):
            if words & known:
                return split
    return ""


def lend(names, most, seed):
    """Choose the training pictures that become validation pictures: set of names.

    Pictures with a small hash are chosen: up to a tenth of all, and about `most` of a large set.
    """
    if len(names) < FEWEST:
        return set()
    share = min(SHARE, most / len(names))
    return {name for name in names if place(name, seed) < share} or {
        min(names, key=lambda name: place(name, seed))}


def place(name, seed):
    """Return where a name's hash lies among all hashes, in [0, 1)."""
    digest = hashlib.sha256(f"{seed} {name}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2 ** 64
