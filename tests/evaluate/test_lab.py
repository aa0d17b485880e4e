"""A run's judge and baseline: what they are, and what is said when they cannot be used."""

import shlex
import shutil
from dataclasses import replace

import pytest
import torch

import train
from mini_dalle2.configs import VARIANTS
from mini_dalle2.decoder import Decoder
from mini_dalle2.evaluate.command import main
from mini_dalle2.evaluate.lab import Lab
from mini_dalle2.evaluate.making import Maker
from mini_dalle2.evaluate.recipes import Sampled
from mini_dalle2.pipeline import load_model
from mini_dalle2.runtime.files import read_json, write_json


def test_the_judge_is_another_clip(evaluated):
    judge, own = (load_model(evaluated / f"{name}.pt", name)[0] for name in ("judge", "clip"))
    assert judge.cfg.vision_width < own.cfg.vision_width and judge.cfg.clip_dim < own.cfg.clip_dim
    saved, config = (
        torch.load(evaluated / "judge.pt", weights_only=True),
        read_json(evaluated / "config.json"),
    )
    assert (
        saved["config"]["data"]["seed"] != config["data"]["seed"]
        and saved["step"] == saved["steps"]
    )
    assert not (evaluated / "evaluate" / "judge.pt").exists(), "an evaluation trains nothing"


def test_glide_never_saw_z_img(evaluated):
    """Its input layers for z_img are bit-identical to untrained ones; the run's have learned."""
    weights = {}
    for name in ("glide", "decoder"):
        model, saved = load_model(evaluated / f"{name}.pt", name)
        torch.manual_seed(saved["config"]["data"]["seed"])
        fresh = Decoder(model.cfg)
        weights[name] = [
            torch.equal(getattr(model, way).weight, getattr(fresh, way).weight)
            for way in ("z_to_emb", "z_to_tokens")
        ]
        assert not all(map(torch.equal, model.unet.parameters(), fresh.unet.parameters()))
    assert weights == {"glide": [True, True], "decoder": [False, False]}


def test_glide_draws_the_same_whatever_z_img_is(evaluated):
    lab = Lab(evaluated, 16, "cpu")
    maker = Maker(lab)
    assert (
        maker.settled(Sampled(16, z="diffusion", glide=True))
        == maker.settled(Sampled(16, z="ar", glide=True))
        == maker.settled(Sampled(16, z=None, glide=True))
    )
    same = [
        maker.make_pictures(maker.settled(Sampled(4, z=z, glide=True)))
        for z in ("diffusion", "true")
    ]
    other = maker.make_pictures(maker.settled(Sampled(4, z=None)))
    assert torch.equal(*same) and not torch.equal(same[0], other)
    a, b = (getattr(lab.glide.decoder.cfg, key) for key in ("z_drop", "caption_drop"))
    own = lab.model.decoder.cfg
    assert (a, b) == (1.0, 0.2) and replace(
        own, z_drop=a, caption_drop=b, sketch=False
    ) == lab.glide.decoder.cfg, "as large, and drawn with as many steps"


def amended(path, **changes):
    """Change some values of a checkpoint."""
    checkpoint = torch.load(path, weights_only=True)
    torch.save(checkpoint | changes, path)


def test_settings_of_the_run_make_a_judge_stale(copied, capsys):
    settings = read_json(copied / "config.json")
    settings["clip"]["train"]["steps"] = 8
    write_json(settings, copied / "config.json")
    lab = Lab(copied, 16, "cpu")
    assert lab.why_unusable("judge") == "was made with other settings"
    assert lab.signature_of("judge") is None and lab.signature_of("glide") is not None
    assert main([f"--run={copied}", "--n=16", "--device=cpu", "--only", "fig8"]) == 2
    error = capsys.readouterr().err
    assert (
        f"judge.pt was made with other settings: delete judge.pt, judge.resume.pt in {copied}, "
        f"then run `python train.py --stage judge --out {copied}` first" in error
    )


