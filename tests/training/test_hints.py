"""hints.py: every command that train.py prints works as printed, in the state it is printed in."""

import shlex
import shutil

import pytest
import torch

import sample
import train
from conftest import SMALL
from mini_dalle2 import DALLE2, configs
from mini_dalle2.runtime.files import load_checkpoint, read_json, signature, write_json
from mini_dalle2.training import guards, hints, overrides
from mini_dalle2.training.run import Run
from calls import call, copy_of, printed

LONG = "a very long caption about a red circle that stands above a blue square, and much more"


@pytest.fixture
def begin(monkeypatch):
    """A function that opens the run of a command line, as train.py does before its first step.

    A command that is refused is refused here. Whether sizes work takes long, and is left out.
    """
    monkeypatch.setattr(guards, "check_one_step", lambda *_: None)
    return lambda *words: Run.open(train.parse([str(word) for word in words]), torch.device("cpu"))


def opened(folder, names=(), captions=None, device="cpu", resume=True):
    """A finished run, opened as Run.open leaves it; perhaps with these captions of its own."""
    config = overrides.from_dict(read_json(folder / "config.json"))
    run = Run(config, folder, torch.device(device), resume, names)
    if captions:
        run.config = overrides.override(config, ["--data.source=elsewhere"])
        run.pictures.captions = lambda: captions
    return run


# ---------------------------------------------------------------------------- the next command

@pytest.mark.parametrize("captions, expected", [
    ([LONG, "a red ring"], "a red ring"),
    ([LONG], "a very long"),
    (["-5 degrees", "a red ring"], "a red ring"),
    (["--n 3 rings"], "n 3 rings"),
    (["x" * 200], "xxxx"),
    (["a \ufffd", "a red ring"], "a red ring"),
    (["\ufffd" * 3], "a picture")])
def test_the_caption_in_the_next_command_is_taken(run, capsys, captions, expected):
    prepared = opened(run, captions=captions)
    words = printed(hints.next_step(prepared))
    assert words[:1] == ["text"] and words[2:] == ["--run", str(run)]
    assert words[1].startswith(expected)
    assert words[1] == expected or captions[0].startswith(words[1])
    # As sample.py reads it.
    args = sample.parse(words)
    model = load_checkpoint(run / "decoder.pt")["model_config"]
    length = model["context_length"]
    assert len(prepared.tokenizer().tokenize([words[1]], length)[0]) == length
    assert args.captions == [words[1]]


def test_the_next_command_draws_after_long_captions(run, tmp_path, capsys):
    words = printed(hints.next_step(opened(run, captions=[LONG * 3])))
    assert sample.main([*words, "--n=1", "--stage=base", f"--out={tmp_path / 'x.png'}"]) == 0
    assert (tmp_path / "x.png").is_file()


def test_the_next_command_trains_all_that_is_missing(run, tmp_path, begin):
    both = ("upsampler1", "upsampler2")
    gone = [f"{name}{end}" for name in both for end in (".pt", ".resume.pt")]
    copy = copy_of(run, tmp_path / "a run", gone)
    told = hints.next_step(opened(copy, ["decoder"]))
    assert told == f"python train.py --out '{copy}' --resume"
    again = begin(*printed(told))
    assert [name for name in again.names if name not in again.done] == list(both)


def test_a_stage_that_is_only_begun_comes_next(run, tmp_path):
    """It has files, but sample.py would have to warn about it."""
    copy = copy_of(run, tmp_path / "copy", ["config.json"])
    saved = read_json(run / "config.json")
    saved["decoder"]["train"]["steps"] = 9
    write_json(saved, copy / "config.json")
    assert hints.next_step(opened(copy, ["upsampler2"])) == f"python train.py --out {copy} --resume"


def test_what_a_new_clip_made_stale_is_named(run, tmp_path, capsys):
    """A CLIP that is learned again on another machine differs a little. The printed way works."""
    copy = copy_of(run, tmp_path / "copy", ["clip.pt"])
    clip = load_checkpoint(run / "clip.pt")
    clip["ema"] = {name: value * 1.0001 for name, value in clip["ema"].items()}
    torch.save(clip | {"clip_signature": signature(clip["ema"])}, copy / "clip.pt")
    told = f"next: {hints.next_step(opened(copy, ['clip']))}"
    assert told.startswith(f"next: {copy}/prior.pt, {copy}/ar_prior.pt, ")
    assert "were trained on the embeddings of another CLIP: delete prior.pt, prior.resume.pt" in told
    for name in configs.ON_CLIP:
        for end in (".pt", ".resume.pt"):
            assert f"{name}{end}" in told
            (copy / f"{name}{end}").unlink()
    assert printed(told) == ["--out", str(copy), "--resume"]
    code, out, error = call(capsys, *printed(told))
    assert code == 0, error
    assert out.count("was finished before") == 4 and DALLE2.load(copy)


# ---------------------------------------------------------------------------- messages of train.py

def test_the_stage_to_run_first_is_that_of_this_command(tmp_path, capsys, begin):
    """In an empty folder: the same settings, with another stage. Then the command itself works."""
    asked = [*SMALL, "--stage", "clip", f"--out={tmp_path / 'it is new'}"]
    code, _, error = call(capsys, *asked)
    assert code == 2 and "tokenizer.json is missing: run `python train.py" in error
    words = printed(error)
    assert words == [*SMALL, f"--out={tmp_path / 'it is new'}", "--stage", "tokenizer"]
    assert call(capsys, *words)[0] == 0
    assert begin(*asked).names == ["clip"]


