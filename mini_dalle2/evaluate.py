"""The evaluation command: the paper's experiments on a finished run, and a report of what they show.

    python -m mini_dalle2.evaluate --run runs/tiny                       all of them: half an hour on two CPU cores
    python -m mini_dalle2.evaluate --run runs/tiny --only fig8 steps     some of them
    python -m mini_dalle2.evaluate --run runs/tiny --n 64                quicker, with wider intervals
    python -m mini_dalle2.evaluate --run runs/tiny --readme              also puts the main table and the plots into README.md

It writes RUN/report.md, and into RUN/evaluate what the report shows. First it says how long each part will take. Whatever has been done stays
done: called again after Ctrl-C it goes on, called again after the end it only writes the report. It does again what other weights, another
--n or another version of these files make out of date. RUN/evaluate/cache-… only saves time; it may be deleted.

The text of a report is made from what experiments.py found, kept in RUN/evaluate/NAME.json; no figure in it is typed. In brackets behind each
stands its 95 % interval. Read next: lab.py, experiments.py.
"""

import argparse
import difflib
import functools
import hashlib
import inspect
import re
import shlex
import sys
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure as Sheet
from tqdm import tqdm

from . import experiments, lab as lab_module, metrics
from .configs import Parser, sentence
from .experiments import EXPERIMENTS, Findings
from .lab import LEAST, Draw, Lab, has_efficientnet
from .metrics import Figure, agrees
from .pipeline import out_of_memory
from .report import save_figure
from .stages import read_json, write_json
from .training import atomic_open, load_checkpoint, pick_device

README = Path(__file__).resolve().parent.parent / "README.md"
N = 160                                                                    # captions: `tiny` then takes less than forty minutes on two cores
BEGIN, END = "<!-- evaluate: begin -->", "<!-- evaluate: end -->"
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple")
MARKERS = "osD^"


def parse(argv):
    """Command line -> namespace. Raises ValueError."""
    parser = Parser(prog="evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    epilog="experiments: " + ", ".join(EXPERIMENTS))
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"), help="run folder of train.py, finished (default: runs/tiny)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these experiments")
    parser.add_argument("--n", type=int, default=N, help=f"captions that pictures are drawn for (default: {N})")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--readme", nargs="?", type=Path, const=README, metavar="FILE",
                        help="put the main table and the plots there (default: README.md)")
    args = parser.parse_args(argv)
    for name in args.only or ():
        if name not in EXPERIMENTS:
            closest = difflib.get_close_matches(name, EXPERIMENTS, n=1, cutoff=0)[0]
            raise ValueError(f'there is no experiment "{name}" (there are {", ".join(EXPERIMENTS)}); the closest is {closest}')
    if not LEAST <= args.n <= 10_000:
        raise ValueError(f"--n {args.n}: from {LEAST} to 10000 captions")
    if args.readme is not None:
        split_readme(args.readme)
    return args


# ---------------------------------------------------------------------------------------------------------------- doing them

def models_of(lab, one):
    """{name: (stage, settings, what it is)} of all models that are trained for an experiment: the judge is needed by each."""
    return {"judge": lab.side_models()["judge"]} | one.models(lab)


@functools.cache
def version():
    """The text of what finds things: what it found is out of date when it changes."""
    return "".join(inspect.getsource(module) for module in (experiments, lab_module, metrics))


def key(lab, one):
    """What the findings of an experiment depend on, as text; None while a model that they need has yet to be trained."""
    trained = [lab.trained(name, *model[:2]) for name, model in models_of(lab, one).items()]
    if None in trained:
        return None
    recipes = [lab.key(lab.settled(recipe)) for recipe in one.needs(lab).values()]
    return hashlib.sha256(repr((lab.cache.name, lab.n, trained, recipes, version(), has_efficientnet())).encode()).hexdigest()


