"""What the experiments on CLIP's space find in made-up sets."""

from dataclasses import replace

import pytest
import torch

from made_up import further, other_background, shown, verdicts
from mini_dalle2.data.pixels import from_pil
from mini_dalle2.data.shapes import render
from mini_dalle2.evaluate.captions import EDITS, edited
from mini_dalle2.evaluate.experiments import EXPERIMENTS
from mini_dalle2.evaluate.findings import Findings
from mini_dalle2.evaluate.latent_space import EDITED, THETAS, ranks
from mini_dalle2.evaluate.report import verdict
from mini_dalle2.evaluate.seen import Seen


def test_variations_and_interpolations_tell_what_is_so_from_its_converse(synthetic):
    n = synthetic.part(4)
    true, empty = shown(synthetic, n), shown(synthetic, n, right=0)
    nearly, black = (
        Seen(synthetic, pictures, true.captions)
        for pictures in (true.pictures ^ 1, true.pictures * 0)
    )
    assert verdicts(
        synthetic, "variations", {"sampled": empty, 0.0: true, 0.5: true, 1.0: nearly}
    ) == ["yes", "yes"]
    assert verdicts(
        synthetic, "variations", {"sampled": true, 0.0: true, 0.5: black, 1.0: empty}
    ) == ["no", "no"]
    m = synthetic.part(8)
    a, b = synthetic.true(m), synthetic.true(m, first=m)
    for order, said in (((a, a, a, b, b), "yes"), ((b, b, a, a, a), "no")):
        assert verdicts(synthetic, "interpolation", dict(zip(THETAS, order))) == [
            said,
            "cannot tell",
        ], "one of two is nothing in between"


def test_text_diffs_tell_an_edit_from_another_picture_of_its_caption(synthetic, monkeypatch):
    """True pictures with the edits of colour made are right.

    On another background, or in another place, they are not what was there before.
    """
    monkeypatch.setattr(synthetic, "real", lambda of, real=synthetic.real: real(of, 32))
    data, chosen, captions = synthetic.scenes("edits")
    scenes = [data.scene(i) for i in chosen]
    edits = [
        next(edit for edit in EDITS if edited(scene.text, *edit) == wanted)
        for scene, wanted in zip(scenes, captions)
    ]

    def recoloured(scene, before, after):
        return replace(
            scene,
            things=tuple(
                replace(thing, colour=after.split()[0])
                if f"{thing.colour} {thing.shape}" == before
                else thing
                for thing in scene.things
            ),
        )

    made = [
        recoloured(scene, *edit) if edit in EDITS[:4] else scene
        for scene, edit in zip(scenes, edits)
    ]
    coloured = sum(edit in EDITS[:4] for edit in edits) / len(edits)
    pairs = sum(
        edit in EDITS[:4] and len(scene.things) > 1 for edit, scene in zip(edits, scenes)
    ) / len(edits)
    elsewhere = [
        further(scene, 0.2) if len(scene.things) == 1 else scene for scene in made
    ]  # of two the relation would be another
    before, same, other, moved_on = (
        Seen(synthetic, torch.stack([from_pil(render(scene, 32)) for scene in crowd]), captions)
        for crowd in (scenes, made, map(other_background, made), elsewhere)
    )
    assert 0 < pairs < coloured
    for seen, kept in ((same, coloured), (other, 0), (moved_on, pairs)):
        found = Findings()
        EXPERIMENTS["textdiff"].find(synthetic, found, dict.fromkeys(EDITED, before) | {0.5: seen})
        rows = {
            name: [figure.value for figure in row] for name, row in found.tables[0]["rows"].items()
        }
        assert (
            rows["0.5"] == pytest.approx([coloured, kept])
            and rows["0"] == [0, 0]
            and verdict(found.claims[0]) == "yes"
        )


def test_effective_rank():
    z = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1.0] * 3 + [0.0] * 5
    )
    count, effective = ranks(z + 5)
    assert count == 3 and effective == pytest.approx(3, rel=1e-2)
    assert ranks(z * torch.tensor([1.0, 0.2, 0.2, 1, 1, 1, 1, 1]))[1] < 2