def test_an_unfinished_clip_is_finished_by_the_printed_command(run, tmp_path, begin):
    """`--stage prior` on a CLIP that was interrupted."""
    gone = [f"{name}{end}" for name in configs.ON_CLIP for end in (".pt", ".resume.pt")]
    copy = copy_of(run, tmp_path / "a copy", [*gone, "clip.pt", "clip.resume.pt"])
    for name in ("clip.pt", "clip.resume.pt"):
        torch.save(load_checkpoint(run / name) | {"step": 2}, copy / name)
    with pytest.raises(ValueError, match="clip.pt has 2 of 3 steps") as refused:
        begin("--out", copy, "--stage=prior")
    again = begin(*printed(str(refused.value)))
    assert again.names == ["clip"] and again.done == [] and again.resume


def test_nothing_to_resume_names_the_run_that_is_there(run, tmp_path, capsys, begin):
    copy_of(run, tmp_path / "mine")
    code, _, error = call(capsys, "--out", tmp_path / "other", "--resume")
    assert code == 2 and "there is nothing to resume in" in error
    assert printed(error) == ["--out", str(tmp_path / "mine"), "--resume"]
    assert begin(*printed(error)).folder == tmp_path / "mine"
    shutil.rmtree(tmp_path / "mine")
    code, _, error = call(capsys, "--out", tmp_path / "other", "--resume")
    assert code == 2 and error.endswith("leave out --resume to begin a run")


def test_from_and_resume_together_after_ctrl_c(run, tmp_path, capsys, begin):
    """The same command with --resume is what people try: --from has done its work by then."""
    copy = copy_of(run, tmp_path / "copy")
    code, _, error = call(capsys, "--from", run, "--out", copy, "--resume")
    assert code == 2 and error.endswith("has taken over the weights already: leave out --from")
    assert begin("--out", copy, "--resume").folder == copy


def test_sizes_come_before_resume(run, capsys):
    """To data or sizes that a run does not have, "add --resume" is no remedy."""
    for words in (["--data=elsewhere"], ["--clip.text_width=64"]):
        code, _, error = call(capsys, "--out", run, *words)
        assert code == 2 and "choose another folder with --out" in error
        assert "--resume" not in error


def test_habits_change_by_the_printed_command(run, tmp_path, capsys):
    copy = copy_of(run, tmp_path / "copy")
    code, _, error = call(capsys, "--out", copy, "--decoder.caption_drop=0.2")
    # That this works is tested in test_train.py.
    assert code == 2 and error.endswith("with --resume --decoder.steps=6 say")


def test_a_lower_rate_goes_on(run):
    prepared = opened(run, ["prior"])
    words = printed(hints.lower_rate(prepared, "prior"))
    assert words == ["--out", str(run), "--resume", "--prior.lr=3.3e-04"]
    # A variant takes its rate from the run, which has been trained with it.
    told = hints.lower_rate(prepared, "judge")
    assert "begin a new run" in told and "--clip.lr=3.3e-04" in told and "--resume" not in told


def test_captions_that_are_cut_get_a_hint_that_works(run, tmp_path, capsys):
    """Sizes of a run, and of --from, cannot change: only a new run keeps all."""
    prepared = opened(run)
    longest = len(prepared.tokenizer().encode(LONG)) + 2
    prepared.tokens([LONG, "a red ring"])
    told = capsys.readouterr().out
    assert "1 captions have more than 32 tokens and lose their end" in told
    hint = f"--clip.context_length={longest}"
    assert told.strip().endswith(f"only a new run, not --from, can keep all, with {hint}")
    assert call(capsys, "--from", run, "--out", tmp_path / "new", hint)[0] == 2
    # What is kept is all, and not a token more.
    longer = prepared.tokenizer().tokenize([LONG], longest)
    assert longer.shape[1] == longest
    with pytest.raises(ValueError):
        prepared.tokenizer().tokenize([LONG], longest - 1)


def test_the_device_is_named_where_it_would_be_another(run, monkeypatch):
    folder = run.parent / "it's new"
    assert hints.go_on(folder, torch.device("cpu"), "clip").endswith(" --stage clip --resume")
    monkeypatch.setattr(hints, "pick_device", lambda: torch.device("cuda"))
    words = shlex.split(hints.go_on(folder, torch.device("cpu")))
    assert words == ["python", "train.py", "--out", str(folder), "--device", "cpu", "--resume"]


def test_a_folder_that_looks_like_an_option():
    assert hints.word("-x") == "./-x" and hints.word("a b") == "'a b'"


@pytest.mark.parametrize("name, told", [
    ("clip", "--clip.batch_size=8"), ("decoder", "--decoder.accumulate=2"),
    ("judge", "--resume")])
def test_less_memory(run, name, told):
    """CLIP's batch cannot be computed in parts; a variant follows its run."""
    assert hints.less_memory(opened(run), name).endswith(f" {told}")


@pytest.mark.parametrize("name, weights, told", [
    ("decoder", False, "--data.images"), ("judge", False, "--data.images"),
    ("upsampler2", False, "--data.upsampler2_images"), ("decoder", True, "--preset")])
def test_what_to_make_smaller(name, weights, told):
    assert hints.smaller(name, weights).endswith(told)
