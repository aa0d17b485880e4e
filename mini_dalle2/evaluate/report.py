"""The report of an evaluation: tables, plots and verdicts, made from what experiments found.

Findings are the plain values of findings.py: {name of an experiment: its findings}.

Read next: experiments.py.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure as Sheet

from ..metrics.intervals import Figure, agrees, share
from ..metrics.sets import retrieval_hits
from ..runtime.files import atomic_open, load_checkpoint
from ..runtime.processes import is_main
from ..training.figures import save_figure
from .experiments import EXPERIMENTS, suitable

RESULTS = Path(__file__).resolve().parents[2] / "notebooks" / "results.md"
# What a page of results shows, as far as an evaluation made it.
IN_RESULTS = (
    "pictures.png", "guidance_plot.png", "components_plot.png", "textdiff_plot.png",
    "steps_plot.png")
LINE_COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple")
MARKERS = "osD^"


# -------------------------------------------------------------------- Markdown

def text_of(figure, unit):
    """Write [value, low, high] as "27.0 % (21.8 to 32.8)", and None as a dash."""
    if figure is None:
        return "–"
    value, low, high = (f"{100 * x:.1f}" if unit == "%" else f"{x:.3g}" for x in figure)
    return f"{value}{' %' if unit == '%' else ''} ({low} to {high})"


def markdown(lines):
    """Write a table, a list of lists of cells with the head first, as Markdown."""
    head, *rows = lines
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def table_of(table):
    """Write a table of findings as Markdown."""
    lines = [[table["first"], *table["columns"]]]
    for name, figures in table["rows"].items():
        lines.append([name, *map(text_of, figures, table["columns"].values())])
    return markdown(lines)


def verdict(claim):
    """Return "yes", "no" or "cannot tell"."""
    difference = claim["difference"]
    return agrees(Figure(*difference)) if difference else "cannot tell"


def claims_of(claims, head="the paper"):
    """Write claims (or checks) as Markdown: a list of (claim, leading cells such as a name)."""
    before = ["experiment"] if claims and claims[0][1] else []
    lines = [[*before, head, "here: this difference, and its interval", "agrees"]]
    for claim, names in claims:
        difference = f"{claim['here']}: {text_of(claim['difference'], claim['unit'])}"
        lines.append([*names, claim["paper"], difference, verdict(claim)])
    return markdown(lines)


def all_claims(all_findings):
    """Write the claims of all experiments as one table, with the names of the experiments."""
    return claims_of([(claim, [name]) for name, findings in all_findings.items()
                      for claim in findings["claims"]])


# -------------------------------------------------------------------- plots

def plot(spec, path):
    """Plot what Findings.plot added: panels beside each other, lines with their intervals."""
    panels = spec["panels"]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    size = max(5, 3.4 * columns), 3.2 * rows
    # White whatever is behind the picture.
    figure = Sheet(figsize=size, layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(panels):]:
        axes.axis("off")
    for axes, (name, (unit, lines)) in zip(grid, panels.items()):
        plot_panel(axes, spec, name, unit, lines)
    save_figure(figure, path)


def plot_panel(axes, spec, name, unit, lines):
    """Plot one panel: lines {name: figures at the values of the x axis}."""
    values, scale = spec["values"], 100 if unit == "%" else 1
    for i, (line, figures) in enumerate(lines.items()):
        known = [figure or [np.nan] * 3 for figure in figures]
        value, low, high = scale * np.array(known, dtype=float).T
        colour = LINE_COLOURS[i % 4]
        axes.plot(values, value, marker=MARKERS[i % 4], markersize=4, color=colour, label=line)
        axes.fill_between(values, low, high, color=colour, alpha=0.15, linewidth=0)
    axes.set(xlabel=spec["x"], ylabel=f"{name}, %" if unit == "%" else name)
    if spec["log"]:
        axes.set_xscale("log", base=2)
    axes.set_xticks(values, [f"{value:g}" for value in values])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=8)


def plot_all(lab, all_findings):
    """Plot everything in RUN/evaluate: {experiment: {file: title}}."""
    files = {}
    for name, found in all_findings.items():
        files[name] = {}
        for i, spec in enumerate(found["plots"], start=1):
            file = f"{name}_plot{i if i > 1 else ''}.png"
            files[name][file] = f"{EXPERIMENTS[name].title}: by {spec['x']}"
            if is_main():
                plot(spec, lab.folder / file)
    return files


# -------------------------------------------------------------------- RUN/report.md

WORDS = """\
*Fréchet distance*: how far a set of pictures lies from true ones, by mean and spread of the judge's
features. It is extrapolated to infinitely many pictures: between two sets alike it is near zero, on
either side. *Precision* is the share of generated pictures that lie among true ones, *recall* the
share of true pictures that lie among generated ones. *CLIP score*: how well pictures fit their
captions, as the judge sees it. *η* says how much fresh noise a sampling step adds, from 0 (none) to
1. *θ* says how far one goes from one thing to another, from 0 to 1. In the tables more is better
under ↑, less is better under ↓."""


def write_report(lab, all_findings):
    """Plot the findings and write RUN/report.md; return {file of a plot: title}."""
    plots = plot_all(lab, all_findings)
    parts = [section(EXPERIMENTS[name], found, plots[name]) for name, found in all_findings.items()]
    missing = [one.name for one in suitable(lab, None) if one.name not in all_findings]
    # By names: what experiments share counts once.
    seconds = {}
    for found in all_findings.values():
        seconds |= found["seconds"]
    head = [
        f"# What {lab.run} shows of the paper's findings", WORDS, about(lab),
        all_claims(all_findings),
        f"Together {minutes(seconds)} minutes, for training the variants, sampling and measuring."]
    if missing:
        head.append(f"Not done yet: {', '.join(missing)}.")
    if is_main():
        with atomic_open(lab.run / "report.md") as file:
            file.write(("\n\n".join(head + parts) + "\n").encode())
    return {file: title for files in plots.values() for file, title in files.items()}


def minutes(seconds):
    """Write the sum of {name: seconds} in minutes."""
    return f"{sum(seconds.values()) / 60:.1f}"


def section(one, found, plots):
    """Write an experiment's part of the report; plots: {file: title}."""
    n = f", n = {' and '.join(map(str, found['n']))}" if found["n"] else ""
    asked = " ".join(one.find.__doc__.split())
    words = (f"`{one.name}`{n}, {minutes(found['seconds'])} minutes with what it shares with "
             f"others. {asked}")
    kinds = {"claims": "the paper", "checks": "check of the method: true by construction"}
    claims = [claims_of([(claim, []) for claim in found[kind]], head)
              for kind, head in kinds.items() if found[kind]]
    pictures = plots | {grid: one.title for grid in found["grids"]}
    images = [f"![{title}](evaluate/{file})" for file, title in pictures.items()]
    tables = [table_of(table) for table in found["tables"]]
    return "\n\n".join([f"## {one.title}", words, *tables, *claims, *found["notes"], *images])


