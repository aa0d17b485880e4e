"""Experiments on the quality of pictures (unCLIP §5): prior, two priors and GLIDE, guidance, steps.

Each experiment first names its recipes (…_needs), then finds something in what they made.

Shapes: N pictures, D width of the judge's features.
References: unCLIP (2204.06125) §5, Table 3; GLIDE (2112.10741). Read next: latent_space.py.
"""

from dataclasses import replace

import numpy as np

from ..metrics.intervals import bootstrap, mean_change, share, wider
from ..metrics.sets import covered, frechet_distance
from .findings import experiment
from .measures import (
    COLUMNS, DIVERSITY, TIMES, distance, distance_gap, diversity, enough, gap, mean_of_known,
    picture_distance_gap, set_figures, true_figures)
from .recipes import Embed, Sampled

# Fig. 9
GUIDANCE = (1.0, 2.0, 3.0, 4.0)
STEPS = (5, 10, 25, 50)
PRIOR_STEPS = (4, 8, 16, 64)
UNCLIP, UNCLIP_AR, GLIDE = "unCLIP, diffusion prior", "unCLIP, AR prior", "GLIDE"
CENTRED = "z_txt, centred"
LEARNED, SMALL = "ancestral, learned variance", "ancestral, β̃"


def possible(lab, recipes):
    """Keep those of the recipes {name: Sampled} that this run can make."""
    return {name: recipe for name, recipe in recipes.items()
            if recipe.z != "ar" or lab.model.ar_prior}


def without_ar(lab):
    """A note for a run without an autoregressive prior."""
    if lab.model.ar_prior:
        return []
    return ["This run has no autoregressive prior: its rows and claims are left out."]


# -------------------------------------------------------------------- what the prior is for

def fig8_needs(lab):
    """One set for each thing that the decoder can be given besides the caption."""
    n = lab.n
    recipes = {"nothing": Sampled(n, z=None), "z_txt as z_img": Sampled(n, z="z_txt")}
    if getattr(lab.model.prior.cfg, "whiten_z", False):
        recipes[CENTRED] = Sampled(n, z="z_txt", move=("centre", 1))
    recipes["z_img from the AR prior"] = Sampled(n, z="ar")
    recipes["z_img from the prior"] = Sampled(n)
    recipes["true z_img"] = Sampled(n, z="true")
    return possible(lab, recipes)


@experiment("What the prior is for (Fig. 8, §5.1)", fig8_needs)
def fig8(lab, found, made):
    """One decoder is told the caption, and is given nothing else, z_txt in place of z_img, or what
    a prior samples."""
    rows = {name: set_figures(lab, seen) for name, seen in made.items()}
    rows["true pictures"] = true_figures(lab, lab.n)
    found.table("besides the caption, the decoder is given", COLUMNS, rows)
    name = CENTRED if CENTRED in made else "z_txt as z_img"
    caption, text, prior = made["nothing"], made[name], made["z_img from the prior"]
    found.claim(
        "with the caption alone pictures are clearly worst",
        "right: prior − caption alone", gap(prior.right, caption.right), "%")
    found.claim(
        "z_txt in place of z_img does better than the caption alone",
        f"right: {name} − caption alone", gap(text.right, caption.right), "%")
    found.claim(
        "a prior does better than z_txt",
        f"right: prior − {name}", gap(prior.right, text.right), "%")
    found.claim(
        "a prior does better than z_txt (FID 7.99 against 16.55)",
        f"Fréchet distance: {name} − prior", picture_distance_gap(lab, text, prior))
    if CENTRED in made:
        found.notes.append(
            "This decoder sees z_img whitened, by mean and spread of the pictures' embeddings. "
            "Captions have another mean, far away, so that z_txt in place of z_img does worse than "
            "in the paper. \"Centred\" is z_txt moved by the difference of the two means; the "
            "claims are about it.")
    found.notes += without_ar(lab)
    found.sheet(lab, "fig8", made)


# -------------------------------------------------------------------- two priors, and GLIDE

