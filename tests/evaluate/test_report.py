"""The evaluation: intervals that hold, verdicts read off them, nothing stale, nothing done twice, and a report without bare figures."""

import ast
import json
import math
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import train
from conftest import ROOT, SMALL
from mini_dalle2 import evaluate
from mini_dalle2.evaluate import report
from mini_dalle2.training import log as training
from mini_dalle2.evaluate import lab as lab_module
from mini_dalle2.data.pixels import from_pil
from mini_dalle2.data.shapes import CaptionedShapes, Scene, Thing, render
from mini_dalle2.decoder import Decoder
from mini_dalle2.evaluate.command import known, main
from mini_dalle2.evaluate.report import IN_README, split_readme, verdict
from mini_dalle2.evaluate.experiments import (
    EDITED, EXPERIMENTS, Findings, GUIDANCE, THETAS, backgrounds, concept_of, concepts_found,
    moved, nearest, ranks, swapped)
from mini_dalle2.evaluate.lab import BESIDES, Draw, EDITS, Embed, Lab, Seen, edited, few_colours
from mini_dalle2.data.shapes import parse_caption
from mini_dalle2.metrics.intervals import (
    Figure, agrees, bootstrap, mean_change, share, share_apart, share_gap, wider, wilson)
from mini_dalle2.metrics.sets import frechet_distance
from mini_dalle2.pipeline import DALLE2, load_model
from test_graph import package_graph

SHAPES = [name for name, one in EXPERIMENTS.items() if one.data != "folder"]


@pytest.fixture(scope="module")
def evaluated(run, tmp_path_factory):
    """A micro run with all its experiments done, by the command. Not to be written into."""
    folder = tmp_path_factory.mktemp("evaluated") / "run"
    shutil.copytree(run, folder)
    assert main([f"--run={folder}", "--n=16", "--device=cpu"]) == 0
    return folder


@pytest.fixture
def copied(evaluated, tmp_path):
    """A copy of it, to be written into."""
    return shutil.copytree(evaluated, tmp_path / "run")


# ---------------------------------------------------------------------------------------------------------------- intervals

def coverage(trials, inside):
    """Does an interval of 95 % hold the truth in about 95 % of the trials? Within four standard deviations of that binomial."""
    spread = math.sqrt(trials * 0.95 * 0.05)
    assert abs(inside - 0.95 * trials) <= 4 * spread + 0.01 * trials, inside / trials


@pytest.mark.parametrize("halves", [False, True])
def test_bootstrap_holds_the_mean_as_often_as_it_says(halves):
    rng, trials, inside = np.random.default_rng(0), 300, 0
    for trial in range(trials):
        x = rng.exponential(size=120)                                      # mean 1, and not symmetric
        value, low, high = bootstrap(np.mean, x, times=200, seed=trial, halves=halves)
        assert value == pytest.approx(x.mean())
        inside += low <= 1 <= high
    coverage(trials, inside)


@pytest.mark.parametrize("halves", [False, True])
def test_bootstrap_is_as_wide_as_the_closed_form(halves):
    x = np.random.default_rng(1).normal(size=400)
    value, low, high = bootstrap(np.mean, x, times=4000, halves=halves)
    assert high - low == pytest.approx(2 * 1.96 * x.std() / math.sqrt(400), rel=0.06)
    assert bootstrap(np.mean, x) == bootstrap(np.mean, x) != bootstrap(np.mean, x, seed=1)


def test_bootstrap_of_a_distance_stays_where_the_distance_is():
    """Rows that are drawn twice, or are fewer, move a Fréchet distance; the interval must be about the number that is given."""
    rng, trials, inside = np.random.default_rng(2), 60, 0
    truth = np.mean([frechet_distance(rng.normal(size=(60, 6)), 0.5 + rng.normal(size=(200, 6))) for _ in range(300)])
    for trial in range(trials):
        a, b = rng.normal(size=(60, 6)), 0.5 + rng.normal(size=(200, 6))
        value, low, high = bootstrap(frechet_distance, a, torch.from_numpy(b), times=60, seed=trial, halves=True)
        assert low < value < high
        inside += low <= truth <= high
    assert inside >= 0.85 * trials
    off = [(low + high) / 2 - value for value, low, high in (bootstrap(frechet_distance, a, b, times=200, halves=halves) for halves in (True, False))]
    assert abs(off[0]) < off[1] / 2, "and this is why halves are there: rows drawn twice make crowds narrower than they are"


