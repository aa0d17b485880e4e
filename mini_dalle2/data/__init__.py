"""Data: captioned pictures to learn from, and the way from pixels to tensors.

The paper trains on pairs (x, y) of an image and its caption (§2). Its 650 million pairs are not
public. This folder holds three stand-ins:

    shapes.py       coloured shapes, drawn on demand, with an exact caption grammar
    folder.py       a folder of your own captioned pictures
    emoji.py        real emoji in nine styles, fetched and drawn by one command

Around these stand four helpers. `tables.py` holds a whole data set as one tensor. `pixels.py`
turns pictures into tensors. `grid.py` shows pictures with their captions. `near_misses.py` makes
captions that are almost right, from which CLIP learns more than from the rest of a batch.

Read next: shapes.py (the data set of the default preset), ../tokenizer.py (what becomes of a
caption).
"""

from .folder import CaptionedFolder
from .grid import caption_grid
from .near_misses import near_misses, with_near_misses
from .pixels import central_square, from_pil, to_float, to_pil, to_rgb, to_uint8
from .shapes import (
    COLOURS, COUNTS, HELD_OUT, RELATIONS, SEEN, SHAPES, SIZES, CaptionedShapes, Scene, Thing,
    coverage, make_scene, parse_caption, relation_caption, render)
from .tables import Pictures, load_table

__all__ = [
    "COLOURS", "COUNTS", "HELD_OUT", "RELATIONS", "SEEN", "SHAPES", "SIZES",
    "CaptionedFolder", "CaptionedShapes", "Pictures", "Scene", "Thing",
    "caption_grid", "central_square", "coverage", "from_pil", "load_table", "make_scene",
    "near_misses", "parse_caption", "relation_caption", "render", "to_float", "to_pil", "to_rgb",
    "to_uint8", "with_near_misses"]
