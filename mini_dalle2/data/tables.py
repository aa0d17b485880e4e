"""Tables: a whole data set of pictures as one tensor, in memory or on disk.

Training reads every picture many times. So each picture is drawn or decoded once, for one size,
and kept as uint8:

    data set  ->  table (N, 3, S, S) uint8, and N captions  ->  batch (B, 3, S, S) in [-1, 1]

`load_table` makes a table from any data set. `Pictures` chooses the data sets of a run, shapes or
a folder, and keeps the last table. A table that is too large for the memory lies in a file.

Shapes: N pictures, B batch, S side in pixels.
Read next: ../training/stages.py, which takes its batches from here.
"""

import hashlib
import math
import os
import signal
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import Subset
from tqdm import tqdm

from ..runtime.commands import is_run, word
from ..runtime.device import machine_memory, on_device
from ..runtime.processes import is_main
from .folder import CaptionedFolder, one_large_at_a_time, shorter_side
from .pixels import to_float, to_uint8
from .shapes import CaptionedShapes
from .split import splits

# Examples that are loaded first, to see how long one takes.
FIRST = 32
# A chunk of examples for a worker process, at most: in seconds, in examples, in bytes.
CHUNK_SECONDS = 0.5
CHUNK_EXAMPLES = 1024
CHUNK_BYTES = 2 ** 25
# Work of fewer seconds than this is not worth starting processes.
WORTH_PROCESSES = 10
MOST_WORKERS = 16


# ------------------------------------------------------------------------------ one table

def load_items(dataset, indices):
    """Load some examples: (uint8 array (n, 3, S, S), list of n captions)."""
    items = [dataset[i] for i in indices]
    pictures = torch.stack([to_uint8(item["image"]) for item in items])
    return pictures.numpy(), [item["text"] for item in items]


# A worker process's own copy of the data set, sent once and not with each chunk.
_dataset = None


def _start_worker(dataset, one_large):
    global _dataset
    _dataset = dataset
    # Of all workers together, one decodes a large picture at a time.
    one_large_at_a_time(one_large)
    # Ctrl-C reaches all processes of a terminal. The first one decides what to do about it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # There are as many workers as cores: more threads would only get into each other's way.
    torch.set_num_threads(1)


def _end_with_parent():
    """End this worker when the process that started it ends, however that came."""
    parent_process().join()
    os._exit(1)


def _load_in_worker(indices):
    return load_items(_dataset, indices)


def empty_table(shape, folder=None):
    """Make an empty uint8 tensor, in memory or in a file without a name in `folder`.

    The system keeps the parts of the file in memory that are read most. The file goes when the
    tensor or the process goes. Raises OSError when the disk has no room.
    """
    if folder is None:
        return torch.empty(shape, dtype=torch.uint8)
    nbytes = math.prod(shape)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                # Take the room now: a disk that fills up later would kill the process.
                os.posix_fallocate(file.fileno(), 0, nbytes)
            return torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=tuple(shape)))
    except OSError as error:
        raise OSError(
            f"{folder} has no room for {nbytes / 1e9:,.1f} GB of pictures ({error.strerror}): "
            f"lower --data.images") from None