def test_an_extrapolated_distance_is_nearly_unbiased_and_its_interval_holds():
    """80 rows of 32 columns, as wide as a trained network's: some directions far wider than others."""
    rng, trials, inside, plain, found = np.random.default_rng(6), 80, 0, [], []
    spread, shift = np.linspace(1.5, 0.1, 32), 0.15
    truth = 32 * shift ** 2 + ((0.2 * spread) ** 2).sum()                  # |μ_a − μ_b|² + Σ (σ_a − σ_b)²
    for trial in range(trials):
        a, b = spread * rng.normal(size=(80, 32)), 0.8 * spread * rng.normal(size=(160, 32)) + shift
        value, low, high = bootstrap(frechet_distance, a, b, times=40, seed=trial, halves=True, extrapolate=True)
        plain.append(frechet_distance(a, b) - truth)
        found.append(value - truth)
        inside += low <= truth <= high
    assert abs(np.mean(found)) < np.mean(plain) / 7, (np.mean(found), np.mean(plain))
    assert inside >= 0.9 * trials, inside


def test_rows_of_one_tuple_are_drawn_together():
    x = np.random.default_rng(3).normal(size=200)
    assert bootstrap(lambda a, b: (a - b).mean(), (x, x + 1), times=50)[1:] == pytest.approx((-1, -1))
    several = bootstrap(lambda a: (a.min(), a.max()), x, times=50)
    assert [f.value for f in several] == [x.min(), x.max()] and all(isinstance(f, Figure) for f in several)
    for wrong in ((x[:1],), ((x, x[:5]),)):
        with pytest.raises(ValueError, match="at least two rows"):
            bootstrap(np.mean, *wrong)


@pytest.mark.parametrize("p", [0.02, 0.3, 1.0])
def test_share_against_the_binomial(p):
    rng, n = np.random.default_rng(4), 60
    inside = sum(low <= p <= high for _, low, high in (share(rng.random(n) < p) for _ in range(500)))
    exact = sum(math.comb(n, k) * p ** k * (1 - p) ** (n - k) for k in range(n + 1) if wilson(k / n, n).low <= p <= wilson(k / n, n).high)
    assert exact > 0.92 and abs(inside / 500 - exact) < 0.05
    assert share([True] * 10).low == pytest.approx(10 / (10 + 1.96 ** 2), rel=1e-3)        # the closed form at p = 1
    with pytest.raises(ValueError):
        share([])


def test_share_gap_against_many_samples():
    rng, n, inside = np.random.default_rng(5), 80, 0
    for _ in range(500):
        u = rng.random(n)
        a, b = u < 0.4, (u < 0.25) | (rng.random(n) < 0.1)                 # answers to the same questions, not independent
        inside += share_gap(a, b).low <= 0.4 - (0.25 + 0.75 * 0.1) <= share_gap(a, b).high
    coverage(500, inside)
    none = share_gap([False] * 16, [False] * 16)
    assert none.value == 0 and none.low < -0.05 and none.high > 0.05, "sixteen answers that agree are no certainty"
    with pytest.raises(ValueError):
        share_gap([True], [True, False])
    assert none == mean_change(np.zeros(16)), "and no more when changes are added up"


def test_share_apart_against_many_samples():
    rng, inside = np.random.default_rng(7), 0
    for _ in range(500):
        value, low, high = share_apart(rng.random(60) < 0.1, rng.random(40) < 0.3)
        inside += low <= -0.2 <= high
    coverage(500, inside)
    assert share_apart([True] * 20, [True] * 20).low < -0.1, "twenty answers are no certainty"
    assert wider(Figure(0.5, 0.4, 0.6), Figure(0.5, 0.3, 0.55)) == (0.5, 0.3, 0.6)


def test_a_verdict_is_read_off_the_interval():
    cases = {(0.1, 0.01, 0.2): "yes", (-0.1, -0.2, -0.01): "no", (0.1, -0.1, 0.3): "cannot tell", (0, 0, 0): "cannot tell"}
    assert {numbers: agrees(Figure(*numbers)) for numbers in cases} == cases


# ---------------------------------------------------------------------------------------------------------------- the report

def test_the_report_holds_every_experiment(evaluated):
    text = (evaluated / "report.md").read_text()
    for name in SHAPES:
        found = json.loads((evaluated / "evaluate" / f"{name}.json").read_text())["findings"]
        assert f"## {EXPERIMENTS[name].title}\n" in text and f"`{name}`" in text
        assert found["tables"] and found["claims"]
    assert set(re.findall(r"^\| (\w+) \| .* \| (?:yes|no|cannot tell) \|$", text, re.M)) == set(SHAPES)
    for file in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (evaluated / file).stat().st_size > 1000, file
    assert len(re.findall(r"_plot\d?\.png\)", text)) >= 6
    parts = {re.search("`(\\w+)`", part)[1]: part for part in text.split("\n## ")[1:]}
    assert "n = 4 and 16," in parts["guidance"] and "true pictures" in parts["fig8"] and "true z_img |" in parts["steps"]
    assert "check of the method" in parts["variations"] and "check of the method" not in text.split("\n## ")[0]
    assert re.search(r"\nTogether [\d.]+ minutes", text) and "Fréchet distance ↓" in parts["fig8"]


