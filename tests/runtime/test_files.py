"""The files of a run: written whole or not at all, read without running code; damage, full disks and kills do no harm."""

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from mini_dalle2.pipeline import WEIGHTS
from mini_dalle2.runtime.files import (
    atomic_open, card_rows, check_card, load_checkpoint, read_json, read_metrics, save_checkpoint,
    write_json)

import train
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

@contextlib.contextmanager
def room_for(nbytes):
    """In this context no file gets larger: writing more is an OSError, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("nbytes", [0, 1000, 100_000, 200_000, 399_000])
def test_a_full_disk_is_one_sentence_and_destroys_nothing(tmp_path, nbytes):
    """torch's writer, which has two ways to fail, meets the end of the room in all of its parts."""
    path = tmp_path / "toy.pt"
    save_checkpoint({"stage": "toy", "step": 1}, path)
    with pytest.raises(OSError, match=r"toy\.pt could not be written \(File too large\)") as error:
        with room_for(nbytes):
            save_checkpoint({"stage": "toy", "a": torch.zeros(50_000), "b": torch.zeros(50_000)}, path)
    assert "\n" not in str(error.value)
    assert load_checkpoint(path)["step"] == 1 and os.listdir(tmp_path) == ["toy.pt"]


def test_other_errors_of_torch_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="mine"), atomic_open(tmp_path / "a"):
        raise RuntimeError("mine")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["prior.resume.pt", "prior.pt", "metrics.jsonl"])
def test_a_disk_that_fills_up_in_training(run, tmp_path, capsys, monkeypatch, name):
    """Exit code 2 and one sentence; the last good checkpoint stays, and the run goes on from it once there is room."""
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    more = ["--out", str(copy), "--resume", "--stage=prior", "--prior.steps=9", "--device=cpu"]
    replace = os.replace

    def no_room(source, target):
        if Path(target).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", no_room)
        assert train.main(more) == 2
    said = capsys.readouterr().err.strip().splitlines()[-1]
    assert said == f"train.py: {copy / name} could not be written (No space left on device); what was saved before is still there"
    # STAGE.resume.pt is written before STAGE.pt: when only the latter has found no room, the former is one step of saving ahead.
    assert load_checkpoint(copy / "prior.pt")["step"] == 3
    assert load_checkpoint(copy / "prior.resume.pt")["step"] == (4 if name == "prior.pt" else 3)
    assert not list(copy.glob(".*"))
    assert train.main(more) == 0
    assert load_checkpoint(copy / "prior.pt")["step"] == 9


def test_several_writers_of_one_file_do_not_meet(tmp_path):
    """Each has a temporary file of its own; the last one wins, and nothing is left."""
    path = tmp_path / "a.txt"
    with atomic_open(path) as first:
        first.write(b"1111")
        with atomic_open(path) as second:
            second.write(b"22")
        first.write(b"1111")
        assert path.read_bytes() == b"22"
    assert path.read_bytes() == b"1" * 8 and os.listdir(tmp_path) == ["a.txt"]


def test_the_longest_name_that_a_file_may_have(tmp_path):
    path = tmp_path / ("a" * 255)
    with atomic_open(path) as file:
        file.write(b"1")
    assert path.read_bytes() == b"1"


def test_after_every_kind_of_end_a_stage_goes_on_to_the_same_weights():
    """Two kills, and one or two blows of each other kind; the benchmark does twenty, and all stages."""
    stages = ["clip"]
    command = [sys.executable, "tests/benchmarks/kills.py", "--kills=2", "--stages", *stages]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout.count("bit-identical") == len(stages), process.stdout + process.stderr


# ---------------------------------------------------------------------------------------------------------------- damage

def flipped(content, place):
    """The bytes with one bit flipped."""
    content = bytearray(content)
    content[place] ^= 4
    return bytes(content)


def test_each_flipped_bit_of_a_checkpoint_is_found(tmp_path):
    path = tmp_path / "toy.pt"
    checkpoint = {"stage": "toy", "step": 7, "ema": {"w": torch.randn(500)}}
    save_checkpoint(checkpoint, path)
    content = path.read_bytes()
    # In a tensor, in a number, in the zip's directory, in the digest: every byte counts.
    for place in [*range(0, len(content), 37), *range(len(content) - 90, len(content))]:
        path.write_bytes(flipped(content, place))
        with pytest.raises(ValueError, match="toy.pt cannot be read as a checkpoint: it is damaged"):
            load_checkpoint(path)
    path.write_bytes(content)
    assert torch.equal(load_checkpoint(path)["ema"]["w"], checkpoint["ema"]["w"])


