"""changes.py: what a run may change is changed, and the rest is refused before the first step."""

import os
import shlex
import shutil

import pytest
import torch

import train
from mini_dalle2 import DALLE2, configs
from mini_dalle2.runtime.files import VERSION, load_checkpoint, save_checkpoint


@pytest.fixture
def copy(run, tmp_path):
    """A copy of a finished run, by links: files are only ever replaced."""
    folder = tmp_path / "run"
    shutil.copytree(run, folder, copy_function=os.link)
    return folder


@pytest.fixture
def no_step(monkeypatch):
    """Whatever is trained is a mistake."""
    monkeypatch.setattr(train, "train", lambda run, stage: pytest.fail("a step was taken"))


def call(capsys, *words):
    """Run train.py: (exit code, the last line of standard error)."""
    capsys.readouterr()
    code = train.main([str(word) for word in [*words, "--device=cpu"]])
    return code, (capsys.readouterr().err.strip().splitlines() or [""])[-1]


@pytest.mark.parametrize("setting, learned", [
    ("seed=1", "tokenizer, clip, prior, ar_prior, sketch, decoder, upsampler1, upsampler2"),
    ("images=41", "tokenizer, clip"), ("val_images=9", "tokenizer, clip"),
    ("near_misses=false", "tokenizer, clip"), ("upsampler1_images=7", "holds upsampler1, which"),
    ("upsampler2_images=5", "holds upsampler2, which")])
def test_the_data_of_stages_stay_what_they_were(copy, capsys, no_step, setting, learned):
    code, said = call(capsys, "--out", copy, "--resume", "--prior.steps=9", f"--data.{setting}")
    key = setting.split("=")[0]
    assert code == 2 and learned in said and f"learned with --data.{key}=" in said


def test_an_upsampler_that_is_still_to_come_may_get_more_pictures(copy, capsys):
    for end in (".pt", ".resume.pt"):
        (copy / f"upsampler2{end}").unlink()
    code, said = call(capsys, "--out", copy, "--resume", "--data.upsampler2_images=5")
    assert code == 0, said
    assert load_checkpoint(copy / "upsampler2.pt")["config"]["data"]["upsampler2_images"] == 5


@pytest.mark.parametrize("stage, left", [
    ("clip", "prior, ar_prior, sketch, decoder"), ("sketch", "decoder")])
@pytest.mark.parametrize("only", [True, False])
def test_what_others_have_learned_from_stays(copy, capsys, no_step, stage, left, only):
    more = [f"--stage={stage}"] if only else []
    code, said = call(capsys, "--out", copy, "--resume", f"--{stage}.steps=9", *more)
    assert code == 2 and said.startswith(f"train.py: {left} in {copy} have learned from {stage}")
    assert DALLE2.load(copy).clip is not None, "the run can still be sampled from"


def test_the_command_that_is_named_trains_all_from_these_weights(copy, capsys):
    code, said = call(capsys, "--out", copy, "--resume", "--clip.steps=5")
    words = shlex.split(said[said.index("python train.py"):])[2:]
    assert call(capsys, *words)[0] == 0
    more = copy.with_name("run-more")
    assert load_checkpoint(more / "clip.pt")["steps"] == 5
    assert DALLE2.load(more).prior is not None


def test_what_nothing_has_learned_from_may_take_more_steps(copy, capsys):
    code, said = call(capsys, "--out", copy, "--resume", "--prior.steps=5", "--upsampler1.steps=4")
    assert code == 0, said
    assert load_checkpoint(copy / "prior.pt")["step"] == 5
    # CLIP alone, before the others are there.
    for stage in configs.MODELS:
        for end in (".pt", ".resume.pt") if stage != "clip" else ():
            (copy / f"{stage}{end}").unlink()
    assert call(capsys, "--out", copy, "--resume", "--stage=clip", "--clip.steps=5")[0] == 0
    assert load_checkpoint(copy / "clip.pt")["step"] == 5


def resaved(path, **values):
    save_checkpoint(load_checkpoint(path) | values, path)


def test_each_stage_says_which_version_made_it(copy):
    for stage in configs.MODELS:
        assert load_checkpoint(copy / f"{stage}.pt")["version"] == VERSION


def test_a_stage_of_another_version_is_found_before_the_first_step(copy, capsys, no_step):
    whole = (copy / "upsampler2.pt").read_bytes()
    resaved(copy / "upsampler2.pt", version=VERSION + 1)
    code, said = call(capsys, "--out", copy, "--resume", "--prior.steps=9")
    assert code == 2 and "upsampler2.pt was made by a newer version of mini_dalle2" in said
    # An older one, whose decoder had another setting, or another layer.
    (copy / "upsampler2.pt").write_bytes(whole)
    old = load_checkpoint(copy / "decoder.pt")
    for changes in ({"model_config": old["model_config"] | {"depth": 3}},
                    {"ema": old["ema"] | {"old_layer.weight": torch.zeros(2)}}):
        save_checkpoint(old | changes, copy / "decoder.pt")
        code, said = call(capsys, "--out", copy, "--resume", "--prior.steps=9")
        assert code == 2 and "decoder.pt does not fit this version's models" in said


def test_a_stage_without_a_version_is_from_before_there_were_any(copy, capsys):
    checkpoint = load_checkpoint(copy / "decoder.pt")
    checkpoint.pop("version")
    torch.save(checkpoint, copy / "decoder.new")
    os.replace(copy / "decoder.new", copy / "decoder.pt")
    assert call(capsys, "--out", copy, "--resume", "--prior.steps=4")[0] == 0


def test_memory_and_speed_may_change_at_any_time(copy, capsys):
    settings = ["--prior.steps=4", "--prior.accumulate=2", "--prior.lr=1e-4", "--prior.recompute=true"]
    code, said = call(capsys, "--out", copy, "--resume", *settings)
    assert code == 0, said