def test_no_figure_stands_without_its_interval(evaluated):
    lines = (evaluated / "report.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line, behind in zip(lines, [*lines[1:], ""])
            if line.startswith("| ") and "| --- |" not in line + behind]             # no heads of tables
    number = r"-?[\d.]+(?:e[-+]\d+)?"
    figures = 0
    for row in rows:
        claim = row[-1] in ("yes", "no", "cannot tell")
        for cell in [row[-2].rsplit(": ", 1)[1]] if claim else row[1:]:
            figures += 1
            found = re.fullmatch(rf"({number})(?: %)? \(({number}) to ({number})\)", cell)
            assert found or cell == "–", cell
            if found:
                value, low, high = map(float, found.groups())
                assert low <= value <= high or math.isclose(low, value, abs_tol=0.11) or math.isclose(high, value, abs_tol=0.11), cell
    assert figures > 200


def test_verdicts_in_the_report_follow_from_their_intervals(evaluated):
    for line in (evaluated / "report.md").read_text().splitlines():
        if found := re.search(r"\((-?[\d.e+-]+) to (-?[\d.e+-]+)\) \| (yes|no|cannot tell) \|$", line):
            low, high = float(found[1]), float(found[2])
            if found[3] == "yes":
                assert low >= 0
            elif found[3] == "no":
                assert high <= 0
            else:
                assert low <= 0 <= high


# ---------------------------------------------------------------------------------------------------------------- the models beside the run

def test_the_judge_is_another_clip(evaluated):
    judge, own = (load_model(path, "clip")[0] for path in (evaluated / "evaluate" / "judge.pt", evaluated / "clip.pt"))
    assert judge.cfg.vision_width < own.cfg.vision_width and judge.cfg.clip_dim < own.cfg.clip_dim
    saved, config = torch.load(evaluated / "evaluate" / "judge.pt", weights_only=True), json.loads((evaluated / "config.json").read_text())
    assert saved["config"]["data"]["seed"] != config["data"]["seed"] and saved["step"] == saved["steps"]
    assert not (evaluated / "evaluate" / "judge").exists(), "what it was trained in is gone"


def test_glide_never_saw_z_img(evaluated):
    """Its way in for z_img is what it was before training, to the bit, while that of the run's decoder has learned."""
    weights = {}
    for path in (evaluated / "evaluate" / "glide.pt", evaluated / "decoder.pt"):
        model, saved = load_model(path, "decoder")
        torch.manual_seed(saved["config"]["data"]["seed"])
        fresh = Decoder(model.cfg)
        weights[path.stem] = [torch.equal(getattr(model, name).weight, getattr(fresh, name).weight) for name in ("z_to_emb", "z_to_tokens")]
        assert not all(map(torch.equal, model.unet.parameters(), fresh.unet.parameters()))
    assert weights == {"glide": [True, True], "decoder": [False, False]}


def test_glide_draws_the_same_whatever_z_img_is(evaluated):
    lab = Lab(evaluated, 16, "cpu")
    assert lab.settled(Draw(16, z="diffusion", glide=True)) == lab.settled(Draw(16, z="ar", glide=True)) == lab.settled(Draw(16, z=None, glide=True))
    same = [lab.draw(lab.settled(Draw(4, z=z, glide=True))) for z in ("diffusion", "true")]
    other = lab.draw(lab.settled(Draw(4, z=None)))
    assert torch.equal(*same) and not torch.equal(same[0], other)
    a, b = (getattr(lab.glide.decoder.cfg, key) for key in ("z_drop", "caption_drop"))
    own = lab.model.decoder.cfg
    assert (a, b) == (1.0, 0.2) and replace(own, z_drop=a, caption_drop=b, sketch=False) == lab.glide.decoder.cfg, "as large, and drawn with as many steps"


# ---------------------------------------------------------------------------------------------------------------- nothing twice, nothing stale

def forbidden(*arguments, **options):
    raise AssertionError("this was done before")