def priors_needs(lab):
    """Each model once, and for a quarter of the captions again: {(model, again): recipe}."""
    rows = possible(lab, {
        UNCLIP_AR: Sampled(lab.n, z="ar"),
        UNCLIP: Sampled(lab.n),
        GLIDE: Sampled(lab.n, glide=True)})
    first = {(name, False): recipe for name, recipe in rows.items()}
    second = {(name, True): replace(recipe, n=lab.part(4), seed=1) for name, recipe in rows.items()}
    return first | second


@experiment("Two priors, and GLIDE (Tables 1 and 2)", priors_needs, models=("glide",))
def priors(lab, found, made):
    """The whole model with either prior, and the baseline that has none."""
    rows = {name: seen for (name, again), seen in made.items() if not again}
    spread = {name: diversity(seen, made[name, True]) for name, seen in rows.items()}
    figures = {name: [*set_figures(lab, seen), mean_of_known(spread[name])]
               for name, seen in rows.items()}
    figures["true pictures"] = [*true_figures(lab, lab.n), None]
    found.table("pictures by", COLUMNS | {"diversity ↑": ""}, figures)
    claim_about_priors(lab, found, rows)
    found.claim(
        "GLIDE's pictures fit their captions better (Table 1: unCLIP is preferred by 45.3 %)",
        "right: GLIDE − diffusion prior", gap(rows[GLIDE].right, rows[UNCLIP].right), "%")
    both = spread[UNCLIP], spread[GLIDE]
    found.claim(
        "unCLIP's are more diverse (Table 1: preferred by 70.5 %)",
        "diversity in grey levels: diffusion prior − GLIDE",
        bootstrap(lambda x, y: np.nanmean(x) - np.nanmean(y), both) if enough(*both) else None)
    found.notes += [
        DIVERSITY,
        "Both models sample with the run's own guidance scale, "
        f"{lab.model.decoder.cfg.guidance:g}. The next experiment tries other scales.",
        *without_ar(lab)]
    found.sheet(lab, "priors", rows)


def claim_about_priors(lab, found, rows):
    """Table 2: each model's distance from true pictures, compared with the others'."""
    diffusion, glide, ar = rows[UNCLIP], rows[GLIDE], rows.get(UNCLIP_AR)
    found.claim(
        "FID of the diffusion prior is below GLIDE's (Table 2: 10.39 against 12.24)",
        "Fréchet distance: GLIDE − diffusion prior", picture_distance_gap(lab, glide, diffusion))
    if ar:
        found.claim(
            "FID of the AR prior is below GLIDE's (Table 2: 10.63 against 12.24)",
            "Fréchet distance: GLIDE − AR prior", picture_distance_gap(lab, glide, ar))
        found.claim(
            "FID of the diffusion prior is below the AR prior's (Table 2: 10.39 against 10.63)",
            "Fréchet distance: AR − diffusion prior", picture_distance_gap(lab, ar, diffusion))


# -------------------------------------------------------------------- guidance

MODELS = ("unCLIP", "GLIDE")


def guidance_needs(lab):
    """Both models at each guidance scale, twice: {(model, scale, again): recipe}."""
    needs = {}
    for model in MODELS:
        for scale in GUIDANCE:
            once = Sampled(lab.n, glide=model == "GLIDE", guidance=scale)
            needs[model, scale, False] = once
            needs[model, scale, True] = replace(once, n=lab.part(4), seed=1)
    return needs


@experiment("What guidance costs (Fig. 9, 10 and 11)", guidance_needs, models=("glide",))
def guidance(lab, found, made):
    """The guidance scale of unCLIP's decoder, with z_img fixed, and of GLIDE: what is won, and what
    diversity is lost."""
    sets = {key[:2]: seen for key, seen in made.items() if not key[2]}
    spread = {(model, scale): diversity(seen, made[model, scale, True])
              for (model, scale), seen in sets.items()}
    figures = {key: [*set_figures(lab, seen), mean_of_known(spread[key])]
               for key, seen in sets.items()}
    columns = COLUMNS | {"diversity ↑": ""}
    rows = {f"{model}, {scale:g}": row for (model, scale), row in figures.items()}
    rows["true pictures"] = [*true_figures(lab, lab.n), None]
    found.table("guidance", columns, rows)
    panels = {}
    for i, (column, unit) in enumerate(columns.items()):
        lines = {model: [figures[model, scale][i] for scale in GUIDANCE] for model in MODELS}
        panels[column] = unit, lines
    found.plot("guidance scale of the decoder", list(GUIDANCE), panels)
    claim_about_guidance(lab, found, sets, spread)
    found.notes.append(DIVERSITY)
    shown = {f"{model}, {scale:g}": sets[model, scale] for model in MODELS for scale in GUIDANCE}
    found.sheet(lab, "guidance", shown)


