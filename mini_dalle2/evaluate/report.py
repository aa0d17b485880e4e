"""The report of an evaluation: tables, plots and verdicts, made from what the experiments found.

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
from .experiments import EXPERIMENTS, fitting


README = Path(__file__).resolve().parents[2] / "notebooks" / "results.md"
IN_README = ("pictures.png", *(f"{name}_plot.png" for name in ("guidance", "components", "textdiff", "steps")))       # those that there are
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple")
MARKERS = "osD^"


def text_of(figure, unit):
    """[value, low, high] -> "27.0 % (21.8 to 32.8)"; None, for what there is not, a dash."""
    if figure is None:
        return "–"
    value, low, high = (f"{100 * x:.1f}" if unit == "%" else f"{x:.3g}" for x in figure)
    return f"{value}{' %' if unit == '%' else ''} ({low} to {high})"


def table_of(table):
    """A table of findings as Markdown."""
    lines = [[table["first"], *table["columns"]], ["---"] * (1 + len(table["columns"]))]
    lines += [[name, *map(text_of, figures, table["columns"].values())] for name, figures in table["rows"].items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def verdict(claim):
    """ "yes", "no" or "cannot tell"."""
    return agrees(Figure(*claim["difference"])) if claim["difference"] else "cannot tell"


def claims_of(all_findings, named=True, kind="claims", head="the paper"):
    """All claims (or "checks") of {name: findings} as Markdown; named: with the name of each one's experiment."""
    lines = [["experiment", head, "here: this difference, and its interval", "agrees"], ["---"] * 4]
    lines += [[name, claim["paper"], f"{claim['here']}: {text_of(claim['difference'], claim['unit'])}", verdict(claim)]
              for name, findings in all_findings.items() for claim in findings[kind]]
    return "\n".join(f"| {' | '.join(line if named else line[1:])} |" for line in lines)


def plot(spec, path):
    """Draws a plot of findings: its panels beside each other, each line with its intervals, dark on white whatever is behind the picture."""
    panels = spec["panels"]
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Sheet(figsize=(max(5, 3.4 * columns), 3.2 * rows), layout="constrained", facecolor="white")
    grid = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in grid[len(panels):]:
        axes.axis("off")
    for axes, (name, (unit, lines)) in zip(grid, panels.items()):
        scale = 100 if unit == "%" else 1
        for i, (line, figures) in enumerate(lines.items()):
            value, low, high = scale * np.array([figure or [np.nan] * 3 for figure in figures], dtype=float).T
            axes.plot(spec["values"], value, marker=MARKERS[i % 4], markersize=4, color=COLOURS[i % 4], label=line)
            axes.fill_between(spec["values"], low, high, color=COLOURS[i % 4], alpha=0.15, linewidth=0)
        axes.set(xlabel=spec["x"], ylabel=f"{name}, %" if unit == "%" else name)
        if spec["log"]:
            axes.set_xscale("log", base=2)
        axes.set_xticks(spec["values"], [f"{value:g}" for value in spec["values"]])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        if len(lines) > 1:
            axes.legend(fontsize=8)
    save_figure(figure, path)


def write_report(lab, all_findings):
    """Draws the plots and writes RUN/report.md from the findings {name: findings}; returns {plot's file: title}."""
    plots, parts = {}, []
    for one in EXPERIMENTS.values():
        if one.name not in all_findings:
            continue
        found, files = all_findings[one.name], {}
        for i, spec in enumerate(found["plots"], start=1):
            files[f"{one.name}_plot{i if i > 1 else ''}.png"] = f"{one.title}: by {spec['x']}"
            if is_main():
                plot(spec, lab.folder / list(files)[-1])
        plots |= files
        images = [f"![{title}](evaluate/{file})" for file, title in (files | {grid: one.title for grid in found["grids"]}).items()]
        claims = [claims_of({one.name: found}, False, kind, head) for kind, head in (
            ("claims", "the paper"), ("checks", "check of the method: true by construction")) if found[kind]]
        of = f", n = {' and '.join(map(str, found['n']))}" if found["n"] else ""
        words = f"`{one.name}`{of}, {sum(found['seconds'].values()) / 60:.1f} minutes with what it shares with others. {one.find.__doc__}"
        parts.append("\n\n".join([f"## {one.title}", words, *map(table_of, found["tables"]), *claims, *found["notes"], *images]))
    missing = [one.name for one in fitting(lab, None) if one.name not in all_findings]
    seconds = {name: value for found in all_findings.values() for name, value in found["seconds"].items()}
    head = [f"# What {lab.run} shows of the paper's findings", WORDS, about(lab), claims_of(all_findings),
            f"Together {sum(seconds.values()) / 60:.1f} minutes, of training and drawing for it, and of looking."]
    head += [f"Not done yet: {', '.join(missing)}."] if missing else []
    if is_main():
        with atomic_open(lab.run / "report.md") as file:
            file.write(("\n\n".join(head + parts) + "\n").encode())
    return plots


