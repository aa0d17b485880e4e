"""Experiments on CLIP's space (unCLIP §2.2 to §4).

Principal components, SAM, variations, interpolations, text diffs.

Each experiment first names its recipes (…_needs), then finds something in what they made.

Shapes: N pictures, D width of embeddings, K steps of a series.
References: unCLIP (2204.06125) §2.2, §3, §4; SAM (2010.01412). Read next: binding.py.
"""

import numpy as np
import torch

from ..metrics.intervals import bootstrap, share
from ..metrics.sets import retrieval_hits
from ..training.variants import SAM_RHO
from .captions import EDITS, edited
from .findings import experiment
from .measures import TIMES, apart, backgrounds, cosine, gap, mean_of_known, moved
from .recipes import Sampled
from .seen import Seen

ASPECTS = ("colours", "shapes", "layout", "all")


# -------------------------------------------------------------------- principal components

def component_counts(lab):
    """1, 2, 4, … components, and all of them."""
    D = lab.model.clip.cfg.clip_dim
    return [2 ** i for i in range(D.bit_length()) if 2 ** i < D] + [D]


def components_needs(lab):
    """A set for each number of components; none without the AR prior, which measured them."""
    if not lab.model.ar_prior:
        return {}
    return {count: Sampled(
        lab.part(4), z="true", move=("components", count), told=False, guidance=1.0, rule=0.0,
        x_T="one") for count in component_counts(lab)}


