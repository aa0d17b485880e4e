"""Your own pictures: a folder of captioned images, and the way from an image file to a tensor and back.

The paper's models learn from pairs (x, y) of image and caption (§2). This file makes such pairs from a folder in either of two conventions:

    metadata.jsonl      one line per picture, as in Hugging Face's `imagefolder`: {"file_name": "cats/tom.png", "text": "a grey cat"};
                        text may also be a list of captions
    tom.png + tom.txt   a side-car file of the same name, one caption per line

Real folders are untidy: transparent, rotated, 16-bit, truncated files, files without a caption. What can be read is brought to one form,
RGB on white, upright, the central square; what cannot is left out and named in `report`. Nothing is left out silently.

Shapes: N pictures, S side of the square in pixels. Images are (3, S, S), float in [-1, 1].
References: the `imagefolder` page of the Hugging Face `datasets` documentation; CLIP's preprocessing (bicubic, shorter side, centre crop).
Read next: `data.py`.
"""

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


# The last line is formats that Pillow may not read: they are tried all the same, so that the report names them.
EXTENSIONS = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm",
              ".avif", ".heic", ".heif", ".jxl", ".svg"}


def load_picture(path, size):
    """Read one image file as the central square of its upright self: RGB image, size × size, bicubic with antialiasing.

    Raises whatever Pillow raises for a missing, foreign, corrupt or truncated file.
    """
    with Image.open(path) as image:
        if image.format == "JPEG":
            image.draft(image.mode, (2 * size, 2 * size))                  # libjpeg decodes straight to a half, quarter or eighth
        image.load()
        return central_square(image, size)


VERIFIED = {}                                                           # (path, change time, bytes) -> reason: decoded once for all sizes


def why_unreadable(path, size):
    """Why a file cannot be used: (reason, detail), or None if it can.

    It is decoded in full, by the function that will read it later: the header of a truncated file looks perfectly healthy.
    """
    try:
        stat = os.stat(path)
    except (OSError, ValueError):                                          # a metadata.jsonl can hold names that no system takes
        return "file missing", ""
    key = (str(path), stat.st_mtime_ns, stat.st_size)
    if key not in VERIFIED:
        try:
            load_picture(path, size)
            VERIFIED[key] = None
        except UnidentifiedImageError:
            VERIFIED[key] = "not an image that Pillow can read", ""
        except Exception as error:                                         # OSError, SyntaxError, ValueError, struct.error, ...
            VERIFIED[key] = "corrupt or truncated", str(error) or type(error).__name__
    return VERIFIED[key]


