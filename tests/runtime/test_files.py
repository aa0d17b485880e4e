"""The files of a run: written whole or not at all, read without running code; damage, full disks and kills do no harm."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from mini_dalle2.runtime.files import atomic_open, load_checkpoint, read_metrics, save_checkpoint

from conftest import ROOT


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
    script = ("import os, sys, torch\nfrom mini_dalle2.runtime import files\n"
              "def die(value, file):\n    file.write(b'x' * 1000); file.flush(); os._exit(9)\n"
              "torch.save = die\nfiles.save_checkpoint({'stage': 'toy', 'step': 2}, sys.argv[1])\n")
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


# ---------------------------------------------------------------------------------------------------------------- full disks and kills

def test_a_full_disk_is_one_sentence_and_destroys_nothing(tmp_path):
    """/dev/full takes nothing: "no space left on device"."""
    path = tmp_path / "toy.pt"
    save_checkpoint({"stage": "toy", "step": 1}, path)
    for size in (10, 10 ** 6):                                             # small ones fail when the file is closed, large ones before
        (tmp_path / "toy.pt.tmp").symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"toy\.pt could not be written \(No space left on device\)") as error:
            save_checkpoint({"stage": "toy", "step": 2, "w": torch.zeros(size)}, path)
        assert "\n" not in str(error.value)
        assert load_checkpoint(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["toy.pt"]


@pytest.mark.parametrize("name", ["prior.resume.pt", "prior.pt", "metrics.jsonl"])
def test_a_disk_that_fills_up_in_training(run, tmp_path, name):
    """Exit code 2 and one sentence; the last good checkpoint stays, and the run goes on from it once there is room."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    more, full = ["--out", str(copy), "--resume", "--stage=prior", "--prior.steps=9"], copy / f"{name}.tmp"
    full.symlink_to("/dev/full")
    process = subprocess.run([sys.executable, "train.py", *more, "--device=cpu"], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    said = process.stderr.strip().splitlines()[-1]
    assert said == f"train.py: {copy / name} could not be written (No space left on device); what was saved before is still there"
    # STAGE.resume.pt is written before STAGE.pt: when only the latter has found no room, the former is one step of saving ahead.
    assert load_checkpoint(copy / "prior.pt")["step"] == 3
    assert load_checkpoint(copy / "prior.resume.pt")["step"] == (4 if name == "prior.pt" else 3)
    assert not full.is_symlink()
    assert subprocess.run([sys.executable, "train.py", *more, "--device=cpu"], cwd=ROOT, capture_output=True).returncode == 0
    assert load_checkpoint(copy / "prior.pt")["step"] == 9


def test_killed_at_random_moments_a_stage_ends_with_the_same_weights():
    """Two kills of some stages of micro, one from outside and one in the middle of a write; the benchmark does twenty of each."""
    stages = ["clip", "decoder"]
    command = [sys.executable, "tests/benchmarks/kills.py", "--kills=2", "--stages", *stages]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.count("bit-identical") == len(stages), process.stdout + process.stderr
