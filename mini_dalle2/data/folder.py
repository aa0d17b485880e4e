"""Your own pictures: a folder of captioned images becomes a data set.

The paper's models learn from pairs (x, y) of image and caption (§2). This file makes pairs from
a folder. Captions stand in a metadata file or beside the pictures (captions.py). Pictures may
also lie in archives (archives.py).

Real folders are untidy. They hold truncated files, and pictures without a caption. A file that
cannot be used is left out and named in `report`; nothing but hidden files is left out silently.
All others are brought to one form: RGB on white, upright, the central square (pixels.py).

Shapes: N pictures, S side of the square in pixels. Images are (3, S, S), float in [-1, 1].
Read next: emoji.py (builds a folder to try), tables.py (a whole data set as one tensor).
"""

import contextlib
import copy
import os
import random
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm import tqdm

from ..runtime.files import is_pointer
from ..runtime.pictures import TOO_MANY_PIXELS, how_many_pixels
from .archives import OUTSIDE, Tree
from .captions import METADATA, SIDECARS, read_metadata, read_sidecar
from .pixels import central_square, from_pil, to_float


def picture_suffixes():
    """Return the endings of picture files, in lower case: all that Pillow knows, and some more.

    Pillow cannot read the others, or only with a plug-in. They are tried all the same, so that
    the report names them.
    """
    Image.init()
    known = {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN}
    # Films and measurements.
    films = {".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr"}
    return known - films | {".avif", ".heic", ".heif", ".jxl", ".svg"}


# ------------------------------------------------------------------------------ pictures

def load_picture(file, size):
    """Read the central square of one image file: RGB image, size × size, upright.

    file: a path or an open file. Raises whatever Pillow raises for a missing, foreign, corrupt or
    truncated file.
    Memory: a pixel takes up to 28 bytes on the way, in a transparent WebP (a 16-bit one 14). Each
    of 16 threads decodes up to MANY_PIXELS: less than 2 GB. One larger picture comes beside them:
    at most 5 GB, because Pillow reads no more than 179 million pixels.
    """
    with Image.open(file) as image:
        if image.format == "JPEG":
            # libjpeg decodes straight to a half, a quarter or an eighth of the size.
            image.draft(image.mode, (2 * size, 2 * size))
        large = image.width * image.height > MANY_PIXELS
        with ONE_LARGE if large else contextlib.nullcontext():
            return central_square(image, size)


def one_large_at_a_time(lock):
    """Let this process wait for a lock before it decodes a large picture."""
    global ONE_LARGE
    ONE_LARGE = lock


def shorter_side(file):
    """Return the shorter side of a picture in pixels, from its header."""
    with Image.open(file) as image:
        return min(image.size)


UNREADABLE = "not an image that Pillow can read"
LEFT_IN_LFS = "only stands for a picture, which git-lfs keeps elsewhere (run git lfs pull)"
# Of pictures with more pixels, one at a time is decoded. Worker processes share a lock.
MANY_PIXELS = 4_000_000
ONE_LARGE = threading.Lock()
# What `why_unreadable` has found: (path, change time, bytes) -> reason. So a file is decoded
# once, and not once more for each size.
VERIFIED = {}


def why_unreadable(tree, path, size):
    """Say why a file of a Tree cannot be used: (reason, detail), or None if it can.

    The file is decoded in full, by the function that will read it later. The header alone would
    not do: the header of a truncated file is intact.
    """
    try:
        version = (str(path), *tree.version(path))
    except (OSError, ValueError):
        # ValueError: a metadata.jsonl can hold names that no system accepts.
        return "file missing", ""
    if version not in VERIFIED:
        try:
            if not tree.is_regular(path):
                return "no regular file", "a folder, a pipe, a socket or a device"
            load_picture(tree.open(path), size)
            VERIFIED[version] = None
        except TOO_MANY_PIXELS as error:
            VERIFIED[version] = "more pixels than Pillow reads", how_many_pixels(error)
        except UnidentifiedImageError:
            pointer = is_pointer(tree.start(path))
            VERIFIED[version] = (LEFT_IN_LFS if pointer else UNREADABLE), ""
        except Exception as error:
            # OSError, SyntaxError, ValueError, struct.error: decoders raise many kinds.
            VERIFIED[version] = "corrupt or truncated", str(error) or type(error).__name__
    return VERIFIED[version]


