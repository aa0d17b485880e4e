"""Distances of objects and backgrounds are measured in pixels and grey levels."""

from dataclasses import replace

import numpy as np

from made_up import further, other_background, shown
from mini_dalle2.data.shapes import parse_caption
from mini_dalle2.evaluate.measures import backgrounds, moved


def test_what_has_moved_is_measured_in_pixels(synthetic):
    """Objects moved by two pixels and another background are found.

    An object of another colour has none of its kind to be near to.
    """
    singles = [
        i
        for i, text in enumerate(synthetic.scenes("val")[2][:40])
        if parse_caption(text)[0] == "size"
    ]
    true, there, lighter, other = (
        shown(synthetic, 40, change=change)
        for change in (
            lambda scene: scene,
            lambda scene: further(scene, 2 / 32),
            other_background,
            lambda scene: replace(
                scene,
                things=tuple(
                    replace(t, colour="red" if t.colour != "red" else "blue") for t in scene.things
                ),
            ),
        )
    )
    assert (
        np.allclose(moved(there, true)[singles], 2, atol=0.3) and np.nanmax(moved(true, true)) == 0
    )
    assert np.isnan(moved(other, true)[singles]).all() and len(singles) > 4
    assert np.allclose(moved(other, true, kind=())[singles], 0, atol=0.3)
    assert (np.abs(backgrounds(lighter) - backgrounds(true)) == 30).all()
