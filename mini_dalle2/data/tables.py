"""Tables of pictures: a whole data set as one uint8 tensor, in memory or on disk.

Read next: shapes.py.
"""

import hashlib
import math
import os
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset
from tqdm import tqdm

from ..runtime.device import machine_memory, on_device
from ..runtime.processes import is_main
from .folder import CaptionedFolder
from .pixels import to_float, to_uint8
from .shapes import CaptionedShapes


_dataset = None                                                            # a worker process's own copy, sent once and not with each chunk


def _set_dataset(dataset):
    global _dataset
    _dataset = dataset
    torch.set_num_threads(1)                                               # as many workers as cores: more threads only collide


def _load_chunk(indices):
    return _load(_dataset, indices)


def _load(dataset, indices):
    items = [dataset[i] for i in indices]
    return torch.stack([to_uint8(item["image"]) for item in items]).numpy(), [item["text"] for item in items]


def empty_table(shape, folder=None):
    """A uint8 tensor to be filled: in memory, or in a file without a name in `folder`, of which memory holds what is read most.

    The file is gone when the tensor is, or the process. Raises OSError when the disk has no room for it.
    """
    if folder is None:
        return torch.empty(shape, dtype=torch.uint8)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):                             # else a disk that is full later on would kill the process
                os.posix_fallocate(file.fileno(), 0, math.prod(shape))
            return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=tuple(shape)))
    except OSError as error:
        raise OSError(f"{folder} has no room for {math.prod(shape) / 1e9:,.1f} GB of pictures ({error.strerror}): lower --data.images") from None


def load_table(dataset, progress=True, folder=None):
    """Draw or read a whole data set once: (uint8 tensor (N, 3, S, S), list of N captions); folder: see `empty_table`.

    Works for any data set of {"image": (3, S, S) in [-1, 1], "text": str}, and spreads over all cores if the first few examples
    say that the rest takes longer than starting processes does. progress: show a bar. Raises ValueError for an empty data set.
    """
    n = len(dataset)
    if n == 0:
        raise ValueError("load_table: the data set is empty")
    with tqdm(total=n, desc="pictures", unit="", disable=not progress, leave=False) as bar:
        dataset[0]                                                         # the first one always takes longer
        began = time.perf_counter()
        first, texts = _load(dataset, range(min(n, 32)))
        seconds = (time.perf_counter() - began) / len(first)               # per example
        table = empty_table((n, *first.shape[1:]), folder)
        table[:len(first)] = torch.from_numpy(first)
        bar.update(len(first))
        step = int(min(1024, max(1, 0.5 / max(seconds, 1e-6)), max(1, 2 ** 25 // first[0].nbytes)))   # half a second's work, at most 32 MiB
        chunks = [range(i, min(n, i + step)) for i in range(len(first), n, step)]

        def store(results):
            for pictures, captions in results:
                table[len(texts):len(texts) + len(captions)] = torch.from_numpy(pictures)
                texts.extend(captions)
                bar.update(len(captions))

        workers = min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, len(chunks), 16)
        if workers > 1 and seconds * (n - len(first)) > 10:
            try:                                                           # spawn: forking a process that runs torch's threads may hang
                with ProcessPoolExecutor(workers, get_context("spawn"), _set_dataset, (dataset,)) as pool:
                    store(pool.map(_load_chunk, chunks))
            except BrokenProcessPool:                                      # scripts without `if __name__ == "__main__"`
                pass                                                       # what is missing is made here, below
        store(_load(dataset, chunk) for chunk in chunks if chunk.stop > len(texts))
    return table, texts


def is_large(nbytes):
    """Whether a table of pictures is to lie on disk: if it takes more than a quarter of the memory that each process on this machine can have."""
    return nbytes > machine_memory() / 4 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


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