def test_what_is_done_is_not_done_again(copied, monkeypatch):
    before = {path: path.read_bytes() for path in copied.rglob("*.json")}
    report = (copied / "report.md").read_text().splitlines()
    monkeypatch.setattr(Lab, "draw", forbidden)
    monkeypatch.setattr(Lab, "embed", forbidden)
    monkeypatch.setattr(lab_module, "TRAIN", {"clip": forbidden, "decoder": forbidden})
    monkeypatch.setattr(evaluate, "perform", forbidden)
    (copied / "report.md").unlink()
    assert main([f"--run={copied}", "--n=16", "--device=cpu"]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert (copied / "report.md").read_text().splitlines()[1:] == report[1:], "but for the name of the folder"


def test_other_code_makes_all_out_of_date(copied, monkeypatch):
    one, own = EXPERIMENTS["fig8"], lab_module.code
    for changed, still in (("experiments", ("pictures", "models")), ("lab", ("models",)), ("decoder", ())):
        monkeypatch.setattr(lab_module, "code", lambda *without: own(*without) + ("" if changed in without else "another one"))
        lab = Lab(copied, 16, "cpu")
        assert known(lab, one) is None
        assert (lab.missing(one.needs(lab).values()) == []) == ("pictures" in still)
        for name, (stage, settings, _) in (lab.side_models() | EXPERIMENTS["sam"].models(lab)).items():
            assert (lab.trained(name, stage, settings) is not None) == ("models" in still), (changed, name)


def test_training_and_drawing_do_without_what_does_not_count():
    graph = package_graph({file.stem: file.read_text() for file in (ROOT / "mini_dalle2").glob("*.py")})
    for used, without in (({"stages"}, (*BESIDES, "lab")), ({"lab"}, BESIDES)):
        while new := {name for module in used for name in graph[module]} - used:
            used |= new
        assert len(used) > 15 and not used & set(without), used


def test_comments_are_no_code():
    assert lab_module.code() == lab_module.code() != lab_module.code("experiments") and len(lab_module.code()) == 16
    assert ast.dump(ast.parse("a = 1  # one\n")) == ast.dump(ast.parse("\na = 1\n")) != ast.dump(ast.parse("a = 2\n"))


def test_what_is_out_of_date_is_not_shown(copied):
    one = EXPERIMENTS["fig8"]
    assert known(Lab(copied, 16, "cpu"), one) is not None
    assert known(Lab(copied, 17, "cpu"), one) is None, "other captions"
    (copied / "evaluate" / "fig8.png").rename(copied / "evaluate" / "elsewhere.png")
    assert known(Lab(copied, 16, "cpu"), one) is None, "its sheet is gone"
    (copied / "evaluate" / "elsewhere.png").rename(copied / "evaluate" / "fig8.png")
    path = copied / "evaluate" / "fig8.json"
    whole = path.read_text()
    path.write_text(whole[:50])
    assert known(Lab(copied, 16, "cpu"), one) is None, "damaged"
    path.write_text(whole)
    # One weight of the prior is another one: what does not depend on it is thrown away too, for it lies in the same cache.
    saved = torch.load(copied / "prior.pt", weights_only=True)
    saved["ema"]["query"] += 1e-3
    torch.save(saved, copied / "prior.pt")
    lab = Lab(copied, 16, "cpu")
    assert known(lab, one) is None and not lab.cache.exists() and lab.trained("judge", *lab.side_models()["judge"][:2])
    lab.sweep()
    assert not list((copied / "evaluate").glob("cache-*"))


def test_a_judge_of_other_settings_is_trained_again(copied):
    settings = json.loads((copied / "config.json").read_text())
    settings["clip"]["train"]["steps"] = 8
    (copied / "config.json").write_text(json.dumps(settings))
    lab = Lab(copied, 16, "cpu")
    assert lab.trained("judge", *lab.side_models()["judge"][:2]) is None
    assert lab.trained("glide", *lab.side_models()["glide"][:2]) is not None
    lab.judge
    assert torch.load(copied / "evaluate" / "judge.pt", weights_only=True)["steps"] == 4


def test_after_a_kill_it_goes_on_where_it_was(copied, monkeypatch, capsys):
    """While the third crowd of an experiment is drawn, the process ends. What was drawn by then is not drawn again."""
    whole = (copied / "evaluate" / "fig8.json").read_text()
    for path in ((copied / "evaluate").glob("cache-*")):
        shutil.rmtree(path)
    (copied / "evaluate" / "fig8.json").unlink()
    drawn, draw = [], Lab.draw

    def killed(lab, recipe):
        if len(drawn) == 2:
            raise KeyboardInterrupt
        drawn.append(recipe)
        return draw(lab, recipe)

    monkeypatch.setattr(Lab, "draw", killed)
    command = [f"--run={copied}", "--n=16", "--device=cpu", "--only", "fig8"]
    assert main(command) == 130 and "goes on" in capsys.readouterr().err
    first = list(drawn)
    drawn.clear()
    monkeypatch.setattr(Lab, "draw", lambda lab, recipe: drawn.append(recipe) or draw(lab, recipe))
    assert main(command) == 0
    assert len(first) == 2 and drawn and not set(first) & set(drawn)
    now = json.loads((copied / "evaluate" / "fig8.json").read_text())["findings"]
    before = json.loads(whole)["findings"]
    assert {k: v for k, v in now.items() if k != "seconds"} == {k: v for k, v in before.items() if k != "seconds"}, "as if nothing had happened"


def test_a_side_model_goes_on_where_it_was_stopped(run, tmp_path, monkeypatch):
    folder = shutil.copytree(run, tmp_path / "run")
    whole, stopped = Lab(folder, 16, "cpu"), Lab(folder, 16, "cpu")
    settings = {"decoder.z_drop": 1.0, "decoder.steps": 4}
    expected = whole.beside("one", "decoder", settings)[1]
    add = training.Log.add

    def kill(log, step, *rest):
        add(log, step, *rest)
        if step == 3:                                                      # the checkpoint of step 2 is there
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Log, "add", kill)
    with pytest.raises(KeyboardInterrupt):
        stopped.beside("two", "decoder", settings)
    assert (folder / "evaluate" / "two" / "decoder.resume.pt").is_file() and not (folder / "evaluate" / "two.pt").exists()
    steps = []
    monkeypatch.setattr(training.Log, "add", lambda log, step, *rest: steps.append(step) or add(log, step, *rest))
    assert stopped.beside("two", "decoder", settings)[1] == expected and steps == [3, 4]


