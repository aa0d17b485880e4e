"""budget.py: how many steps a number of pictures gets, and who may overrule it."""

import json
from dataclasses import replace

import pytest
import torch

import train
from mini_dalle2 import configs
from mini_dalle2.data.pixels import to_pil
from mini_dalle2.data.shapes import CaptionedShapes
from mini_dalle2.data.tables import Pictures
from mini_dalle2.runtime.files import read_json
from mini_dalle2.training import budget, overrides

ALL = {stage: 10 ** 9 for stage in configs.MODELS}
LONG = "a photograph of a very small grey cat that sleeps on an old wooden chair"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twelve pictures with captions in metadata.jsonl, all of them of more than 16 tokens."""
    path = tmp_path_factory.mktemp("pictures") / "mine"
    path.mkdir()
    dataset = CaptionedShapes("train", 8, 1, 12)
    lines = []
    for i in range(12):
        to_pil(dataset[i]["image"]).save(path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": f"{LONG}, {i}"}))
    (path / "metadata.jsonl").write_text("\n".join(lines))
    return path


def settled(*arguments):
    """The configuration that train.py begins with, made as guards.settle makes it."""
    args = train.parse([str(one) for one in arguments])
    changes = [f"--data.source={args.data}"] if args.data else []
    changes += args.settings
    return overrides.override(budget.begin(args, None, changes), changes)


def steps_of(config):
    """{stage: steps}."""
    return {stage: getattr(config, stage).train.steps for stage in configs.MODELS}


def test_steps_grow_with_the_root_of_the_number():
    few = budget.steps_for(32, ALL)
    assert few == budget.steps_for(3, ALL) == budget.STEPS
    assert budget.steps_for(128, ALL) == {stage: 2 * steps for stage, steps in few.items()}
    assert budget.steps_for(33, ALL)["decoder"] == 610
    assert budget.steps_for(128, ALL | {"decoder": 700})["decoder"] == 700


def test_many_pictures_get_the_whole_preset():
    whole = steps_of(configs.tiny())
    assert budget.steps_for(4000, whole) == whole
    assert budget.steps_for(3000, whole) != whole


def test_a_folder_gets_fewer_steps_and_says_so(folder, tmp_path, capsys):
    config = settled("--data", folder, "--out", tmp_path / "new")
    told = capsys.readouterr().out
    learned = Pictures(config.data, torch.device("cpu")).available
    assert told.startswith(f"note: there are {learned} pictures to learn, so each stage takes fewer "
                           f"steps than the preset tiny has.")
    assert told.count("\n") == 1
    assert steps_of(config) == budget.STEPS
    # Nothing else is another, but for the room for long captions.
    length = config.clip.model.context_length
    same = {"data.source": str(folder), "clip.context_length": length}
    same |= {f"{stage}.steps": steps for stage, steps in budget.STEPS.items()}
    assert config == configs.changed(configs.tiny(), same)
    assert length > 16 and length == config.decoder.model.context_length


def test_every_caption_fits(folder, tmp_path, capsys):
    """The context is as long as the longest caption, as the run's own tokenizer reads it."""
    out = tmp_path / "new"
    arguments = ["--data", str(folder), f"--out={out}", "--stage=tokenizer"]
    assert train.main(arguments) == 0
    config = overrides.from_dict(read_json(out / "config.json"))
    run = train.Run(config, out, torch.device("cpu"))
    captions = run.pictures.captions()
    lengths = [len(run.tokenizer().encode(caption)) + 2 for caption in captions]
    assert max(lengths) == config.clip.model.context_length
    capsys.readouterr()
    run.tokens(captions)
    assert "lose their end" not in capsys.readouterr().out


def test_settings_and_presets_win(folder, tmp_path, capsys):
    new = ("--data", folder, "--out", tmp_path / "new")
    config = settled(*new, "--decoder.steps=77", "--clip.context_length=20")
    assert steps_of(config) == budget.STEPS | {"decoder": 77}
    assert config.clip.model.context_length == 20
    capsys.readouterr()
    assert settled(*new, "--preset=tiny") == configs.changed(
        configs.tiny(), {"data.source": str(folder)})
    assert settled("--out", tmp_path / "new") == configs.tiny()
    assert capsys.readouterr().out == ""


def test_the_setting_data_source_names_a_folder_too(folder, tmp_path):
    config = settled(f"--data.source={folder}", "--out", tmp_path / "new")
    assert steps_of(config) == budget.STEPS


def test_a_run_keeps_its_steps(folder, tmp_path):
    """With --resume, and with as many pictures as there may be then."""
    args = train.parse(["--resume", "--data", str(folder), "--out", str(tmp_path)])
    saved = overrides.override(configs.tiny(), ["--decoder.steps=5"])
    assert budget.begin(args, saved, [f"--data.source={folder}"]) == saved


@pytest.mark.parametrize("own, expected", [(27000, 600), (450, 450)])
def test_from_does_not_take_over_a_long_schedule(folder, tmp_path, capsys, own, expected):
    """It takes fewer steps for few pictures, but never more than the other run took."""
    args = train.parse(["--from=box", "--data", str(folder), "--out", str(tmp_path / "new")])
    saved = overrides.override(configs.tiny(), ["--prior.steps=40000", f"--decoder.steps={own}"])
    config = budget.begin(args, saved, [f"--data.source={folder}"])
    assert steps_of(config) == budget.STEPS | {"decoder": expected}
    # The weights fix the context.
    assert config.clip.model == saved.clip.model
    assert "fewer steps than box has" in capsys.readouterr().out


def test_from_for_many_pictures_takes_the_steps_of_the_preset(folder, tmp_path, monkeypatch):
    args = train.parse(["--from=box", "--data", str(folder), "--out", str(tmp_path / "new")])
    saved = overrides.override(configs.tiny(), ["--prior.steps=40000"])
    many = replace(configs.tiny(), data=replace(configs.tiny().data, source=str(folder)))
    monkeypatch.setattr(budget, "PICTURES", 0.001)
    config = budget.begin(args, saved, [f"--data.source={folder}"])
    assert steps_of(config) == steps_of(many)


def test_from_for_shapes_keeps_the_schedule(tmp_path):
    args = train.parse(["--from=box", "--out", str(tmp_path / "new")])
    saved = overrides.override(configs.tiny(), ["--prior.steps=40000"])
    assert budget.begin(args, saved, []) == saved
