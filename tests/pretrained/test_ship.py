"""The bundled weights: half as large, the same pictures, and a card that says how they were made."""

import shlex
from pathlib import Path

import numpy as np
import pytest
import torch

import sample
import train
from conftest import commands
from mini_dalle2 import DALLE2
from mini_dalle2 import configs, pipeline
from mini_dalle2.pretrained import ship as shipped
from mini_dalle2.runtime.files import load_checkpoint, read_json, signature
from mini_dalle2.training import overrides


@pytest.fixture(scope="module")
def box(run, tmp_path_factory):
    """The micro run, packed."""
    out = tmp_path_factory.mktemp("box") / "weights"
    assert shipped.main([str(run), "--commit", "1234abc", "--out", str(out)]) == 0
    return out


def test_half_the_size(run, box):
    assert not (box / "sketch.pt").is_file()                               # it lies in the decoder
    for stage in configs.MODELS.keys() - {"sketch"}:
        a, b = (load_checkpoint(folder / f"{stage}.pt", stage) for folder in (run, box))
        kept = a.keys() - {"ema", "clip_signature"}
        if stage == "clip":                                                # what redraws pictures stays behind
            assert any(name.startswith("redraw.") for name in a["ema"])
            a["ema"] = {name: value for name, value in a["ema"].items() if not name.startswith("redraw.")}
            a["config"]["clip"]["model"]["picture_weight"] = a["model_config"]["picture_weight"] = 0.0
        assert a.keys() == b.keys() and a["ema"].keys() == b["ema"].keys() and all(a[key] == b[key] for key in kept)
        if a.get("clip_signature"):                                        # of CLIP as it lies in the box
            assert b["clip_signature"] == signature(load_checkpoint(box / "clip.pt")["ema"])
        names = dict(pipeline.load_model(run / f"{stage}.pt")[0].named_parameters())
        for name, value in b["ema"].items():
            assert value.dtype == (torch.float16 if name in names else a["ema"][name].dtype)
            assert torch.allclose(value.float(), a["ema"][name].float(), rtol=1e-3, atol=1e-7)


def test_they_draw_nearly_the_same(run, box, monkeypatch):
    captions, options = ["a red circle above a blue square"], {"stage": "base", "progress": False}
    monkeypatch.setattr(pipeline, "WEIGHTS", box)
    model = DALLE2.load()                                                  # nothing named: the bundled ones
    assert all(p.dtype == torch.float32 for p in model.decoder.parameters())
    a, b = (np.asarray(m.text_to_image(captions, **options)[0][0]).astype(int) for m in (DALLE2.load(run), model))
    assert abs(a - b).mean() < 2


def test_pictures_do_not_go_into_the_package(run, box, monkeypatch):
    monkeypatch.setattr(pipeline, "WEIGHTS", box)
    detour = box / ".." / box.name                                         # the same folder, written in another way
    folders = [sample.parse(["text", "a circle", *named]).folder for named in ([], ["--run", str(box)], ["--run", str(detour)], ["--run", str(run)])]
    assert folders == [Path("."), Path("."), Path("."), run]


def test_they_keep_the_words_of_the_captions(run, box):
    assert (box / "words.txt").read_bytes() == (run / "words.txt").read_bytes()


def test_the_card_says_how_to_make_them(run, box):
    card = (box / "README.md").read_text()
    assert "1234abc" in card and all(f"| {stage} |" in card for stage in configs.MODELS) and "Not graded" in card
    assert f"| clip | {configs.parameters(pipeline.load_model(box / 'clip.pt')[0]):,} |" in card, "as many parameters as lie in the box"
    assert [shlex.join(words) for words in commands(card)] == (run / "commands.txt").read_text().splitlines()
    args = train.parse(commands(card)[0][2:])
    made = overrides.override(configs.preset(args.preset or "tiny"), args.settings)
    saved = overrides.from_dict(read_json(run / "config.json"))
    assert configs.changed(made, {key: configs.get(saved, key) for key in configs.LEARNED}) == saved


def test_mistakes(run, tmp_path, capsys):
    for arguments, said in ((["nowhere"], "nowhere/clip.pt"), ([str(run)], "--commit")):
        more = ["--commit", "x"] if said != "--commit" else []
        assert shipped.main([*arguments, *more, "--out", str(tmp_path / "box")]) == 2 and not (tmp_path / "box").exists()
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and said in error
