"""The experiment on what is hard (unCLIP §7): colours, counts, and combinations never seen.

Shapes: N pictures.
References: unCLIP (2204.06125) §7, Fig. 14 and 15. Read next: real_pictures.py.
"""

from dataclasses import replace

import numpy as np

from ..data.shapes import parse_caption
from ..metrics.intervals import bootstrap, share, share_apart, wider
from .findings import experiment
from .measures import ENOUGH, gap
from .recipes import Sampled

UNCLIP, ALONE, GLIDE = "unCLIP", "unCLIP, from true z_img alone", "GLIDE"
NAMES = (UNCLIP, ALONE, GLIDE)
# {what parse_caption says: a column}
KINDS = {
    "size": "one object", "relation": "two in a relation", "two": "two of a kind",
    "three": "three of a kind", "four": "four of a kind"}


def binding_needs(lab):
    """Three ways to make pictures, for three sets of captions: {(way, of): recipe}."""
    rows = {
        UNCLIP: Sampled(lab.n),
        ALONE: Sampled(lab.n, z="true", told=False),
        GLIDE: Sampled(lab.n, glide=True)}
    return {(name, of): replace(recipe, of=of)
            for of in ("val", "pairs", "held_out") for name, recipe in rows.items()}


@experiment("Which colour belongs to which object (§7)", binding_needs, data="shapes",
            models=("glide",))
def binding(lab, found, made):
    """Two objects of two colours; two, three, four of a kind; combinations of colour and shape that
    training has never shown."""
    two_objects(lab, found, {name: made[name, "pairs"] for name in NAMES})
    kinds_of_captions(found, {name: made[name, "val"] for name in NAMES})
    rows = {}
    for name in NAMES:
        seen, new = made[name, "val"].right, made[name, "held_out"].right
        rows[name] = [share(seen), share(new), share_apart(seen, new)]
    columns = {"seen: all right ↑": "%", "never seen: all right ↑": "%", "difference": "%"}
    found.table("combinations", columns, rows)
    found.notes.append(
        "The paper does not measure counting, nor combinations that were never seen.")
    for of in ("pairs", "held_out"):
        found.sheet(lab, f"binding_{of}", {name: made[name, of] for name in NAMES})


def swapped(seen):
    """Which pictures of two objects are right but for exchanged colours (N,) bool."""
    found = []
    for g, caption in zip(seen.grades, seen.captions):
        asked = sorted(colour for colour, _ in parse_caption(caption)[2])
        there = sorted(str(thing["colour"]) for thing in g["objects"])
        found.append(g["shapes"] and g["layout"] and not g["colours"] and there == asked)
    return np.array(found)


def two_objects(lab, found, made):
    """Table and claims on pictures of two objects, {way: Seen}."""
    rows = made | {"true pictures": lab.true(lab.n, "pairs")}
    swaps = {name: swapped(seen) for name, seen in rows.items()}
    form = {name: seen.aspect("shapes") & seen.aspect("layout") for name, seen in rows.items()}
    figures = {}
    for name, seen in rows.items():
        of_these = share(swaps[name][form[name]]) if form[name].any() else None
        figures[name] = [share(seen.right), share(form[name]), of_these]
    columns = {"all right ↑": "%", "shapes and layout right ↑": "%",
               "of these, colours swapped ↓": "%"}
    found.table("two objects", columns, figures)
    right = ", ".join(f"{form[name].sum()} ({name})" for name in made)
    found.notes.append(
        f"Of {lab.n} pictures of two objects, shapes and layout are right in {right}. Nothing is "
        f"claimed from a share of fewer than {ENOUGH}.")
    ours, theirs = (swaps[name][form[name]] for name in (UNCLIP, GLIDE))
    more = None
    if min(len(ours), len(theirs)) >= ENOUGH:
        both = swaps[UNCLIP], form[UNCLIP], swaps[GLIDE], form[GLIDE]
        more = wider(bootstrap(swapped_gap, both), share_apart(ours, theirs))
    found.claim(
        "unCLIP is worse than GLIDE at binding colours to objects (Fig. 14)",
        "colours swapped, of pictures with the right shapes and layout: unCLIP − GLIDE", more, "%")
    found.claim(
        "even from the picture's own z_img colours come out exchanged (Fig. 15)",
        "colours swapped: from true z_img alone − in true pictures, where the grader errs",
        gap(swaps[ALONE], swaps["true pictures"]), "%")


def swapped_gap(our_swaps, our_form, their_swaps, their_form):
    """The share of swapped colours among pictures of the right form: ours − theirs."""
    ours = our_swaps.sum() / max(1, our_form.sum())
    return ours - their_swaps.sum() / max(1, their_form.sum())


def kinds_of_captions(found, made):
    """Table of which captions are hard, {way: Seen}."""
    asked = [parse_caption(caption) for caption in made[UNCLIP].captions]
    kinds = np.array([word if kind == "count" else kind for kind, word, _ in asked])
    rows = {}
    for name, seen in made.items():
        rows[name] = [share(seen.right[kinds == kind]) if (kinds == kind).any() else None
                      for kind in KINDS]
    columns = dict.fromkeys(KINDS.values(), "%")
    found.table("all right ↑, of captions that ask for", columns, rows)
