"""Several processes: two with half of each batch train as one with all of it, only the first writes, and a run may change their number."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, SMALL
from mini_dalle2 import configs, evaluate
from mini_dalle2.data.pixels import to_pil
from mini_dalle2.data.shapes import CaptionedShapes
from mini_dalle2.runtime.processes import collect, gather_rows, is_main, rank, world
from mini_dalle2.runtime.files import read_json
from mini_dalle2.runtime.files import load_checkpoint, read_metrics

STAGES = list(configs.MODELS)


def torchrun(*arguments, script="train.py"):
    """train.py, or another script or module, by torchrun, two processes on one thread each."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               *(["--", script] if script.endswith(".py") else ["-m", "--", script])]      # without the dashes, torchrun takes --n for its own
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *map(str, arguments), "--device=cpu"], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)


def losses(run, stage):
    """A stage's loss of every step."""
    return [line["loss"] for line in read_metrics(run) if line["stage"] == stage]


def equal(a, b):
    """Whether two dicts of tensors agree bit for bit."""
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def without(run, folder, stages):
    """A copy of a run without these stages."""
    gone = {f"{stage}{end}" for stage in stages for end in (".pt", ".resume.pt", ".png", "_loss.png")}
    shutil.copytree(run, folder, ignore=lambda _, names: [name for name in names if name in gone])
    return folder


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
    """The stages after CLIP trained by two processes, on the CLIP that one process trained."""
    folder = without(run, tmp_path_factory.mktemp("two") / "run", STAGES[1:])
    (folder / "embeddings.pt").unlink()
    process = torchrun("--out", folder, "--resume")
    assert process.returncode == 0, process.stderr[-3000:]
    return folder, process


def test_one_process_is_alone():
    rows = torch.randn(3, 2)
    assert world() == 1 and rank() == 0 and is_main() and gather_rows(rows) is rows and collect(5) == [5]


