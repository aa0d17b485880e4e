"""The captioned pictures of a run, at any size: drawn or read from a folder, split, and kept as tables, in memory or on disk.

Shapes: N pictures. Read next: data.py, folder.py.
"""

import hashlib
import math
import os
from pathlib import Path

import torch
from torch.utils.data import Subset

from .data import CaptionedFolder, CaptionedShapes, load_table, to_float
from .distributed import is_main


def machine_memory():
    """Bytes of memory that this machine has; infinitely many on a system that does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return math.inf


def is_large(nbytes):
    """Whether a table of pictures is to lie on disk: if it takes more than a quarter of the memory that each process on this machine can have."""
    return nbytes > machine_memory() / 4 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def on_device(batch, device):
    """A tensor on the device. From memory to a GPU by way of pinned memory: the processor does not wait for the copy."""
    if batch.device.type == "cpu" and device.type == "cuda":
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=True)


def pictures_at(indices, table, device):
    """Rows of a table of pictures (N, 3, S, S) uint8, wherever it lies -> (B, 3, S, S) float in [-1, 1], on the device."""
    return to_float(on_device(table[indices.to(table.device)], device))


class Pictures:
    """The captioned pictures of a run: data sets of any size, and tables of them; the last training table is kept. Large ones lie in `scratch`."""

    def __init__(self, cfg, device, scratch=None):
        self.cfg, self.device, self.scratch = cfg, device, scratch
        self.last, self.there = (None, None), math.inf                     # as many shapes as one likes
        if cfg.source != "shapes":
            self.is_split = all(Path(cfg.source, split).is_dir() for split in ("train", "val"))
            folder = self.folder("train", 1)
            self.there = len(folder)
            print(folder.report)

    def folder(self, split, size):
        """All pictures of the folder, at size × size; of its subfolder for the split, if it has both "train" and "val"."""
        return CaptionedFolder(Path(self.cfg.source, split) if self.is_split else self.cfg.source, size)

    def dataset(self, split, size, limit):
        """At most `limit` examples of "train" or "val". A folder that is not split lends a tenth to "val", chosen by the seed."""
        if self.cfg.source == "shapes":
            return CaptionedShapes(split, size, self.cfg.seed, limit)
        folder = self.folder(split, size)
        order = torch.randperm(len(folder), generator=torch.Generator().manual_seed(self.cfg.seed)).tolist()
        lent = 0 if self.is_split else min(self.cfg.val_images, len(folder) // 10)
        if lent == 0:                                                      # or too few to spare any: then "val" shows training pictures
            return Subset(folder, order[:limit])
        return Subset(folder, order[:lent][:limit] if split == "val" else order[lent:][:limit])

    def table(self, split, size, limit):
        """-> uint8 pictures (N, 3, size, size), and their N captions. Where: on the GPU if they take less than a quarter of it, else see `is_large`."""
        if split == "val":
            return load_table(self.dataset(split, size, limit), progress=False)
        if self.last[0] != (size, limit):
            self.last = (None, None)                                       # the old one goes before the new one comes
            dataset = self.dataset(split, size, limit)
            pictures, captions = load_table(dataset, is_main(), self.scratch if is_large(len(dataset) * 3 * size ** 2) else None)
            if self.device.type == "cuda" and pictures.nbytes < torch.cuda.mem_get_info(self.device)[0] / 4:
                pictures = pictures.to(self.device)
            self.last = (size, limit), (pictures, captions)
        return self.last[1]

    def captions(self):
        """All captions of the training pictures, without drawing or reading those."""
        dataset = self.dataset("train", 1, self.cfg.images)
        if self.cfg.source == "shapes":
            return [dataset.scene(i).text for i in range(len(dataset))]
        return [text for i in dataset.indices for text in dataset.dataset.texts(i)]

    def key(self):
        """A text that changes when the training pictures do."""
        cfg, files = self.cfg, []
        if cfg.source != "shapes":
            files = [(str(file), file.stat().st_mtime_ns, file.stat().st_size, texts) for file, texts in self.folder("train", 1).pictures]
        return hashlib.sha256(repr((cfg.source, cfg.images, cfg.val_images, cfg.seed, files)).encode()).hexdigest()