def test_a_checkpoint_is_still_what_torch_and_zip_programs_read(tmp_path):
    path = tmp_path / "toy.pt"
    save_checkpoint({"stage": "toy", "ema": {"w": torch.arange(5)}}, path)
    for mmap in (False, True):
        assert torch.equal(torch.load(path, weights_only=True, mmap=mmap)["ema"]["w"], torch.arange(5))
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None and len(archive.comment) == 64
    before_comment = path.read_bytes()[:-66] + bytes(2)
    assert archive.comment.decode() == hashlib.sha256(before_comment).hexdigest()


def test_a_checkpoint_without_a_digest_has_the_checksums_of_its_zip(tmp_path):
    """As older versions wrote them, and as the bundled weights are."""
    path = tmp_path / "toy.pt"
    torch.save({"stage": "toy", "ema": {"w": torch.zeros(500)}}, path)
    assert load_checkpoint(path)["stage"] == "toy"
    content = path.read_bytes()
    path.write_bytes(flipped(content, len(content) // 2))
    with pytest.raises(ValueError, match="toy.pt cannot be read as a checkpoint: it is damaged"):
        load_checkpoint(path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused_by_name(tmp_path, bad):
    path = tmp_path / "toy.pt"
    for where, name in (({"ema": {"w": torch.tensor([1.0, bad])}}, "ema w"),
                        ({"optimizer": {3: {"exp_avg": torch.tensor(bad)}}}, "optimizer 3 exp_avg"),
                        ({"z_img": [torch.tensor([bad]).half()]}, "z_img")):
        save_checkpoint({"stage": "toy", "n": torch.tensor([1]), **where}, path)
        with pytest.raises(ValueError, match=f"toy.pt cannot be used: {name} in it is not whole, or not finite"):
            load_checkpoint(path)


def test_json_that_was_changed_is_refused(tmp_path):
    path = tmp_path / "config.json"
    value = {"a": [1, 2.5, None, "é", True], "b": {"c": 1e-5, "3": "x"}}
    write_json(value, path)
    assert read_json(path) == value
    text = path.read_text()
    path.write_text(text.replace("2.5", "2.6"))
    with pytest.raises(ValueError, match="edited or damaged"):
        read_json(path)
    path.write_text(json.dumps({"a": 1}))
    assert read_json(path) == {"a": 1}, "files without a digest are read"


def test_a_card_names_the_file_that_is_damaged(tmp_path):
    (tmp_path / "a.pt").write_bytes(b"one")
    (tmp_path / "b.txt").write_bytes(b"two")
    (tmp_path / "README.md").write_text("# Card\n\n" + card_rows([tmp_path / "a.pt", tmp_path / "b.txt"]) + "\n")
    check_card(tmp_path / "a.pt")
    check_card(tmp_path / "b.txt")
    (tmp_path / "b.txt").write_bytes(b"tvo")
    with pytest.raises(ValueError, match=r"b\.txt is damaged.*copy it once more"):
        check_card(tmp_path / "b.txt")
    check_card(tmp_path / "a.pt")
    check_card(tmp_path / "not_listed.pt")


def test_the_bundled_weights_are_those_of_their_card():
    card = (WEIGHTS / "README.md").read_text()
    names = re.findall(r"^\| (\S+) \| `\w{64}` \|$", card, re.MULTILINE)
    assert sorted(names) == sorted(path.name for path in WEIGHTS.iterdir() if path.suffix in (".pt", ".txt"))
    for name in names:
        check_card(WEIGHTS / name)


def test_a_number_that_stands_for_many_is_refused(tmp_path):
    """A stranger's file of some kilobytes could fill any memory."""
    path = tmp_path / "toy.pt"
    save_checkpoint({"stage": "toy", "ema": {"w": torch.zeros(1).expand(1000, 1000)}}, path)
    with pytest.raises(ValueError, match="ema w in it is not whole"):
        load_checkpoint(path)
