"""Made-up sets of pictures, from which it is known what an experiment has to find."""

from dataclasses import replace

import torch

from mini_dalle2.data.pixels import from_pil
from mini_dalle2.data.shapes import render
from mini_dalle2.evaluate.experiments import EXPERIMENTS
from mini_dalle2.evaluate.findings import Findings
from mini_dalle2.evaluate.report import verdict
from mini_dalle2.evaluate.seen import Seen


def exchanged(scene):
    """The scene with the colours of its two objects exchanged."""
    first, second = scene.things
    return replace(
        scene, things=(replace(first, colour=second.colour), replace(second, colour=first.colour))
    )


def further(scene, by):
    """The scene with each object moved by that share of the side, to where there is room."""
    return replace(
        scene,
        things=tuple(
            replace(thing, x=thing.x - by if thing.x > 0.5 else thing.x + by)
            for thing in scene.things
        ),
    )


def other_background(scene):
    return replace(scene, background=scene.background + (30 if scene.background < 210 else -30))


def shown(lab, n=None, of="val", right=None, change=lambda scene: scene):
    """n pictures of captions, rendered from their scenes, each changed by `change`.

    All but the first `right` of them are empty.
    """
    data, chosen, captions = lab.scenes(of)
    n = n or lab.n
    pictures = torch.stack([from_pil(render(change(data.scene(i)), 32)) for i in chosen[:n]])
    pictures[n if right is None else right :] = 200
    return Seen(lab, pictures, captions[:n])


def verdicts(lab, name, made):
    found = Findings()
    EXPERIMENTS[name].find(lab, found, made)
    return [verdict(claim) for claim in found.claims]
