"""The evaluation command: the paper's experiments on a finished run, and a report of what they show.

    python -m mini_dalle2.evaluate --run runs/tiny                       all of them: half an hour on two CPU cores
    python -m mini_dalle2.evaluate --run runs/tiny --only fig8 steps     some of them
    python -m mini_dalle2.evaluate --run runs/tiny --n 64                quicker, with wider intervals
    python -m mini_dalle2.evaluate --run runs/tiny --readme              also puts the main table and some plots into README.md
    torchrun --nproc_per_node=2 -m -- mini_dalle2.evaluate --run runs/tiny     each process draws half of the pictures

It writes RUN/report.md, and into RUN/evaluate what the report shows. First it says how long each part will take. Whatever has been done stays
done: called again after Ctrl-C it goes on, called again after the end it only writes the report. It does again what other weights, other
pictures to learn from, another --n or other code make out of date. RUN/evaluate/cache-… only saves time; it may be deleted.

The text of a report is made from what experiments.py found, kept in RUN/evaluate/NAME.json; no figure in it is typed. In brackets behind each
stands its 95 % interval. README.md has a place for captioned shapes and one for each folder of pictures: see `split_readme`.
Read next: lab.py, experiments.py.
"""

import argparse
import contextlib
import difflib
import shlex
import sys
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure as Sheet
from tqdm import tqdm

from . import lab as lab_module
from .commands import run_command
from .configs import Parser
from .distributed import agreed, is_main, launcher, world
from .experiments import EXPERIMENTS, Findings
from .lab import LEAST, Draw, Lab, digest, has_efficientnet
from .metrics import Figure, agrees, retrieval_hits, share
from .report import save_figure
from .stages import read_json, write_json
from .training import atomic_open, load_checkpoint

README = Path(__file__).resolve().parent.parent / "README.md"
N = 128                                                                    # captions: `tiny` then takes less than forty minutes on two cores
IN_README = ("pictures.png", *(f"{name}_plot.png" for name in ("guidance", "components", "textdiff", "steps")))       # those that there are
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
                        help="put the main table and some plots there (default: README.md); not with --only")
    args = parser.parse_args(argv)
    for name in args.only or ():
        if name not in EXPERIMENTS:
            closest = difflib.get_close_matches(name, EXPERIMENTS, n=1, cutoff=0)[0]
            raise ValueError(f'there is no experiment "{name}" (there are {", ".join(EXPERIMENTS)}); the closest is {closest}')
    if not LEAST <= args.n <= 10_000:
        raise ValueError(f"--n {args.n}: from {LEAST} to 10000 captions")
    if args.readme is not None and args.only:
        raise ValueError("--readme shows all experiments: leave out --only")
    return args


# ---------------------------------------------------------------------------------------------------------------- doing them

def models_of(lab, one):
    """{name: (stage, settings, what it is)} of all models that are trained for an experiment: the judge is needed by each."""
    return {"judge": lab.side_models()["judge"]} | one.models(lab)


def key(lab, one):
    """What the findings of an experiment depend on, as digits; None while a model that they need has yet to be trained."""
    trained = [lab.trained(name, *model[:2]) for name, model in models_of(lab, one).items()]
    if None in trained:
        return None
    return digest(lab.cache.name, lab.n, trained, [lab.key(lab.settled(recipe)) for recipe in one.needs(lab).values()], lab_module.code(),
                  has_efficientnet())


def known(lab, one):
    """The findings of an experiment from RUN/evaluate/NAME.json, or None if they are not there, damaged or out of date."""
    before, findings = None, None
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        saved = read_json(lab.folder / f"{one.name}.json")
        if all((lab.folder / name).is_file() for name in saved["findings"]["grids"]):
            before, findings = saved["key"], saved["findings"]
    before, findings = agreed((before, findings))
    return findings if findings and before == key(lab, one) else None      # the key is asked for by all processes, or by none