def claim_about_guidance(lab, found, sets, spread):
    """What changes from the lowest guidance scale to the highest, compared between the models."""
    low, high = GUIDANCE[0], GUIDANCE[-1]
    ends = [("unCLIP", low), ("unCLIP", high), ("GLIDE", low), ("GLIDE", high)]
    features = tuple(sets[end].features for end in ends)
    spreads = tuple(spread[end] for end in ends)
    found.claim(
        "guidance costs unCLIP far less FID than GLIDE (Fig. 11)",
        f"growth of the Fréchet distance from scale {low:g} to {high:g}: GLIDE − unCLIP",
        bootstrap(growth_gap, features, lab.others().features, times=TIMES, halves=True,
                  extrapolate=True))
    # The bootstrap knows that other samples have other territories, but not that few true
    # pictures may agree by chance. The closed form knows the second.
    real = lab.others().features[:lab.n]
    lost = bootstrap(lambda *z: lost_gap(*z).mean(), features, real, times=TIMES, halves=True)
    found.claim(
        "and no recall, where GLIDE loses it (Fig. 13)",
        f"recall lost from scale {low:g} to {high:g}: GLIDE − unCLIP",
        wider(lost, mean_change(lost_gap(*features, real))), "%")
    found.claim(
        "GLIDE's pictures of a caption become alike, unCLIP's do not (Fig. 9)",
        f"share of the diversity kept from scale {low:g} to {high:g}: unCLIP − GLIDE",
        bootstrap(kept_gap, spreads) if enough(*spreads) else None, "%")


def growth_gap(unclip_low, unclip_high, glide_low, glide_high, real):
    """How much more guidance moves GLIDE's set away from the true one than unCLIP's."""
    def growth(low, high):
        return frechet_distance(high, real) - frechet_distance(low, real)

    return growth(glide_low, glide_high) - growth(unclip_low, unclip_high)


def lost_gap(unclip_low, unclip_high, glide_low, glide_high, real):
    """For each true picture (N,): 1 if only GLIDE loses it by guidance, −1 if only unCLIP does.

    A picture is lost if the generated set covers it at the low scale and not at the high one.
    """
    def lost(low, high):
        before, after = (covered(real.double(), z.double()).int() for z in (low, high))
        return before - after

    return (lost(glide_low, glide_high) - lost(unclip_low, unclip_high)).numpy()


def kept_gap(unclip_low, unclip_high, glide_low, glide_high):
    """The share of diversity that unCLIP keeps under guidance, minus the share GLIDE keeps."""
    def kept(low, high):
        before, after = (max(np.nanmean(spread), 1e-9) for spread in (low, high))
        return after / before

    return kept(unclip_low, unclip_high) - kept(glide_low, glide_high)


# -------------------------------------------------------------------- sampling steps