@experiment("What the principal components of z_img say (Fig. 7)", components_needs)
def components(lab, found, made):
    """Pictures from z_img with only some of its principal components left: what do the first ones
    hold, what the last?"""
    if not made:
        found.notes.append(
            "Left out: the components belong to the autoregressive prior, which this run lacks.")
        return
    n, kept = lab.part(4), list(made)
    true = lab.true(n)
    close = {count: cosine(seen.z, true.z) for count, seen in made.items()}
    columns = {"cosine with the true picture ↑": ""}
    rows = {count: [mean_of_known(close[count])] for count in kept}
    panels = {"cosine with the true picture": (
        "", {"pictures": [rows[count][0] for count in kept]})}
    if lab.shapes:
        lines = {name: [share(seen.aspect(name)) for seen in made.values()] for name in ASPECTS}
        columns |= {f"{name} ↑": "%" for name in ASPECTS}
        panels["right"] = "%", lines
        for i, count in enumerate(kept):
            rows[count] += [line[i] for line in lines.values()]
    found.table("components", columns, {f"{count}": row for count, row in rows.items()})
    found.plot("principal components of z_img that are kept", kept, panels, log=True)
    few = max(count for count in kept if count <= max(1, kept[-1] // 16))
    found.claim(
        "later components still add to the picture (20 of 320 against all)",
        f"cosine with the true picture: all components − {few}", gap(close[kept[-1]], close[few]))
    if lab.shapes:
        colours, shapes = (
            np.stack([seen.aspect(name) for seen in made.values()], axis=1).astype(float)
            for name in ("colours", "shapes"))
        found.claim(
            "the first components hold what is coarse, the later ones exact form",
            "of what all components get right, the share that fewer get right, averaged: "
            "colours − shapes",
            bootstrap(lead, (colours, shapes)), "%")
    labels = [f"{count} components" for count in kept]
    found.paths(lab, "components", true, made, labels, range(min(6, n)))


def lead(a, b):
    """How far one series of answers (N, K) is ahead of another on the way to its last value."""
    def progress(x):
        return x.mean(0) / max(x[:, -1].mean(), 1 / len(x))

    return float((progress(a) - progress(b))[:-1].mean())


# -------------------------------------------------------------------- SAM

SAM = {
    "with_sam": "with SAM",
    "without_sam": "without SAM",
    "without_sam_half": "without SAM, half the steps",
    "without_sam_quarter": "without SAM, a quarter of the steps"}


def nothing_needed(lab):
    """No pictures are made for this experiment."""
    return {}


def ranks(z):
    """Measure over how many dimensions embeddings (N, D) spread.

    Return (how many principal components hold 99 % of the variance; the effective rank, e to the
    entropy of the components' shares of the variance).
    """
    shares = torch.linalg.svdvals(z.double() - z.double().mean(0)).square()    # (min(N, D),)
    shares = shares / shares.sum()
    count = 1.0 + float((1 - shares.cumsum(0) > 0.01).sum())
    return count, float(torch.special.entr(shares).sum().exp())


@experiment("The rank of CLIP's space, with and without SAM (§2.2)", nothing_needed,
            models=tuple(SAM))
def sam(lab, found, made):
    """Small CLIPs, trained alike but for SAM or for fewer steps: over how many dimensions do their
    embeddings spread?"""
    table, captions = lab.real(size=lab.model.clip.cfg.image_size)
    clips = {"the run's own": lab.model.clip, "the judge": lab.judge}
    clips |= {what: lab.loaded(name)[0] for name, what in SAM.items()}
    z = {name: lab.embed_pictures(table, clip) for name, clip in clips.items()}
    hits = {name: np.array(retrieval_hits(z[name], lab.embed_captions(captions, clip), captions))
            for name, clip in clips.items()}
    columns = {
        "components that hold 99 %": "", "effective rank": "", "finds the right caption ↑": "%"}
    found.table("CLIP", columns, {
        f"{name} ({z[name].shape[1]} dimensions)": [
            *bootstrap(ranks, z[name], times=TIMES, halves=True), share(hits[name])]
        for name in clips})
    with_sam, *without = SAM.values()
    no_better = (name for name in without if hits[name].mean() <= hits[with_sam].mean())
    fair = next(no_better, without[-1])
    found.claim(
        "SAM reduces the rank sharply (319 of 1,024 components hold 99 %)",
        f"effective rank: {fair} − with SAM",
        bootstrap(lambda x, y: ranks(x)[1] - ranks(y)[1], (z[fair], z[with_sam]), times=TIMES,
                  halves=True))
    found.claim(
        "and makes CLIP slightly better", "right captions found: with − without SAM",
        gap(hits[with_sam], hits["without SAM"]), "%")
    found.notes.append(
        f"Budget: {lab.checkpoint('with_sam')['steps']:,} steps, ρ = {SAM_RHO}, same seed and "
        f"batches. The CLIPs are measured on {len(captions):,} pictures that they have not seen, "
        f"with {len(set(captions)):,} different captions. The effective rank is e to the entropy "
        "of the components' shares of the variance: 3 if three share it alike. An under-trained "
        "CLIP also has a low rank. So SAM is compared with the longest-trained CLIP that finds no "
        f"more captions, or else with the least trained one: {fair}.")


# -------------------------------------------------------------------- variations

ETAS = (0.0, 0.5, 1.0)


def variations_needs(lab):
    """True pictures sampled again at each η, and other pictures of their captions."""
    n = lab.part(4)
    needs = {"sampled": Sampled(n, seed=1)}
    for eta in ETAS:
        needs[eta] = Sampled(n, z="true", told=False, guidance=1.0, rule=eta, x_T="inverted")
    return needs


@experiment("Variations (Fig. 3, §3.1)", variations_needs)
def variations(lab, found, made):
    """Pictures from (z_img, x_T) of a true one: what stays and what moves, at each η?"""
    true = lab.true(lab.part(4))
    other = "sampled from its caption"
    made = {f"η = {eta:g}": made[eta] for eta in ETAS} | {other: made["sampled"]}
    changed = {name: apart(seen.pictures, true.pictures) for name, seen in made.items()}
    close = {name: cosine(seen.z, true.z) for name, seen in made.items()}
    columns = {"right ↑": "%", "cosine with the picture": "", "difference in grey levels": ""}
    rows = {name: [share(seen.right), mean_of_known(close[name]), mean_of_known(changed[name])]
            for name, seen in made.items()}
    if lab.shapes:
        columns |= {"its objects have moved, in pixels": "", "its background, in grey levels": ""}
        for name, seen in made.items():
            lighter = np.abs(backgrounds(seen) - backgrounds(true))
            rows[name] += [mean_of_known(moved(seen, true)), mean_of_known(lighter)]
    found.table("beside the picture", columns, rows)
    found.claim(
        "what CLIP sees stays",
        "cosine with the picture: variation, η = 1 − another picture of its caption",
        gap(close["η = 1"], close[other]))
    found.claim(
        "the larger η, the more varies", "difference in grey levels: η = 1 − η = 0.5",
        gap(changed["η = 1"], changed["η = 0.5"]))
    found.check(
        "η = 0 reconstructs the picture, a larger η does not",
        "difference in grey levels: η = 1 − η = 0", gap(changed["η = 1"], changed["η = 0"]))
    found.sheet(lab, "variations", {"true": true} | made)


# -------------------------------------------------------------------- interpolations

THETAS = (0.0, 0.25, 0.5, 0.75, 1.0)


def interpolation_needs(lab):
    """Pictures on the way between two true ones, for each θ."""
    return {theta: Sampled(
        lab.part(8), z="true", told=False, guidance=1.0, rule=0.0, x_T="inverted",
        move=("between", theta)) for theta in THETAS}


@experiment("Interpolations (Fig. 4, §3.2)", interpolation_needs)
def interpolation(lab, found, made):
    """The way from one picture to another: what does the judge see in between? Each picture is in
    one pair only."""
    n = lab.part(8)
    a, b = lab.true(n), lab.true(n, first=n)
    to_a = {theta: cosine(seen.z, a.z) for theta, seen in made.items()}
    to_b = {theta: cosine(seen.z, b.z) for theta, seen in made.items()}
    lines = {"with the first": [mean_of_known(to_a[theta]) for theta in THETAS],
             "with the second": [mean_of_known(to_b[theta]) for theta in THETAS]}
    rows = {f"{theta:g}": [line[i] for line in lines.values()] for i, theta in enumerate(THETAS)}
    found.table("θ", {f"cosine {name}": "" for name in lines}, rows)
    found.plot(
        "θ, from the first picture to the second", list(THETAS),
        {"cosine, as the judge sees it": ("", lines)})
    found.claim(
        "the path goes from one picture's content to the other's",
        "cosine with the second picture: θ = 0.75 − θ = 0.25", gap(to_b[0.75], to_b[0.25]))
    found.claim(
        "in between lies what both have in common",
        "cosine with the less similar of both, at θ = 0.5 − cosine of the two",
        gap(np.minimum(to_a[0.5], to_b[0.5]), cosine(a.z, b.z)))
    found.check(
        "its ends are the two pictures",
        "difference in grey levels: of the two pictures − of θ = 1 and the second",
        gap(apart(a.pictures, b.pictures), apart(made[1.0].pictures, b.pictures)))
    labels = [f"θ = {theta:g}" for theta in THETAS] + ["the second"]
    found.paths(lab, "interpolation", a, made | {"second": b}, labels, range(min(6, n)))


# -------------------------------------------------------------------- text diffs

EDITED = (0.0, 0.2, 0.3, 0.4, 0.5, 0.75)


def textdiff_needs(lab):
    """True pictures edited by captions, at each θ; also by the paper's formula if ours differs."""
    moves = {theta: ("text", theta) for theta in EDITED}
    if getattr(lab.model.prior.cfg, "whiten_z", False):
        moves["slerp"] = "slerp", 0.5
    n = len(lab.real("edits")[1])
    return {name: Sampled(
        n, "edits", "true", move, told=False, guidance=2.0, rule=0.0, x_T="inverted")
        for name, move in moves.items()}


@experiment("Text diffs (Fig. 5, §3.3)", textdiff_needs, data="shapes")
def textdiff(lab, found, made):
    """Ten edits, chosen before any was tried: is the edit made, and all else kept? As
    DALLE2.textdiff does it, between whole captions."""
    wanted, shown = lab.real("edits")[1], lab.shown("edits")
    true = Seen(lab, lab.real("edits")[0], shown)
    slerped = made.get("slerp")
    made = {theta: made[theta] for theta in EDITED}
    hits = {f"{theta:g}": edits_made(true, seen) for theta, seen in made.items()}
    if slerped:
        hits["0.5, by the paper's formula"] = edits_made(true, slerped)
    columns = {
        "what the new caption says, and nothing else ↑": "%",
        "and near where objects were, on the same background ↑": "%"}
    found.table("θ", columns, {name: [share(one) for one in both] for name, both in hits.items()})
    which = np.array([edit_between(*pair) for pair in zip(shown, wanted)])
    used = sorted(set(which.tolist()))
    found.table("edit, θ = 0.5", columns, {
        " → ".join(EDITS[i]): [share(one[which == i]) for one in hits["0.5"]] for i in used})
    line = {"all ten edits": [share(seen.right) for seen in made.values()]}
    found.plot("θ, how far", list(EDITED), {"what the new caption says": ("%", line)})
    found.notes.append(
        "Near where objects were: from each object of the picture to the nearest one of the new "
        "picture, of any kind, it is less than a tenth of the side, in the mean. The same "
        "background: its grey differs by less than 12 of 255 levels.")
    found.claim(
        "a difference of captions changes the picture accordingly (θ up to 0.5)",
        "edit made: θ = 0.5 − θ = 0", gap(made[0.5].right, made[0.0].right), "%")
    if slerped:
        found.notes.append(
            "The paper rotates z_img towards the normalised difference of both captions' z_txt "
            "(§3.3). This decoder sees z_img whitened, where that direction means little. So we "
            "add another difference, which is not the paper's: of what the prior predicts for "
            "either caption from the noised z_img (FlowEdit, 2412.08629). At θ = 0.5 it is added "
            "in full; beyond, exaggerated.")
    asked = Seen(lab, true.pictures, [f"{old} → {new}" for old, new in zip(shown, wanted)])
    firsts = [int(np.argmax(which == i)) for i in used]
    found.paths(lab, "textdiff", asked, made, [f"θ = {theta:g}" for theta in EDITED], firsts)


def edits_made(true, seen):
    """Which pictures are right (N,) bool, and which are also near the true ones; both Seen."""
    near = moved(true, seen, kind=()) < seen.pictures.shape[-1] / 10
    alike = np.abs(backgrounds(seen) - backgrounds(true)) < 12
    return [seen.right, seen.right & near & alike]


def edit_between(old, new):
    """The number of the edit that makes one caption of the other."""
    return next(i for i, edit in enumerate(EDITS) if edited(old, *edit) == new)
