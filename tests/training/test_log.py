"""log.py: progress with and without a terminal, previews, and a note about slow steps."""

import io
import sys

import pytest
import torch

from conftest import ToyStage
from mini_dalle2.runtime.settings import TrainConfig
from mini_dalle2.training import figures, hints, log


class Terminal(io.StringIO):
    """A standard error that says it is a terminal."""

    def isatty(self):
        return True


class Clock:
    """A clock that only the test moves."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """The clock of the log."""
    made = Clock()
    monkeypatch.setattr(log.time, "perf_counter", made)
    return made


def toy(steps=100, log_every=1):
    """A stage of so many steps, which only has a name and numbers."""
    stage = ToyStage("toy", None, TrainConfig(steps=steps, log_every=log_every), None, None)
    stage.title = "toy (stage 3 of 8)"
    return stage


def tick(progress, step, clock=None, seconds=0.0):
    """Tell a log about one step that took so many seconds."""
    if clock:
        clock.now += seconds
    progress.add(step, torch.tensor(0.5), torch.tensor(1.0), 0.1)


def test_a_line_per_twentieth_without_a_terminal(tmp_path, capsys, clock):
    with log.Log(toy(), tmp_path) as progress:
        for step in range(1, 101):
            tick(progress, step, clock, 6.0)
    out, error = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 20 and error == ""
    assert lines[0] == "toy (stage 3 of 8): step 5 of 100, loss 0.5000, 9.5 minutes left"
    assert lines[-1] == "toy (stage 3 of 8): step 100 of 100, loss 0.5000, 0.0 minutes left"


def test_a_resumed_stage_counts_its_own_seconds(tmp_path, capsys, clock):
    """Half of the steps lie behind it; what they took says nothing about this machine."""
    with log.Log(toy(), tmp_path, step=50, seconds=9999.0) as progress:
        for step in range(51, 56):
            tick(progress, step, clock, 6.0)
    assert capsys.readouterr().out.splitlines() == [
        "toy (stage 3 of 8): step 55 of 100, loss 0.5000, 4.5 minutes left"]


def test_one_loss_in_the_log_the_curve_and_the_table(tmp_path, capsys, monkeypatch):
    """All three show the mean of the last tenth of the steps, after a resume as well."""
    # The first steps are no part of it, however slowly lines come.
    values = [9.0, *[0.01 * step for step in range(1, 20)]]
    for first, last in ((0, 13), (13, 20)):
        stage = toy(steps=20)
        with log.Log(stage, tmp_path, step=first) as progress:
            for step in range(first + 1, last + 1):
                progress.add(step, torch.tensor(values[step - 1]), torch.tensor(1.0), 0.1)
    shown = [float(line.split("loss ")[1].split(",")[0])
             for line in capsys.readouterr().out.splitlines()]
    # Of 10 steps the last one is more than nine tenths, of 11 to 20 the last two.
    means = [*values[:10], *[values[i] - 0.005 for i in range(10, 20)]]
    assert shown == pytest.approx(means, abs=5e-5)

    saved = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: saved.append(figure))
    figures.loss_curve(tmp_path, "toy")
    axes = saved[0].axes[0]
    assert axes.get_title() == "toy: 0.1850 after 20 steps"
    assert axes.lines[1].get_ydata() == pytest.approx(means)

    hints.print_table(tmp_path, {"toy": 1.0})
    assert "0.1850" in capsys.readouterr().out


def test_a_bar_with_the_stage_in_a_terminal(tmp_path, capsys, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with log.Log(toy(), tmp_path) as progress:
        for step in range(1, 101):
            tick(progress, step)
        progress.bar.refresh()
    assert "toy (stage 3 of 8): 100%" in terminal.getvalue()
    assert capsys.readouterr().out == ""


def test_previews_come_every_two_minutes_and_take_a_twentieth(tmp_path, capsys, clock):
    stage = toy()
    drawn = []

    def preview():
        drawn.append(clock.now)
        clock.now += 30
        return "toy.preview.png"

    stage.preview = preview
    with log.Log(stage, tmp_path) as progress:
        for _ in range(100):
            clock.now += 10
            progress.preview()
    # The first after two minutes; then at most 30 s of every 600 s go into drawing.
    assert drawn == [1120.0, 1750.0]
    assert capsys.readouterr().out == "toy: a preview is in toy.preview.png\n" * 2


def test_slow_steps_are_said_once(tmp_path, capsys, clock):
    """The median counts: one long step, such as one with a checkpoint, is none of them."""
    stage = toy(log_every=5)
    paces = []

    def slow_note(seconds):
        paces.append(seconds)
        return "note: slow" if seconds > 3 else None

    stage.slow_note = slow_note
    with log.Log(stage, tmp_path) as progress:
        for step, seconds in enumerate([1, 1, 60, 1, 1, *[8] * 10], start=1):
            tick(progress, step, clock, seconds)
    assert paces == pytest.approx([1.0, 8.0, 8.0])
    assert capsys.readouterr().out.count("note: slow") == 1
