"""Kills a training at random moments, lets it go on, and compares its weights with those of a run that nobody disturbed, bit for bit.

    python tests/benchmarks/kills.py [--kills 20] [--seed 0] [--stages clip prior ar_prior sketch decoder upsampler1 upsampler2]

SIGKILL leaves a process no chance to tidy up. Half of the kills come at a random time, from outside; the other half in the middle of
writing one of the stage's files: half of it written, all of it but not yet renamed, or just renamed while the next file is still the old
one. After each, every file there must be readable, and `--resume` must end with the very weights and optimiser state. Exit code 1 if not.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import train                                                               # noqa: E402
from conftest import SMALL                                                 # noqa: E402
from mini_dalle2 import configs          # noqa: E402
from mini_dalle2.runtime.files import load_checkpoint, read_metrics          # noqa: E402

SETTINGS = [*SMALL, *(f"--{stage}.steps=8" for stage in configs.MODELS), "--decoder.dropout=0.1"]
MOMENTS = ("half", "whole", "renamed")                                     # of a write; see `die_writing`


def die_writing(number, moment):
    """From now on the process kills itself in its `number`-th write of a file (from 0), at this moment of it."""
    fsync, replace, written = os.fsync, os.replace, [0]

    def dying_fsync(descriptor):
        fsync(descriptor)
        if written[0] == number and moment != "renamed":
            if moment == "half":
                os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def dying_replace(source, target):
        replace(source, target)
        if written[0] == number and moment == "renamed":
            os.kill(os.getpid(), signal.SIGKILL)
        written[0] += 1

    os.fsync, os.replace = dying_fsync, dying_replace


def call(arguments, after=None, write=None):
    """Runs train.py in a process of its own, silently, which is killed `after` seconds or in a `write` (number, moment); None: never.

    -> (exit code, −9 if it was killed; seconds). A fork, because importing torch takes longer than training `micro`.
    """
    began, child = time.perf_counter(), os.fork()
    if child == 0:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
            if write:
                die_writing(*write)
            os._exit(train.main([str(a) for a in arguments]))
    if after is not None:
        time.sleep(after)
        os.kill(child, signal.SIGKILL)                                     # nobody has waited for it: it is still ours, finished or not
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), time.perf_counter() - began


def same(a, b):
    """Whether two values out of checkpoints are equal: tensors bit for bit, dicts and lists item by item."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return a == b


def broken(folder):
    """The files of a run that cannot be read."""
    found = []
    for path in folder.glob("*.pt"):
        try:
            load_checkpoint(path)
        except ValueError as error:
            found.append(str(error))
    return found


def torture(stage, whole, folder, kills, rng):
    """`kills` kills of one stage, each followed by --resume; whole: an undisturbed run. -> (kills that hit, a list of what went wrong)."""
    mine, later = {f"{stage}.pt", f"{stage}.resume.pt"}, list(configs.STAGES)[list(configs.STAGES).index(stage) + 1:]
    left_out = mine | {f"{name}{end}" for name in later for end in (".pt", ".resume.pt")} | ({"embeddings.pt"} if stage == "prior" else set())
    arguments = [*SETTINGS, "--stage", stage, "--out", folder]

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder, ignore=lambda _, names: [n for n in names if n in left_out or n.endswith(".png")])

    prepare()
    code, seconds = call(arguments)
    hit, wrong = 0, [f"{stage}: exit code {code}"] if code else []
    for kill in range(kills):
        prepare()
        moment = {"after": seconds * rng.random()} if kill % 2 == 0 else {"write": (rng.randrange(12), rng.choice(MOMENTS))}
        hit += call(arguments, **moment)[0] == -signal.SIGKILL
        wrong += [f"{stage}, {moment}: {error}" for error in broken(folder)]
        code, _ = call([*arguments, "--resume"])
        if code:
            wrong.append(f"{stage}, {moment}: resumed with exit code {code}")
            continue
        for name, keys in ((f"{stage}.pt", ["ema"]), (f"{stage}.resume.pt", ["ema", "model", "optimizer", "streams"])):
            a, b = (load_checkpoint(run / name) for run in (whole, folder))
            wrong += [f"{stage}, {moment}: {key} in {name} is another" for key in keys if not same(a[key], b[key])]
        losses = [[(line["step"], line["loss"]) for line in read_metrics(run) if line["stage"] == stage] for run in (whole, folder)]
        if losses[0] != losses[1]:
            wrong.append(f"{stage}, {moment}: other losses")
    return hit, wrong


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=list(configs.MODELS), default=list(configs.MODELS))
    args = parser.parse_args()
    torch.set_num_threads(1)                                               # threads do not survive a fork
    rng, failed = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        if call([*SETTINGS, "--out", whole])[0]:
            sys.exit("the undisturbed run failed")
        for stage in args.stages:
            hit, wrong = torture(stage, whole, Path(temporary) / "killed", args.kills, rng)
            print(f"{stage:<12}{args.kills} kills, {hit} of them before it had finished: {'; '.join(wrong) or 'bit-identical'}", flush=True)
            failed += wrong
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