def test_clip_sees_the_whole_batch(run, tmp_path):
    """Half a batch would have an easier task, ln 8 instead of ln 16; and without gradients through what is gathered, step 2 would differ."""
    folder = without(run, tmp_path / "run", STAGES)
    process = torchrun("--out", folder, "--stage=clip")
    assert process.returncode == 0, process.stderr[-3000:]
    assert losses(folder, "clip") == pytest.approx(losses(run, "clip"), abs=1e-5) and len(losses(run, "clip")) == 3
    a, b = (load_checkpoint(path / "clip.resume.pt")["optimizer"] for path in (run, folder))
    for i in a:                                                            # Adam's mean of gradients: the gradients themselves agree
        assert torch.allclose(a[i]["exp_avg"], b[i]["exp_avg"], atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("stage", STAGES[1:])
def test_two_processes_give_the_losses_of_one(run, two, stage):
    assert losses(two[0], stage) == pytest.approx(losses(run, stage), abs=1e-5) and len(losses(run, stage)) == 3
    a, b = (load_checkpoint(path / f"{stage}.resume.pt")["streams"] for path in (run, two[0]))
    assert torch.equal(a["noise"], b["noise"]) and torch.equal(a["data"], b["data"])


def test_only_the_first_process_writes(run, two):
    folder, process = two
    assert {path.name for path in folder.iterdir()} == {path.name for path in run.iterdir()}
    assert process.stdout.count("next: python sample.py") == 1 and process.stdout.count("together") == 1
    assert len({line["step"] for line in read_metrics(folder) if line["stage"] == "decoder"}) == len(losses(folder, "decoder"))


def test_another_number_of_processes_goes_on_and_says_what_changes(two, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(two[0], folder)
    more = ["--out", folder, "--resume", "--stage=prior"]
    command = [sys.executable, "train.py", "--device=cpu", *map(str, more), "--prior.steps=4"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0 and load_checkpoint(folder / "prior.pt")["step"] == 4
    assert "note: prior was trained by 2 processes so far, now by 1: " in process.stdout and "no longer bit-identical" in process.stdout
    process = torchrun(*more, "--prior.steps=5")
    assert process.returncode == 0 and load_checkpoint(folder / "prior.pt")["step"] == 5
    assert process.stdout.count("note: prior was trained by 1 processes so far, now by 2: ") == 1


def test_as_many_processes_go_on_bit_for_bit(run, tmp_path):
    """With dropout, which each process draws from a stream of its own."""
    settings, ends = ["--stage=decoder", "--decoder.dropout=0.2", "--decoder.decay=none"], []
    for name, parts in (("whole", [["--decoder.steps=5"]]), ("parts", [["--decoder.steps=2"], ["--decoder.steps=5", "--resume"]])):
        folder = without(run, tmp_path / name, ["decoder"])
        for part in parts:
            process = torchrun("--out", folder, *settings, *part)
            assert process.returncode == 0 and "note:" not in process.stdout, process.stderr[-3000:]
        ends.append(load_checkpoint(folder / "decoder.resume.pt"))
    assert equal(ends[0]["model"], ends[1]["model"]) and equal(ends[0]["ema"], ends[1]["ema"])
    assert not torch.equal(ends[0]["processes"][0]["cpu"], ends[0]["processes"][1]["cpu"])


HALVES = """
import torch
from mini_dalle2.runtime.processes import like, parallel_module, processes, whole
from mini_dalle2.transformer import Transformer
def halves():
    torch.manual_seed(0)
    model = Transformer(2, 16, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    parallel_module(model, shard=True)
    for name, p in model.named_parameters():
        assert p.to_local().numel() * 2 == p.numel() and torch.equal(whole(p), before[name])
        assert torch.equal(like(before[name], p).to_local(), p.to_local())
with processes(torch.device("cpu")):
    halves()                                     # as in train.py, no model outlives the processes
    print("halves")
"""


def test_each_process_keeps_half_of_the_weights(tmp_path):
    (tmp_path / "halves.py").write_text(HALVES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", tmp_path / "halves.py"]
    process = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert process.returncode == 0 and process.stdout == "halves\n", process.stderr[-3000:]


def test_sharded_weights_train_as_whole_ones(run, tmp_path):
    """Losses and checkpoints are those of one process, and one may go on where the other stopped."""
    folder = without(run, tmp_path / "run", STAGES[1:])
    process = torchrun("--out", folder, "--resume", "--shard")
    assert process.returncode == 0, process.stderr[-3000:]
    for stage in STAGES[1:]:
        assert losses(folder, stage) == pytest.approx(losses(run, stage), abs=1e-5) and len(losses(folder, stage)) == 3
        a, b = (load_checkpoint(path / f"{stage}.resume.pt") for path in (run, folder))
        assert a["ema"].keys() == b["ema"].keys() and all(torch.allclose(a["ema"][key], b["ema"][key], atol=1e-3) for key in a["ema"])
        assert a["optimizer"].keys() == b["optimizer"].keys()
    whole = without(run, tmp_path / "whole", [])
    more = ["--stage=decoder", "--decoder.steps=4", "--resume"]
    assert torchrun("--out", whole, "--decoder.shard=true", *more).returncode == 0
    assert subprocess.run([sys.executable, "train.py", "--out", folder, "--decoder.shard=false", "--device=cpu", *more], cwd=ROOT).returncode == 0
    assert len(losses(whole, "decoder")) == 4 and losses(whole, "decoder") == pytest.approx(losses(folder, "decoder"), abs=1e-5)


@pytest.mark.parametrize("script, arguments, said", [
    ("train.py", ["--decoder.lrr=1"], "train.py: there is no setting --decoder.lrr; the closest is --decoder.lr"),
    ("train.py", ["--clip.shard=true"], "train.py: clip.shard must be false: CLIP's temperature is a single number, which fully_shard cannot divide"),
    ("train.py", [*SMALL, "--clip.batch_size=15"], "train.py: --clip.batch_size=15 must be a multiple of processes × accumulate (2 × 1)"),
    ("sample.py", ["text", ""], "sample.py: there is no run folder "),
    ("mini_dalle2.evaluate", [], "evaluate: there is no run folder ")])
def test_mistakes_are_said_once(script, arguments, said, tmp_path):
    process = torchrun(*arguments, "--out" if script == "train.py" else "--run", tmp_path / "run", script=script)
    assert process.returncode != 0 and sum(line.startswith(said) for line in process.stderr.splitlines()) == 1


@pytest.mark.parametrize("verb", [["text", "two cyan rings", "--n=1", "--rerank=5", "--prior=ar"], ["variations", "GIVEN", "--n=1"]],
                         ids=("uneven, then fewer than processes", "a picture"))
def test_two_processes_draw_what_one_draws(run, tmp_path, verb):
    given = tmp_path / "given.png"
    to_pil(CaptionedShapes("val", 64)[0]["image"]).save(given)
    verb = [str(given) if word == "GIVEN" else word for word in verb] + ["--run", run]
    one = subprocess.run([sys.executable, "sample.py", *map(str, verb), "--device=cpu", "--out", tmp_path / "one.png"], cwd=ROOT, capture_output=True)
    two = torchrun(*verb, "--out", tmp_path / "two.png", script="sample.py")
    assert one.returncode == two.returncode == 0, two.stderr[-3000:]
    assert two.stdout.count("two.png") == 1
    a, b = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("one", "two"))
    assert a.shape == b.shape and abs(a - b).max() <= 2                    # batches of other sizes round differently


def numbers(found):
    """All numbers in findings, in order, but for the seconds that they took."""
    if isinstance(found, dict):
        return [n for key, value in found.items() if key != "seconds" for n in numbers(value)]
    return [n for value in found for n in numbers(value)] if isinstance(found, list) else [found] * isinstance(found, (int, float))


def test_two_processes_find_what_one_finds(judged, tmp_path):
    """The evaluation: pictures inverted and sampled by both, the same files and findings, and the second time nothing to do."""
    folders, asked = [shutil.copytree(judged, tmp_path / name) for name in ("one", "two")], ["--only", "variations", "--n", "16"]
    assert evaluate.main(["--run", str(folders[0]), *asked, "--device=cpu"]) == 0
    two = torchrun("--run", folders[1], *asked, script="mini_dalle2.evaluate")
    assert two.returncode == 0 and two.stdout.count("the report: ") == 1, two.stderr[-3000:]
    files = [{path.relative_to(folder) for path in folder.rglob("*")} for folder in folders]
    assert files[0] == files[1]
    findings = [numbers(read_json(folder / "evaluate" / "variations.json")["findings"]) for folder in folders]
    assert findings[1] == pytest.approx(findings[0], rel=1e-3, abs=1e-3) and len(findings[0]) > 20
    for one in folders[0].glob("evaluate/cache-*/*.pt"):
        a, b = (load_checkpoint(folders[i] / one.relative_to(folders[0]))["made"].float() for i in (0, 1))
        assert a.shape == b.shape and (a - b).abs().max() <= (2 if "sampled" in one.name else 1e-3)
    again = torchrun("--run", folders[1], *asked, script="mini_dalle2.evaluate")
    assert again.returncode == 0 and "variations: " not in again.stdout
