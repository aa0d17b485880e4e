"""changes.py: each row of its table, on a finished run; what is refused leaves every file."""

import shutil

import pytest
import torch

import train
from conftest import SMALL
from mini_dalle2 import DALLE2, configs
from mini_dalle2.data.pixels import to_pil
from mini_dalle2.data.shapes import CaptionedShapes
from mini_dalle2.runtime.files import (
    load_checkpoint, read_json, save_checkpoint, write_json)
from mini_dalle2.training import guards, overrides
from mini_dalle2.training.run import Run
from mini_dalle2.training.variants import variant
from calls import call, copy_of, printed

CONFIG = "config.json"
ON_CLIP = "prior, ar_prior, sketch, decoder"


def files(*names):
    """The files of these stages."""
    return [f"{name}{end}" for name in names for end in (".pt", ".resume.pt")]


def contents(folder):
    """{name: bytes} of what a folder holds."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def settings_of(folder):
    """The configuration that a run folder has written down."""
    return overrides.from_dict(read_json(folder / CONFIG))


@pytest.fixture
def begin(monkeypatch):
    """A function that opens the run of a command line, as train.py does before its first step.

    Whether sizes work takes long, and is left out.
    """
    monkeypatch.setattr(guards, "check_one_step", lambda *_: None)
    return lambda *words: Run.open(train.parse([str(word) for word in words]), torch.device("cpu"))


# ---------------------------------------------------------------------------- a run of shapes

REFUSED = {
    "sizes": (["--clip.text_width=64"], "holds a clip of other sizes"),
    "the tokenizer": (["--tokenizer.vocab_size=600"], "holds a tokenizer of other sizes"),
    "the data": (["--data=elsewhere"], "from other data"),
    "the seed": (["--data.seed=1"], "learned from the pictures of --data.seed=0"),
    "the seed, for one more stage": (["--data.seed=1", "--stage=upsampler2",
                                      "--upsampler2.steps=5"], "the pictures of --data.seed=0"),
    "near misses": (["--data.near_misses=false"], "learned with --data.near_misses=true"),
    "a habit": (["--decoder.caption_drop=0.2"], "another caption_drop"),
    "more CLIP": (["--clip.steps=6"], f"clip.pt cannot take more steps, because {ON_CLIP} learned"),
    "more CLIP alone": (["--clip.steps=6", "--stage=clip"], "clip.pt cannot take more steps"),
    "more CLIP, and the next": (["--clip.steps=6", "--stage=decoder"], "keep --clip.steps=3"),
    "more sketch": (["--sketch.steps=6"], "sketch.pt cannot take more steps, because decoder"),
    "more sketch alone": (["--sketch.steps=6", "--stage=sketch"], "keep --sketch.steps=3"),
    "another preset": (["--preset=tiny"], "begun with the preset micro"),
}


@pytest.mark.parametrize("words, said", REFUSED.values(), ids=REFUSED)
def test_what_cannot_go_together_is_refused_before_training(run, tmp_path, capsys, words, said):
    copy = copy_of(run, tmp_path / "copy")
    before = contents(copy)
    code, out, error = call(capsys, "--out", copy, "--resume", *words)
    assert code == 2 and said in error and error.startswith("train.py: "), error
    assert contents(copy) == before and "stages to train" not in out


ALLOWED = {
    "nothing": ([], []),
    "the same preset": (["--preset=micro"], []),
    "more steps": (["--prior.steps=6", "--decoder.steps=5", "--upsampler1.steps=4"],
                   ["prior", "decoder", "upsampler1"]),
    "fewer steps of CLIP": (["--clip.steps=2"], []),
    "the rate": (["--upsampler2.lr=1e-5", "--upsampler2.steps=4"], ["upsampler2"]),
    "validation pictures of shapes": (["--data.val_images=20"], []),
    "a habit that is learned": (["--decoder.caption_drop=0.2", "--decoder.steps=4"], ["decoder"]),
}


@pytest.mark.parametrize("words, learning", ALLOWED.values(), ids=ALLOWED)
def test_what_may_change_is_silent(run, tmp_path, capsys, begin, words, learning):
    opened = begin("--out", copy_of(run, tmp_path / "copy"), "--resume", *words)
    assert [name for name in opened.names if name not in opened.done] == learning
    assert "note" not in capsys.readouterr().out


NUMBERS = {
    "images": f"clip, {ON_CLIP} learned from up to 40 pictures",
    "upsampler1_images": "upsampler1 learned from up to 6 pictures",
    "upsampler2_images": "upsampler2 learned from up to 4 pictures",
}


@pytest.mark.parametrize("key, said", NUMBERS.items(), ids=NUMBERS)
@pytest.mark.parametrize("number", [2, 50])
def test_another_number_of_pictures_is_said(run, tmp_path, capsys, begin, key, said, number):
    copy = copy_of(run, tmp_path / "copy")
    begin("--out", copy, "--resume", f"--data.{key}={number}")
    told = f"note: {said}; with --data.{key}={number}, what is trained from here on learns from"
    assert told in capsys.readouterr().out
    assert getattr(settings_of(copy).data, key) == number
    # The next call has nothing to say.
    begin("--out", copy, "--resume")
    assert "note" not in capsys.readouterr().out


def test_pictures_of_another_number_keep_the_split(run, tmp_path, capsys):
    """More pictures of shapes: the first ones stay, and the validation pictures are the same."""
    copy = copy_of(run, tmp_path / "copy", files("prior"))
    before = load_checkpoint(run / "embeddings.pt")
    code, out, error = call(capsys, "--out", copy, "--stage=prior", "--data.images=50")
    assert code == 0 and "learned from up to 40 pictures" in out, error
    after = load_checkpoint(copy / "embeddings.pt")
    assert after["captions"][:40] == before["captions"] and len(after["captions"]) == 50
    assert DALLE2.load(copy)


def test_near_misses_change_while_clip_learns(run, tmp_path, begin):
    copy = copy_of(run, tmp_path / "copy", files(*configs.ON_CLIP))
    opened = begin("--out", copy, "--resume", "--clip.steps=5", "--data.near_misses=false")
    assert opened.names[1] == "clip" and "clip" not in opened.done
    assert not opened.config.data.near_misses


def test_clip_learns_on_as_long_as_nothing_knows_it(run, tmp_path, capsys):
    """The upsamplers never see CLIP."""
    copy = copy_of(run, tmp_path / "copy", files(*configs.ON_CLIP))
    code, _, error = call(capsys, "--out", copy, "--resume", "--clip.steps=5", "--stage=clip")
    assert code == 0 and load_checkpoint(copy / "clip.pt")["step"] == 5, error


def test_the_printed_way_to_more_clip_ends_in_a_run_that_draws(run, tmp_path, capsys):
    copy = copy_of(run, tmp_path / "it's mine")
    before = contents(copy)
    words = ["--preset=micro", "--out", copy, "--resume", "--stage", "clip", "--clip.steps=4"]
    code, _, error = call(capsys, *words)
    assert code == 2 and "prior, ar_prior, sketch, decoder learned from it" in error
    new = tmp_path / "it's mine-2"
    again = printed(error[error.index("with `"):])
    assert again == ["--from", str(copy), "--out", str(new), "--clip.steps=4"]
    assert call(capsys, *again)[0] == 0
    assert load_checkpoint(new / "clip.pt")["step"] == 4 and DALLE2.load(new)
    assert contents(copy) == before and DALLE2.load(copy)
    # A second time the name is taken.
    assert call(capsys, *words)[2].endswith("-3' --clip.steps=4`")


def test_the_other_way_is_to_keep_the_steps(run, tmp_path, begin):
    """Also where an older version has written more steps down than CLIP has taken."""
    copy = copy_of(run, tmp_path / "copy", [CONFIG])
    saved = read_json(run / CONFIG)
    saved["clip"]["train"]["steps"] = 9
    write_json(saved, copy / CONFIG)
    with pytest.raises(ValueError, match="clip.pt cannot take more steps.*keep --clip.steps=3"):
        begin("--out", copy, "--resume")
    opened = begin("--out", copy, "--resume", "--clip.steps=3")
    assert opened.done == list(configs.STAGES)


def test_a_lost_clip_is_learned_again_and_fits(run, tmp_path, capsys):
    """The same settings give the same weights to the bit. A note says what is at stake until then."""
    copy = copy_of(run, tmp_path / "copy", files("clip"))
    code, out, error = call(capsys, "--out", copy, "--resume")
    assert code == 0, error
    assert f"note: {ON_CLIP} learned from a clip that is not in {copy} any more" in out
    assert out.count("was finished before") == 7 and DALLE2.load(copy)


@pytest.mark.parametrize("base, known, word", [
    ("clip", ON_CLIP, "--clip.lr=3e-3"), ("clip", ON_CLIP, "--data.images=50"),
    ("clip", ON_CLIP, "--clip.steps=4"), ("sketch", "decoder", "--sketch.steps=4")])
def test_a_lost_stage_with_other_settings_is_refused(run, tmp_path, capsys, base, known, word):
    copy = copy_of(run, tmp_path / "copy", files(base))
    before = contents(copy)
    for stage in ("all", base):
        code, _, error = call(capsys, "--out", copy, "--resume", f"--stage={stage}", word)
        assert code == 2 and f"{known} learned from a {base} that is not in {copy}" in error
        first = known.split(",")[0]
        assert f"go back to its settings, or delete {first}.pt, {first}.resume.pt" in error
    assert contents(copy) == before


def test_a_lost_stage_may_use_memory_in_another_way(run, tmp_path, begin):
    copy = copy_of(run, tmp_path / "copy", files("clip"))
    words = ["--clip.save_every=1", "--clip.recompute=true"]
    assert "clip" not in begin("--out", copy, "--resume", *words).done


def test_stages_of_an_evaluation_that_no_longer_fit_are_named(run, tmp_path, capsys, begin):
    copy = copy_of(run, tmp_path / "copy")
    config = settings_of(run)
    for name in ("judge", "glide"):
        base = load_checkpoint(run / f"{configs.VARIANTS[name]}.pt")
        of_variant = {"stage": name, "config": overrides.to_dict(variant(config, name))}
        save_checkpoint(base | of_variant, copy / f"{name}.pt")
    begin("--out", copy, "--resume", "--prior.steps=5")
    assert "note" not in capsys.readouterr().out
    begin("--out", copy, "--resume", "--decoder.steps=5")
    assert "note: glide no longer belong to this run; an evaluation" in capsys.readouterr().out


# ---------------------------------------------------------------------------- a folder of pictures

@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A run that has learned the tokenizer of a folder of pictures, and no more."""
    pictures, folder = (tmp_path_factory.mktemp("own") / name for name in ("pictures", "run"))
    pictures.mkdir()
    for i, item in zip(range(4), CaptionedShapes("train", 16)):
        to_pil(item["image"]).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(item["text"])
    words = [*SMALL, "--data", str(pictures), "--stage=tokenizer", f"--out={folder}"]
    assert train.main(words) == 0
    return folder


