"""Exchanged colours are found, in single pictures and in made-up sets."""

import torch

from made_up import exchanged, shown, verdicts
from mini_dalle2.data.pixels import from_pil
from mini_dalle2.data.shapes import Scene, Thing, render
from mini_dalle2.evaluate.binding import swapped
from mini_dalle2.evaluate.lab import Lab
from mini_dalle2.evaluate.seen import Seen


def test_swapped_colours_are_found(evaluated):
    caption = "a red circle above a blue square"
    scenes = {
        "right": ("red", "blue"),
        "swapped": ("blue", "red"),
        "one wrong": ("red", "green"),
        "both red": ("red", "red"),
    }
    pictures = torch.stack(
        [
            from_pil(
                render(
                    Scene(
                        "",
                        210,
                        (Thing(a, "circle", 0.5, 0.27, 0.17), Thing(b, "square", 0.5, 0.73, 0.17)),
                    ),
                    32,
                )
            )
            for a, b in scenes.values()
        ]
    )
    seen = Seen(Lab(evaluated, 16, "cpu"), pictures, [caption] * 4)
    assert swapped(seen).tolist() == [False, True, False, False] and seen.right.tolist() == [
        True,
        False,
        False,
        False,
    ]
    assert seen.notes()[0] == caption and "WRONG: colours" in seen.notes()[1]


def test_binding_tells_what_is_so_from_its_converse(synthetic):
    true = {of: shown(synthetic, of=of) for of in ("val", "pairs", "held_out")}
    swaps, poor = (
        shown(synthetic, of="pairs", change=exchanged),
        shown(synthetic, of="pairs", right=12),
    )
    crowds = {"true": true, "swapped": true | {"pairs": swaps}, "poor": true | {"pairs": poor}}
    for ours, alone, theirs, said in (
        ("swapped", "swapped", "true", ["yes", "yes"]),
        ("true", "true", "swapped", ["no", "cannot tell"]),
        ("true", "true", "poor", ["cannot tell", "cannot tell"]),
    ):  # fewer than twenty may have swapped them
        names = {"unCLIP": ours, "unCLIP, from true z_img alone": alone, "GLIDE": theirs}
        assert (
            verdicts(
                synthetic,
                "binding",
                {(name, of): crowds[crowd][of] for name, crowd in names.items() for of in true},
            )
            == said
        )