def perform(lab, one, place):
    """Does an experiment: trains and draws what it needs, looks at it, keeps what it finds."""
    for name, (stage, settings, what) in models_of(lab, one).items():
        if lab.trained(name, stage, settings) is None:
            print(f"{what}: is trained once and kept in {lab.folder}", flush=True)
            lab.beside(name, stage, settings)
    needs, made = one.needs(lab), {}
    missing = lab.missing(needs.values())
    graded = lab.speed("grader") if lab.shapes else 0.0
    total = sum(map(lab.seconds, missing)) + graded * sum(recipe.n for recipe in needs.values() if isinstance(recipe, Draw))
    with tqdm(total=max(total, 1e-3), desc=f"{one.name} ({place})", bar_format="{l_bar}{bar}| {elapsed}<{remaining}", leave=False,
              disable=not is_main()) as lab.bar:
        for name, recipe in needs.items():
            for part in lab.ingredients(recipe):
                made[name] = lab.make(part)
            if isinstance(recipe, Draw):
                made[name] = lab.seen(recipe)
                made[name].right                                           # the grader's work belongs to the bar too
                lab.spent(graded * recipe.n)
    lab.bar, found, began = None, Findings(), time.perf_counter()
    one.find(lab, found, made)
    # What it took, each part by its own name: experiments share models and pictures, and a total must count those once.
    seconds = {one.name: time.perf_counter() - began}
    seconds |= {lab.key(part): lab.took[part] for recipe in needs.values() for part in lab.ingredients(recipe)}
    seconds |= {name: load_checkpoint(lab.folder / f"{name}.pt", stage)["seconds"] for name, (stage, _, _) in models_of(lab, one).items()}
    findings = vars(found) | {"seconds": seconds, "n": sorted({recipe.n for recipe in needs.values()})}
    now = key(lab, one)
    if is_main():
        write_json({"key": now, "findings": findings}, lab.folder / f"{one.name}.json")
    print(f"{one.name}: does it agree with the paper? {', '.join(map(verdict, found.claims)) or 'nothing to compare'}", flush=True)


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


# ---------------------------------------------------------------------------------------------------------------- the README

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


# ---------------------------------------------------------------------------------------------------------------- the command

def work(args, device):
    """Does what is asked for. Several processes all go through the same, for they must meet wherever pictures are drawn; the first one writes."""
    lab = Lab(args.run, args.n, device)
    name = "shapes" if lab.shapes else Path(lab.job.config.data.source).resolve().name
    if args.readme is not None:
        split_readme(args.readme, f"evaluate {name}")                      # before half an hour is spent
    chosen = fitting(lab, args.only)
    for stage in ("clip", "decoder"):                                      # which are trained once more
        if (size := getattr(lab.job.config, stage).train.batch_size) % world():
            raise ValueError(f"{stage} learned from {size} examples a step, which cannot be divided among {world()} processes")
    lab.sweep()
    lab.folder.mkdir(exist_ok=True)
    plan(lab, chosen)
    for i, one in enumerate(chosen, start=1):
        if known(lab, one) is None:
            perform(lab, one, f"{i} of {len(chosen)}")
    all_findings = {one.name: found for one in EXPERIMENTS.values() if (found := known(lab, one)) is not None}
    plots = write_report(lab, all_findings)
    print(f"the report: {lab.run / 'report.md'}")
    if args.readme is not None and is_main():
        n, dashes = f" --n {args.n}" if args.n != N else "", "-- " if world() > 1 else ""
        command = f"{launcher()} -m {dashes}mini_dalle2.evaluate --run {shlex.quote(str(args.run))}{n} --readme"
        write_readme(lab, args.readme, name, all_findings, plots, command)


def main(argv=None):
    """The command: 0 when all went well, 2 after a mistake (one sentence on standard error), 130 after Ctrl-C."""
    return run_command("evaluate", parse, work, argv, less="lower --n", stopped="stopped; the same command goes on where it was")


if __name__ == "__main__":
    sys.exit(main())
