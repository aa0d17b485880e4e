"""train.py: the whole chain at toy size, going on after a stop, folders of pictures, and one sentence for every mistake."""

import json
import math
import os
import shutil
import shlex
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from unittest import mock

import pytest
import torch
from PIL import Image

import train                                               # the script at the top level
from conftest import ROOT, SMALL
from mini_dalle2 import DALLE2
from mini_dalle2 import configs
from mini_dalle2.data import tables as pictures
from mini_dalle2.data.pixels import to_pil
from mini_dalle2.data import split
from mini_dalle2.data.shapes import CaptionedShapes
from mini_dalle2.tricks.sketched import SketchedDecoder
from mini_dalle2.pipeline import load_model
from mini_dalle2.prior import DiffusionPrior
from mini_dalle2.pretrained.ship import ship
from mini_dalle2.data.tables import Pictures
from mini_dalle2.runtime.files import read_json, signature, write_json
from mini_dalle2.training import changes, guards, hints, log, origin, pace, stages
from mini_dalle2.training.run import Run
from mini_dalle2.runtime.files import load_checkpoint, read_metrics, save_checkpoint
from mini_dalle2.training import overrides
from mini_dalle2.training.variants import variant


def call(capsys, *arguments):
    """Runs train.py in this process: (exit code, what it said on standard output, the last line on standard error)."""
    capsys.readouterr()
    code = train.main([str(a) for a in arguments])
    out, error = capsys.readouterr()
    return code, out, (error.strip().splitlines() or [""])[-1]


def copy_of(run, folder, leave_out=()):
    """A copy of a run folder without some of its files."""
    folder.mkdir()
    for path in run.iterdir():
        if path.name not in leave_out:
            os.link(path, folder / path.name)                              # files are only ever replaced, never written into
    return folder


# ---------------------------------------------------------------------------------------------------------------- the chain

def test_run_folder(run):
    names = {path.name for path in run.iterdir()}
    stages = set(configs.MODELS)
    assert {f"{stage}{end}" for stage in stages for end in (".pt", ".resume.pt", ".png", "_loss.png")} <= names
    assert names - {f"{stage}{end}" for stage in stages for end in (".pt", ".resume.pt", ".png", "_loss.png")} == {
        "config.json", "tokenizer.json", "embeddings.pt", "metrics.jsonl", "commands.txt", "words.txt"}
    assert (run / "commands.txt").read_text() == f"python train.py {shlex.join([*SMALL, f'--out={run}'])}\n"
    assert {line["stage"] for line in read_metrics(run)} == stages
    for name in names:
        if name.endswith(".png"):
            with Image.open(run / name) as picture:
                picture.load()


def test_checkpoints_carry_all_that_sampling_needs(run):
    config = overrides.from_dict(read_json(run / "config.json"))
    vocab = config.clip.model.vocab_size
    assert 514 < vocab < 640 and config.clip.model.eot_id == vocab - 1     # as the tokenizer came out, not as it was asked for
    signatures = set()
    for stage in configs.MODELS:
        model, checkpoint = load_model(run / f"{stage}.pt")
        assert model.cfg == getattr(config, stage).model and overrides.from_dict(checkpoint["config"]) == config
        assert checkpoint["step"] == 3 and "optimizer" not in checkpoint
        if not stage.startswith("upsampler"):
            assert len(checkpoint["tokenizer"]["merges"]) == vocab - 514
            signatures.add(checkpoint["clip_signature"])
    assert len(signatures) == 1 and signatures.pop() == signature(load_checkpoint(run / "clip.pt")["ema"])


def test_embeddings_are_those_of_the_frozen_clip(run):
    saved = load_checkpoint(run / "embeddings.pt")
    clip, _ = load_model(run / "clip.pt")
    dataset = CaptionedShapes("train", 16, 0, 40)
    z = clip.encode_image(torch.stack([dataset[i]["image"] for i in range(5)])).detach()
    assert torch.allclose(z, saved["z_img"][:5], atol=2e-2)                # the table rounds pictures to 8 bits
    assert saved["captions"] == [dataset.scene(i).text for i in range(40)] and saved["z_txt"].shape == (40, 32)


def test_finished_stages_are_skipped_and_next_command_is_named(run, capsys):
    before = (run / "clip.pt").stat().st_mtime_ns
    code, out, _ = call(capsys, "--out", run, "--resume")
    assert code == 0 and out.count("was finished before") == 8 and (run / "clip.pt").stat().st_mtime_ns == before
    assert out.strip().splitlines()[-1] == f"next: python sample.py text 'a red circle above a blue square' --run {run}"


def test_more_steps_on_resume(run, tmp_path, capsys):
    copy = copy_of(run, tmp_path / "copy")
    assert call(capsys, "--out", copy, "--resume", "--stage=decoder", "--decoder.steps=5", "--decoder.lr=1e-5")[0] == 0
    assert load_checkpoint(copy / "decoder.pt")["step"] == 5 and load_checkpoint(run / "decoder.pt")["step"] == 3
    assert read_json(copy / "config.json")["decoder"]["train"]["lr"] == 1e-5
    line = f"python train.py --out {copy} --resume --stage=decoder --decoder.steps=5 --decoder.lr=1e-5\n"
    assert (copy / "commands.txt").read_text() == (run / "commands.txt").read_text() + line


