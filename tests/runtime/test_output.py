"""commands.py: what cannot be printed never ends the work."""

import os
import subprocess
import sys

import pytest

import train
from conftest import ROOT, SMALL
from mini_dalle2.runtime.commands import Patient

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