def about(lab):
    """Say who judges, and how."""
    judge, cfg = lab.checkpoint("judge"), lab.judge.cfg
    true = lab.true(len(lab.real()[1]))
    found = share(retrieval_hits(true.z, true.z_txt, true.captions))
    if lab.shapes:
        right = "the grader's verdict on everything in a picture"
    else:
        right = "a picture whose own caption the judge finds among those of the whole set"
    lines = [
        f"{in_short(lab)} Captions are of `val`, pictures of {lab.size} pixels, unless something "
        "else is said. Generated sets are compared with "
        f"{len(lab.others().captions):,} true pictures of other captions. In brackets: 95 % "
        "intervals, from a bootstrap over captions (shares: in closed form). A claim of the paper "
        "agrees if the interval of its difference lies above zero, and does not if the interval "
        "lies below; otherwise one cannot tell. The intervals are over captions and noise, not "
        "over trainings, which might come out differently. Of twenty claims one may be wrong by "
        "chance.",
        f"The judge is a CLIP with {cfg.vision_width} channels instead of "
        f"{lab.model.clip.cfg.vision_width} and a seed of its own, trained for "
        f"{judge['steps']:,} steps ({judge['seconds'] / 60:.1f} minutes). It finds the caption of "
        f"a true picture among {len(true.captions):,} for {text_of(found, '%')}. *Right* is "
        f"{right}."]
    if lab.signature_of("glide"):
        lines.append(about_glide(lab))
    return "\n\n".join(lines)


def about_glide(lab):
    """Say what the baseline is."""
    glide = lab.checkpoint("glide")
    text = (f"GLIDE is the decoder again, trained for {glide['steps']:,} steps "
            f"({glide['seconds'] / 60:.1f} minutes). It never sees z_img")
    if getattr(lab.model.decoder, "sketch", None) is None:
        return text + "."
    return text + ", nor the sketch that ours sees. The sketch's own training is not counted."


def in_short(lab):
    """Say what was evaluated, in a sentence."""
    steps = []
    for stage in ("clip", "prior", "ar_prior", "decoder"):
        path = lab.run / f"{stage}.pt"
        if path.is_file():
            steps.append(f"{stage} {load_checkpoint(path)['step']:,}")
    return (f"Preset {lab.config.preset}, {lab.n} captions; steps of training: "
            f"{', '.join(steps)}.")


# -------------------------------------------------------------------- a page of results

def split_page(path, name):
    """Return (text before, text behind) the place of a name in a page, marks included.

    The marks are <!-- NAME: begin --> and <!-- NAME: end -->. Raises ValueError without them,
    FileNotFoundError without the page.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path} to put the table into")
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ended, behind = rest.partition(end)
    if not (found and ended) or begin in rest or end in before + behind:
        raise ValueError(f"{path} does not say where the table goes: write {begin} on one line, "
                         f"and {end} on the next")
    return before + begin, end + behind


def write_results(lab, path, name, all_findings, plots, command):
    """Put the main table, some plots and the command that makes them into their place in a page.

    name: "shapes" or the folder's name; plots: {file: title}. The plots go into images/ beside
    the page.
    """
    before, behind = split_page(path, f"evaluate {name}")
    folder = path.parent / "images"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        f"By `{command}`: {in_short(lab)} 95 % intervals in brackets. `{lab.run}/report.md` says "
        "how each was found.",
        all_claims(all_findings)]
    if "pictures" in all_findings:
        lines.append(table_of(all_findings["pictures"]["tables"][0]))
        title = "Pictures sampled for captions whose own pictures were never trained on"
        plots = {"pictures.png": title} | plots
    for file in [file for file in IN_RESULTS if file in plots]:
        with atomic_open(folder / f"evaluate_{name}_{file}") as copied:
            copied.write((lab.folder / file).read_bytes())
        lines.append(f"![{plots[file]}](images/evaluate_{name}_{file})")
    with atomic_open(path) as file:
        file.write((before + "\n" + "\n\n".join(lines) + "\n" + behind).encode())


# Names of before, for those who import them.
IN_README = IN_RESULTS
split_readme = split_page
