"""Your own pictures: a folder of captioned images becomes a data set.

The paper's models learn from pairs (x, y) of image and caption (§2). This file makes pairs from
a folder in either of two conventions:

    metadata.jsonl      one line per picture, as in Hugging Face's `imagefolder`:
                        {"file_name": "cats/tom.png", "text": "a grey cat"}
                        text may also be a list of captions
    tom.png + tom.txt   a side-car file of the same name, one caption per line

Real folders are untidy. They hold truncated files, and pictures without a caption. A file that
cannot be used is left out and named in `report`; nothing is left out silently. All others are
brought to one form: RGB on white, upright, the central square (pixels.py).

Shapes: N pictures, S side of the square in pixels. Images are (3, S, S), float in [-1, 1].
Reference: the `imagefolder` page of the Hugging Face `datasets` documentation.
Read next: emoji.py (builds a folder to try), tables.py (a whole data set as one tensor).
"""

import copy
import json
import os
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from torch.utils.data import Dataset
from tqdm import tqdm

from .pixels import central_square, from_pil, to_float

# The second line lists formats that Pillow may be unable to read. They are tried all the same,
# so that the report names them.
EXTENSIONS = {
    ".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
    ".avif", ".heic", ".heif", ".jxl", ".svg"}


# ------------------------------------------------------------------------------ pictures

def load_picture(path, size):
    """Read the central square of one image file: RGB image, size × size, upright.

    Raises whatever Pillow raises for a missing, foreign, corrupt or truncated file.
    """
    with Image.open(path) as image:
        if image.format == "JPEG":
            # libjpeg decodes straight to a half, a quarter or an eighth of the size.
            image.draft(image.mode, (2 * size, 2 * size))
        image.load()
        return central_square(image, size)


# What `why_unreadable` has found: (path, change time, bytes) -> reason. So a file is decoded
# once, and not once more for each size.
VERIFIED = {}


def why_unreadable(path, size):
    """Say why a file cannot be used: (reason, detail), or None if it can.

    The file is decoded in full, by the function that will read it later. The header alone would
    not do: the header of a truncated file is intact.
    """
    try:
        stat = os.stat(path)
    except (OSError, ValueError):
        # ValueError: a metadata.jsonl can hold names that no system accepts.
        return "file missing", ""
    version = (str(path), stat.st_mtime_ns, stat.st_size)
    if version not in VERIFIED:
        try:
            load_picture(path, size)
            VERIFIED[version] = None
        except UnidentifiedImageError:
            VERIFIED[version] = "not an image that Pillow can read", ""
        except Exception as error:
            # OSError, SyntaxError, ValueError, struct.error: decoders raise many kinds.
            VERIFIED[version] = "corrupt or truncated", str(error) or type(error).__name__
    return VERIFIED[version]


# ------------------------------------------------------------------------------ captions

def has_ink(text):
    """Tell whether a text has any character that can be seen."""
    return any(char.isprintable() and not char.isspace() for char in text)