def test_habits_change_while_a_stage_learns_on(run, tmp_path, capsys):
    """What weights do not depend on may change with further steps, but not behind the back of a finished stage, nor of one not asked for."""
    copy = copy_of(run, tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    for arguments in (["--resume"], ["--resume", "--stage=prior", "--prior.steps=5"]):
        code, _, error = call(capsys, "--out", copy, *arguments, "--decoder.caption_drop=0.2")
        assert code == 2 and "another caption_drop" in error and "--decoder.steps=6" in error
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before
    habits = ["--decoder.caption_drop=0.2", "--decoder.guidance=1.5"]
    assert call(capsys, "--out", copy, "--resume", "--stage=decoder", "--decoder.steps=5", *habits)[0] == 0
    model, checkpoint = load_model(copy / "decoder.pt")
    assert checkpoint["step"] == 5 and (model.cfg.caption_drop, model.cfg.guidance) == (0.2, 1.5)
    begun = tmp_path / "begun"
    code, _, error = call(capsys, "--from", run, "--out", begun, "--stage=prior", "--prior.steps=2", *habits)
    assert code == 2 and "another caption_drop and guidance" in error
    assert call(capsys, "--from", run, "--out", begun, "--stage=decoder", "--decoder.steps=2", *habits)[0] == 0
    assert load_model(begun / "decoder.pt")[0].cfg.guidance == 1.5


def test_every_habit_is_one_of_a_model():
    kinds = [kind for of_stage in configs.MODELS.values() for kind in of_stage]
    names = {name for kind in kinds for name in kind.__dataclass_fields__}
    assert set(configs.HABITS) <= names


def weights_of(model):
    """A model's learned tensors, in one row."""
    return torch.cat([p.float().flatten() for p in model.parameters()])


def weights(path):
    """Those of a checkpoint."""
    return weights_of(load_model(path)[0])


def test_from_begins_with_what_another_run_has_learned(run, tmp_path, capsys):
    """One step at a rate of next to nothing, from the bundled weights: one stage alone, then all of them, the first of them interrupted."""
    box, one, new = tmp_path / "box", tmp_path / "one", tmp_path / "new"
    ship(run, box, "1234abc")
    still = [f"--{stage}.{key}" for stage in configs.MODELS for key in ("steps=1", "lr=1e-9", "warmup=0")]
    assert call(capsys, "--from", box, "--out", one, "--stage=decoder", *still)[0] == 0
    assert torch.allclose(weights(one / "decoder.pt"), weights(box / "decoder.pt"), rtol=0, atol=1e-6)
    assert torch.equal(weights(one / "sketch.pt"), weights_of(load_model(box / "decoder.pt")[0].sketch))       # a part of it there
    assert torch.equal(weights(one / "clip.pt"), weights(box / "clip.pt")) and load_checkpoint(one / "decoder.pt")["step"] == 1
    assert DALLE2.load(one).tokenizer.encode("a red ring") == DALLE2.load(run).tokenizer.encode("a red ring")
    begun = copy_of(one, new, ["decoder.resume.pt"])
    config = overrides.from_dict(read_json(one / "config.json"))
    origin.copy_origin(Run(config, begun, torch.device("cpu"), True, configs.STAGES), box)
    code, out, _ = call(capsys, "--out", begun, "--resume", *still)        # as after a Ctrl-C before anything was saved
    assert code == 0 and "tokenizer: was finished before" in out
    for stage in configs.MODELS:
        assert load_checkpoint(begun / f"{stage}.pt")["step"] == 1
        theirs = weights_of(load_model(box / "decoder.pt")[0].sketch) if stage == "sketch" else weights(box / f"{stage}.pt")
        assert torch.allclose(weights(begun / f"{stage}.pt"), theirs, rtol=0, atol=1e-6), stage


def test_pictures_that_ctrl_c_prevented_are_drawn_on_resume(run, tmp_path, capsys, monkeypatch):
    copy = copy_of(run, tmp_path / "copy", ["decoder.png", "upsampler1_loss.png", "prior.resume.pt"])      # the latter may be deleted
    before = {path.name: path.stat().st_mtime_ns for path in copy.iterdir()}

    def ctrl_c(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(stages.DecoderStage, "picture", ctrl_c)
        code, _, error = call(capsys, "--out", copy, "--resume")
        assert code == 130 and error == f"stopped; go on with: python train.py --out {copy} --resume"
    code, out, _ = call(capsys, "--out", copy, "--resume")
    assert code == 0 and out.count("was finished before") == 8
    after = {path.name: path.stat().st_mtime_ns for path in copy.iterdir() if path.name != "config.json"}
    assert set(after) - set(before) == {"decoder.png", "upsampler1_loss.png"}
    assert all(after[name] == before[name] for name in before if name != "config.json")      # nothing was trained or drawn again


def test_a_variance_that_ctrl_c_prevented_is_measured_on_resume(run, tmp_path, capsys, monkeypatch):
    """The prior's analytic variance is measured when its training is over, and added to both of its files."""
    copy = copy_of(run, tmp_path / "copy", ["prior.pt", "prior.resume.pt"])
    assert load_checkpoint(run / "prior.pt")["ema"]["cov"].max() > 0

    def ctrl_c(*_):
        raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(DiffusionPrior, "measure_variance", ctrl_c)
        assert call(capsys, "--out", copy, "--resume", "--stage=prior")[0] == 130
    assert load_checkpoint(copy / "prior.pt")["ema"]["cov"].max() == 0     # the state that Ctrl-C leaves
    assert call(capsys, "--out", copy, "--resume", "--stage=prior")[0] == 0
    for file in ("prior.pt", "prior.resume.pt"):
        assert torch.equal(load_checkpoint(copy / file)["ema"]["cov"], load_checkpoint(run / "prior.pt")["ema"]["cov"])


def test_commands_to_go_on_with_can_be_pasted(run, tmp_path, capsys):
    """A folder's name and a caption with spaces, quotes and a dollar sign, as a shell understands them."""
    copy, caption = copy_of(run, tmp_path / "it's a $HOME"), 'a "cat", it\'s $5'
    config = overrides.from_dict(read_json(run / "config.json"))
    prepared = Run(config, copy, torch.device("cpu"), True)
    prepared.config = overrides.override(config, ["--data.source=elsewhere", "--clip.context_length=64"])
    prepared.pictures.captions = lambda: [caption]
    hints.summary(prepared, {})
    line = capsys.readouterr().out.strip().splitlines()[-1].removeprefix("next: ")
    assert shlex.split(line) == ["python", "sample.py", "text", caption, "--run", str(copy)]


def test_one_stage_alone_equals_the_chain(run, tmp_path, capsys):
    """A stage's weights do not depend on what ran before it in the same process; it needs no --resume, and takes the run's own numbers."""
    copy = copy_of(run, tmp_path / "copy", ["decoder.pt", "decoder.resume.pt", "embeddings.pt"])
    code, out, _ = call(capsys, "--out", copy, "--stage=decoder")
    assert code == 0 and "decoder" in out and "clip " not in out
    a, b = (load_checkpoint(folder / "decoder.pt")["ema"] for folder in (run, copy))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_measuring_and_previews_leave_no_trace(run, tmp_path, capsys, monkeypatch):
    """Weights and random streams are to the bit those of a run without them."""
    stage = "decoder"
    copy = copy_of(run, tmp_path / "copy", [f"{stage}{end}" for end in (".pt", ".resume.pt", ".png")])
    monkeypatch.setattr(pace, "WORTH", 1)
    monkeypatch.setattr(log, "PREVIEW", 0)
    monkeypatch.setattr(log, "DRAWING", math.inf)
    code, out, _ = call(capsys, "--out", copy, f"--stage={stage}", f"--{stage}.save_every=1")
    assert code == 0 and out.count(f"{stage}: a preview is in {copy}/{stage}.preview.png") == 2
    first = out.splitlines()[0]
    assert first.startswith(f"1 of 1 stages to train, less than a minute: {stage} 0.0")
    a, b = (load_checkpoint(folder / f"{stage}.resume.pt") for folder in (run, copy))
    for part in ("ema", "model", "streams"):
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part])
    # The last picture takes the place of the preview.
    assert (copy / f"{stage}.png").is_file() and not (copy / f"{stage}.preview.png").exists()