def available_cores():
    """Count the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def chunk_length(seconds, nbytes):
    """Choose how many examples a chunk has. seconds, nbytes: of one example."""
    by_time = CHUNK_SECONDS / max(seconds, 1e-6)
    by_memory = max(1, CHUNK_BYTES // nbytes)
    return int(min(CHUNK_EXAMPLES, max(1, by_time), by_memory))


def load_table(dataset, progress=True, folder=None):
    """Draw or read a whole data set once: (uint8 tensor (N, 3, S, S), list of N captions).

    dataset: any data set of {"image": (3, S, S) in [-1, 1], "text": str}. progress: show a bar.
    folder: where a table on disk lies (see `empty_table`). The work spreads over all cores if the
    first examples show that this saves time. Raises ValueError for an empty data set.
    """
    n = len(dataset)
    if n == 0:
        raise ValueError("the data set is empty: a table needs at least one picture")
    # None: no bar outside a terminal.
    disable = None if progress else True
    with tqdm(total=n, desc="pictures", unit="", disable=disable, leave=False) as bar:
        # The very first example always takes longer: leave it out of the measurement.
        dataset[0]
        began = time.perf_counter()
        first, texts = load_items(dataset, range(min(n, FIRST)))
        seconds = (time.perf_counter() - began) / len(first)
        table = empty_table((n, *first.shape[1:]), folder)
        table[:len(first)] = torch.from_numpy(first)
        bar.update(len(first))
        length = chunk_length(seconds, first[0].nbytes)
        chunks = [range(i, min(n, i + length)) for i in range(len(first), n, length)]

        def store(results):
            for pictures, captions in results:
                table[len(texts):len(texts) + len(captions)] = torch.from_numpy(pictures)
                texts.extend(captions)
                bar.update(len(captions))

        workers = min(available_cores(), len(chunks), MOST_WORKERS)
        if workers > 1 and seconds * (n - len(first)) > WORTH_PROCESSES:
            # Spawn: forking a process that runs torch's threads may hang.
            spawn = get_context("spawn")
            try:
                shared = (dataset, spawn.Lock())
                with ProcessPoolExecutor(workers, spawn, _start_worker, shared) as pool:
                    store(pool.map(_load_in_worker, chunks))
            except BrokenProcessPool:
                # A script without `if __name__ == "__main__"` cannot start workers. The next
                # line loads what is missing.
                pass
        store(load_items(dataset, chunk) for chunk in chunks if chunk.stop > len(texts))
    return table, texts


def is_large(nbytes):
    """Tell whether a table of pictures should lie on disk.

    It should if it takes more than a quarter of the memory that each process of this machine has.
    """
    return nbytes > machine_memory() / 4 / int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def pictures_at(indices, table, device):
    """Take rows of a table as a batch: (B, 3, S, S), float in [-1, 1], on the device.

    indices: (B,). table: (N, 3, S, S) uint8, in memory, on disk or on the GPU.
    """
    return to_float(on_device(table[indices.to(table.device)], device))


# ------------------------------------------------------------------------------ a run's pictures

class Pictures:
    """The captioned pictures of a run: data sets of any size, and tables of them.

    cfg: `DataConfig`. scratch: the folder where large tables lie. The last training table is kept.
    `available` is the number of training pictures that exist; of shapes there is no end.
    `has_val` tells whether there are validation pictures. Raises FileNotFoundError, ValueError.
    """

    def __init__(self, cfg, device, scratch=None):
        self.cfg = cfg
        self.device = device
        self.scratch = scratch
        # The last training table: its (size, limit), and (pictures, captions).
        self.last_asked = None
        self.last_table = None
        # Whether there are pictures that are not trained on.
        self.has_val = True
        # Of a folder of pictures: what `folder_digest` gives.
        self.digest = None
        if cfg.source == "shapes":
            self.available = math.inf
        else:
            if not Path(cfg.source).is_dir():
                raise FileNotFoundError(f"no such folder: {cfg.source}{self.where_to_look()}")
            # It is read once, for all splits and sizes.
            self.whole = whole = CaptionedFolder(cfg.source, 1, cfg.outside)
            self.digest = digest(whole)
            self.chosen = self.splits(whole)
            counts = Counter(self.chosen)
            self.available = counts["train"]
            if not self.available:
                raise ValueError(f"{cfg.source} has no captioned picture in its training folder")
            self.has_val = counts["val"] > 0
            print(whole.report)
            print(f"  {counts['train']} for training, {counts['val']} for validation, "
                  f"{counts['test']} for tests, {counts['']} in other folders")

    def where_to_look(self):
        """Say how a run learns that its pictures have moved: text for the end of a message."""
        if self.scratch is None or not is_run(self.scratch):
            return ""
        return (f": if the pictures have moved, say where they are: "
                f"python train.py --resume --out {word(self.scratch)} --data FOLDER")

    @property
    def val_kind(self):
        """Say what the pictures of "val" are: "unseen", or "training" if none can be spared."""
        return "unseen" if self.has_val else "training"

    def splits(self, folder):
        """Return the split of each picture of a CaptionedFolder; see split.py."""
        files = [file for file, _ in folder.pictures]
        return splits(files, folder.path, self.cfg.val_images, self.cfg.seed)

    def folder(self, split, size):
        """Return the pictures of "train" or "val" at size × size: a CaptionedFolder.

        If too few pictures are there to spare any, "val" has the training pictures.
        """
        split = split if self.has_val else "train"
        return self.whole.at(size).part([chosen == split for chosen in self.chosen])

    def smaller_than(self, side):
        """Return (number of training pictures of less than `side` pixels, the smallest side).

        The first is 0 for shapes, which are drawn at any size.
        """
        if self.cfg.source == "shapes":
            return 0, side
        folder = self.folder("train", 1)
        sides = [shorter_side(folder.tree.open(file)) for file, _ in folder.pictures]
        return sum(one < side for one in sides), min(sides)

    def dataset(self, split, size, limit):
        """Return at most `limit` examples of "train" or "val"; the seed chooses their order."""
        if self.cfg.source == "shapes":
            return CaptionedShapes(split, size, self.cfg.seed, limit)
        folder = self.folder(split, size)
        generator = torch.Generator().manual_seed(self.cfg.seed)
        order = torch.randperm(len(folder), generator=generator).tolist()
        return Subset(folder, order[:limit])

    def table(self, split, size, limit):
        """Return uint8 pictures (N, 3, size, size) and their N captions.

        A training table lies on the GPU if it takes less than a quarter of the free memory there.
        Else it lies in memory or on disk (see `is_large`).
        """
        if split == "val":
            return load_table(self.dataset(split, size, limit), progress=False)
        if self.last_asked != (size, limit):
            # Let the old table go before the new one comes.
            self.last_asked = None
            self.last_table = None
            dataset = self.dataset(split, size, limit)
            on_disk = is_large(len(dataset) * 3 * size ** 2)
            pictures, captions = load_table(dataset, is_main(), self.scratch if on_disk else None)
            if self.fits_on_gpu(pictures):
                pictures = pictures.to(self.device)
            self.last_asked = (size, limit)
            self.last_table = (pictures, captions)
        return self.last_table

    def fits_on_gpu(self, pictures):
        """Tell whether the run uses a GPU that has four times the memory that a table takes."""
        if self.device.type != "cuda":
            return False
        free, _ = torch.cuda.mem_get_info(self.device)
        return pictures.nbytes < free / 4

    def captions(self):
        """Return all captions of the training pictures, without drawing or reading these."""
        dataset = self.dataset("train", 1, self.cfg.images)
        if self.cfg.source == "shapes":
            return [dataset.scene(i).text for i in range(len(dataset))]
        return [text for i in dataset.indices for text in dataset.dataset.texts(i)]

    def fingerprint(self):
        """Return a text that changes when the training pictures do, but not with their place."""
        cfg = self.cfg
        files = []
        if cfg.source != "shapes":
            files = contents(self.folder("train", 1))
        kind = "shapes" if cfg.source == "shapes" else "folder"
        settings = (kind, cfg.images, cfg.val_images, cfg.seed, files)
        return hashlib.sha256(repr(settings).encode()).hexdigest()


def contents(folder):
    """List what a CaptionedFolder holds: [(name, bytes, captions)] of its pictures."""
    found = []
    for file, texts in folder.pictures:
        _, nbytes = folder.tree.version(file)
        name = Path(os.path.relpath(file, folder.path)).as_posix()
        found.append((name, nbytes, texts))
    return found


def digest(folder):
    """Return a text that depends on the pictures of a CaptionedFolder, but not on its place.

    Other files do not count: a Mac, for example, leaves a .DS_Store in each folder that is looked
    at.
    """
    return hashlib.sha256(repr(contents(folder)).encode()).hexdigest()


def folder_digest(path, outside=False):
    """Return the `digest` of the folder at a path. outside: see CaptionedFolder.

    Raises FileNotFoundError if there is no such folder, ValueError if it has no pictures.
    """
    return digest(CaptionedFolder(path, 1, outside))
