"""Files of a run: checkpoints, JSON and metrics.jsonl. A file is written whole, or not at all.

Checkpoints and JSON carry a digest of what they hold. A file that is damaged is not believed.
Read next: ../training/state.py, which writes the checkpoints of a training.
"""

import contextlib
import hashlib
import json
import os
import re
import secrets
import zipfile
from pathlib import Path

import torch

from .device import out_of_memory
from .signals import waiting

# The name under which a file is written.
LEFTOVER = ".mini_dalle2-*.tmp"
# The key of the digest in our JSON files.
DIGEST = "sha256_of_the_rest"
# The types of what a checkpoint may hold.
FIELDS = {
    "version": (int, str), "step": int, "steps": int, "seconds": (int, float), "config": dict,
    "model_config": dict, "clip_signature": (str, type(None)), "tokenizer": (dict, type(None)),
    "ema": dict, "model": dict, "optimizer": dict, "streams": dict,
    "processes": list}
# The floats that weights may be stored in. Floats of fewer bits would need a scale beside them.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# How the last part of a zip file begins, and the length of a comment of 64 characters.
ZIP_END = b"PK\5\6"
COMMENT = (64).to_bytes(2, "little")


@contextlib.contextmanager
def writing(path):
    """Turn a full or read-only disk into an OSError of one sentence that names the file."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # torch's writer of checkpoints raises a RuntimeError over the OSError of a full disk.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise OSError(f"{path} could not be written ({cause.strerror or cause}); "
                      f"what was saved before is still there") from None


@contextlib.contextmanager
def atomic_open(path):
    """Open a file for writing bytes, under another name until the end.

    The new file replaces `path` in one step: after a kill there is the old file or the new one.
    Of several processes that write the same file, the last one wins. Ctrl-C waits for the end.
    Raises OSError when the disk is full or read-only.
    """
    path = Path(path)
    # No two writers have the same name, and the file system takes its length.
    temporary = path.with_name(LEFTOVER.replace("*", secrets.token_hex(8)))
    try:
        with waiting(), writing(path):
            with open(temporary, "xb") as file:
                yield file
                file.flush()
                # The contents must reach the disk before the name does.
                os.fsync(file.fileno())
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def remove_leftovers(folder):
    """Remove what a killed process left in a folder that nobody writes into now."""
    for path in Path(folder).glob(LEFTOVER):
        path.unlink(missing_ok=True)


class Digesting:
    """A file for torch.save that also takes the SHA-256 of all bytes that are written."""

    def __init__(self, file):
        self.file = file
        self.digest = hashlib.sha256()

    def write(self, data):
        """Write bytes. Return how many."""
        self.digest.update(data)
        return self.file.write(data)

    def flush(self):
        """Hand what was written to the system."""
        self.file.flush()


def save_checkpoint(checkpoint, path):
    """Write a dict of tensors and plain values atomically. Its key "stage" says what it holds.

    torch writes a zip file. Its comment becomes the SHA-256 of all bytes before the comment.
    """
    with atomic_open(path) as file:
        whole = Digesting(file)
        torch.save(checkpoint, whole)
        # A zip file ends with the length of its comment, two bytes, and the comment.
        file.seek(-2, os.SEEK_END)
        file.write(COMMENT + whole.digest.hexdigest().encode())


def file_digest(path, end=0, more=b""):
    """Return the SHA-256 of a file, without its last `end` bytes and with `more` instead."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size - end
        while left > 0 and (part := file.read(min(left, 2 ** 20))):
            digest.update(part)
            left -= len(part)
    digest.update(more)
    return digest.hexdigest()


def card_rows(files):
    """Write the lines of a card, README.md, about files that lie beside it."""
    return "\n".join(f"| {path.name} | `{file_digest(path)}` |" for path in files)


def check_card(path):
    """Compare a file with the card beside it, if there is one, as beside the bundled weights.

    Raises ValueError for a file that is damaged.
    """
    card = Path(path).with_name("README.md")
    text = card.read_text("utf-8", errors="replace") if card.is_file() else ""
    listed = dict(re.findall(r"^\| (\S+) \| `(\w{64})` \|$", text, re.MULTILINE))
    name = Path(path).name
    if name in listed and file_digest(path) != listed[name]:
        raise ValueError(f"{path} is damaged, because {card} has another SHA-256: copy it once "
                         f"more from where the others are from")