def test_a_preview_is_a_picture_of_the_last_checkpoint(run, tmp_path, monkeypatch):
    copy = copy_of(run, tmp_path / "copy")
    config = overrides.from_dict(read_json(run / "config.json"))
    prepared = Run(config, copy, torch.device("cpu"), True, ["upsampler1"])
    path = stages.open_stage(prepared, "upsampler1").preview()
    assert path.read_bytes() == (copy / "upsampler1.png").read_bytes()


def test_z_img_is_noised_towards_the_end_only(run, tmp_path, capsys, monkeypatch):
    copy, seen, original = copy_of(run, tmp_path / "copy", ["decoder.pt", "decoder.resume.pt"]), [], SketchedDecoder.loss

    def loss(self, *batch, **rest):
        seen.append(rest.get("z_noise"))
        return original(self, *batch, **rest)

    monkeypatch.setattr(SketchedDecoder, "loss", loss)
    code, _, error = call(capsys, "--out", copy, "--stage=decoder", "--decoder.steps=4", "--decoder.z_noise=0.3", "--decoder.z_noise_from=0.5")
    assert code == 0, error
    assert seen == [None, 0.0, 0.0, 0.3, 0.3]                              # the first to see whether the sizes work


def test_a_new_clip_makes_new_embeddings(run, tmp_path, capsys):
    gone = [f"{stage}{end}" for stage in ("clip", *configs.ON_CLIP) for end in (".pt", ".resume.pt")]
    copy = copy_of(run, tmp_path / "copy", gone)
    assert call(capsys, "--out", copy, "--stage=clip", "--clip.lr=3e-3")[0] == 0
    old = load_checkpoint(copy / "embeddings.pt")
    assert call(capsys, "--out", copy, "--stage=prior")[0] == 0
    new = load_checkpoint(copy / "embeddings.pt")                          # computed again
    assert new["key"] != old["key"] and not torch.allclose(new["z_img"], old["z_img"], atol=1e-4)


def test_embeddings_are_kept_while_nothing_changed(run, tmp_path, capsys, monkeypatch):
    copy = copy_of(run, tmp_path / "copy", ["prior.pt", "prior.resume.pt"])
    drawn = []
    original = Pictures.dataset
    monkeypatch.setattr(Pictures, "dataset", lambda self, split, *rest: drawn.append(split) or original(self, split, *rest))
    assert call(capsys, "--out", copy, "--stage=prior")[0] == 0
    assert drawn == ["val"]                                                # no training picture was drawn


# ---------------------------------------------------------------------------------------------------------------- the loop

def test_the_loop_stands_close_to_the_script(run, tmp_path, capsys, monkeypatch):
    """At most four functions of ours from the script's call of main down to loss.backward()."""
    copy = copy_of(run, tmp_path / "copy", ["upsampler1.pt", "upsampler1.resume.pt"])
    backward = torch.Tensor.backward
    stacks = []

    def seen(self, *arguments, **rest):
        frame = sys._getframe(1)
        stacks.append([])
        while frame.f_code.co_name != "call":
            stacks[-1].append((Path(frame.f_code.co_filename), frame.f_code.co_name))
            frame = frame.f_back
        return backward(self, *arguments, **rest)

    monkeypatch.setattr(torch.Tensor, "backward", seen)
    assert call(capsys, "--out", copy, "--stage=upsampler1", "--upsampler1.steps=1")[0] == 0
    files = [ROOT / "train.py", *(ROOT / "mini_dalle2").rglob("*.py")]
    ours = [name for path, name in stacks[0] if path in files]
    assert ours == ["train", "work", "run_command", "main"] and len(stacks) == 1


