"""pace.py: the minutes of a run before it begins, and threads that wait for each other."""

from dataclasses import replace

import pytest
import torch

from mini_dalle2 import configs
from mini_dalle2.training import hints, pace
from mini_dalle2.training.run import Run
from mini_dalle2.training.stages import open_stage

NAMES = [name for name in configs.STAGES if name != "tokenizer"]


def prepared(folder, *settings, names=configs.STAGES):
    """A run of the preset micro that has not begun."""
    config = configs.changed(configs.preset("micro"), dict(settings))
    return Run(config, folder, torch.device("cpu"), names=names)


def test_all_stages_are_measured_and_nothing_is_left_behind(tmp_path, capsys):
    """With SAM, bf16 and parts, too. The random stream stands where it stood."""
    run = prepared(tmp_path, *[(f"{name}.steps", 60) for name in NAMES], ("clip.sam_rho", 0.1),
                   ("prior.dtype", "bf16"), ("decoder.accumulate", 2))
    before = torch.get_rng_state()
    pace.announce(run)
    assert torch.equal(torch.get_rng_state(), before) and not list(tmp_path.iterdir())
    assert list(run.pace) == NAMES and all(0 < seconds < 10 for seconds in run.pace.values())
    told = capsys.readouterr().out
    assert told.startswith("8 of 8 stages to train, ") and told.count("\n") == 1
    assert [word.split()[0] for word in told.split(": ", 1)[1].split(", ")] == NAMES


@pytest.mark.parametrize("name", ["judge", "glide"])
def test_variants_are_measured(tmp_path, name):
    run = prepared(tmp_path, names=[name])
    assert pace.seconds_of_a_step(run, name) > 0


def test_minutes_are_steps_times_seconds(tmp_path, capsys, monkeypatch):
    """Steps behind a run, finished stages and short stages do not count."""
    run = prepared(tmp_path, ("clip.steps", 600), ("prior.steps", 1200), ("decoder.steps", 90))
    run.done = ["tokenizer", "sketch"]
    monkeypatch.setattr(pace, "seconds_of_a_step", lambda run, name: 0.5)
    monkeypatch.setattr(pace, "steps_left", lambda run, name: {
        "clip": 360, "prior": 1200, "decoder": 90}.get(name, 30))
    pace.announce(run)
    assert capsys.readouterr().out == (
        "6 of 8 stages to train, about 14 minutes: clip 3.0, prior 10.0, decoder 0.8\n")


def test_steps_left(run):
    """Of a finished run that gets more steps."""
    config = configs.changed(configs.preset("micro"), {"decoder.steps": 100})
    again = Run(config, run, torch.device("cpu"), resume=True)
    assert pace.steps_left(again, "decoder") == 97 and pace.steps_left(again, "tokenizer") == 0
    assert pace.steps_left(Run(config, run, torch.device("cpu")), "decoder") == 100


@pytest.mark.parametrize("minutes, text", [
    (0.0, "less than a minute"), (1.2, "about 2 minutes"), (21.6, "about 22 minutes"),
    (178.0, "about 3.0 hours")])
def test_minutes_in_words(minutes, text):
    assert pace.about(minutes) == text


def made_up(monkeypatch, seconds):
    """Let a step of n examples take seconds(n, threads). Return the calls as a list."""
    calls = []
    threads = [2]
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads[0])
    monkeypatch.setattr(torch, "set_num_threads", lambda n: threads.__setitem__(0, n))

    def trial(stage):
        def step(n):
            calls.append((n, threads[0]))
            # The first call takes longer, and must not count.
            return seconds(n, threads[0]) * (10 if len(calls) == 1 else 1)
        return step

    monkeypatch.setattr(pace, "trial", trial)
    return calls


def test_a_whole_batch_is_measured_if_it_is_quick(tmp_path, capsys, monkeypatch):
    """A fixed 0.1 s and 0.01 s per example: a few examples alone would mislead."""
    run = prepared(tmp_path)
    calls = made_up(monkeypatch, lambda n, threads: 0.1 + 0.01 * n)
    assert pace.seconds_of_a_step(run, "clip") == pytest.approx(0.26)
    assert calls[-1] == (16, 1) and torch.get_num_threads() == 2
    assert capsys.readouterr().out == ""


def test_a_few_examples_stand_for_a_slow_batch(tmp_path, monkeypatch):
    calls = made_up(monkeypatch, lambda n, threads: 5.0 * n)
    assert pace.seconds_of_a_step(prepared(tmp_path), "clip") == pytest.approx(80.0)
    assert max(n for n, _ in calls) == 4


def test_threads_that_wait_for_each_other_are_said(tmp_path, capsys, monkeypatch):
    """Two threads on a busy machine take 8 s, one takes 0.16 s: that is what a step should take."""
    run = prepared(tmp_path)
    made_up(monkeypatch, lambda n, threads: n * (0.5 if threads == 2 else 0.01))
    assert pace.seconds_of_a_step(run, "clip") == pytest.approx(0.16)
    told = capsys.readouterr().out
    assert told.startswith("note: a step of clip takes 8 s instead of 0.16 s")
    assert f"run OMP_NUM_THREADS=1 python train.py --out {tmp_path} --resume" in told


def test_slow_steps_while_training(tmp_path, monkeypatch):
    run = prepared(tmp_path)
    run.pace["clip"] = 0.15
    stage = open_stage(run, "clip")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert "takes 8 s instead of 0.15 s" in stage.slow_note(8.0)
    assert stage.slow_note(0.15 * hints.SLOW * 0.99) is None
    # What was not measured is not compared.
    assert open_stage(run, "prior").slow_note(8.0) is None
    # One thread has no other to wait for.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert stage.slow_note(8.0) is None


def test_too_little_memory_does_not_stop_the_estimate(tmp_path, capsys, monkeypatch):
    run = prepared(tmp_path, ("clip.steps", 60))
    monkeypatch.setattr(pace, "trial", lambda stage: lambda n: torch.empty(2 ** 55))
    pace.announce(run)
    assert capsys.readouterr().out == "8 of 8 stages to train, less than a minute\n"


def test_examples_of_a_process(tmp_path):
    run = prepared(tmp_path)
    assert pace.examples(open_stage(run, "clip")) == 16
    few = replace(run.config, data=replace(run.config.data, upsampler2_images=5))
    run.config = few
    assert pace.examples(open_stage(run, "upsampler2")) == 5
    run.pictures.available = 7
    assert pace.examples(open_stage(run, "decoder")) == 7