def known(lab, one):
    """The findings of an experiment from RUN/evaluate/NAME.json, or None if they are not there, damaged or out of date."""
    try:
        saved = read_json(lab.folder / f"{one.name}.json")
        same = saved["key"] == key(lab, one) and all((lab.folder / name).is_file() for name in saved["findings"]["grids"])
        return saved["findings"] if same else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def perform(lab, one, place):
    """Does an experiment: trains and draws what it needs, looks at it, keeps what it finds."""
    for name, (stage, settings, what) in models_of(lab, one).items():
        if lab.trained(name, stage, settings) is None:
            print(f"{what}: is trained once and kept in {lab.folder}", flush=True)
            lab.beside(name, stage, settings)
    began, needs = time.perf_counter(), one.needs(lab)
    missing = lab.missing(needs.values())
    graded = lab.speed("grader") if lab.shapes else 0.0
    total = sum(map(lab.seconds, missing)) + graded * sum(recipe.n for recipe in needs.values() if isinstance(recipe, Draw))
    with tqdm(total=max(total, 1e-3), desc=f"{one.name} ({place})", bar_format="{l_bar}{bar}| {elapsed}<{remaining}", leave=False) as lab.bar:
        made = {}
        for name, recipe in needs.items():
            made[name] = lab.make(recipe)
            if isinstance(recipe, Draw):
                made[name] = lab.seen(recipe)
                made[name].right                                           # the grader's work belongs to the bar too
                lab.spent(graded * recipe.n)
    lab.bar, found = None, Findings()
    one.find(lab, found, made)
    findings = vars(found) | {"seconds": time.perf_counter() - began}
    write_json({"key": key(lab, one), "findings": findings}, lab.folder / f"{one.name}.json")
    said = ", ".join(agrees(Figure(*claim["difference"])) for claim in found.claims) or "nothing to compare"
    print(f"{one.name}: does it agree with the paper? {said} ({findings['seconds'] / 60:.1f} minutes)", flush=True)


def plan(lab, chosen):
    """Prints what is to be done and how long each part will take, about."""
    print(f"{lab.run}: {len(chosen)} experiments on {lab.n} captions")
    recipes, lines = set(), []
    for name, (stage, settings, what) in {name: model for one in chosen for name, model in models_of(lab, one).items()}.items():
        if seconds := lab.training_seconds(name, stage, settings):
            lines.append((what, seconds))
    for one in chosen:
        if known(lab, one) is None:
            needs = list(one.needs(lab).values())
            new = [recipe for recipe in lab.missing(needs) if recipe not in recipes]
            recipes.update(new)
            graded = sum(recipe.n for recipe in new if isinstance(recipe, Draw)) * lab.speed("grader") if lab.shapes else 0.0
            lines.append((one.name, sum(map(lab.seconds, new)) + graded))
    for name, seconds in lines + [("together, and a few minutes for intervals", sum(seconds for _, seconds in lines))] if lines else []:
        print(f"  {name:<64}{seconds / 60:6.1f} minutes, about")


def fitting(lab, only):
    """The experiments to be done. Raises ValueError when one was asked for that these pictures cannot have."""
    kind = "shapes" if lab.shapes else "folder"
    for name in only or ():
        if EXPERIMENTS[name].data not in ("any", kind):
            needed = "a folder of real pictures" if lab.shapes else "captioned shapes"
            raise ValueError(f"{name} needs {needed}, which {lab.run} did not learn from")
    return [one for one in EXPERIMENTS.values() if (one.name in only if only else one.data in ("any", kind))]


# ---------------------------------------------------------------------------------------------------------------- the report

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


def claims_of(all_findings, named=True):
    """All claims of {name: findings} as Markdown; named: with the name of each one's experiment."""
    lines = [["experiment", "the paper", "here: this difference, and its interval", "agrees"], ["---"] * 4]
    lines += [[name, claim["paper"], f"{claim['here']}: {text_of(claim['difference'], claim['unit'])}", agrees(Figure(*claim["difference"]))]
              for name, findings in all_findings.items() for claim in findings["claims"]]
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
            value, low, high = scale * np.array(figures, dtype=float).T
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
            plot(spec, lab.folder / list(files)[-1])
        plots |= files
        images = [f"![{title}](evaluate/{file})" for file, title in (files | {grid: one.title for grid in found["grids"]}).items()]
        claims = [claims_of({one.name: found}, named=False)] if found["claims"] else []
        words = f"`{one.name}`, {found['seconds'] / 60:.1f} minutes. {one.find.__doc__}"
        parts.append("\n\n".join([f"## {one.title}", words, *map(table_of, found["tables"]), *claims, *found["notes"], *images]))
    missing = [one.name for one in fitting(lab, None) if one.name not in all_findings]
    head = [f"# What {lab.run} shows of the paper's findings", about(lab), claims_of(all_findings)]
    head += [f"Not done yet: {', '.join(missing)}."] if missing else []
    with atomic_open(lab.run / "report.md") as file:
        file.write(("\n\n".join(head + parts) + "\n").encode())
    return plots