# ---------------------------------------------------------------------------------------------------------------- recipes

def test_recipes_say_what_is_needed_before_it_is_drawn(evaluated):
    lab = Lab(evaluated, 16, "cpu")
    for name in SHAPES:
        needs = EXPERIMENTS[name].needs(lab)
        assert lab.missing(needs.values()) == [], name
        assert all(lab.seconds(lab.settled(recipe)) >= 0 for recipe in needs.values())
    assert [type(one).__name__ for one in lab.ingredients(Draw(4, z="diffusion", x_T="inverted"))] == ["Embed", "Inverted", "Draw"]
    cfg = lab.model.decoder.cfg
    assert lab.settled(Draw(16)) == lab.settled(Draw(16, guidance=cfg.guidance, steps=cfg.sampling_steps)), "said or not, it is the same"


def test_priors_are_judged_by_z_img_of_their_own(evaluated, monkeypatch):
    """Not by the best of several sketches: neither the paper nor GLIDE, whom they are compared with, has that."""
    lab = Lab(evaluated, 16, "cpu")
    monkeypatch.setattr(DALLE2, "choose", lambda *_: pytest.fail("a sketch was looked at"))
    for prior in ("diffusion", "ar"):
        z_img = lab.embed(Embed(8, prior=prior))
        assert lab.model.has_sketch and z_img.shape == (8, lab.model.clip.cfg.clip_dim)


def test_each_picture_of_a_crowd_has_noise_of_its_own_and_keeps_it(evaluated):
    lab = Lab(evaluated, 16, "cpu")
    a, b, other = (lab.draw(lab.settled(Draw(n, seed=seed))) for n, seed in ((4, 0), (6, 0), (4, 1)))
    assert (a.int() - b[:4].int()).abs().max() <= 1 and not torch.equal(a, other)
    ancestral = lab.draw(lab.settled(Draw(4, rule="ancestral")))
    assert not torch.equal(lab.draw(lab.settled(Draw(4, rule=0.0))), ancestral)


