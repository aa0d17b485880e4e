"""data: captioned pictures: drawn shapes, your own folder, emoji; and the way from pixels to tensors.

Read next: shapes.py.
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