def printable(text):
    """Return a text on one line, with \\x.. for what no terminal shows as a letter.

    A name of a file may hold control characters, and bytes that are not UTF-8.
    """
    return re.sub(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]", lambda odd: repr(odd[0])[1:-1], text)


def cut(text):
    """Return a text for a report, without its middle if it is long."""
    return text if len(text) <= 300 else f"{text[:200]} … {text[-80:]}"


# ------------------------------------------------------------------------------ the data set

class CaptionedFolder(Dataset):
    """The captioned images of a folder and its subfolders, in order of their paths.

    path: the folder, with metadata files or side-car texts; see captions.py.
    size: side in pixels. The shorter side of a picture is resized to it, and the middle is kept.
    outside: read also what links and metadata files name outside the folder.
    `[i]` gives {"image": (3, S, S) float in [-1, 1], "text": str}. Of several captions, example i
    gets one at random, always the same. `texts(i)` gives all of them.
    `report` says in words what was skipped and why. `skipped` lists it: [(file, reason, detail)].
    Raises FileNotFoundError if there is no such folder, and ValueError if size < 1 or if nothing
    in the folder can be used.
    """

    def __init__(self, path, size=64, outside=False):
        self.path = Path(os.path.normpath(path))
        self.size = int(size)
        if not self.path.is_dir():
            raise FileNotFoundError(f"no such folder: {path}")
        if self.size < 1:
            raise ValueError(f"size is {size}: it must be at least 1")
        self.tree = Tree(self.path, outside)
        self.skipped = []
        for file, reason, detail in self.tree.left_out:
            self._skip(file, reason, detail)
        self.pictures = self._readable(self._captioned())
        if not self.pictures:
            first = {reason: f" ({cut(file)}: {cut(detail)})" if detail else ""
                     for file, reason, detail in reversed(self.skipped)}
            reasons = [f"{n} × {reason}{first[reason]}" for reason, n in self._reasons().items()]
            why = ", ".join(reasons) or "no image files"
            raise ValueError(
                f"no usable captioned picture in {path} ({why}): "
                f"add pictures with a metadata.jsonl, with a metadata.csv, or with .txt files of "
                f"the same names")

    def _captioned(self):
        """Return [(file, captions)] of the pictures that have captions, and skip all else."""
        suffixes = picture_suffixes()
        pictures = set()
        sidecars = {}
        others = []
        captions = {}
        for file in self.tree.files:
            suffix = file.suffix.lower()
            if suffix in suffixes:
                pictures.add(file)
            elif suffix in SIDECARS:
                sidecars[file.with_suffix(""), suffix] = file
            elif file.name.lower() in METADATA:
                self._read_metadata(file, captions)
            else:
                others.append(file)
        captioned = []
        for file in sorted(pictures | captions.keys()):
            texts = captions.get(file) or self._beside(file, sidecars)
            if texts:
                captioned.append((file, texts))
            elif texts is not None:
                self._skip(file, "no caption")
        stems = {file.with_suffix("") for file in pictures} | pictures
        alone = [file for (stem, _), file in sidecars.items() if stem not in stems]
        for file in sorted(alone):
            self._skip(file, "no picture of this name")
        tables = {Path(name).suffix: name for name in METADATA}
        for file in sorted(others):
            name = tables.get(file.suffix.lower())
            self._skip(file, f"table of captions? then rename it to {name}" if name
                       else "neither picture nor caption")
        for archive, why in self.tree.damaged.items():
            self._skip(archive, "archive cannot be read", why)
        return captioned

    def _read_metadata(self, file, captions):
        """Add what a metadata file says to {picture: captions}."""
        try:
            content = self.tree.read(file)
        except OSError as error:
            self._skip(file, "captions cannot be read", str(error.strerror or error))
            return
        entries, bad = read_metadata(file.name, content)
        folder = Path(os.path.relpath(file.parent, self.path)).as_posix()
        for place, reason, detail in bad:
            self._note(place if folder == "." else f"{folder}/{place}", reason, detail)
        for name, texts in entries:
            picture = Path(os.path.normpath(file.parent / name))
            if picture not in self.tree.files:
                # Windows writes sub\red.png.
                other = Path(os.path.normpath(file.parent / name.replace("\\", "/")))
                picture = other if other in self.tree.files else picture
            try:
                if picture in self.tree.files or self.tree.may_read(picture):
                    captions.setdefault(picture, []).extend(texts)
                else:
                    self._skip(picture, OUTSIDE)
            except (OSError, ValueError, RecursionError):
                # No system accepts this name, or it is a link to a link to a link, and so on.
                self._skip(picture, "file missing")

    def _beside(self, file, sidecars):
        """Return the captions of the files beside a picture; None if one cannot be read.

        They are named as the picture is, without its ending or with it: tom.txt, tom.png.txt.
        """
        for suffix in SIDECARS:
            for stem in (file.with_suffix(""), file):
                if (stem, suffix) not in sidecars:
                    continue
                try:
                    texts = read_sidecar(suffix, self.tree.read(sidecars[stem, suffix]))
                except OSError as error:
                    self._skip(file, "side-car text cannot be read", str(error.strerror or error))
                    return None
                except ValueError:
                    self._skip(file, "side-car text is not UTF-8")
                    return None
                if texts:
                    return texts
        return []

    def _readable(self, captioned):
        """Return those of [(file, captions)] whose files can be decoded, and skip the others."""
        readable = []
        # Pillow's decoders run in parallel threads.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            reasons = pool.map(lambda item: why_unreadable(self.tree, item[0], self.size),
                               captioned)
            pairs = tqdm(zip(captioned, reasons), total=len(captioned), desc="checking pictures",
                         unit="", delay=2, leave=False, disable=None)
            for item, reason in pairs:
                if reason:
                    self._skip(item[0], *reason)
                else:
                    readable.append(item)
        return readable

    def at(self, size):
        """Return the same data set with pictures of another size. Nothing is read again."""
        other = copy.copy(self)
        other.size = size
        return other

    def part(self, wanted):
        """Return a data set with only some of the pictures; wanted: a bool for each."""
        part = copy.copy(self)
        part.pictures = [picture for picture, keep in zip(self.pictures, wanted) if keep]
        return part

    def _skip(self, file, reason, detail=""):
        """Note that a file was left out."""
        self._note(Path(os.path.relpath(file, self.path)).as_posix(), reason, detail)

    def _note(self, name, reason, detail):
        """Note that something with this name in the folder was left out."""
        self.skipped.append((printable(name), reason, printable(" ".join(detail.split()))))

    def _reasons(self):
        """Count the skipped files by reason: {reason: number}, most frequent first."""
        return dict(Counter(reason for _, reason, _ in self.skipped).most_common())

    @property
    def report(self):
        """Say what was read and what was skipped: text of a few lines, five names a reason."""
        lines = [f"{len(self)} captioned pictures in {printable(str(self.path))}, "
                 f"{len(self.skipped)} skipped"]
        for reason, n in self._reasons().items():
            named = [f"{cut(file)} ({cut(detail)})" if detail else cut(file)
                     for file, why, detail in self.skipped if why == reason]
            more = f" and {n - 5} more" if n > 5 else ""
            lines.append(f"  {n} × {reason}: {', '.join(named[:5])}{more}")
        return "\n".join(lines)

    def __len__(self):
        return len(self.pictures)

    def texts(self, index):
        """Return all captions of one picture: list of str."""
        return self.pictures[index][1]

    def __getitem__(self, index):
        # IndexError outside the length; negative numbers count from the end.
        index = range(len(self))[index]
        file, texts = self.pictures[index]
        # Not texts[index % n]: sorted names may repeat with period n.
        text = texts[int(random.Random(index).random() * len(texts))]
        try:
            image = load_picture(self.tree.open(file), self.size)
        except Exception as error:
            raise ValueError(
                f"{file} was readable and no longer is ({error}): restore it or start again"
            ) from error
        return {"image": to_float(from_pil(image)), "text": text}
