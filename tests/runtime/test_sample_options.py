"""The command line of sample.py: what people type at first, and what is said to it."""

import shlex

import pytest

import sample
from mini_dalle2.data.shapes import COLOURS, SHAPES
from mini_dalle2.runtime.sample_options import captions_of, check_verb, quotes_notes


@pytest.mark.parametrize(
    "line, meant",
    [
        ('"a red circle"', 'text "a red circle"'),
        ('"a red circle" --n 2 --stage=base', 'text "a red circle" --n 2 --stage=base'),
        ("a red circle --n 2", 'text "a red circle" --n 2'),
        ("cat.png --n 2", "variations cat.png --n 2"),
        ('"it\'s a cat"', 'text "it\'s a cat"'),
        ('"draw a star"', 'text "a star"'),
        ('please draw me "a red star" --n 2', 'text "a red star" --n 2'),
        ('"a picture of two red stars"', 'text "two red stars"'),
        (
            'edit cat.png "make it red"',
            'textdiff cat.png "a red circle" "a blue circle"',
        ),
    ],
)
def test_a_forgotten_verb_is_named_with_the_command_that_was_meant(
    tmp_path, monkeypatch, line, meant
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cat.png").touch()
    with pytest.raises(ValueError, match="is none of text, variations, ") as error:
        sample.parse(shlex.split(line))
    command = "python" + str(error.value).rsplit(": python", 1)[1]
    assert shlex.split(command) == ["python", "sample.py", *shlex.split(meant)]
    # The command that is named is one that is understood.
    sample.parse(shlex.split(command)[2:])


@pytest.mark.parametrize(
    "line, said",
    [
        ("", "say what to do: text, variations, interpolate, textdiff, inpaint"),
        ("variation cat.png", 'no verb "variation"; the closest is variations'),
        ("Text cat", 'no verb "Text"; the closest is text'),
        ("--n 3 text", "--n stands before the verb: the verb comes first, as in: python sample.py"),
        ("text circle --gudance 3", "no option --gudance; the closest is --guidance"),
        ("inpaint a.png m.png two cyan rings", '"cyan" is one word too many'),
    ],
)
def test_other_beginnings(line, said):
    with pytest.raises(ValueError, match=said):
        sample.parse(shlex.split(line))


@pytest.mark.parametrize("verb", [*sample.VERBS, "-h", "--help"])
def test_verbs_and_help_pass(verb):
    check_verb([verb], sample.VERBS)


def test_the_help_of_text_says_what_the_box_knows(capsys):
    with pytest.raises(SystemExit):
        sample.parse(["text", "--help"])
    said = capsys.readouterr().out
    assert all(word in said for word in (*COLOURS, *SHAPES, "above", "left of", "four", "words.txt"))
    assert '"a red circle above a blue square"' in said


def test_captions_without_quotes_are_noticed():
    def captions(line):
        return captions_of(sample.parse(shlex.split(line)))

    assert '"a red circle"' in quotes_notes(captions("text a red circle"))[0]
    assert quotes_notes(captions('text "a red circle" "two rings"')) == []
    assert quotes_notes(captions("text circle")) == []
    assert captions("inpaint a.png m.png cat") == ["cat"]
    assert captions('textdiff a.png "" cat') == ["cat"]
    assert captions("textdiff a.png dog cat") == ["dog", "cat"]
    assert captions("variations a.png") == []
