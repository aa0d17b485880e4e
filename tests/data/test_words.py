"""Words: what the training captions had, and which words of a caption they did not have."""

from pathlib import Path

from mini_dalle2.data.shapes import COLOURS, SHAPES, CaptionedShapes
from mini_dalle2.data.words import (
    FEW,
    read_words,
    shapes_grammar,
    strange_words,
    word_notes,
    words_in,
    write_words,
)
from mini_dalle2.pipeline import WEIGHTS


def test_words_are_runs_of_letters_and_digits():
    assert words_in("A Photo of sks-dog, at 3 o'clock!") == (
        ["a", "photo", "of", "sks", "dog", "at", "3", "o", "clock"]
    )
    # An accent that is a character of its own, full-width letters, another script.
    assert words_in("Cafe\u0301 \uff32\uff25\uff24 \u732b") == ["caf\u00e9", "red", "\u732b"]


def test_the_words_of_captions_come_back_from_the_folder(tmp_path):
    assert read_words(tmp_path) is None and word_notes(["a cat"], tmp_path) == []
    write_words(["two cats", "Two dogs", "two cats"], tmp_path)
    assert (tmp_path / "words.txt").read_text() == "cats\ndogs\ntwo\n"
    assert read_words(tmp_path) == {"cats", "dogs", "two"}


def test_each_caption_has_its_note_with_the_closest_known_words(tmp_path):
    write_words(["a red circle", "an ant and a blue square"], tmp_path)
    assert word_notes(["a blue circle", "a red square"], tmp_path) == []
    known = read_words(tmp_path)
    assert strange_words("a crcle on a dog, a dog", known) == (
        [("crcle", "circle"), ("on", None), ("dog", None)]
    )
    # "an" is two letters of three, and means nothing here.
    assert strange_words("ann", {"a", "an", "red"}) == [("ann", None)]
    first, second, last = word_notes(["a crcle", "a ant", "a " + "x" * 10**6], tmp_path)
    assert first == ('"a crcle": no training caption had "crcle" (the closest is "circle"), so the '
                     'pictures cannot show this')
    assert second.startswith('"a xxx') and len(second) < 200
    assert last == ("the training captions had these words: a, an, and, ant, blue, circle, red, "
                    "square")


def test_many_words_are_left_in_their_file(tmp_path):
    write_words([f"word{i}" for i in range(FEW + 1)], tmp_path)
    assert word_notes(["a cat"], tmp_path)[-1].endswith(f"see {tmp_path / 'words.txt'}")


def test_a_damaged_file_only_costs_the_note(tmp_path):
    (tmp_path / "words.txt").write_bytes(b"red\n\xff\xfe\ncircle\n")
    assert {"red", "circle"} < read_words(tmp_path)


def test_the_box_knows_exactly_the_words_of_its_training_captions():
    data = CaptionedShapes("train", 32, 0, 3000)
    assert read_words(WEIGHTS) == {
        word for i in range(len(data)) for word in words_in(data.scene(i).text)
    }
    # Held-out pairs, too, are made of known words.
    held_out = CaptionedShapes("held_out", 32, 0, 200)
    assert word_notes([held_out.scene(i).text for i in range(200)], WEIGHTS) == []
    for strange in ("a cat", "a magenta circle", "a red pentagon", "five red circles"):
        assert word_notes([strange], WEIGHTS)[-1].endswith(shapes_grammar())


def test_a_count_needs_a_colour_where_the_training_captions_had_one(tmp_path):
    for caption in ("two stars", "three large circles"):
        (note,) = word_notes(["a star", caption], WEIGHTS)
        assert note.startswith(f'"{caption}" may give another number of objects')
    right = ["two red stars", "a star", "a red circle above a blue square"]
    assert word_notes(right, WEIGHTS) == []
    write_words(["two stars", "a red apple"], tmp_path)
    assert word_notes(["two stars"], tmp_path) == []


def test_the_grammar_names_all_colours_and_shapes():
    assert set(COLOURS) | set(SHAPES) < set(words_in(shapes_grammar()))
    (line,) = [line for line in shapes_grammar().splitlines() if "captions" in line]
    assert word_notes([line.split("captions")[1]], Path(WEIGHTS)) == []
