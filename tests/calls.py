"""What several tests of train.py share: calling it, a copy of a run, a command in a message."""

import os
import shlex

import train


def call(capsys, *words):
    """Run train.py: (exit code, standard output, the last line of standard error)."""
    capsys.readouterr()
    code = train.main([str(word) for word in words])
    out, error = capsys.readouterr()
    return code, out, (error.strip().splitlines() or [""])[-1]


def printed(text):
    """The words of the command in a message: in backticks, or from its last "python" on."""
    if "`" in text:
        return shlex.split(text.split("`")[1])[2:]
    return shlex.split(text[text.rindex("python "):])[2:]


def copy_of(run, folder, without=()):
    """A copy of a run folder, by links, without some files."""
    folder.mkdir()
    for path in run.iterdir():
        if path.name not in without:
            os.link(path, folder / path.name)
    return folder
