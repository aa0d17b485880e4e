"""Files of a run: written whole or not at all; checkpoints, JSON and metrics.jsonl.

Read next: training/state.py.
"""

import contextlib
import hashlib
import json
import os
from pathlib import Path

import torch


@contextlib.contextmanager
def writing(path):
    """Makes a full disk, or one that may not be written to, an OSError that names the file, in one
    sentence."""
    try:
        yield
    except OSError as error:
        raise OSError(f"{path} could not be written ({error.strerror or error}); what was saved before is still there") from None


@contextlib.contextmanager
def atomic_open(path):
    """Opens a neighbour of `path` for writing bytes and renames it over `path` at the end: there
    is the old file or the new, never half.

    Raises OSError when the disk is full, or may not be written to.
    """
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with writing(path):
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())                    # the contents reach the disk before the name does
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def save_checkpoint(checkpoint, path):
    """Writes a dict of tensors and plain values atomically. Its key "stage" says what it is."""
    with atomic_open(path) as file:
        torch.save(checkpoint, file)


def load_checkpoint(path, stage=None):
    """Reads a checkpoint, a dict with tensors on the CPU, without running any code in it; stage:
    what it must be of, if that matters.

    Raises FileNotFoundError, ValueError.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                             # torch raises half a dozen types for a damaged file, all with long texts
        raise ValueError(f"{path} cannot be read as a checkpoint: it is damaged or not one ({type(error).__name__})") from None
    if not isinstance(checkpoint, dict) or "stage" not in checkpoint:
        raise ValueError(f"{path} is a torch file, but no checkpoint of mini_dalle2")
    if stage not in (None, checkpoint["stage"]):
        raise ValueError(f"{path} is a checkpoint of {checkpoint['stage']}, not of {stage}")
    return checkpoint


def read_metrics(run):
    """The lines of metrics.jsonl as a list of dicts; what is none (half-written, since the machine
    went down) is left out."""
    path, entries = Path(run) / "metrics.jsonl", []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict) and "stage" in entry and isinstance(entry.get("step"), int)]


def read_json(path):
    """Plain values from a JSON file. Raises ValueError when it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("too many brackets within each other") from None


def write_json(value, path):
    """Writes plain values as JSON, whole or not at all."""
    with atomic_open(path) as file:
        file.write(json.dumps(value, indent=1).encode())


def signature(weights):
    """Sixteen hexadecimal digits that change when any weight does."""
    digest = hashlib.sha256()
    for name, value in sorted(weights.items()):
        digest.update(name.encode() + value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