def clean_texts(value):
    """A caption or list of captions from a file -> those in which something can be seen, with single spaces. Raises TypeError for anything else."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"text is neither a string nor a list of strings: {value!r:.60}")
    return [" ".join(text.split()) for text in texts if any(char.isprintable() and not char.isspace() for char in text)]


def read_metadata(path):
    """Read a metadata.jsonl: ({picture path: captions}, [(place, reason, detail) of each bad line])."""
    captions, bad = {}, []
    for number, line in enumerate(path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line.decode("utf-8"))
            texts = clean_texts(entry.get("text") or [])
            captions.setdefault(path.parent / entry["file_name"], []).extend(texts)        # several lines for one picture add up
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            detail = "no file_name" if isinstance(error, (KeyError, AttributeError)) else str(error)
            bad.append((f"{path.name} line {number}", "line not understood", detail))
    return captions, bad


def read_sidecar(path):
    """Captions from a text file, one per line; [] if there is no such file. Raises ValueError if it is not UTF-8."""
    return clean_texts(path.read_text(encoding="utf-8-sig").splitlines()) if path.is_file() else []


class CaptionedFolder(Dataset):
    """A folder (and its subfolders) of captioned images, with `metadata.jsonl` files or side-car texts; in order of their paths.

    path: the folder. size: side in pixels; the shorter side of a picture is resized to it and the middle is kept.
    `[i]` gives {"image": (3, S, S) float in [-1, 1], "text": str}. Of several captions each i gets one at random, always the same;
    `texts(i)` gives all of them. `report` says in words what was skipped and why, `skipped` lists it: [(file, reason, detail)].
    Raises FileNotFoundError if there is no such folder, ValueError if size < 1 or nothing in the folder can be used.
    """

    def __init__(self, path, size=64):
        self.path, self.size = Path(path), int(size)
        if not self.path.is_dir():
            raise FileNotFoundError(f"no such folder: {path}")
        if self.size < 1:
            raise ValueError(f"size must be at least 1, got {size}")
        files, captions, self.skipped = self._scan()
        captioned = []
        for file in sorted(files | captions.keys()):
            try:
                texts = captions.get(file) or read_sidecar(file.with_suffix(".txt"))
                if texts:
                    captioned.append((file, texts))
                else:
                    self._skip(file, "no caption")
            except ValueError:
                self._skip(file, "side-car text is not UTF-8")
        self.pictures = []
        with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:                     # Pillow's decoders run in parallel threads
            reasons = pool.map(lambda item: why_unreadable(item[0], self.size), captioned)
            bar = tqdm(zip(captioned, reasons), total=len(captioned), desc="checking pictures", unit="", delay=2, leave=False)
            for item, reason in bar:
                if reason:
                    self._skip(item[0], *reason)
                else:
                    self.pictures.append(item)
        if not self.pictures:
            counts = ", ".join(f"{n} × {reason}" for reason, n in self._reasons().items()) or "no image files"
            raise ValueError(f"no usable captioned picture in {path}: {counts}")

    def _scan(self):
        """Everything below the folder: (image files, {picture: captions} from all metadata.jsonl, what was wrong in those)."""
        files, captions, bad = set(), {}, []
        for folder, subfolders, names in os.walk(self.path):
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            files.update(Path(folder, name) for name in names if not name.startswith(".") and Path(name).suffix.lower() in EXTENSIONS)
            if "metadata.jsonl" in names:
                found, wrong = read_metadata(Path(folder, "metadata.jsonl"))
                bad += wrong
                for file, texts in found.items():
                    captions.setdefault(Path(os.path.normpath(file)), []).extend(texts)
        return {Path(os.path.normpath(file)) for file in files}, captions, bad

    def _skip(self, file, reason, detail=""):
        """Note that a file was left out."""
        self.skipped.append((Path(os.path.relpath(file, self.path)).as_posix(), reason, " ".join(detail.split())))

    def _reasons(self):
        """{reason: how many were skipped for it}, most frequent first."""
        return dict(Counter(reason for _, reason, _ in self.skipped).most_common())

    @property
    def report(self):
        """What was read and what was skipped, why and how many: text of a few lines, up to five names for each reason."""
        lines = [f"{len(self)} captioned pictures in {self.path}, {len(self.skipped)} skipped"]
        for reason, n in self._reasons().items():
            named = [f"{file} ({detail})" if detail else file for file, why, detail in self.skipped if why == reason]
            lines.append(f"  {n} × {reason}: {', '.join(named[:5])}{f' and {n - 5} more' if n > 5 else ''}")
        return "\n".join(lines)

    def __len__(self):
        return len(self.pictures)

    def texts(self, index):
        """All captions of one picture: list of str."""
        return self.pictures[index][1]

    def __getitem__(self, index):
        index = range(len(self))[index]                                    # IndexError outside; negative ones count from the end
        file, texts = self.pictures[index]
        text = texts[int(random.Random(index).random() * len(texts))]      # not index % n: sorted names may repeat with period n
        try:
            image = load_picture(file, self.size)
        except Exception as error:
            raise ValueError(f"{file} was readable and no longer is: {error}") from error
        return {"image": to_float(from_pil(image)), "text": text}
