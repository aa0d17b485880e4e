"""Which pictures a model learns from, and which are kept to look at what it has learned.

    my_pictures/train/  my_pictures/val/  my_pictures/test/     the names of the folders say it
    my_pictures/                                                a hash of each name says it

Validation pictures are never trained on, and test pictures are not used at all. A hash depends on
one name only. So a picture that was trained on stays a training picture when others are added.

Read next: tables.py, which asks for a split.
"""

import hashlib
from pathlib import Path

# What people call the folders of a data set, in lower case. "held_out" is the emoji's test set.
TRAINING = {"train", "training"}
VALIDATION = {"val", "valid", "validation", "dev"}
TEST = {"test", "testing", "eval", "evaluation", "held_out"}
# Of fewer pictures, none can be spared for validation.
FEWEST = 10
# At most this share of the pictures is spared.
SHARE = 0.1


def splits(files, root, most, seed):
    """Choose the split of each picture: list of "train", "val", "test" and "" for none.

    files: the pictures' paths, below `root`. most: as many validation pictures are enough.
    """
    names = [Path(file).relative_to(root).as_posix() for file in files]
    chosen = [folder_split(name) for name in names]
    if "train" not in chosen:
        # "test" may be a subject here: without a folder for training, names say nothing.
        chosen = ["train"] * len(names)
    if "val" not in chosen:
        training = [name for name, split in zip(names, chosen) if split == "train"]
        lent = lend(training, most, seed)
        chosen = ["val" if name in lent else split for name, split in zip(names, chosen)]
    return chosen


def folder_split(name):
    """Return the split that the first folder of a path names: "train", "val", "test" or ""."""
    first = name.split("/")[0].lower()
    for split, folders in (("train", TRAINING), ("val", VALIDATION), ("test", TEST)):
        if first in folders and "/" in name:
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