def test_without_a_judge_it_names_the_command(run, judged, tmp_path, capsys):
    """At once, in one sentence: all that is missing, or the single stage where that is enough."""
    folder = shutil.copytree(run, tmp_path / "run")
    words = [f"--run={folder}", "--n=16", "--device=cpu"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and f"run `python train.py --stage evaluation --out {folder}` first" in error
    )
    assert all(f"{folder}/{name}.pt is missing" in error for name in VARIANTS)
    assert main([*words, "--only", "components"]) == 2
    error = capsys.readouterr().err
    assert (
        f"{folder}/judge.pt is missing: run `python train.py --stage judge --out {folder}` first"
        in error
    )
    assert "glide" not in error and not (folder / "evaluate").exists(), "nothing was made"
    shutil.copy(judged / "judge.pt", folder)
    shutil.copy(judged / "glide.pt", folder)
    assert main(words) == 2
    error = capsys.readouterr().err
    assert f"run `python train.py --stage evaluation --out {folder} --resume` first" in error
    assert "/judge.pt" not in error and f"{folder}/with_sam.pt is missing" in error


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"step": 0}, "is not finished"),
        ({"config": {}}, "is damaged"),
        ({"tokenizer": {}}, "was made with another tokenizer"),
        ({"clip_signature": "another"}, "was made with another CLIP"),
    ],
)
def test_a_baseline_that_is_not_this_run_s(copied, capsys, changes, reason):
    amended(copied / "glide.pt", **changes)
    lab = Lab(copied, 16, "cpu")
    assert lab.why_unusable("glide") == reason and lab.why_unusable("judge") is None
    assert main([f"--run={copied}", "--n=16", "--device=cpu", "--only", "priors"]) == 2
    error = capsys.readouterr().err
    resume = " --resume" if reason == "is not finished" else ""
    delete = "" if resume else f"delete glide.pt, glide.resume.pt in {copied}, then "
    command = f"train.py --stage glide --out {copied}{resume}"
    assert f"glide.pt {reason}: {delete}run `python {command}` first" in error
    assert main([f"--run={copied}", "--n=16", "--device=cpu", "--only", "components"]) == 0


def test_the_judge_of_an_older_version_is_not_used(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "evaluate").mkdir()
    shutil.copy(run / "clip.pt", folder / "evaluate" / "judge.pt")
    assert main([f"--run={folder}", "--n=16", "--device=cpu", "--only", "components"]) == 2
    assert "evaluate/judge.pt, of an older version, cannot be used" in capsys.readouterr().err


def test_weights_without_a_run_are_evaluated_by_the_command_that_is_named(
    run, tmp_path, monkeypatch, capsys
):
    """The box has neither config.json nor the models to compare with."""
    monkeypatch.chdir(tmp_path)
    for stage in ("clip", "prior", "ar_prior", "decoder", "upsampler1", "upsampler2"):
        (tmp_path / "box").mkdir(exist_ok=True)
        shutil.copy(run / f"{stage}.pt", tmp_path / "box" / f"{stage}.pt")
    # The first name is taken.
    (tmp_path / "runs" / "box").mkdir(parents=True)
    before = {path: path.read_bytes() for path in (tmp_path / "box").iterdir()}
    assert main(["--run=box", "--n=16", "--device=cpu"]) == 2
    error = capsys.readouterr().err
    words = shlex.split(error.split("`")[1])
    assert words == shlex.split("python train.py --from box --stage evaluation --out runs/box2")
    assert train.main([*words[2:], "--device=cpu"]) == 0
    assert "next: python -m mini_dalle2.evaluate --run runs/box2" in capsys.readouterr().out
    assert main(["--run=runs/box2", "--n=16", "--device=cpu", "--only", "components"]) == 0
    assert {path: path.read_bytes() for path in (tmp_path / "box").iterdir()} == before


def test_a_stale_judge_is_replaced_as_it_is_said(copied, capsys):
    amended(copied / "judge.pt", tokenizer={})
    assert main([f"--run={copied}", "--n=16", "--device=cpu", "--only", "components"]) == 2
    error = capsys.readouterr().err
    assert f"delete judge.pt, judge.resume.pt in {copied}, then run `python train.py" in error
    for name in ("judge.pt", "judge.resume.pt"):
        (copied / name).unlink()
    assert train.main([*shlex.split(error.split("`")[1])[2:], "--device=cpu"]) == 0
    assert Lab(copied, 16, "cpu").why_unusable("judge") is None