def steps_needs(lab):
    """{("decoder" or "prior", rule, steps): recipe}.

    The decoder's ancestral steps have its learned variance, if it samples so, or β̃ (DDIM, η = 1).
    """
    decoder, prior = lab.model.decoder.cfg, lab.model.prior.cfg
    rules = {SMALL: 1.0, "DDIM": 0.0}
    if decoder.sampler == "ddpm":
        rules = {LEARNED: "ancestral"} | rules
    needs = {}
    for name, rule in rules.items():
        for count in STEPS:
            if count <= decoder.num_timesteps:
                needs["decoder", name, count] = Sampled(lab.part(2), rule=rule, steps=count)
    n = min(2 * lab.n, len(lab.real()[1]) // 2)
    for name, rule in {"analytic": "analytic", SMALL: "β̃", "DDIM": "DDIM"}.items():
        for count in PRIOR_STEPS:
            if count <= prior.num_timesteps:
                needs["prior", name, count] = Embed(n, rule=rule, steps=count)
    return needs


@experiment("How many steps, and which (Table 3)", steps_needs)
def steps(lab, found, made):
    """Quality against sampling steps, of the decoder and of the prior, for each rule of a step."""
    decoder, prior = (
        {key[1:]: value for key, value in made.items() if key[0] == model}
        for model in ("decoder", "prior"))
    steps_of_decoder(lab, found, decoder)
    steps_of_prior(lab, found, prior)
    claim_about_decoder_steps(found, decoder)
    found.notes.append(
        "Fréchet distances to true z_img are taken in the run's own CLIP. One z_img is sampled for "
        "each caption; the better of two is not chosen.")


def rules_and_counts(made):
    """The rules and the numbers of steps in {(rule, steps): …}, each once."""
    return list(dict.fromkeys(rule for rule, _ in made)), sorted({count for _, count in made})


def plot_steps(found, model, columns, figures):
    """Plot figures {(rule, steps): [a Figure for each of the columns {name: unit}]}."""
    rules, counts = rules_and_counts(figures)
    panels = {}
    for i, (column, unit) in enumerate(columns.items()):
        lines = {rule: [figures[rule, count][i] for count in counts] for rule in rules}
        panels[column] = unit, lines
    found.plot(f"sampling steps of the {model}", counts, panels, log=True)


def steps_of_decoder(lab, found, made):
    """Table and plot of the decoder's pictures {(rule, steps): Seen}."""
    columns = {"right ↑": "%", "Fréchet distance ↓": ""}
    figures = {key: [share(seen.right), distance(seen.features, lab.others().features)]
               for key, seen in made.items()}
    rows = {f"{rule}, {count}": row for (rule, count), row in figures.items()}
    true = true_figures(lab, lab.part(2))
    rows["true pictures"] = [true[list(COLUMNS).index(column)] for column in columns]
    found.table("decoder, steps", columns, rows)
    plot_steps(found, "decoder", columns, figures)


def steps_of_prior(lab, found, made):
    """Table, plot and claim of the prior's embeddings {(rule, steps): z_img (n, D)}."""
    n = len(next(iter(made.values())))
    # The first n belong to the captions that are asked for, the others are compared with.
    true = lab.true_embeddings(len(lab.real()[1]))
    spaces = {"Fréchet distance to true z_img ↓": lambda z: z}
    if getattr(lab.model.prior.cfg, "whiten_z", False):
        spaces["the same of whitened z_img ↓"] = (
            lambda z: lab.model.prior.whitening(z.to(lab.model.device)).cpu())

    def distances(z):
        return [distance(space(z), space(true[n:])) for space in spaces.values()]

    figures = {key: distances(z) for key, z in made.items()}
    columns = dict.fromkeys(spaces, "")
    rows = {f"{rule}, {count}": row for (rule, count), row in figures.items()}
    found.table("prior, steps", columns, rows | {"true z_img": distances(true[:n])})
    plot_steps(found, "prior", columns, figures)
    _, counts = rules_and_counts(made)
    few = counts[min(1, len(counts) - 1)]
    found.claim(
        "the prior is sampled with Analytic-DPM's variance, made for few steps",
        f"Fréchet distance to true z_img, {few} steps: β̃ − analytic",
        distance_gap(made[SMALL, few], made["analytic", few], true[n:]))


def claim_about_decoder_steps(found, made):
    """What the paper says of the decoder's steps, in pictures {(rule, steps): Seen}."""
    rules, counts = rules_and_counts(made)
    ancestral, few = rules[0], counts[min(1, len(counts) - 1)]
    found.claim(
        "where steps are few (upsamplers), DDIM is used and not ancestral steps",
        f"right, {few} steps: DDIM − {ancestral}",
        gap(made["DDIM", few].right, made[ancestral, few].right), "%")
    found.claim(
        "the decoder takes many ancestral steps (250)",
        f"right, {ancestral}: {counts[-1]} − {counts[0]} steps",
        gap(made[ancestral, counts[-1]].right, made[ancestral, counts[0]].right), "%")
    if ancestral != LEARNED:
        found.notes.append(
            "This preset hardly trains the decoder's variance and does not sample with it: its "
            "ancestral steps have β̃.")