# ---------------------------------------------------------------------------------------------------------------- variants

def test_variants_are_trained_like_stages(run, tmp_path, capsys):
    """The judge and GLIDE: trained, skipped, gone on with, loaded; the run's own files stay."""
    copy = copy_of(run, tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    config = overrides.from_dict(read_json(copy / "config.json"))
    for name in ("judge", "glide"):
        code, out, error = call(capsys, "--out", copy, f"--stage={name}")
        assert code == 0, error
        # The other models of an evaluation are still missing.
        more = f"next: python train.py --stage evaluation --out {copy} --resume"
        assert out.strip().splitlines()[-1] == more
        model, checkpoint = load_model(copy / f"{name}.pt", name)
        expected = variant(config, name)
        cfg = getattr(expected, configs.VARIANTS[name]).model
        # The paper's class is loaded where all tricks are off.
        assert checkpoint["model_config"] == asdict(cfg)
        assert configs.sizes(model.cfg) == configs.sizes(cfg)
        assert checkpoint["stage"] == name and checkpoint["config"] == overrides.to_dict(expected)
        assert checkpoint["step"] == checkpoint["steps"] and "optimizer" not in checkpoint
        assert {line["stage"] for line in read_metrics(copy)} >= {name}
        for end in (".png", "_loss.png", ".resume.pt"):
            assert (copy / f"{name}{end}").is_file()
    changed = {"metrics.jsonl", "commands.txt"}
    assert all((copy / name).read_bytes() == before[name] for name in set(before) - changed)
    assert (run / "commands.txt").read_bytes() == before["commands.txt"]
    code, _, error = call(capsys, "--out", copy, "--stage=judge")
    assert code == 2 and "already holds judge: add --resume" in error
    code, out, _ = call(capsys, "--out", copy, "--stage=judge", "--resume")
    assert code == 0 and "judge: was finished before" in out


def test_an_evaluation_s_models_in_order(run, tmp_path, capsys, monkeypatch):
    """All of them; one that Ctrl-C has stopped goes on, bit for bit."""
    copy, whole = (copy_of(run, tmp_path / name) for name in ("copy", "whole"))
    assert call(capsys, "--out", whole, "--stage=evaluation")[0] == 0
    original, calls = SketchedDecoder.loss, []

    def loss(self, *batch, **rest):
        calls.append(1)
        # The first call sees whether the sizes work. The third is the second step.
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *batch, **rest)

    with monkeypatch.context() as patch:
        patch.setattr(SketchedDecoder, "loss", loss)
        code, out, error = call(capsys, "--out", copy, "--stage=evaluation")
    assert code == 130 and error.endswith(f"--out {copy} --stage evaluation --resume")
    assert error.startswith("glide stopped and saved at step ")
    code, out, error = call(capsys, "--out", copy, "--stage=evaluation", "--resume")
    assert code == 0 and "judge: was finished before" in out, error
    order = dict.fromkeys(line["stage"] for line in read_metrics(whole))
    assert list(order)[-len(configs.VARIANTS):] == list(configs.VARIANTS)
    for name in configs.VARIANTS:
        a, b = (load_checkpoint(folder / f"{name}.pt")["ema"] for folder in (whole, copy))
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_variants_follow_the_run(run, tmp_path, capsys):
    """Their settings are the run's: others are refused, and so is a model of another run."""
    code, _, error = call(capsys, "--out", tmp_path / "new", "--stage=judge")
    assert code == 2 and "holds no run that --stage judge could belong to" in error
    copy = copy_of(run, tmp_path / "copy")
    code, _, error = call(capsys, "--out", copy, "--stage=judge", "--clip.steps=9")
    assert code == 2 and "leave out --clip.steps=9" in error and not (copy / "judge.pt").exists()
    assert call(capsys, "--out", copy, "--stage=judge", *SMALL)[0] == 0
    assert call(capsys, "--out", copy, "--stage=glide")[0] == 0
    config = read_json(copy / "config.json")
    config["clip"]["train"]["lr"] = 0.5
    (copy / "config.json").unlink()
    write_json(config, copy / "config.json")
    code, _, error = call(capsys, "--out", copy, "--stage=judge", "--resume")
    assert code == 2 and "judge.pt was trained with other settings" in error
    assert "train it again with --stage judge" in error
    # GLIDE learned on the embeddings of one CLIP. Here the checkpoint names another one.
    checkpoint = load_checkpoint(copy / "glide.pt") | {"clip_signature": "0" * 16}
    save_checkpoint(checkpoint, copy / "glide.pt")
    code, _, error = call(capsys, "--out", copy, "--stage=glide", "--resume")
    assert code == 2 and "glide.pt was trained on the embeddings of another CLIP" in error