def is_whole(path):
    """Whether the bytes of a checkpoint are those that were written.

    torch does not look at this. Files of older versions have no digest, but each part of a zip
    file has a checksum of 32 bits.
    """
    with open(path, "rb") as file:
        file.seek(-min(os.path.getsize(path), 66), os.SEEK_END)
        end = file.read()
    if end[-22:-18] == ZIP_END and end[-2:] == bytes(2):
        try:
            with zipfile.ZipFile(path) as archive:
                return archive.testzip() is None
        except Exception:
            # zipfile, too, raises half a dozen types for damage.
            return False
    digest = end[2:].decode("ascii", "replace")
    return end[:2] == COMMENT and digest == file_digest(path, end=66, more=bytes(2))


def unsound(value, name=""):
    """Return the name of a tensor in a checkpoint that is not sound, or None.

    value: a tensor, or dicts and lists of tensors and other values; name: what it is called.
    """
    # Each dict and list once, because a file may hold one many times.
    todo = [(name, value)]
    seen = set()
    while todo:
        name, value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if torch.is_tensor(value):
            if not is_sound(value):
                return name
        elif isinstance(value, dict):
            for key, one in value.items():
                todo.append((f"{name} {key}" if isinstance(key, (str, int)) else name, one))
        elif isinstance(value, (list, tuple)):
            todo += [(name, one) for one in value]
    return None


def is_sound(tensor):
    """Whether a tensor is a plain one, has all its numbers stored, and all of them are finite.

    Whether its type is one of FLOATS is for others to say.
    """
    if tensor.layout != torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        return False
    # One stored number may stand for any number of them.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return False
    return tensor.dtype not in FLOATS or bool(tensor.isfinite().all())


def load_checkpoint(path, stage=None):
    """Read a checkpoint: a dict with its tensors on the CPU. No code in the file is run.

    stage: the stage that the checkpoint must be of; None: any.
    Raises FileNotFoundError, and ValueError for a file that is damaged, not finite or another.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    if not is_whole(path):
        raise ValueError(f"{path} cannot be read as a checkpoint: it is damaged or not one")
    check_card(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # These two are no fault of the file.
        if isinstance(error, PermissionError) or out_of_memory(error):
            raise
        # torch raises half a dozen types for a damaged file, all of them with long texts.
        raise ValueError(f"{path} cannot be read as a checkpoint: "
                         f"it is damaged or not one ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("stage"), str):
        raise ValueError(f"{path} is a torch file, but no checkpoint of mini_dalle2")
    for name, kind in FIELDS.items():
        if name in checkpoint and not isinstance(checkpoint[name], kind):
            raise ValueError(f"{path} is no checkpoint of mini_dalle2: its {name} is a "
                             f"{type(checkpoint[name]).__name__}")
    for name in ("step", "steps", "seconds"):
        if not 0 <= checkpoint.get(name, 0) < 2 ** 63:
            raise ValueError(f"{path} is no checkpoint of mini_dalle2: its {name} is no number of "
                             f"{name.removesuffix('s')}s")
    if stage not in (None, checkpoint["stage"]):
        raise ValueError(f"{path} is a checkpoint of {checkpoint['stage'][:40]}, not of {stage}")
    if (name := unsound(checkpoint)) is not None:
        raise ValueError(f"{path} cannot be used: {name.strip()[:80]} in it is not whole, or not "
                         f"finite")
    return checkpoint


def is_pointer(start):
    """Whether a file begins as a git-lfs pointer, which only stands for a large file."""
    return start.startswith(b"version https://git-lfs")


def read_metrics(run):
    """The lines of metrics.jsonl in a run folder, as a list of dicts.

    A broken line is left out: a machine that goes down may leave half of one.
    """
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)
            and "stage" in entry and isinstance(entry.get("step"), int)]


def read_json(path):
    """Read plain values from a JSON file.

    Raises ValueError when the file is not JSON, or not what `write_json` has written.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("too many brackets within each other") from None
    # Files of older versions, and of other people, have no digest.
    if isinstance(value, dict) and DIGEST in value:
        digest = value.pop(DIGEST)
        if digest != json_digest(value):
            raise ValueError(f"it was edited or damaged: settings are changed with flags such as "
                             f"--decoder.lr=3e-4; to use the file as it is, delete its line "
                             f"{DIGEST}")
    return value


def write_json(value, path):
    """Write a dict of plain values as JSON, atomically, with a digest."""
    with atomic_open(path) as file:
        whole = {DIGEST: json_digest(value)} | value
        file.write(json.dumps(whole, indent=1).encode())


def json_digest(value):
    """Return the SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def signature(weights):
    """Sixteen hexadecimal digits that change when any weight of a state dict changes."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        digest.update(name.encode() + data)
    return digest.hexdigest()[:16]