def about(lab):
    """Who judges, and how: the report's first words."""
    judge, cfg = load_checkpoint(lab.folder / "judge.pt", "clip"), lab.judge.cfg
    true = lab.true(len(lab.real()[1]))
    found = metrics.share(metrics.retrieval_hits(true.z, true.z_txt, true.captions))
    right = "the grader's verdict on everything in a picture" if lab.shapes else "a picture whose own caption the judge finds among the crowd's"
    lines = [f"Preset {lab.job.config.preset}, {lab.n} captions of `val` for each crowd of pictures, at {lab.size} pixels, unless something else is "
             "said. In brackets: 95 % intervals, from a bootstrap over captions (shares: in closed form). A claim of the paper agrees if the interval of "
             "the difference that it is about lies above zero, does not if it lies below; otherwise nothing can be told.",
             f"The judge is a CLIP with {cfg.vision_width} channels instead of {lab.model.clip.cfg.vision_width} and a seed of its own, trained for "
             f"{judge['steps']:,} steps ({judge['seconds'] / 60:.1f} minutes); it finds the caption of a true picture among {len(true.captions):,} "
             f"for {text_of(found, '%')}. *Right* is {right}."]
    if lab.glide_signature():
        glide = load_checkpoint(lab.folder / "glide.pt", "decoder")
        lines.append(f"GLIDE is the decoder once more, {glide['steps']:,} steps ({glide['seconds'] / 60:.1f} minutes), which never sees z_img.")
    return "\n\n".join(lines)


# ---------------------------------------------------------------------------------------------------------------- the README

def split_readme(path):
    """(text before the markers, text behind them). Raises ValueError, FileNotFoundError when they are not there, once each and in order."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path} to put the table into")
    parts = re.split(f"{BEGIN}|{END}", path.read_text(encoding="utf-8"))
    text = path.read_text(encoding="utf-8")
    if len(parts) != 3 or text.find(BEGIN) > text.find(END):
        raise ValueError(f"{path} does not say where the table goes: write {BEGIN} on one line, and {END} on the next")
    return parts[0], parts[2]


def write_readme(lab, path, all_findings, plots, command):
    """Puts the main table, the plots, and the command that makes them, between the markers, and the plots into notebooks/images beside it."""
    before, behind = split_readme(path)
    folder = path.parent / "notebooks" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"By `{command}`: {lab.n} captions, 95 % intervals in brackets; `{lab.run}/report.md` says how each was found.", claims_of(all_findings)]
    for name, title in plots.items():
        with atomic_open(folder / f"evaluate_{name}") as file:
            file.write((lab.folder / name).read_bytes())
        lines.append(f"![{title}](notebooks/images/evaluate_{name})")
    with atomic_open(path) as file:
        file.write((before + BEGIN + "\n" + "\n\n".join(lines) + "\n" + END + behind).encode())


# ---------------------------------------------------------------------------------------------------------------- the command

def work(args):
    """Does what is asked for."""
    lab = Lab(args.run, args.n, pick_device(args.device))
    chosen = fitting(lab, args.only)
    lab.sweep()
    lab.folder.mkdir(exist_ok=True)
    plan(lab, chosen)
    for i, one in enumerate(chosen, start=1):
        if known(lab, one) is None:
            perform(lab, one, f"{i} of {len(chosen)}")
    all_findings = {one.name: found for one in EXPERIMENTS.values() if (found := known(lab, one)) is not None}
    plots = write_report(lab, all_findings)
    print(f"the report: {lab.run / 'report.md'}")
    if args.readme is not None:
        n = f" --n {args.n}" if args.n != N else ""
        write_readme(lab, args.readme, all_findings, plots, f"python -m mini_dalle2.evaluate --run {shlex.quote(str(args.run))}{n} --readme")


def main(argv=None):
    """The command: 0 when all went well, 2 after a mistake (one sentence on standard error), 130 after Ctrl-C."""
    try:
        work(parse(argv))
        return 0
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on where it was", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        message = "there is not enough memory for this: lower --n"
    except (ValueError, OSError, FloatingPointError) as error:
        message = sentence(error)
    print(f"evaluate: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
