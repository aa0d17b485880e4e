"""Commands: a misspelled option is told the closest, advice names what works in that state, and what
cannot be printed never ends the work."""

import os
import shlex
import subprocess
import sys

import pytest

import train
from conftest import ROOT, SMALL
from mini_dalle2.runtime.commands import (
    Parser,
    Patient,
    how_to_begin,
    how_to_finish,
    how_to_train_again,
    train_command,
)


@pytest.fixture
def parser():
    parser = Parser(prog="x")
    verbs = parser.add_subparsers(dest="verb", parser_class=Parser)
    one = verbs.add_parser("one")
    one.add_argument("caption")
    one.add_argument("--guidance", type=float)
    verbs.add_parser("two").add_argument("--guide")
    return parser


@pytest.mark.parametrize(
    "line, said",
    [
        ("one a --guidence 3", "no option --guidence; the closest is --guidance"),
        ("one a --guidence=3", "no option --guidence; the closest is --guidance"),
        ("two --guides 3", "no option --guides; the closest is --guide"),
        ("one a --zzz", "no option --zzz; --help shows all options"),
        ("one a red circle", '"red" is one word too many: words that belong together stand in quotes'),
    ],
)
def test_what_is_not_understood_is_named(parser, line, said):
    with pytest.raises(ValueError, match=said):
        parser.parse_args(line.split())


def test_what_is_understood_passes(parser):
    args = parser.parse_args(["one", "a red circle", "--guidance=3"])
    assert vars(args) == {"verb": "one", "caption": "a red circle", "guidance": 3.0}
    assert Parser(prog="y").parse_args([]) is not None


def test_commands_take_any_folder():
    command = train_command("my runs/it's", "--stage", "judge", resume=True)
    assert shlex.split(command.strip("`")) == (
        ["python", "train.py", "--stage", "judge", "--out", "my runs/it's", "--resume"]
    )


def test_advice_follows_what_is_there(tmp_path):
    assert how_to_begin(tmp_path / "new") == f"train one with {train_command(tmp_path / 'new')}"
    (tmp_path / "file").touch()
    assert "this is a file" in how_to_begin(tmp_path / "file")
    # Weights without a run: train.py cannot go on with these.
    assert "train.py" not in how_to_finish(tmp_path) + how_to_train_again(tmp_path, "prior")
    (tmp_path / "config.json").touch()
    assert how_to_finish(tmp_path) == f"go on with {train_command(tmp_path, resume=True)}"
    assert how_to_train_again(tmp_path, "prior") == (
        f"delete prior.pt, prior.resume.pt in {tmp_path}, and "
        f"go on with {train_command(tmp_path, resume=True)}"
    )


# ------------------------------------------------------------------------------ output that fails

# A command that prints, warns, shows a progress bar and makes a file.
WORK = """
import sys, warnings
from pathlib import Path
from types import SimpleNamespace
from tqdm import tqdm
from mini_dalle2.runtime.commands import run_command

def work(args, device):
    for i in tqdm(range(3)):
        print("caf\\u00e9 \\u592a " + "\\udce9" * 3, flush=True)
        print("x" * 100_000)
    warnings.warn("caf\\u00e9")
    Path(sys.argv[1]).write_text(str(sys.stdout.isatty()))

sys.exit(run_command("x", lambda argv: SimpleNamespace(device="cpu"), work))
"""


def run_work(path, redirect, **environment):
    """Run WORK in a shell, with its output sent elsewhere: (exit code, standard error)."""
    command = f'"$0" -c "$1" "$2" {redirect}'
    process = subprocess.run(["sh", "-c", command, sys.executable, WORK, str(path)], cwd=ROOT,
                             capture_output=True, env=os.environ | environment)
    return process.returncode, process.stderr.decode()


@pytest.mark.parametrize("redirect", [
    ">/dev/full", ">/dev/full 2>&1", ">&-", ">&- 2>&-", "<&- >&- 2>&-", "| true", "2>&1 | true"])
def test_output_that_is_full_closed_or_gone(tmp_path, redirect):
    code, said = run_work(tmp_path / "done", redirect)
    assert code == 0 and (tmp_path / "done").read_text() == "False"
    assert "Traceback" not in said and "Exception ignored" not in said


def test_letters_that_the_encoding_lacks(tmp_path):
    process = subprocess.run([sys.executable, "-c", WORK, str(tmp_path / "done")], cwd=ROOT,
                             capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0 and (tmp_path / "done").exists()
    assert process.stdout.startswith(b"caf\\xe9 \\u592a \\udce9\\udce9\\udce9\n")


class Failing:
    """A stream that fails in every way."""

    def __init__(self, error):
        self.error = error

    def write(self, text):
        raise self.error

    def flush(self):
        raise self.error

    isatty = flush


@pytest.mark.parametrize("stream", [
    None, Failing(OSError(5, "Input/output error")), Failing(ValueError("closed file")),
    Failing(BrokenPipeError())])
def test_a_stream_that_fails(stream):
    patient = Patient(stream)
    print("x", file=patient, flush=True)
    assert patient.isatty() is False


def test_a_training_whose_output_is_full_goes_on(tmp_path):
    with open("/dev/full", "w") as full, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", full)
        patch.setattr(sys, "stderr", full)
        code = train.main([*SMALL, "--stage=tokenizer", "--out", str(tmp_path / "run")])
    assert code == 0 and (tmp_path / "run" / "tokenizer.json").is_file()
