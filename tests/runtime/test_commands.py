"""Commands: a misspelled option is told the closest, and advice names what works in that state."""

import shlex

import pytest

from mini_dalle2.runtime.commands import (
    Parser,
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