# ---------------------------------------------------------------------------------------------------------------- folders

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve captioned pictures, one of them with an overlong caption, and a corrupt one."""
    path, dataset = tmp_path_factory.mktemp("pictures"), CaptionedShapes("train", 40, 1, 12)
    for i in range(12):
        to_pil(dataset[i]["image"]).save(path / f"{i:02}.png")
        (path / f"{i:02}.txt").write_text("a very long caption " * 20 if i == 3 else dataset[i]["text"])
    (path / "broken.png").write_bytes((path / "00.png").read_bytes()[:100])
    (path / "broken.txt").write_text("broken")
    return path


def test_a_folder_of_pictures(folder, tmp_path, capsys):
    code, out, _ = call(capsys, *SMALL, "--data", folder, "--out", tmp_path / "run")
    assert code == 0 and "12 captioned pictures" in out and "broken.png" in out
    assert "1 captions have more than 32 tokens and lose their end" in out
    assert len(load_checkpoint(tmp_path / "run" / "embeddings.pt")["captions"]) == 12      # of so few, none is kept aside
    # So no figure is about unseen pictures.
    assert "right caption for" in out and out.count("training pictures") == 2 and "unseen" not in out
    code, _, error = call(capsys, "--data=shapes", "--out", tmp_path / "run", "--resume")
    assert code == 2 and "from other data" in error


def test_folder_split_is_disjoint_and_fixed(folder, monkeypatch):
    monkeypatch.setattr(split, "FEWEST", 10)
    cfg = configs.DataConfig(source=str(folder), images=100, val_images=5)
    pictures = Pictures(cfg, torch.device("cpu"))
    train_part, val_part = ([pictures.folder(split, 8).pictures[i][0] for i in pictures.dataset(split, 8, 100).indices] for split in ("train", "val"))
    assert len(val_part) == 1 and sorted(train_part + val_part) == [folder / f"{i:02}.png" for i in range(12)]
    assert pictures.dataset("train", 16, 4).indices == pictures.dataset("train", 8, 100).indices[:4]      # the same order at every size
    assert sorted(pictures.captions()) == sorted(t for i in range(11) for t in pictures.folder("train", 1).texts(i))
    key = pictures.fingerprint()
    os.utime(folder / "05.png", ns=(1, 1))
    assert pictures.fingerprint() == key
    train_part[0].with_suffix(".txt").write_text("another caption")
    assert Pictures(cfg, torch.device("cpu")).fingerprint() != key


@pytest.mark.parametrize("name, captions", [
    ("copies of one", ["a dog"] * 3), ("one caption for all", ["a photo of sks dog"] * 2)])
def test_a_set_without_any_spread_trains(tmp_path, capsys, name, captions):
    """Nothing can be measured of what is the same everywhere, and nothing becomes NaN by it."""
    for i, caption in enumerate(captions):
        to_pil(CaptionedShapes("train", 32)[0 if name == "copies of one" else i]["image"]).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(caption)
    run = tmp_path / "run"
    code, out, error = call(capsys, *SMALL, "--data", tmp_path, "--out", run)
    assert code == 0, error
    for stage in configs.MODELS:
        weights = load_checkpoint(run / f"{stage}.pt")["ema"]
        assert all(torch.isfinite(value).all() for value in weights.values()), stage
    assert all(math.isfinite(line["loss"]) for line in read_metrics(run))
    if name == "one caption for all":
        again = tmp_path / "again"
        assert call(capsys, "--data", tmp_path, "--out", again, "--from", run, "--stage=prior", "--prior.steps=2")[0] == 0
        assert all(math.isfinite(line["loss"]) for line in read_metrics(again))
    model = DALLE2.load(run, device="cpu")
    [[picture]] = model.text_to_image([captions[0]], progress=False)
    assert picture.size == (64, 64)


def test_a_run_knows_its_pictures_wherever_they_lie(folder, tmp_path, capsys, monkeypatch):
    """Another spelling of the place, a copy and a moved folder are the same pictures; a changed folder is said to be so."""
    run, place = tmp_path / "run", tmp_path / "pictures"
    shutil.copytree(folder, place)
    steps = [f"--{stage}.steps=1" for stage in configs.MODELS]
    assert call(capsys, "--preset=micro", "--data", place, "--out", run, "--stage=tokenizer", *steps)[0] == 0
    monkeypatch.chdir(tmp_path)
    for spelling in ("pictures/", "./pictures", str(place)):
        code, out, _ = call(capsys, "--data", spelling, "--out", run, "--resume", "--stage=tokenizer")
        assert code == 0 and "has changed" not in out
    place.rename(tmp_path / "moved")
    code, _, error = call(capsys, "--out", run, "--resume")
    assert code == 2 and f"--resume --out {run} --data FOLDER" in error
    # Files that are neither pictures nor captions do not count.
    (tmp_path / "moved" / ".DS_Store").write_text("a Mac looked at this folder")
    assert call(capsys, "--out", run, "--resume", "--stage=clip", "--data", tmp_path / "moved")[0] == 0
    assert overrides.from_dict(read_json(run / "config.json")).data.source == str(tmp_path / "moved")
    # one picture more, in another place: other data; in the known place: said
    shutil.copytree(tmp_path / "moved", tmp_path / "more")
    for end in ("png", "txt"):
        shutil.copy(folder / f"00.{end}", tmp_path / "more" / f"99.{end}")
    code, _, error = call(capsys, "--out", run, "--resume", "--data", tmp_path / "more")
    assert code == 2 and "from other data" in error
    for end in ("png", "txt"):
        shutil.copy(folder / f"00.{end}", tmp_path / "moved" / f"99.{end}")
    code, out, _ = call(capsys, "--out", run, "--resume", "--stage=clip")
    assert code == 0 and "moved has changed since this run began" in out


def test_runs_of_older_versions_take_a_new_place_too(folder, tmp_path, capsys):
    """They kept no record of their pictures: the old folder is one, where it is still there."""
    run, place = tmp_path / "run", tmp_path / "pictures"
    shutil.copytree(folder, place)
    steps = [f"--{stage}.steps=1" for stage in configs.MODELS]
    assert call(capsys, "--preset=micro", "--data", place, "--out", run, "--stage=tokenizer", *steps)[0] == 0
    shutil.copytree(place, tmp_path / "copy")
    shutil.copytree(place, tmp_path / "more")
    for end in ("png", "txt"):
        shutil.copy(folder / f"00.{end}", tmp_path / "more" / f"99.{end}")
    begun = overrides.from_dict(read_json(run / "config.json")).data.source
    (run / "pictures.json").unlink()
    assert not changes.is_other_data(run, str(tmp_path / "copy"), begun) and changes.is_other_data(run, str(tmp_path / "more"), begun)
    shutil.rmtree(place)
    code, out, _ = call(capsys, "--out", run, "--resume", "--stage=tokenizer", "--data", tmp_path / "copy")
    assert code == 0 and f"{place} is gone: those in {tmp_path / 'copy'} are taken for the same" in out
    code, _, error = call(capsys, "--out", run, "--resume", "--stage=tokenizer", "--data", tmp_path / "more")
    assert code == 2 and "from other data" in error


def test_a_folder_that_is_split_already_stays_so(folder, tmp_path):
    for part, names in (("train", range(0, 8)), ("val", range(8, 10)), ("held_out", range(10, 12))):
        for name in names:
            for end in ("png", "txt"):
                (tmp_path / part).mkdir(exist_ok=True)
                shutil.copy(folder / f"{name:02}.{end}", tmp_path / part)
    pictures = Pictures(configs.DataConfig(source=str(tmp_path), val_images=1), torch.device("cpu"))
    texts = {part: {(folder / f"{name:02}.txt").read_text().strip() for name in names} for part, names in (("train", range(8)), ("val", (8, 9)))}
    assert pictures.available == 8 and set(pictures.captions()) == texts["train"]
    assert len(pictures.table("val", 8, 100)[1]) == 2 and set(pictures.table("val", 8, 100)[1]) == texts["val"]


# ---------------------------------------------------------------------------------------------------------------- batches

def order(stage, n, *settings):
    """The order of n examples in a stage of the micro preset, whose batches have 16 of them."""
    config = overrides.override(configs.preset("micro"), settings)
    return stages.BatchOrder(stage, n, getattr(config, stage).train, config.data.seed)


def test_few_examples_make_small_batches_of_distinct_ones():
    indices = order("clip", 5)
    assert all(sorted(indices(step).tolist()) == list(range(5)) for step in range(3))
    assert len(set(order("clip", 100)(0).tolist())) == 16


@pytest.mark.parametrize("n", [16, 48, 100, 17])
def test_an_epoch_shows_every_example_once(n):
    """Laid end to end, the batches are all examples in one order, then in another.

    This holds also where 16 does not divide n.
    """
    indices = order("decoder", n)
    # Sixteen epochs.
    batches = [indices(step) for step in range(n)]
    assert all(len(batch) == 16 for batch in batches)
    epochs = torch.cat(batches).view(-1, n)
    assert all(epoch.sort().values.tolist() == list(range(n)) for epoch in epochs)
    # Each epoch has an order of its own.
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == len(epochs)


def test_batches_follow_from_seed_and_step_alone():
    """A resumed run begins in the middle of an epoch, and sees what an uninterrupted one sees."""
    whole, resumed = order("prior", 50), order("prior", 50)
    other = order("prior", 50, "--data.seed=1")
    expected = [whole(step) for step in range(12)]
    assert all(torch.equal(resumed(step), expected[step]) for step in (5, 6, 11, 3))
    assert not torch.equal(other(0), expected[0])


# ---------------------------------------------------------------------------------------------------------------- mistakes

@pytest.mark.parametrize("arguments, said", [
    (["--preset=huge"], "invalid choice: 'huge'"), (["--stage=vae"], "invalid choice: 'vae'"), (["--device=abacus"], "abacus"),
    (["--decoder.lrr=1"], "closest is --decoder.lr"), (["--decoder.lr=fast"], "takes a finite number"), (["--lr", "3"], "no setting --lr"),
    (["stray"], "not understood"), (["--data=no/such/folder"], "no such folder"), (["--resume"], "nothing to resume"),
    (["--decoder.head_dim=5"], "decoder"), (["--clip.vision_heads=7"], "clip"), (["--clip.patch_size=32"], "clip"),
    (["--stage=tokenizer", "--upsampler2.model_channels=20"], "upsampler2"), (["--data.images=1000000000"], "clip needs at least"),
    (["--stage=clip"], "tokenizer.json is missing"), (["--stage=prior"], "tokenizer.json is missing"),
    (["--out"], "expected one argument")])
def test_mistakes_are_one_sentence(arguments, said, tmp_path, capsys):
    out = tmp_path / "run"
    code = train.main([*SMALL, "--out", str(out), *arguments])
    error = capsys.readouterr().err
    assert code == 2 and said in error and error.startswith("train.py: ") and error.count("\n") == 1
    assert not out.exists() or {path.name for path in out.iterdir()} <= {"config.json"}    # nothing half-made


def test_the_paper_is_too_large_at_once(tmp_path, capsys):
    """250 million pictures of 256 × 256 for CLIP alone: 49 TB."""
    code, out, error = call(capsys, "--preset=paper", "--device=cpu", "--out", tmp_path / "run")
    assert code == 2 and out == "" and not (tmp_path / "run").exists()
    assert error.startswith("train.py: clip needs at least 19.7 GB for its weights and 49,152.2 GB for its pictures")


def test_sizes_that_only_fail_when_run_are_found_before_training():
    """A layer that does not fit its input shows in a step, not when it is made."""
    cfg = configs.preset("micro")
    for stage in configs.MODELS:
        guards.check_one_step(stage, getattr(cfg, stage).model)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="decoder cannot work with these sizes: .*50.* .*60"):
        patch.setattr(type(configs.build(cfg.decoder.model)), "forward", lambda self, x, t, condition: torch.empty(2, 50) @ torch.empty(60, 2))
        guards.check_one_step("decoder", cfg.decoder.model)


def test_memory_is_counted(folder, monkeypatch):
    cfg = overrides.override(configs.preset("micro"), ["--data.images=1000"])
    cpu = torch.device("cpu")
    of_folder = overrides.override(cfg, [f"--data.source={folder}"])
    shapes = Run(cfg, Path("nowhere"), cpu, names=configs.STAGES)
    own = Run(of_folder, Path("nowhere"), cpu)
    assert guards.needs(shapes, "decoder")[1] == (1000 + cfg.data.val_images) * 3 * 16 * 16
    assert guards.needs(shapes, "upsampler2")[1] == 16 * 3 * 64 * 64
    # No more pictures than there are.
    assert guards.needs(own, "decoder")[1] == 12 * 3 * 16 * 16
    weights = sum(p.numel() for p in configs.build(cfg.prior.model).parameters())
    assert guards.needs(own, "prior")[0] == 20 * weights
    guards.check_memory(shapes)
    # A machine of one megabyte.
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)
    guards.check_memory(Run(cfg, Path("nowhere"), cpu, names=["tokenizer"]))
    with pytest.raises(ValueError, match="clip needs at least .* this machine has 0.0 GB"):
        guards.check_memory(shapes)


def test_many_pictures_lie_on_disk(folder, tmp_path, monkeypatch):
    """The table is the same; the run folder looks empty, because the file has no name; a disk without room for it is named."""
    cfg = configs.DataConfig(source=str(folder), images=100, val_images=5)
    few, captions = Pictures(cfg, torch.device("cpu")).table("train", 16, 100)
    monkeypatch.setattr(pictures, "machine_memory", lambda: 4 * few.nbytes - 1)
    asked = []
    monkeypatch.setattr(pictures.np, "memmap", lambda *args, memmap=pictures.np.memmap, **more: asked.append(1) or memmap(*args, **more))
    many, texts = Pictures(cfg, torch.device("cpu"), tmp_path).table("train", 16, 100)
    assert asked and torch.equal(many, few) and texts == captions and not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="no room for 1,000,000.0 GB of pictures"):
        pictures.empty_table((10 ** 15,), tmp_path)


def test_a_batch_goes_to_a_gpu_through_pinned_memory():
    """Where there is no GPU, as far as can be seen without one."""
    rows, batch, gpu = torch.rand(2, 3), mock.Mock(device=torch.device("cpu")), torch.device("cuda")
    assert pictures.on_device(rows, torch.device("cpu")) is rows
    assert pictures.on_device(batch, gpu) is batch.pin_memory().to.return_value
    batch.pin_memory().to.assert_called_once_with(gpu, non_blocking=True)
    if torch.cuda.is_available():
        there = pictures.on_device(rows, gpu)
        assert there.is_cuda and torch.equal(there.cpu(), rows)


def test_too_little_memory_is_one_sentence(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train, "learn_tokenizer", lambda run: torch.empty(2 ** 55))
    code, _, error = call(capsys, *SMALL, "--stage=tokenizer", "--out", tmp_path / "run")
    assert code == 2 and "not enough memory for tokenizer" in error


def printed(text):
    """The words behind "train.py" of the command that a message ends with."""
    return shlex.split(text)[shlex.split(text).index("train.py", 1) + 1:]


def test_the_remedy_for_too_little_memory_works(run, tmp_path, capsys, monkeypatch):
    """A batch that is too large for the memory; the command of the message then trains it."""
    copy = copy_of(run, tmp_path / "copy", ["prior.pt", "prior.resume.pt"])
    loss = DiffusionPrior.loss

    def greedy(self, *batch, **rest):
        examples = len(batch[0])
        return loss(self, *batch, **rest) if examples <= 8 else torch.empty(2 ** 55)

    monkeypatch.setattr(DiffusionPrior, "loss", greedy)
    code, _, error = call(capsys, "--out", copy, "--stage=prior")
    assert code == 2 and "not enough memory for prior" in error
    assert error.endswith(" --resume --prior.accumulate=2")
    code, _, error = call(capsys, *printed(error))
    assert code == 0 and load_checkpoint(copy / "prior.pt")["step"] == 3, error


def test_no_finished_work_is_destroyed(run, capsys):
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    for arguments in (SMALL, [], ["--stage=prior"], ["--stage=tokenizer"]):
        code, _, error = call(capsys, *arguments, "--out", run)
        assert code == 2 and "already holds" in error and "--resume" in error and "--out" in error
    code, _, error = call(capsys, "--out", run, "--resume", "--preset=tiny")
    assert code == 2 and "was begun with the preset micro, not tiny" in error
    code, _, error = call(capsys, "--out", run, "--resume", "--decoder.model_channels=32")
    assert code == 2 and "already holds a decoder of other sizes" in error
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_damaged_files_are_one_sentence(run, tmp_path, capsys):
    for name, arguments in (("config.json", ["--resume"]), ("tokenizer.json", ["--stage=clip", "--resume", "--clip.steps=9"]),
                            ("clip.pt", ["--stage=prior", "--resume", "--prior.steps=9"]),
                            ("decoder.resume.pt", ["--stage=decoder", "--resume", "--decoder.steps=9"])):
        copy = copy_of(run, tmp_path / name, [name])
        (copy / name).write_bytes(b"{ rubbish")
        code, _, error = call(capsys, "--out", copy, *arguments)
        assert code == 2 and name in error and "Traceback" not in error


def test_missing_resume_file_is_said(run, tmp_path, capsys):
    copy = copy_of(run, tmp_path / "copy", ["prior.resume.pt"])
    code, _, error = call(capsys, "--out", copy, "--stage=prior", "--resume", "--prior.steps=9")
    assert code == 2 and "prior.resume.pt, which is needed to go on, is not there" in error


def test_exit_code_and_silence_of_a_real_process(tmp_path):
    command = [sys.executable, "train.py", "--decoder.lrr=1", f"--out={tmp_path / 'run'}"]
    process = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 2 and process.stdout == "" and not (tmp_path / "run").exists()
    assert process.stderr == "train.py: there is no setting --decoder.lrr; the closest is --decoder.lr\n"


def test_a_loss_that_is_not_finite_is_one_sentence(run, tmp_path, capsys, monkeypatch):
    """Exit code 2; the examples of that very step are listed, and the last checkpoint is from before it."""
    copy, calls = copy_of(run, tmp_path / "copy"), []
    loss = DiffusionPrior.loss

    def spoilt(self, *args, **kwargs):
        calls.append(1)                                                    # the first is the rehearsal
        return loss(self, *args, **kwargs) * (math.inf if len(calls) == 3 else 1)
    monkeypatch.setattr(DiffusionPrior, "loss", spoilt)
    code, _, error = call(capsys, "--out", copy, "--resume", "--stage=prior", "--prior.steps=9", "--prior.save_every=4")
    assert code == 2 and error.startswith("train.py: prior: loss inf") and "at step 5" in error and "prior.not_finite.json" in error
    found = json.loads((copy / "prior.not_finite.json").read_text())
    assert found["step"] == 5 and found["indices"] == order("prior", 40)(4).tolist()
    assert load_checkpoint(copy / "prior.resume.pt")["step"] == 4


def test_flags_set_every_stage(tmp_path):
    args = train.parse(["--dtype=bf16", "--compile", "--clip.compile=false", "--out", str(tmp_path)])
    config = guards.settle(args)
    assert all(getattr(config, stage).train.dtype == "bf16" for stage in configs.MODELS)
    assert [stage for stage in configs.MODELS if not getattr(config, stage).train.compile] == ["clip"]


def test_bf16_parts_and_recomputing_train_every_stage(run, tmp_path, capsys):
    """The whole chain, at losses like those without them."""
    more = ["--dtype=bf16"] + [f"--{stage}.recompute=true" for stage in configs.MODELS]
    more += [f"--{stage}.accumulate=2" for stage in configs.MODELS if stage != "clip"]
    assert call(capsys, *SMALL, *more, "--out", tmp_path / "run")[0] == 0
    plain, short = ({line["stage"]: line["loss"] for line in read_metrics(folder)} for folder in (run, tmp_path / "run"))
    for stage in ("clip", "upsampler1", "upsampler2"):                     # which do not learn from another CLIP
        assert short[stage] == pytest.approx(plain[stage], rel=5e-2)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, capsys):
    """Ctrl-C in the middle of a long CLIP stage; then the run goes on from there, with nothing but --resume."""
    out = tmp_path / "run"

    def press():
        while not read_metrics(out):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press, daemon=True)
    thread.start()
    code, _, error = call(capsys, *SMALL, "--out", out, "--clip.steps=1000000")
    thread.join()
    step = load_checkpoint(out / "clip.resume.pt")["step"]
    assert code == 130
    assert error == f"clip stopped and saved at step {step} of 1000000; go on with: python train.py --out {out} --resume"
    assert call(capsys, "--out", out, "--stage=prior")[0] == 2             # not on a CLIP that is not finished
    assert call(capsys, "--out", out, "--resume", "--stage=clip", f"--clip.steps={step + 2}")[0] == 0
    assert load_checkpoint(out / "clip.pt")["step"] == step + 2


# ---------------------------------------------------------------------------------------------------------------- said before the first step

def test_compile_without_a_compiler_is_one_sentence(tmp_path, capsys, monkeypatch):
    """torch says so with a text of many lines, when the first step is taken."""
    def no_compiler(function):
        raise RuntimeError("No working C++ compiler found\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    code, out, error = call(capsys, *SMALL, "--compile", "--out", tmp_path / "run")
    assert code == 2 and out == "" and not (tmp_path / "run").exists()
    assert error == ("train.py: torch.compile does not work on this machine (No working C++ compiler found): install a C++ compiler "
                     "such as g++, or leave out --compile")
    # Only the stages of this call count.
    code, _, error = call(capsys, *SMALL, "--stage=tokenizer", "--clip.compile=true", "--out", tmp_path / "run")
    assert code == 0, error


def test_pictures_that_must_be_enlarged_are_counted(tmp_path, capsys):
    for i, side in enumerate((16, 32, 100)):
        Image.new("RGB", (side, side + 9)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("a picture")
    cfg = overrides.override(configs.preset("micro"), [f"--data.source={tmp_path}"])
    for names, said in ((configs.STAGES, "note: 2 of 3 pictures have less than the 64 pixels of upsampler2. They are enlarged up to 4.0 times"),
                        (["upsampler1"], "note: 1 of 3 pictures have less than the 32 pixels of upsampler1. They are enlarged up to 2.0 times"),
                        (["clip"], "")):
        run = Run(cfg, tmp_path / "run", torch.device("cpu"), names=names)
        capsys.readouterr()
        run.note_small_pictures()
        out = capsys.readouterr().out
        assert out.startswith(said) and bool(out) == bool(said)


def test_folders_whose_names_are_not_utf_8(tmp_path, capsys):
    pictures, run = (Path(os.fsdecode(os.fsencode(tmp_path) + name)) for name in (b"/caf\xe9", b"/r\xe9n"))
    pictures.mkdir()
    for i in range(3):
        Image.new("RGB", (40, 40), (80 * i, 0, 0)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text("a picture")
    code, _, error = call(capsys, *SMALL, "--data", pictures, "--out", run)
    assert code == 0, error
    assert b"caf\xe9" in (run / "commands.txt").read_bytes()
    code, _, error = call(capsys, "--resume", "--prior.steps=4", "--out", run)
    assert code == 0, error
    assert load_checkpoint(run / "prior.pt")["config"]["data"]["source"] == str(pictures)
