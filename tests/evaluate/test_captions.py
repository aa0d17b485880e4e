"""Edits of captions."""

from mini_dalle2.evaluate.captions import EDITS, edited


def test_edits_change_what_they_say():
    assert (
        edited("a red circle above a blue square", "above", "below")
        == "a red circle below a blue square"
    )
    assert (
        edited("an orange square left of a red ring", "orange square", "orange star")
        == "an orange star left of a red ring"
    )
    assert (
        edited("a black cross above a red ring", "black cross", "orange cross")
        == "an orange cross above a red ring"
    )
    assert edited("a red circle above a blue square", "red circle", "blue circle") is None, (
        "two things of one colour: no such caption"
    )
    assert edited("two cyan rings", "above", "below") is None and len(EDITS) == 10
