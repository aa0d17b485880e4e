"""made.py: what sampling would refuse is refused before a step is taken."""

import os

import pytest
import torch

import sample
from mini_dalle2 import DALLE2, configs
from mini_dalle2.pipeline import load_model
from mini_dalle2.pretrained.ship import ship
from mini_dalle2.runtime.files import (
    load_checkpoint, read_json, save_checkpoint, signature, write_json)
from calls import call, copy_of, printed

# Training with steps left for the last stage alone.
MORE = ["--resume", "--upsampler2.steps=5"]


def amended(run, folder, name, **values):
    """A copy of a run with other values in one checkpoint; None: without that key."""
    copy = copy_of(run, folder, [name])
    changed = load_checkpoint(run / name) | values
    save_checkpoint({key: value for key, value in changed.items() if value is not None},
                    copy / name)
    return copy


def refused(capsys, folder, *words):
    """The sentence with which train.py refuses. Nothing is trained, and no file changes."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    code, out, error = call(capsys, "--out", folder, *words)
    assert code == 2 and "stages to train" not in out, error
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    return error


# ---------------------------------------------------------------------------- versions

def test_each_stage_records_its_version(run, tmp_path):
    for stage in configs.MODELS:
        for end in (".pt", ".resume.pt"):
            assert load_checkpoint(run / f"{stage}{end}")["version"] == configs.VERSION
    ship(run, tmp_path / "box", "1234abc")
    for stage in ("clip", "decoder"):
        assert load_checkpoint(tmp_path / "box" / f"{stage}.pt")["version"] == configs.VERSION


@pytest.mark.parametrize("version", [configs.VERSION + 1, 0, "next"])
def test_another_version_is_refused_by_every_command(run, tmp_path, capsys, version):
    copy = amended(run, tmp_path / "copy", "prior.pt", version=version)
    said = f"prior.pt is of version {version!r} of mini_dalle2's checkpoints, and this is version"
    assert said in refused(capsys, copy, *MORE)
    assert said in refused(capsys, copy, "--stage=upsampler2", *MORE)
    assert said in call(capsys, "--from", copy, "--out", tmp_path / "new")[2]
    assert not (tmp_path / "new").exists()
    capsys.readouterr()
    assert sample.main(["text", "a red ring", f"--run={copy}", f"--out={tmp_path}/a.png"]) == 2
    assert said in capsys.readouterr().err


def test_what_goes_on_has_this_version_too(run, tmp_path, capsys):
    copy = amended(run, tmp_path / "copy", "upsampler2.resume.pt", version=configs.VERSION + 1)
    assert "upsampler2.resume.pt is of version" in refused(capsys, copy, *MORE)


def test_a_run_without_the_record_goes_on(run, tmp_path, capsys):
    """Those of before have none, as the bundled weights."""
    copy = copy_of(run, tmp_path / "copy")
    for path in run.glob("*.pt"):
        without = {key: value for key, value in load_checkpoint(path).items() if key != "version"}
        save_checkpoint(without, copy / path.name)
    assert call(capsys, "--out", copy, *MORE)[0] == 0
    assert load_checkpoint(copy / "upsampler2.pt")["version"] == configs.VERSION
    assert "version" not in load_checkpoint(copy / "clip.pt") and DALLE2.load(copy)


def test_the_bundled_weights_have_no_record_and_load():
    model, checkpoint = load_model(configs.__file__.replace("configs.py", "weights/clip.pt"))
    assert checkpoint.get("version", configs.VERSION) == configs.VERSION and model


# ---------------------------------------------------------------------------- what does not fit

OLDER = {
    "settings that no model has": {"model_config": {"depth": 3}},
    "weights of another model": {"ema": {"weight": torch.zeros(3)}},
}


@pytest.mark.parametrize("values", OLDER.values(), ids=OLDER)
@pytest.mark.parametrize("stage", ["prior", "ar_prior", "decoder", "upsampler1"])
def test_a_stage_of_an_older_version_is_found_before_training(run, tmp_path, capsys, stage, values):
    copy = amended(run, tmp_path / "copy", f"{stage}.pt", **values)
    for words in (MORE, ["--stage=upsampler2", *MORE]):
        error = refused(capsys, copy, *words)
        assert f"{stage}.pt does not fit this version's models (" in error
        assert f"): delete {stage}.pt, {stage}.resume.pt in {copy}, and go on with" in error
        assert printed(error) == ["--out", str(copy), "--resume"]


def test_what_a_later_stage_goes_on_from_is_read_first(run, tmp_path, capsys):
    """The prior would have learned on, and then the upsampler would have been refused."""
    words = ["--resume", "--prior.steps=5", "--upsampler1.steps=5"]
    name = "upsampler1.resume.pt"
    weights = {"weight": torch.zeros(3)}
    copy = amended(run, tmp_path / "copy", name, model=weights)
    assert f"{name} belongs to a model of other sizes" in refused(capsys, copy, *words)
    lacking = copy_of(run, tmp_path / "lacking", [name])
    assert f"{name}, which is needed to go on, is not there" in refused(capsys, lacking, *words)


def test_sizes_other_than_those_of_the_configuration(run, tmp_path, capsys):
    """A config.json of another run, whose decoder is as good, but not this one."""
    copy = copy_of(run, tmp_path / "copy", ["config.json"])
    saved = read_json(run / "config.json")
    saved["decoder"]["model"]["text_width"] = 64
    write_json(saved, copy / "config.json")
    error = refused(capsys, copy, *MORE)
    assert f"decoder.pt has other sizes than {copy}/config.json says: delete decoder.pt" in error


def test_another_tokenizer(run, tmp_path, capsys):
    copy = copy_of(run, tmp_path / "copy", ["tokenizer.json"])
    tokenizer = read_json(run / "tokenizer.json")
    write_json(tokenizer | {"merges": tokenizer["merges"][:-1]}, copy / "tokenizer.json")
    error = refused(capsys, copy, *MORE)
    assert f"clip.pt knows another tokenizer than {copy}/tokenizer.json" in error


def test_a_lost_tokenizer_is_learned_again(run, tmp_path, capsys):
    """From the same pictures it comes out the same. From others it is refused before any model."""
    copy = copy_of(run, tmp_path / "copy", ["tokenizer.json"])
    code, out, error = call(capsys, "--out", copy, "--resume")
    assert code == 0 and out.count("was finished before") == 7, error
    os.remove(copy / "tokenizer.json")
    code, out, error = call(capsys, "--out", copy, "--resume", "--data.images=3")
    assert code == 2 and "clip.pt knows another tokenizer than" in error
    assert "prior: was finished" not in out


def test_all_stages_of_another_clip_are_named_at_once(run, tmp_path, capsys):
    copy = copy_of(run, tmp_path / "copy", ["clip.pt"])
    clip = load_checkpoint(run / "clip.pt")
    clip["ema"] = {name: value + 1 for name, value in clip["ema"].items()}
    save_checkpoint(clip, copy / "clip.pt")
    # Sampling believes the record in the file, and training the weights.
    assert "clip.pt is damaged: it holds other weights than it says" in refused(capsys, copy, *MORE)
    save_checkpoint(clip | {"clip_signature": signature(clip["ema"])}, copy / "clip.pt")
    error = refused(capsys, copy, *MORE)
    files = ", ".join(f"{copy}/{name}.pt" for name in configs.ON_CLIP)
    assert f"{files} were trained on the embeddings of another CLIP: delete prior.pt" in error
    assert printed(error) == ["--out", str(copy), "--resume"]


def test_what_goes_on_knows_the_run_s_clip(run, tmp_path, capsys):
    """A machine went down between the two files of a stage's first step, and CLIP was replaced."""
    name = "prior.resume.pt"
    copy = amended(run, tmp_path / "copy", name, clip_signature="0" * 16)
    os.remove(copy / "prior.pt")
    error = refused(capsys, copy, "--resume")
    assert f"{name} was trained on the embeddings of another CLIP: delete prior.pt" in error


def test_a_variant_that_needs_a_clip_is_refused_before_the_others_train(run, tmp_path, capsys):
    copy = copy_of(run, tmp_path / "copy", ["clip.pt", "clip.resume.pt"])
    assert f"{copy}/clip.pt is missing" in refused(capsys, copy, "--stage=evaluation")