@pytest.mark.parametrize("word, said", [
    ("--data.seed=1", "learned from the pictures of --data.seed=0"),
    ("--data.val_images=9", "keep --data.val_images=8")])
def test_training_pictures_never_become_validation_pictures(own, capsys, word, said):
    before = contents(own)
    code, _, error = call(capsys, "--out", own, "--resume", word)
    assert code == 2 and said in error and contents(own) == before
    assert error.endswith("choose another folder with --out")


def test_fewer_validation_pictures_are_among_those_before(own, tmp_path, begin):
    copy = copy_of(own, tmp_path / "copy")
    opened = begin("--out", copy, "--resume", "--data.val_images=7", "--data.near_misses=false")
    assert opened.config.data.val_images == 7


def test_what_nothing_has_learned_from_may_change(own, tmp_path, begin):
    copy = copy_of(own, tmp_path / "copy", ["tokenizer.json"])
    opened = begin("--out", copy, "--resume", "--data.seed=1", "--data.val_images=9")
    assert (opened.config.data.seed, opened.config.data.val_images) == (1, 9)


# ---------------------------------------------------------------------------- --from

def test_from_may_have_other_data_but_not_the_validation_pictures(run, own, tmp_path, begin):
    """Of shapes each seed draws new ones. Of the same folder another seed spares other pictures."""
    box, source = tmp_path / "box", settings_of(own).data.source
    opened = begin("--from", run, "--out", tmp_path / "new", "--data.seed=1", "--data.images=50")
    assert opened.config.data.seed == 1
    box.mkdir()
    for name in configs.MODELS:
        checkpoint = load_checkpoint(run / f"{name}.pt")
        checkpoint["config"]["data"]["source"] = source
        save_checkpoint(checkpoint, box / f"{name}.pt")
    for word in ("--data.seed=1", "--data.val_images=9"):
        with pytest.raises(ValueError, match="keep .*, or leave out --from"):
            begin("--from", box, "--out", tmp_path / "other", word)
    shutil.copytree(source, tmp_path / "elsewhere")
    words = ["--from", box, "--out", tmp_path / "other", "--data.seed=1"]
    assert begin(*words, "--data", tmp_path / "elsewhere").config.data.seed == 1


@pytest.mark.parametrize("words, said", [
    (["--stage=clip"], f"{ON_CLIP} of"), (["--stage=sketch"], "decoder of"),
    (["--stage=decoder", "--clip.steps=9"], "--stage decoder does not train the clip"),
    (["--stage=prior", "--sketch.steps=9"], "leave out --sketch.steps=9")])
def test_from_leaves_no_stage_behind(run, tmp_path, capsys, words, said):
    code, _, error = call(capsys, "--from", run, "--out", tmp_path / "new", *words)
    assert code == 2 and said in error and not (tmp_path / "new").exists()


def test_a_run_from_another_takes_more_clip_while_it_is_the_first(run, tmp_path, begin):
    """Ctrl-C after CLIP: the others are copies, which have learned nothing of this CLIP yet."""
    new = begin("--from", run, "--out", tmp_path / "new").folder
    clip = load_checkpoint(run / "clip.resume.pt")
    for name in ("clip.pt", "clip.resume.pt"):
        save_checkpoint(clip, new / name)
    opened = begin("--out", new, "--resume", "--clip.steps=6")
    assert opened.done == ["tokenizer"]
