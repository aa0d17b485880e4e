"""sample.py: each verb writes its grid, and each mistake is one sentence."""

import shlex
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

# The scripts at the top level.
import sample
import train
from mini_dalle2 import DALLE2
from mini_dalle2.data.tables import Pictures
from mini_dalle2.data.words import read_words, words_in
from mini_dalle2.prior import DiffusionPrior
from mini_dalle2.runtime.files import load_checkpoint, read_json, save_checkpoint
from mini_dalle2.training import overrides
from pictures import CAPTIONS, half_mask, pixels, val_picture


def command(capsys, *arguments):
    """The exit code, and what sample.py itself wrote to standard error."""
    code = sample.main([str(a) for a in arguments])
    return code, [
        line for line in capsys.readouterr().err.splitlines() if line.startswith("sample.py")
    ]


def test_command_writes_a_grid_and_singles(run, tmp_path, capsys):
    code, errors = command(
        capsys,
        "text",
        *CAPTIONS[:2],
        "--run",
        run,
        "--n",
        2,
        "--out",
        tmp_path / "grid.png",
        "--singles",
    )
    assert (code, errors) == (0, [])
    singles = [f"grid-{i}-{j}.png" for i in (1, 2) for j in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*singles, "grid.png"]
    with Image.open(tmp_path / "grid-2-1.png") as image:
        assert image.size == (64, 64)