def test_inversion_and_moves(evaluated):
    lab = Lab(evaluated, 16, "cpu")
    n = 4
    true = lab.real()[0][:n].float()
    both = lab.draw(lab.settled(Draw(2 * n, z="true", told=False, guidance=1.0, rule=0.0, x_T="inverted"))).float()
    back = both[:n]
    ends = [lab.draw(lab.settled(Draw(n, z="true", told=False, guidance=1.0, rule=0.0, x_T="inverted", move=("between", theta)))).float() for theta in (0, 1)]
    assert (ends[0] - back).abs().max() <= 1 and (ends[1] - both[n:]).abs().max() <= 1
    assert (back - true).abs().mean() < (back.roll(1, 0) - true).abs().mean()
    full = lab.make(Embed(n, prior="true"))
    assert torch.allclose(lab.model.ar_prior.codes.project(full, lab.model.clip.cfg.clip_dim), full, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------- what is looked for

def test_edits_change_what_they_say():
    assert edited("a red circle above a blue square", "above", "below") == "a red circle below a blue square"
    assert edited("an orange square left of a red ring", "orange square", "orange star") == "an orange star left of a red ring"
    assert edited("a black cross above a red ring", "black cross", "orange cross") == "an orange cross above a red ring"
    assert edited("a red circle above a blue square", "red circle", "blue circle") is None, "two things of one colour: no such caption"
    assert edited("two cyan rings", "above", "below") is None and len(EDITS) == 10


def test_swapped_colours_are_found(evaluated):
    caption = "a red circle above a blue square"
    scenes = {"right": ("red", "blue"), "swapped": ("blue", "red"), "one wrong": ("red", "green"), "both red": ("red", "red")}
    pictures = torch.stack([from_pil(render(Scene("", 210, (Thing(a, "circle", 0.5, 0.27, 0.17), Thing(b, "square", 0.5, 0.73, 0.17))), 32))
                            for a, b in scenes.values()])
    seen = Seen(Lab(evaluated, 16, "cpu"), pictures, [caption] * 4)
    assert swapped(seen).tolist() == [False, True, False, False] and seen.right.tolist() == [True, False, False, False]
    assert seen.notes()[0] == caption and "WRONG: colours" in seen.notes()[1]


@pytest.fixture(scope="module")
def synthetic(evaluated):
    """A lab that is shown made-up crowds: its pictures are large enough for the grader to be right, and it writes no sheets."""
    lab = Lab(evaluated, 48, "cpu")
    lab.size, lab.grid = 32, lambda name, rows, labels: f"{name}.png"
    return lab


def exchanged(scene):
    """The scene with the colours of its two things exchanged."""
    first, second = scene.things
    return replace(scene, things=(replace(first, colour=second.colour), replace(second, colour=first.colour)))


def further(scene, by):
    """Each of its things by that share of the side farther to where there is room for it."""
    return replace(scene, things=tuple(replace(thing, x=thing.x - by if thing.x > 0.5 else thing.x + by) for thing in scene.things))


def other_background(scene):
    return replace(scene, background=scene.background + (30 if scene.background < 210 else -30))


def shown(lab, n=None, of="val", right=None, change=lambda scene: scene):
    """n pictures of captions, drawn from their scenes, each changed; all but the first `right` of them empty."""
    data, chosen, captions = lab.of_shapes(of)
    n = n or lab.n
    pictures = torch.stack([from_pil(render(change(data.scene(i)), 32)) for i in chosen[:n]])
    pictures[n if right is None else right:] = 200
    return Seen(lab, pictures, captions[:n])


def verdicts(lab, name, made):
    found = Findings()
    EXPERIMENTS[name].find(lab, found, made)
    return [verdict(claim) for claim in found.claims]


def test_fig8_tells_what_is_so_from_its_converse(synthetic):
    rows = [shown(synthetic, right=right) for right in (0, 12, None)]
    for (a, b, c), said in ((rows, "yes"), (rows[::-1], "no")):
        assert verdicts(synthetic, "fig8", {"nothing": a, "z_txt as z_img": rows[0], "z_txt, centred": b, "z_img from the prior": c}) == [said] * 4


def test_priors_and_guidance_tell_what_is_so_from_its_converse(synthetic):
    true, empty, poor = (shown(synthetic, right=right) for right in (None, 0, 12))
    diverse, same = shown(synthetic, 12, change=other_background), shown(synthetic, 12)
    a, b = "unCLIP, diffusion prior", "GLIDE"
    for (a, b), said in (((a, b), ["yes", "no", "yes"]), ((b, a), ["no", "yes", "no"])):
        assert verdicts(synthetic, "priors", {(a, False): true, (a, True): diverse, (b, False): poor, (b, True): same}) == said
    for worst, again, said in ((empty, same, ["yes", "yes", "cannot tell"]), (true, same, ["cannot tell", "cannot tell", "yes"])):
        for a, b in (("unCLIP", "GLIDE"), ("GLIDE", "unCLIP")):
            made = {(model, scale, second): (true, diverse)[second] for model in (a, b) for scale in GUIDANCE for second in (False, True)}
            made |= {(b, GUIDANCE[-1], False): worst, (b, GUIDANCE[-1], True): again}
            assert verdicts(synthetic, "guidance", made) == [{"yes": "no"}.get(word, word) if b == "unCLIP" else word for word in said]


def test_binding_tells_what_is_so_from_its_converse(synthetic):
    true = {of: shown(synthetic, of=of) for of in ("val", "pairs", "held_out")}
    swaps, poor = shown(synthetic, of="pairs", change=exchanged), shown(synthetic, of="pairs", right=12)
    crowds = {"true": true, "swapped": true | {"pairs": swaps}, "poor": true | {"pairs": poor}}
    for ours, alone, theirs, said in (("swapped", "swapped", "true", ["yes", "yes"]), ("true", "true", "swapped", ["no", "cannot tell"]),
                                      ("true", "true", "poor", ["cannot tell", "cannot tell"])):        # fewer than twenty may have swapped them
        names = {"unCLIP": ours, "unCLIP, from true z_img alone": alone, "GLIDE": theirs}
        assert verdicts(synthetic, "binding", {(name, of): crowds[crowd][of] for name, crowd in names.items() for of in true}) == said


def test_what_has_moved_is_measured_in_pixels(synthetic):
    """All things two pixels further, another background: both are found; a thing of another colour has none of its kind to be near to."""
    singles = [i for i, text in enumerate(synthetic.of_shapes("val")[2][:40]) if parse_caption(text)[0] == "size"]
    true, there, lighter, other = (shown(synthetic, 40, change=change) for change in (
        lambda scene: scene, lambda scene: further(scene, 2 / 32), other_background,
        lambda scene: replace(scene, things=tuple(replace(t, colour="red" if t.colour != "red" else "blue") for t in scene.things))))
    assert np.allclose(moved(there, true)[singles], 2, atol=0.3) and np.nanmax(moved(true, true)) == 0
    assert np.isnan(moved(other, true)[singles]).all() and len(singles) > 4
    assert np.allclose(moved(other, true, kind=())[singles], 0, atol=0.3)
    assert (np.abs(backgrounds(lighter) - backgrounds(true)) == 30).all()


def test_variations_and_interpolations_tell_what_is_so_from_its_converse(synthetic):
    n = synthetic.part(4)
    true, empty = shown(synthetic, n), shown(synthetic, n, right=0)
    nearly, black = (Seen(synthetic, pictures, true.captions) for pictures in (true.pictures ^ 1, true.pictures * 0))
    assert verdicts(synthetic, "variations", {"drawn": empty, 0.0: true, 0.5: true, 1.0: nearly}) == ["yes", "yes"]
    assert verdicts(synthetic, "variations", {"drawn": true, 0.0: true, 0.5: black, 1.0: empty}) == ["no", "no"]
    m = synthetic.part(8)
    a, b = synthetic.true(m), synthetic.true(m, first=m)
    for order, said in (((a, a, a, b, b), "yes"), ((b, b, a, a, a), "no")):
        assert verdicts(synthetic, "interpolation", dict(zip(THETAS, order))) == [said, "cannot tell"], "one of two is nothing in between"


def test_text_diffs_tell_an_edit_from_another_picture_of_its_caption(synthetic, monkeypatch):
    """True pictures with the edits of colour made are right; on another ground, or elsewhere, they are not what was there before."""
    monkeypatch.setattr(synthetic, "real", lambda of, real=synthetic.real: real(of, 32))
    data, chosen, captions = synthetic.of_shapes("edits")
    scenes = [data.scene(i) for i in chosen]
    edits = [next(edit for edit in EDITS if edited(scene.text, *edit) == wanted) for scene, wanted in zip(scenes, captions)]

    def recoloured(scene, before, after):
        return replace(scene, things=tuple(replace(thing, colour=after.split()[0]) if f"{thing.colour} {thing.shape}" == before else thing
                                           for thing in scene.things))

    made = [recoloured(scene, *edit) if edit in EDITS[:4] else scene for scene, edit in zip(scenes, edits)]
    coloured = sum(edit in EDITS[:4] for edit in edits) / len(edits)
    pairs = sum(edit in EDITS[:4] and len(scene.things) > 1 for edit, scene in zip(edits, scenes)) / len(edits)
    elsewhere = [further(scene, 0.2) if len(scene.things) == 1 else scene for scene in made]   # of two the relation would be another
    before, same, other, moved_on = (Seen(synthetic, torch.stack([from_pil(render(scene, 32)) for scene in crowd]), captions)
                                     for crowd in (scenes, made, map(other_background, made), elsewhere))
    assert 0 < pairs < coloured
    for seen, kept in ((same, coloured), (other, 0), (moved_on, pairs)):
        found = Findings()
        EXPERIMENTS["textdiff"].find(synthetic, found, dict.fromkeys(EDITED, before) | {0.5: seen})
        rows = {name: [figure.value for figure in row] for name, row in found.tables[0]["rows"].items()}
        assert rows["0.5"] == pytest.approx([coloured, kept]) and rows["0"] == [0, 0] and verdict(found.claims[0]) == "yes"


def test_a_sheet_in_few_colours_keeps_the_rare_ones():
    """Sixty pictures, most of each its ground: pillow's own choice makes a rare green grey."""
    pictures = [render(CaptionedShapes("val", 32, 0, 60).scene(i), 32) for i in range(60)]
    sheet = np.concatenate([np.concatenate([np.asarray(one) for one in pictures[i:i + 10]], axis=1) for i in range(0, 60, 10)])
    ours, theirs = (np.abs(np.asarray(made.convert("RGB")).astype(int) - sheet).max()
                    for made in (few_colours(Image.fromarray(sheet)), Image.fromarray(sheet).quantize(256, dither=Image.Dither.NONE)))
    assert ours < 16 < 30 < theirs


def test_effective_rank():
    z = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0] * 3 + [0.0] * 5)
    count, effective = ranks(z + 5)
    assert count == 3 and effective == pytest.approx(3, rel=1e-2)
    assert ranks(z * torch.tensor([1.0, 0.2, 0.2, 1, 1, 1, 1, 1]))[1] < 2


