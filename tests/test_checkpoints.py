"""The files of a run: written whole or not at all, read without running code, and damage is one clear sentence."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mini_dalle2.training import atomic_open, load_checkpoint, read_metrics, save_checkpoint

ROOT = Path(__file__).resolve().parent.parent


def test_atomic_write_survives_an_exception(tmp_path):
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError):
        with atomic_open(path) as file:
            file.write(b"half of the ne")
            raise RuntimeError
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["a.bin"]
    with atomic_open(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"                                 # until the very end
    assert path.read_bytes() == b"new"


def test_checkpoint_survives_a_killed_process(tmp_path):
    """The process dies in the middle of writing a second checkpoint, without any chance to clean up."""
    path = tmp_path / "toy.pt"
    save_checkpoint({"stage": "toy", "step": 1}, path)
    script = ("import os, sys, torch\nfrom mini_dalle2 import training\n"
              "def die(value, file):\n    file.write(b'x' * 1000); file.flush(); os._exit(9)\n"
              "torch.save = die\ntraining.save_checkpoint({'stage': 'toy', 'step': 2}, sys.argv[1])\n")
    assert subprocess.run([sys.executable, "-c", script, str(path)], cwd=ROOT).returncode == 9
    assert load_checkpoint(path)["step"] == 1
    save_checkpoint({"stage": "toy", "step": 3}, path)                     # what the dead process left behind is no obstacle
    assert load_checkpoint(path)["step"] == 3


def test_bad_checkpoints_are_one_clear_error(tmp_path):
    path = tmp_path / "toy.pt"
    with pytest.raises(FileNotFoundError, match="toy.pt"):
        load_checkpoint(path)
    save_checkpoint({"stage": "toy", "ema": {"w": torch.randn(1000)}}, path)
    whole = path.read_bytes()
    for damaged in (b"", b"not a checkpoint at all", whole[:len(whole) // 2], whole[:200] + b"\0" * 200 + whole[400:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="toy.pt cannot be read") as error:
            load_checkpoint(path)
        assert "\n" not in str(error.value)
    torch.save([1, 2], path)
    with pytest.raises(ValueError, match="no checkpoint of mini_dalle2"):
        load_checkpoint(path)


class Evil:
    """Pickled, this asks for a call of os.mkdir on loading."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_a_checkpoint_runs_no_code(tmp_path):
    torch.save({"stage": Evil(str(tmp_path / "harm"))}, tmp_path / "toy.pt")
    with pytest.raises(ValueError, match="cannot be read"):
        load_checkpoint(tmp_path / "toy.pt")
    assert not (tmp_path / "harm").exists()


def test_a_half_written_metrics_line_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"stage": "a", "step": 1}\n{"stage": "a", "st')
    assert read_metrics(tmp_path) == [{"stage": "a", "step": 1}]
    assert read_metrics(tmp_path / "nowhere") == []
