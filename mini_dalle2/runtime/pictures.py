"""Pictures that a command reads and writes: one sentence for a file that cannot be used.

Read next: commands.py.
"""

import contextlib
import os
import re
import tempfile
from pathlib import Path

from PIL import Image

from .files import atomic_open


# The second is an exception under `python -W error` only.
TOO_MANY_PIXELS = (Image.DecompressionBombError, Image.DecompressionBombWarning)


def how_many_pixels(error):
    """Say how many pixels a picture has, and how many Pillow takes, by its own exception."""
    # Image size (… pixels) exceeds limit of … pixels, could be …
    return str(error).partition(",")[0]


def scale_transparency(image):
    """Bring the transparent value of a PNG, still unread, to the 8 bits that its pixels get.

    Pillow scales pixels of 2, 4 and 16 bits, but not this value.
    """
    value = image.info.get("transparency")
    if image.format != "PNG" or value is None or not image.tile:
        return
    bits = image.tile[0][3]
    if bits in ("L;2", "L;4"):
        image.info["transparency"] = value * {"L;2": 85, "L;4": 17}[bits]
    elif bits == "RGB;16B":
        image.info["transparency"] = tuple(v >> 8 for v in value)


def open_picture(path):
    """Read a picture from a file: PIL image, all of its pixels in memory.

    Raises FileNotFoundError for a missing file, ValueError for a file that Pillow cannot read.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no picture {path}{what_is_there(path)}")
    try:
        with Image.open(path) as image:
            scale_transparency(image)
            image.load()
            return image
    except TOO_MANY_PIXELS as error:
        raise ValueError(f"{path} has more pixels than Pillow reads ({how_many_pixels(error)}): "
                         f"make it smaller") from None
    except Exception as error:
        # Pillow raises half a dozen types for a damaged file.
        raise ValueError(
            f"{path} cannot be read as a picture ({type(error).__name__})") from None


def what_is_there(path):
    """Say what a path is that is no file, for the end of a message; "" if nothing is there."""
    if not Path(path).exists():
        return ""
    kind = "a folder" if Path(path).is_dir() else "a pipe, a socket or a device"
    return f": this is {kind}, so name a picture file"


def samples_file(folder, verb):
    """Return the first of FOLDER/samples/VERB-001.png, VERB-002.png, … that is not there yet.

    Raises ValueError if no file can be written there.
    """
    samples = Path(folder) / "samples"
    if samples.exists() and not samples.is_dir():
        raise ValueError(f"{samples} is not a folder: name another file with --out")
    if not os.access(samples if samples.is_dir() else folder, os.W_OK):
        raise ValueError(f"{samples} cannot be written: name a file elsewhere with --out")
    found = [re.fullmatch(rf"{verb}-(\d+)(-\d+-\d+)?", path.stem) for path in samples.glob("*.png")]
    last = max((int(match[1]) for match in found if match), default=0)
    return samples / f"{verb}-{last + 1:03}.png"


@contextlib.contextmanager
def result_file(out, folder, verb):
    """Yield the file for a command's pictures: `out`, or else a new one in FOLDER/samples.

    Of two commands at the same time, each gets its own. If the work fails, the new file goes.
    """
    path = out
    while path is None:
        path = samples_file(folder, verb)
        path.parent.mkdir(exist_ok=True)
        try:
            path.open("x").close()
        except FileExistsError:
            path = None
    try:
        yield path
    except BaseException:
        if out is None:
            path.unlink(missing_ok=True)
        raise


def save_singles(rows, path):
    """Write each picture of a grid as FILE-ROW-COLUMN.png beside FILE.png. Return their paths."""
    paths = []
    for i, row in enumerate(rows, start=1):
        for j, picture in enumerate(row, start=1):
            paths.append(path.with_name(f"{path.stem}-{i}-{j}.png"))
            with atomic_open(paths[-1]) as file:
                picture.save(file, format="PNG")
    return paths


def check_out(path, inputs, singles=False):
    """Raise ValueError unless a picture can be written to `path` without losing an input picture.

    A command asks this before it works, because afterwards would be too late.
    inputs: paths of the input pictures. singles: whether the pictures of a grid are written too.
    """
    # Not Path.resolve, which raises RuntimeError for a link to itself.
    real = Path(os.path.realpath(path))
    for other in map(Path, inputs):
        real_other = Path(os.path.realpath(other))
        is_out = real_other == real
        is_beside = real_other.parent == real.parent
        looks_single = re.fullmatch(re.escape(path.stem) + r"-\d+-\d+\.png", other.name)
        if is_out or (singles and is_beside and looks_single):
            raise ValueError(
                f"--out {path} would overwrite the input picture {other}: choose another --out")
    if path.suffix.lower() != ".png":
        raise ValueError(f"--out {path}: pictures are written as .png")
    try:
        if path.is_dir():
            raise ValueError(f"--out {path} is a folder: name a file in it")
        if not path.parent.is_dir():
            raise ValueError(f"--out {path}: there is no folder {path.parent}")
        # atomic_open writes a file beside it first.
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise ValueError(f"--out {path} cannot be written: {error.strerror}") from None