VERBS = [
    ["variations", "a.png", "--n=2"],
    ["interpolate", "a.png", "b.png", "--n=3"],
    ["interpolate", "a.png", "b.png", "--fixed-noise"],
    ["textdiff", "a.png", "a red circle", "a blue circle", "--theta", "0", "0.3"],
    ["inpaint", "a.png", "mask.png", "two cyan rings"],
    ["reconstruct", "a.png"],
    ["reconstruct", "a.png", "--components", "1", "3"],
    ["classify", "a.png", *CAPTIONS],
    ["text", CAPTIONS[0], "--prior=ar", "--n=1", "--rerank=3"],
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working folder, with pictures and masks to be named."""
    monkeypatch.chdir(tmp_path)
    picture = val_picture(1)
    picture.save("a.png")
    val_picture(2).save("b.png")
    half_mask().save("mask.png")
    half_mask(32).save("small.png")
    picture.resize((90, 50)).save("wide.jpg")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    return tmp_path


@pytest.mark.parametrize("arguments", VERBS, ids=" ".join)
def test_each_verb_writes_one_labelled_grid(run, folder, capsys, arguments):
    assert sample.main([*arguments, "--run", str(run), "--out", "grid.png"]) == 0
    said = capsys.readouterr().out
    assert "grid.png" in said and "note" not in said
    with Image.open("grid.png") as grid:
        assert grid.width > 64 and grid.height > 64


def test_pictures_of_another_size_are_fitted_and_the_person_told(run, folder, capsys):
    assert (
        sample.main(
            ["variations", "wide.jpg", "--n=1", "--run", str(run), "--out", "grid.png", "--singles"]
        )
        == 0
    )
    assert (
        "wide.jpg has 90 x 50 pixels; its central square is taken at 64 x 64"
        in capsys.readouterr().out
    )
    with Image.open("grid-1-1.png") as drawn:
        assert drawn.size == (64, 64)
    assert (
        sample.main(
            ["variations", "a.png", "--n=2", "--run", str(run), "--out", "grid.png", "--stage=base"]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "taken at 16 x 16" in said and "2 pictures of 16 pixels" in said


@pytest.mark.parametrize(
    "arguments",
    [
        ["variations", "a.png", "--n=1"],
        ["inpaint", "a.png", "mask.png", "two cyan rings", "--n=1"],
        ["interpolate", "a.png", "b.png", "--n=2"],
        ["text", "a red circle", "--n=1"],
        ["textdiff", "a.png", "a red circle", "a blue circle", "--theta", "0.3"],
    ],
    ids=lambda a: a[0],
)
def test_each_verb_obeys_its_seed(run, folder, arguments):
    drawn = []
    for i, seed in enumerate((1, 1, 2)):
        assert (
            sample.main(
                [
                    *arguments,
                    "--run",
                    str(run),
                    "--out",
                    f"{i}.png",
                    "--singles",
                    "--seed",
                    str(seed),
                ]
            )
            == 0
        )
        with Image.open(f"{i}-1-1.png") as image:
            drawn.append(pixels(image.convert("RGB")))
    assert np.array_equal(drawn[0], drawn[1]) and not np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["variations", "nowhere.png"], "there is no picture nowhere.png"),
        (["variations", "broken.png"], "broken.png cannot be read"),
        (
            ["inpaint", "a.png", "small.png", "two cyan rings"],
            "the mask has 32 x 32 pixels, the image 64 x 64",
        ),
        (["inpaint", "a.png", "nowhere.png", "two cyan rings"], "there is no picture nowhere.png"),
        (["classify", "a.png"], "CAPTION"),
        (["variations", "a.png", "--eta=2"], "--eta 2"),
        (["interpolate", "a.png", "b.png", "--n=1"], "at least two"),
        (["textdiff", "a.png", "a red circle", "a blue circle", "--theta", "3"], "theta"),
        (["textdiff", "a.png", "a red circle"], "TARGET"),
        (["reconstruct", "a.png", "--components", "1000"], "components"),
        (["text", "a circle", "--rerank=2"], "rerank"),
        (["text", "a circle", "--rerank=1001"], "--rerank 1001"),
        (["text", "a circle", "--rerank=0"], "--rerank 0"),
        (["text", "a circle", "--prior=none"], "prior"),
    ],
)
def test_mistakes_with_pictures_are_one_sentence(run, folder, capsys, arguments, said):
    before = sorted(path.name for path in folder.iterdir())
    code, errors = command(capsys, *arguments, "--run", run, "--out", "grid.png")
    assert code == 2 and len(errors) == 1 and said in errors[0]
    assert sorted(path.name for path in folder.iterdir()) == before


def test_a_picture_given_is_not_written_over(run, folder, capsys):
    before = (folder / "mask.png").read_bytes()
    code, errors = command(
        capsys,
        "inpaint",
        "a.png",
        "mask.png",
        "a circle",
        "--run",
        run,
        "--out",
        folder / "mask.png",
    )
    assert code == 2
    assert "would overwrite the input picture" in errors[0]
    assert (folder / "mask.png").read_bytes() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["text", "", "--out", "x.png"],
        ["text", "a circle", "--out", "x.gif"],
        ["text", "a circle", "--n", "0"],
        ["text", "a circle", "--n", "two"],
        ["text"],
        ["paint", "a circle"],
        ["text", "a circle", "--colour", "red"],
        ["text", "word " * 200],
    ],
)
def test_mistakes_are_one_sentence_and_exit_code_2(run, tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, errors = command(capsys, *arguments, *(["--run", run] if len(arguments) > 1 else []))
    assert code == 2 and len(errors) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--n=0"], "--n 0"),
        (["--sketches=0"], "--sketches 0"),
        (["--n=-3"], "--n -3"),
        (["--n=1000000000"], "from 1 to 1000"),
        (["--seed=-1"], "--seed -1"),
        (["--seed=9223372036854775808"], "--seed 9223372036854775808"),
        (["--seed=1.5"], "invalid int"),
        (["--steps=0"], "sampling steps"),
        (["--guidance=-1"], "guidance"),
        (["--out=nowhere/x.png"], "there is no folder nowhere"),
        (["--out=x.tiff"], "written as .png"),
        (["--out=x"], "written as .png"),
        (["--out=folder.png"], "is a folder"),
        (["--out=file/x.png"], "there is no folder file"),
        (["--out=/proc/x.png"], "/proc"),
        (["--out=" + "x" * 300 + ".png"], "cannot be written"),
    ],
)
def test_mistakes_are_found_before_anything_is_drawn(
    run, tmp_path, capsys, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").touch()
    monkeypatch.setattr(
        DiffusionPrior, "sample", lambda *_, **__: pytest.fail("it was drawing already")
    )
    before = sorted(run.iterdir())
    code, errors = command(capsys, "text", "a circle", "--run", run, *arguments)
    assert code == 2 and len(errors) == 1 and said in errors[0]
    assert sorted(run.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.png"]


def out_of_gpu_memory():
    raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize(
    "failure", [lambda: torch.empty(2**55), lambda: bytearray(2**55), out_of_gpu_memory]
)
def test_too_little_memory_is_one_sentence(run, tmp_path, capsys, monkeypatch, failure):
    monkeypatch.setattr(DALLE2, "base", lambda *_, **__: failure())
    code, errors = command(capsys, "text", "a circle", "--run", run, "--out", tmp_path / "x.png")
    assert code == 2 and len(errors) == 1 and "--n" in errors[0] and "--stage base" in errors[0]
    assert not list(tmp_path.iterdir())


def test_other_failures_are_not_hidden(run, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(DALLE2, "base", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        sample.main(["text", "a circle", "--run", str(run), "--out", str(tmp_path / "x.png")])


def test_no_run_is_one_sentence_too(tmp_path, capsys):
    code, errors = command(capsys, "text", "a circle", "--run", tmp_path / "nowhere")
    assert code == 2 and len(errors) == 1 and "train.py" in errors[0]


# ------------------------------------------------------------------------------ sheets and notes


def test_sheets_go_into_a_folder_and_never_over_one_another(run, folder, monkeypatch):
    monkeypatch.setattr(sample, "default_run", lambda: run)
    monkeypatch.setattr(sample, "results_folder", lambda _: folder)
    for arguments in (["text", "a red circle"], ["text", "two cyan rings", "--singles"]):
        assert sample.main([*arguments, "--n=1", "--stage=base"]) == 0
    assert sample.main(["variations", "a.png", "--n=1", "--stage=base"]) == 0
    assert sorted(path.name for path in (folder / "samples").iterdir()) == (
        ["text-001.png", "text-002-1-1.png", "text-002.png", "variations-001.png"]
    )


def test_the_sheet_of_a_run_lies_in_the_run(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    assert sample.main(["text", "a red circle", "--n=1", "--stage=base", f"--run={folder}"]) == 0
    assert str(folder / "samples" / "text-001.png") in capsys.readouterr().out
    (folder / "samples" / "text-001.png").unlink()
    (folder / "samples").rmdir()
    (folder / "samples").touch()
    code, errors = command(capsys, "text", "a red circle", "--run", folder)
    assert code == 2 and "samples is not a folder: name another file with --out" in errors[0]


def cell(path, column, side=128):
    """A picture of a sheet of small pictures, which are enlarged to 128 pixels."""
    left = 8 + column * (side + 8)
    return np.asarray(Image.open(path).convert("RGB"))[8 : 8 + side, left : left + side]


@pytest.mark.parametrize("mark", ["white", "transparent"])
@pytest.mark.parametrize("stage, side", [("base", 16), ("full", 64)])
def test_the_mask_on_the_sheet_is_the_one_that_was_used(
    run, folder, capsys, monkeypatch, mark, stage, side
):
    used = {}

    def spy(model, *args, known=None, upsample=DALLE2.upsample, **rest):
        """What the result keeps at each size: the models see the same masks."""
        images = upsample(model, *args, known=known, **rest)
        used.update({batch.shape[-1]: known(batch.shape[-1])[1] for batch in images.values()})
        return images

    monkeypatch.setattr(DALLE2, "upsample", lambda model, base, seeds, stage, progress, known: (
        spy(model, base, seeds, stage, progress, known=known)))
    mask = Image.new("L", (64, 64))
    # An edge that lies on no coarse grid.
    mask.paste(255, (0, 0, 29, 64))
    if mark == "transparent":
        given = val_picture(1).convert("RGBA")
        given.putalpha(mask.point(lambda value: 255 - value))
        mask = given
    mask.save("hole.png")
    arguments = ["inpaint", "a.png", "hole.png", "two cyan rings", "--n=1", f"--stage={stage}"]
    assert sample.main([*arguments, "--run", str(run), "--out", "grid.png"]) == 0
    assert f"hole.png: something new where it is {mark}" in capsys.readouterr().out
    factor = 128 // side
    shown = cell("grid.png", 1)[::factor, ::factor] / 255
    assert np.array_equal(shown, used[side][0].expand(3, -1, -1).permute(1, 2, 0))
    # Outside the mask, the result is the given picture.
    given, result = (cell("grid.png", i)[::factor, ::factor] for i in (0, 2))
    assert np.array_equal(given[shown == 0], result[shown == 0])
    assert not np.array_equal(given[shown == 1], result[shown == 1])


def notes(capsys, *arguments):
    """What sample.py notes on standard error, with exit code 0."""
    capsys.readouterr()
    assert sample.main([*map(str, arguments), "--stage=base", "--out=grid.png"]) == 0
    lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
    return [line for line in lines if line.startswith("note: ")]


def test_words_that_the_captions_did_not_have_are_named(run, folder, capsys):
    own = shutil.copytree(run, folder / "run")
    (own / "words.txt").write_text("a\nred\ncircle\n")
    strange, known = notes(capsys, "text", "a red cat", "--n=1", "--run=run")
    assert strange == ('note: "a red cat": no training caption had "cat", so the pictures cannot '
                       'show this')
    assert known == "note: the training captions had these words: a, circle, red"
    strange, _ = notes(capsys, "textdiff", "a.png", "a circle", "a dog", "--theta=0", "--run=run")
    assert '"dog"' in strange
    assert notes(capsys, "text", "a red circle", "--n=1", "--run=run") == []
    # A run from before there was such a file.
    (own / "words.txt").unlink()
    assert notes(capsys, "text", "a red cat", "--n=1", "--run=run") == []
    (note,) = notes(capsys, "text", "a", "red", "cat", "--n=1", "--run=run")
    assert 'stands in quotes, as in "a red cat"' in note


def test_notes_come_before_the_pictures_and_bars_only_in_a_terminal(
        run, folder, capsys, monkeypatch):
    own = shutil.copytree(run, folder / "run")
    (own / "words.txt").write_text("a\nred\ncircle\n")
    seen = []

    def spy(model, *args, progress, **rest):
        seen.append((progress, capsys.readouterr().err))
        raise ValueError("enough")

    monkeypatch.setattr(DALLE2, "text_to_image", spy)
    for is_terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
        assert sample.main(["text", "a red cat", "--run=run"]) == 2
    assert [progress for progress, _ in seen] == [False, True]
    assert all('"a red cat": no training caption had "cat"' in said for _, said in seen)


def test_a_sheet_is_not_taken_for_one_picture(run, folder, capsys):
    base = ["--n=2", "--stage=base", f"--run={run}"]
    assert sample.main(["text", "a red circle", *base, "--singles", "--out=sheet.png"]) == 0
    code, errors = command(capsys, "variations", "sheet.png", *base, "--out=out.png")
    assert code == 2 and errors[-1] == (
        "sample.py: sheet.png is a sheet of pictures with captions: give a single picture; "
        "sample.py --singles writes each picture to a file of its own")
    assert sample.main(["variations", "sheet-1-2.png", *base, "--out=out.png"]) == 0
    # What training shows of a stage is a sheet, too.
    code, errors = command(capsys, "variations", run / "decoder.png", *base, "--out=out2.png")
    assert code == 2 and "is a sheet of pictures" in errors[-1]


def test_a_run_keeps_the_words_of_its_own_captions(run):
    config = overrides.from_dict(read_json(run / "config.json"))
    captions = Pictures(config.data, torch.device("cpu"), run).captions()
    assert read_words(run) == {word for caption in captions for word in words_in(caption)}


def test_a_caption_that_is_too_long_says_so_and_names_the_words(capsys, tmp_path):
    code, errors = command(capsys, "text", "a magenta pentagon", "--out", tmp_path / "x.png")
    assert code == 2 and not list(tmp_path.iterdir())
    assert errors == [
        "sample.py: caption 'a magenta pentagon' is too long: it takes 18 tokens with start and "
        "end, and the model reads 16: use a shorter caption; unknown and rare words take many "
        "tokens: 'magenta' 7, 'pentagon' 8"
    ]


# ------------------------------------------------------------------------------ what to do next


def test_after_an_interruption_the_command_that_is_named_works(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "my run")
    for name in ("decoder", "upsampler1", "upsampler2", "prior"):
        (folder / f"{name}.pt").unlink()
        (folder / f"{name}.resume.pt").unlink()
        code, errors = command(capsys, "text", "a red circle", "--run", folder)
        assert code == 2 and len(errors) == 1 and " has no " in errors[0]
        words = shlex.split(errors[0].split("`")[1])
        assert words == ["python", "train.py", "--out", str(folder), "--resume"]
    # The same command trains whatever is missing. The upsamplers would only take longer.
    for name in ("upsampler1", "upsampler2"):
        shutil.copy(run / f"{name}.pt", folder)
    assert train.main([*words[2:], "--device=cpu"]) == 0
    assert sample.main(["text", "a red circle", "--n=1", "--stage=base", f"--run={folder}"]) == 0


def test_weights_without_their_run_are_copied_again(run, tmp_path, capsys):
    for name in ("clip.pt", "decoder.pt"):
        shutil.copy(run / name, tmp_path / name)
    code, errors = command(capsys, "text", "a red circle", "--run", tmp_path)
    assert code == 2 and "has no prior.pt: copy this file once more" in errors[0]
    assert "train.py" not in errors[0]


def test_a_stage_of_another_clip_is_trained_again_as_it_is_said(run, tmp_path, capsys):
    folder = shutil.copytree(run, tmp_path / "run")
    prior = load_checkpoint(folder / "prior.pt")
    save_checkpoint(prior | {"clip_signature": "0" * 16}, folder / "prior.pt")
    code, errors = command(capsys, "text", "a red circle", "--run", folder)
    assert code == 2 and "another CLIP" in errors[0]
    assert f"delete prior.pt, prior.resume.pt in {folder}, and go on with `python" in errors[0]
    # test_after_an_interruption follows the rest of this advice.
