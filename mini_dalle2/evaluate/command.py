"""The evaluation command: the paper's experiments on a finished run, and a report of the results.

    python train.py --stage evaluation --out runs/tiny          first: judge and baseline (once)
    python -m mini_dalle2.evaluate --run runs/tiny              all: half an hour on two CPU cores
    python -m mini_dalle2.evaluate --run runs/tiny --only fig8 steps        some experiments
    python -m mini_dalle2.evaluate --run runs/tiny --n 64       quicker, with wider intervals
    python -m mini_dalle2.evaluate --run runs/tiny --results    also into notebooks/results.md
    torchrun --nproc_per_node=2 -m -- mini_dalle2.evaluate --run runs/tiny      two processes
    python train.py --from mini_dalle2/weights --stage evaluation --out runs/box      first, for
    python -m mini_dalle2.evaluate --run runs/box               the bundled weights

The command prints an estimate, then writes RUN/report.md and, into RUN/evaluate, what the report
shows. Every result is cached. After Ctrl-C, the same command goes on where it was. Other weights,
other true pictures or another --n make results again. RUN/evaluate/cache-… may be deleted.

The report is made from RUN/evaluate/NAME.json, where each experiment leaves what it found; no
figure is typed. In brackets stands each figure's 95 % interval. Nothing is trained here.
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
from ..runtime.device import DEVICES
from ..runtime.files import read_json, write_json
from ..runtime.lock import alone_in
from ..runtime.processes import agreed, is_main, launcher, world
from .experiments import EXPERIMENTS, suitable
from .findings import Findings
from .imagenet import has_efficientnet
from .lab import LEAST, Lab, digest
from .making import Maker
from .recipes import Sampled
from .report import RESULTS, split_page, verdict, write_report, write_results

BAR = "{l_bar}{bar}| {elapsed}<{remaining}"
# Captions: `tiny` then takes less than forty minutes on two cores.
N = 128


def parse(argv):
    """Read the command line. Raises ValueError."""
    parser = Parser(
        prog="evaluate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="experiments: " + ", ".join(EXPERIMENTS))
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"),
                        help="a finished run folder of train.py (default: runs/tiny)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these experiments")
    parser.add_argument("--n", type=int, default=N,
                        help=f"captions to sample pictures for (default: {N})")
    parser.add_argument("--device", default="auto", choices=DEVICES)
    parser.add_argument("--results", nargs="?", type=Path, const=RESULTS, metavar="FILE",
                        help="put the main table and some plots there (default: "
                             "notebooks/results.md); not with --only")
    args = parser.parse_args(argv)
    for name in args.only or ():
        if name not in EXPERIMENTS:
            closest = difflib.get_close_matches(name, EXPERIMENTS, n=1, cutoff=0)[0]
            raise ValueError(f'there is no experiment "{name}" (there are '
                             f'{", ".join(EXPERIMENTS)}); the closest is {closest}')
    if not LEAST <= args.n <= 10_000:
        raise ValueError(f"--n {args.n}: from {LEAST} to 10000 captions")
    if args.results is not None and args.only:
        raise ValueError("--results shows all experiments: leave out --only")
    return args


def findings_digits(maker, one):
    """Return digits that change with what an experiment's findings depend on.

    None while a variant that it needs cannot be used.
    """
    lab = maker.lab
    variants = [lab.signature_of(name) for name in ("judge", *one.models)]
    if None in variants:
        return None
    recipes = [maker.digits(maker.settled(recipe)) for recipe in one.needs(lab).values()]
    return digest(lab.cache.name, lab.n, variants, recipes, has_efficientnet())


def known(maker, one):
    """Return the findings of an experiment from RUN/evaluate/NAME.json.

    None if they are not there, damaged or out of date.
    """
    digits, findings = None, None
    folder = maker.lab.folder
    with contextlib.suppress(FileNotFoundError, ValueError, KeyError, TypeError):
        saved = read_json(folder / f"{one.name}.json")
        if all((folder / name).is_file() for name in saved["findings"]["grids"]):
            digits, findings = saved["key"], saved["findings"]
    digits, findings = agreed((digits, findings))
    # All processes ask for the digits, or none does.
    return findings if findings and digits == findings_digits(maker, one) else None


def perform(maker, one, place):
    """Do an experiment: make what it needs, look at it, and keep what it finds."""
    lab = maker.lab
    made = make_all(maker, one, place)
    found = Findings()
    began = time.perf_counter()
    one.find(lab, found, made)
    seconds = {one.name: time.perf_counter() - began} | seconds_of_parts(maker, one)
    n = sorted({recipe.n for recipe in one.needs(lab).values()})
    findings = vars(found) | {"seconds": seconds, "n": n}
    digits = findings_digits(maker, one)
    if is_main():
        write_json({"key": digits, "findings": findings}, lab.folder / f"{one.name}.json")
    verdicts = ", ".join(map(verdict, found.claims)) or "nothing to compare"
    print(f"{one.name}: does it agree with the paper? {verdicts}", flush=True)


def make_all(maker, one, place):
    """Make what an experiment needs, under a progress bar: {name: what it is}, sets as `Seen`."""
    timing, needs, made = maker.timing, one.needs(maker.lab), {}
    total = sum(map(timing.seconds, maker.missing(needs.values()))) + timing.grading(needs.values())
    with tqdm(total=max(total, 1e-3), desc=f"{one.name} ({place})", leave=False,
              bar_format=BAR, disable=not is_main()) as timing.bar:
        for name, recipe in needs.items():
            for part in maker.ingredients(recipe):
                made[name] = maker.make(part)
            if isinstance(recipe, Sampled):
                made[name] = maker.seen(recipe)
                # The grader's work belongs to the bar too.
                made[name].right
                timing.spent(timing.grading([recipe]))
    timing.bar = None
    return made


def seconds_of_parts(maker, one):
    """Return what the variants and recipes of an experiment took: {name or digits: seconds}.

    By names, because experiments share them, and a total must count each once.
    """
    parts = [part for recipe in one.needs(maker.lab).values() for part in maker.ingredients(recipe)]
    seconds = {maker.digits(part): maker.took[part] for part in parts}
    for name in ("judge", *one.models):
        seconds[name] = maker.lab.checkpoint(name)["seconds"]
    return seconds


def plan(maker, chosen):
    """Print what is to be done and an estimate of how long each part will take."""
    lab, timing = maker.lab, maker.timing
    print(f"{lab.run}: {len(chosen)} experiments on {lab.n} captions")
    recipes, lines = set(), []
    for one in chosen:
        if known(maker, one) is None:
            new = [recipe for recipe in maker.missing(one.needs(lab).values())
                   if recipe not in recipes]
            recipes.update(new)
            lines.append((one.name, sum(map(timing.seconds, new)) + timing.grading(new)))
    if lines:
        total = sum(seconds for _, seconds in lines)
        lines.append(("together, and a few minutes for intervals", total))
    for name, seconds in lines:
        print(f"  {name:<64}{seconds / 60:6.1f} minutes, about")


def work(args, device):
    """Do what is asked for.

    Several processes all go through this, because they meet wherever pictures are sampled. Only
    the first one writes.
    """
    lab = Lab(args.run, args.n, device)
    with alone_in(lab.run):
        evaluate(lab, args)


def evaluate(lab, args):
    """Do the experiments that are asked for, and write the report."""
    name = "shapes" if lab.shapes else Path(lab.config.data.source).resolve().name
    if args.results is not None:
        # Fail now, not after half an hour.
        split_page(args.results, f"evaluate {name}")
    chosen = suitable(lab, args.only)
    lab.require(dict.fromkeys(["judge"] + [model for one in chosen for model in one.models]))
    maker = Maker(lab)
    maker.sweep()
    lab.folder.mkdir(exist_ok=True)
    plan(maker, chosen)
    for i, one in enumerate(chosen, start=1):
        if known(maker, one) is None:
            perform(maker, one, f"{i} of {len(chosen)}")
    found = {one.name: known(maker, one) for one in EXPERIMENTS.values()}
    found = {name: findings for name, findings in found.items() if findings is not None}
    plots = write_report(lab, found)
    print(f"the report: {lab.run / 'report.md'}")
    if args.results is not None and is_main():
        write_results(lab, args.results, name, found, plots, command_line(args))


def command_line(args):
    """Return the command that puts these results into a page."""
    n = f" --n {args.n}" if args.n != N else ""
    dashes = "-- " if world() > 1 else ""
    run = shlex.quote(str(args.run))
    return f"{launcher()} -m {dashes}mini_dalle2.evaluate --run {run}{n} --results"


def main(argv=None):
    """Run the command: 0 when all went well, 2 after a mistake (one sentence on standard error),
    130 after Ctrl-C."""
    return run_command("evaluate", parse, work, argv, less="lower --n",
                       stopped="stopped; the same command goes on where it was")


if __name__ == "__main__":
    sys.exit(main())