def clean_texts(value):
    """Return the captions among `value` in which something can be seen, with single spaces.

    value: a caption or a list of captions, from a file. Raises TypeError for anything else.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"text is neither a string nor a list of strings: {value!r:.60}")
    return [" ".join(text.split()) for text in texts if has_ink(text)]


def read_metadata(path):
    """Read a metadata.jsonl: (captions, bad).

    captions: {picture's path: list of captions}; several lines for one picture add up.
    bad: [(place, reason, detail)] of the lines that cannot be understood.
    """
    captions = {}
    bad = []
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
            texts = clean_texts(entry.get("text") or [])
            captions.setdefault(path.parent / entry["file_name"], []).extend(texts)
        except (KeyError, AttributeError):
            bad.append((f"{path.name} line {number}", "line not understood", "no file_name"))
        except (ValueError, TypeError) as error:
            bad.append((f"{path.name} line {number}", "line not understood", str(error)))
    return captions, bad


def read_sidecar(path):
    """Read captions from a text file, one per line: list of str, empty if there is no such file.

    Raises ValueError if the file is not UTF-8.
    """
    if not path.is_file():
        return []
    return clean_texts(path.read_text(encoding="utf-8-sig").splitlines())


# ------------------------------------------------------------------------------ the data set

class CaptionedFolder(Dataset):
    """The captioned images of a folder and its subfolders, in order of their paths.

    path: the folder, with `metadata.jsonl` files or side-car texts.
    size: side in pixels. The shorter side of a picture is resized to it, and the middle is kept.
    `[i]` gives {"image": (3, S, S) float in [-1, 1], "text": str}. Of several captions, example i
    gets one at random, always the same. `texts(i)` gives all of them.
    `report` says in words what was skipped and why. `skipped` lists it: [(file, reason, detail)].
    Raises FileNotFoundError if there is no such folder, and ValueError if size < 1 or if nothing
    in the folder can be used.
    """

    def __init__(self, path, size=64):
        self.path = Path(path)
        self.size = int(size)
        if not self.path.is_dir():
            raise FileNotFoundError(f"no such folder: {path}")
        if self.size < 1:
            raise ValueError(f"size is {size}: it must be at least 1")
        files, captions, self.skipped = self._scan()
        captioned = self._with_captions(files, captions)
        self.pictures = self._readable(captioned)
        if not self.pictures:
            reasons = [f"{n} × {reason}" for reason, n in self._reasons().items()]
            why = ", ".join(reasons) or "no image files"
            raise ValueError(
                f"no usable captioned picture in {path} ({why}): "
                f"add pictures with a metadata.jsonl or with .txt files of the same names")

    def _scan(self):
        """Find everything below the folder: (image files, {picture: captions}, bad lines)."""
        files = set()
        captions = {}
        bad = []
        for folder, subfolders, names in os.walk(self.path):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in names:
                if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS:
                    files.add(Path(os.path.normpath(Path(folder, name))))
            if "metadata.jsonl" in names:
                found, wrong = read_metadata(Path(folder, "metadata.jsonl"))
                bad += wrong
                for file, texts in found.items():
                    captions.setdefault(Path(os.path.normpath(file)), []).extend(texts)
        return files, captions, bad

    def _with_captions(self, files, captions):
        """Return [(file, captions)] of the files that have captions, and skip the others."""
        captioned = []
        for file in sorted(files | captions.keys()):
            try:
                texts = captions.get(file) or read_sidecar(file.with_suffix(".txt"))
            except ValueError:
                self._skip(file, "side-car text is not UTF-8")
                continue
            if texts:
                captioned.append((file, texts))
            else:
                self._skip(file, "no caption")
        return captioned

    def _readable(self, captioned):
        """Return those of [(file, captions)] whose files can be decoded, and skip the others."""
        readable = []
        # Pillow's decoders run in parallel threads.
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
            reasons = pool.map(lambda item: why_unreadable(item[0], self.size), captioned)
            pairs = tqdm(zip(captioned, reasons), total=len(captioned), desc="checking pictures",
                         unit="", delay=2, leave=False)
            for item, reason in pairs:
                if reason:
                    self._skip(item[0], *reason)
                else:
                    readable.append(item)
        return readable

    def part(self, wanted):
        """Return a data set with only some of the pictures; wanted: a bool for each."""
        part = copy.copy(self)
        part.pictures = [picture for picture, keep in zip(self.pictures, wanted) if keep]
        return part

    def _skip(self, file, reason, detail=""):
        """Note that a file was left out."""
        name = Path(os.path.relpath(file, self.path)).as_posix()
        self.skipped.append((name, reason, " ".join(detail.split())))

    def _reasons(self):
        """Count the skipped files by reason: {reason: number}, most frequent first."""
        return dict(Counter(reason for _, reason, _ in self.skipped).most_common())

    @property
    def report(self):
        """Say what was read and what was skipped: text of a few lines, five names a reason."""
        lines = [f"{len(self)} captioned pictures in {self.path}, {len(self.skipped)} skipped"]
        for reason, n in self._reasons().items():
            named = [f"{file} ({detail})" if detail else file
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
            image = load_picture(file, self.size)
        except Exception as error:
            raise ValueError(
                f"{file} was readable and no longer is ({error}): restore it or start again"
            ) from error
        return {"image": to_float(from_pil(image)), "text": text}