WORDS = """\
*Fréchet distance*: how far a crowd of pictures lies from true ones, by mean and spread of what the judge sees in them; it is extrapolated to
infinitely many pictures, so that of two crowds alike it is near zero, on either side. *Precision* is the share of drawn pictures that lie among true
ones, *recall* the share of true pictures that lie among drawn ones. *CLIP score*: how well pictures fit their captions, as the judge sees it. *η*
says how much fresh noise a step of sampling adds, from 0, none, to 1; *θ* how far one goes from one thing to another, from 0 to 1. In the tables
more is better under ↑, less is better under ↓."""


def about(lab):
    """Who judges, and how."""
    judge, cfg = load_checkpoint(lab.folder / "judge.pt", "clip"), lab.judge.cfg
    true = lab.true(len(lab.real()[1]))
    found = share(retrieval_hits(true.z, true.z_txt, true.captions))
    right = "the grader's verdict on everything in a picture" if lab.shapes else "a picture whose own caption the judge finds among the crowd's"
    lines = [f"{in_short(lab)} Captions are of `val`, pictures of {lab.size} pixels, unless something else is said. Crowds are compared with "
             f"{len(lab.others().captions):,} true pictures of other captions. In brackets: 95 % intervals, from a bootstrap over captions (shares: "
             "in closed form). A claim of the paper agrees if the interval of the difference that it is about lies above zero, does not if it "
             "lies below; otherwise nothing can be told. The intervals are over captions and noise, not over trainings, which might come out "
             "otherwise; and of twenty claims one may be wrong by chance.",
             f"The judge is a CLIP with {cfg.vision_width} channels instead of {lab.model.clip.cfg.vision_width} and a seed of its own, trained for "
             f"{judge['steps']:,} steps ({judge['seconds'] / 60:.1f} minutes); it finds the caption of a true picture among {len(true.captions):,} "
             f"for {text_of(found, '%')}. *Right* is {right}."]
    if lab.glide_signature():
        glide = load_checkpoint(lab.folder / "glide.pt", "decoder")
        lines.append(f"GLIDE is the decoder once more, {glide['steps']:,} steps ({glide['seconds'] / 60:.1f} minutes), which never sees z_img" + (
            ", nor the sketch of it that ours is shown, whose own training is not counted here." if lab.model.decoder.cfg.sketch else "."))
    return "\n\n".join(lines)


def in_short(lab):
    """What was evaluated, in a sentence."""
    steps = {m: load_checkpoint(lab.run / f"{m}.pt")["step"] for m in ("clip", "prior", "ar_prior", "decoder") if (lab.run / f"{m}.pt").is_file()}
    return f"Preset {lab.job.config.preset}, {lab.n} captions; steps of training: " + ", ".join(f"{m} {n:,}" for m, n in steps.items()) + "."


def split_readme(path, name):
    """(text before, text behind) the place of that name: <!-- NAME: begin -->, and with `end`. Raises ValueError, FileNotFoundError."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path} to put the table into")
    begin, end = (f"<!-- {name}: {which} -->" for which in ("begin", "end"))
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, ended, behind = rest.partition(end)
    if not (found and ended) or begin in rest or end in before + behind:
        raise ValueError(f"{path} does not say where the table goes: write {begin} on one line, and {end} on the next")
    return before + begin, end + behind


def write_readme(lab, path, name, all_findings, plots, command):
    """Puts the main table, some plots, and the command that makes them, into their place, and the plots into notebooks/images beside it."""
    before, behind = split_readme(path, f"evaluate {name}")
    folder = path.parent / "notebooks" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"By `{command}`: {in_short(lab)} 95 % intervals in brackets; `{lab.run}/report.md` says how each was found.", claims_of(all_findings)]
    if "pictures" in all_findings:
        lines.append(table_of(all_findings["pictures"]["tables"][0]))
        plots = {"pictures.png": "Pictures drawn for captions whose own pictures were never trained on"} | plots
    for file in [file for file in IN_README if file in plots]:
        with atomic_open(folder / f"evaluate_{name}_{file}") as copied:
            copied.write((lab.folder / file).read_bytes())
        lines.append(f"![{plots[file]}](notebooks/images/evaluate_{name}_{file})")
    with atomic_open(path) as file:
        file.write((before + "\n" + "\n\n".join(lines) + "\n" + behind).encode())
