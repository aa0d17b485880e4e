"""Files of a run: checkpoints, JSON and metrics.jsonl. A file is written whole, or not at all.

Read next: ../training/state.py, which writes the checkpoints of a training.
"""

import contextlib
import hashlib
import json
import os
import secrets
from pathlib import Path

import torch

from .signals import waiting


# The name under which a file is written.
LEFTOVER = ".mini_dalle2-*.tmp"


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


def save_checkpoint(checkpoint, path):
    """Write a dict of tensors and plain values atomically. Its key "stage" says what it holds."""
    with atomic_open(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path, stage=None):
    """Read a checkpoint: a dict with its tensors on the CPU. No code in the file is run.

    stage: the stage that the checkpoint must be of; None: any.
    Raises FileNotFoundError, ValueError.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        # torch raises half a dozen types for a damaged file, all of them with long texts.
        raise ValueError(f"{path} cannot be read as a checkpoint: "
                         f"it is damaged or not one ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or "stage" not in checkpoint:
        raise ValueError(f"{path} is a torch file, but no checkpoint of mini_dalle2")
    if stage not in (None, checkpoint["stage"]):
        raise ValueError(f"{path} is a checkpoint of {checkpoint['stage']}, not of {stage}")
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
    """Read plain values from a JSON file. Raises ValueError when the file is not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("too many brackets within each other") from None


def write_json(value, path):
    """Write plain values as JSON, atomically."""
    with atomic_open(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def signature(weights):
    """Sixteen hexadecimal digits that change when any weight of a state dict changes."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        data = value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        digest.update(name.encode() + data)
    return digest.hexdigest()[:16]
