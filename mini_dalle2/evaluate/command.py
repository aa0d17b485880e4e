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

from tqdm import tqdm

from ..runtime.commands import Parser, run_command
from ..runtime.files import load_checkpoint, read_json, write_json
from ..runtime.processes import agreed, is_main, launcher, world
from . import lab as lab_module
from .experiments import EXPERIMENTS, Findings, fitting
from .lab import Draw, LEAST, Lab, digest, has_efficientnet
from .report import README, split_readme, verdict, write_readme, write_report


N = 128                                                                    # captions: `tiny` then takes less than forty minutes on two cores


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