def test_concepts_are_told_apart_within_their_style():
    assert concept_of("tiger, noto style") == ("tiger", ", noto style") and concept_of("a cat, asleep") == ("a cat, asleep", "")

    class Judge:
        memory = {}

        def remembered(self, key, make):
            return make()

        def judged_text(self, captions):
            return torch.eye(2)[[int("dog" in caption) for caption in captions]]

    z = torch.tensor([[1.0, 0], [0, 1], [0, 1]])
    assert concepts_found(Judge(), z, ["cat, a style", "cat, b style", "dog, a style"], ["cat", "dog"]).tolist() == [True, False, True]


def test_the_nearest_training_picture():
    table = torch.randint(0, 256, (50, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pictures = table[[7, 31]].clone()
    pictures[1, 0, 0, 0] ^= 8
    index, far = nearest(pictures, table)
    assert index.tolist() == [7, 31] and far[0] == 0 and far[1] == pytest.approx(math.sqrt(64 / 192))


def test_a_folder_of_real_pictures(tmp_path, capsys):
    """Two styles of eight things; the held-out ones lie in a folder of their own. All that real pictures can have runs."""
    for split, things in (("train", 24), ("val", 16), ("held_out", 16)):
        (tmp_path / "set" / split).mkdir(parents=True)
        lines = []
        for i in range(things):
            picture = Image.new("RGB", (32, 32), "white")
            ImageDraw.Draw(picture).ellipse((4 + i % 8, 4, 20, 28 - i % 5), fill=(30 * (i % 8), 90, 200 - 20 * (i % 3)))
            picture.save(tmp_path / "set" / split / f"{i}.png")
            lines.append(json.dumps({"file_name": f"{i}.png", "text": f"thing {'abcdefgh'[i % 8]}, {('flat', 'round')[i // 8 % 2]} style"}))
        (tmp_path / "set" / split / "metadata.jsonl").write_text("\n".join(lines))
    folder = tmp_path / "run"
    assert train.main([*SMALL, f"--data={tmp_path / 'set'}", f"--out={folder}", "--data.val_images=16"]) == 0
    assert main([f"--run={folder}", "--n=16", "--device=cpu", "--only", "pictures", "fig8"]) == 0
    text = (folder / "report.md").read_text()
    assert "among 8 concepts" in text and "one in 8" in text and "efficientnet" in text.lower()
    assert (folder / "evaluate" / "pictures.png").is_file() and (folder / "evaluate" / "pictures_nearest.png").is_file()
    assert "Not done yet: priors" in text and "textdiff" not in text and "8 captions;" in text, "half of sixteen: the others are the measure"
    lab, one = Lab(folder, 16, "cpu"), EXPERIMENTS["pictures"]
    assert known(lab, one) is not None and lab.others().captions == lab.real()[1][8:] and lab.part(1, "held_out") == 8
    readme = tmp_path / "README.md"
    readme.write_text("a\n<!-- evaluate set: begin -->\n<!-- evaluate set: end -->\nb\n")
    report.write_readme(lab, readme, "set", {"pictures": known(lab, one)}, {}, "a command")
    assert "the judge finds what it shows" in readme.read_text() and (tmp_path / "notebooks/images/evaluate_set_pictures.png").is_file()
    os.utime(tmp_path / "set" / "held_out" / "0.png", (0, 0))
    lab = Lab(folder, 16, "cpu")
    assert known(lab, one) is None and not lab.cache.exists() and lab.trained("judge", *lab.side_models()["judge"][:2]) is None, "another file"
    capsys.readouterr()
    assert main([f"--run={folder}", "--n=16", "--device=cpu", "--only", "textdiff"]) == 2
    assert "captioned shapes" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------- the README

def test_the_readme_holds_the_table_once(copied, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# before\n<!-- evaluate emoji: begin -->\n<!-- evaluate emoji: end -->\n\n"
                      "<!-- evaluate shapes: begin -->\nSTALE\n<!-- evaluate shapes: end -->\n\n# behind\n")
    command = [f"--run={copied}", "--n=16", "--device=cpu", "--readme", str(readme)]
    assert main(command) == 0
    first = readme.read_text()
    assert main(command) == 0 and readme.read_text() == first
    assert first.startswith("# before\n<!-- evaluate emoji: begin -->\n<!-- evaluate emoji: end -->\n\n<!-- evaluate shapes: begin -->\nBy `python")
    assert first.endswith("\n<!-- evaluate shapes: end -->\n\n# behind\n") and "STALE" not in first and first.count("begin -->") == 2
    assert f"--run {copied}" in first and all(f"| {name} |" in first for name in SHAPES) and "decoder 3" in first
    images = re.findall(r"\]\((.*?)\)", first)
    assert len(images) == len(IN_README) - 1 and all(0 < (tmp_path / image).stat().st_size < 150_000 for image in images)


@pytest.mark.parametrize("name", ["shapes", "emoji"])
def test_our_own_readme_has_the_place_for_it(name):
    before, behind = split_readme(report.README, f"evaluate {name}")
    assert len(before) > 1000 and len(behind) > 1000 and Path(report.README).name == "results.md"
