"""The grid: pictures enlarged pixel by pixel, captions beneath, and nothing that does not match."""

import numpy as np
import pytest
from PIL import Image

from mini_dalle2.data.grid import break_lines, caption_grid, grid_font
from mini_dalle2.data.pixels import to_pil
from mini_dalle2.data.shapes import CaptionedShapes


def test_caption_grid(tmp_path):
    images = [to_pil(CaptionedShapes("val", 32)[i]["image"]) for i in range(4)]
    each = caption_grid(
        [images[:2], images[2:]],
        [["first", "second"], ["third", "a caption that is far too long for one line " * 2]],
    )
    assert (
        np.asarray(each.crop((8, 8, 136, 136)))[2::4, 2::4].tolist()
        == np.asarray(images[0]).tolist()
    ), "enlarged pixel by pixel"
    assert (np.asarray(each)[137:150, 8:60] < 100).any(), "there is ink beneath the first picture"
    short = caption_grid([images[:2], images[2:]], ["one", "two"], tmp_path / "grid.png")
    assert (
        Image.open(tmp_path / "grid.png").size == short.size
        and short.width == each.width
        and short.height < each.height
    )
    for rows, captions in (([], []), ([images], []), ([images], [["only one"]]), ([[]], ["x"])):
        with pytest.raises(ValueError):
            caption_grid(rows, captions)


def test_lines_break_between_words():
    font = grid_font(128)
    lines = break_lines("a red circle above a blue square\n\ntwo cyan rings", 90, font)
    assert " ".join(lines).split() == "a red circle above a blue square two cyan rings".split()
    assert len(lines) > 4 and "" in lines and all(font.getlength(line) <= 90 for line in lines)
    assert break_lines("unbreakable " * 2, 10, font) == ["unbreakable"] * 2
    assert break_lines("", 10, font) == [""]


def test_a_white_picture_has_an_edge():
    sheet = np.asarray(caption_grid([[Image.new("RGB", (64, 64), "white")] * 2], ["white"]))
    # The corners of the first cell, one pixel outside the picture.
    for y, x in ((7, 7), (7, 136), (136, 7), (136, 136), (70, 7), (7, 70)):
        assert sheet[y, x].max() < 200
    assert (sheet[8:136, 8:136] == 255).all() and (sheet[6, :] == 255).all()
