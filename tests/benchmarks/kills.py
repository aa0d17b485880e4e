"""Ends a training in every way that a rough machine knows, lets it go on, and compares its weights
with those of a run that nobody disturbed, bit for bit.

    python tests/benchmarks/kills.py [--kills 20] [--seed 0] [--stages clip decoder …]

kill          SIGKILL leaves a process no chance to tidy up. Half of the kills come at a random time,
              from outside; the other half in the middle of writing a file: half of it written, all
              of it but not yet renamed, or just renamed while the next file is still the old one.
signal        SIGINT, SIGTERM, SIGHUP, and SIGINT twice, at a random time: the run saves and ends.
terminal      The terminal is closed, at a random time; half of the trainings ignore that.
full disk     No file can get larger than a size; there are 18 sizes, or fewer with fewer kills.
last save     SIGINT while the last checkpoint of a stage is written: no later stage begins.

After each blow every file must be readable, there must be no traceback, and `--resume` must end
with the very weights and optimiser state. Exit code 1 if not.
"""

import argparse
import collections
import contextlib
import os
import random
import resource
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
from mini_dalle2 import configs                                            # noqa: E402
from mini_dalle2.runtime.files import load_checkpoint, read_metrics        # noqa: E402

STEPS = 8
SETTINGS = [*SMALL, *(f"--{stage}.steps={STEPS}" for stage in configs.MODELS),
            "--decoder.dropout=0.1"]
# Of a write; see `die_writing`.
MOMENTS = ("half", "whole", "renamed")
SIZES = 18
# The exit codes of train.py.
DONE, MISTAKE, STOPPED = 0, 2, 130


# ---------------------------------------------------------------------------- blows from within

def die_writing(number, moment):
    """From now on the process kills itself in its `number`-th write of a file, from 0."""
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


def interrupt_last_save(stage):
    """From now on the process gets a Ctrl-C while it writes a stage's last checkpoint."""
    replace = os.replace

    def interrupted_replace(source, target):
        if Path(target).name == f"{stage}.pt" and load_checkpoint(source)["step"] == STEPS:
            signal.raise_signal(signal.SIGINT)
        replace(source, target)

    os.replace = interrupted_replace


# ---------------------------------------------------------------------------- a training

def call(arguments, said, after=None, signals=(), write=None, room=None, last_save=None,
         terminal=False, deaf=False):
    """Run train.py in a process of its own: (exit code, or −signal; seconds).

    said:      the file for what it prints
    signals:   what it gets `after` so many seconds
    write:     (number, moment) in which it kills itself
    room:      bytes that a file may have
    last_save: the stage in whose last save it gets a Ctrl-C
    terminal:  it runs in a terminal, which is closed `after` so many seconds
    deaf:      it ignores that
    A fork, because importing torch takes longer than training `micro`.
    """
    began = time.perf_counter()
    child, screen = os.forkpty() if terminal else (os.fork(), None)
    if child == 0:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if deaf else signal.SIG_DFL)
        with open(said, "w") as file, contextlib.ExitStack() as redirected:
            if not terminal:
                redirected.enter_context(contextlib.redirect_stdout(file))
                redirected.enter_context(contextlib.redirect_stderr(file))
            if write:
                die_writing(*write)
            if last_save:
                interrupt_last_save(last_save)
            if room is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
            code = 1
            try:
                code = train.main([str(a) for a in arguments])
            finally:
                file.flush()
                os._exit(code)
    if after is not None:
        wait(after, screen)
        for number in signals:
            # Nobody has waited for the process: it is still ours, finished or not.
            os.kill(child, number)
            time.sleep(0.02)
    if screen is not None:
        os.close(screen)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, time.perf_counter() - began


def wait(seconds, screen):
    """Wait, and read what appears on a terminal, which would be full otherwise."""
    end = time.perf_counter() + seconds
    if screen is not None:
        os.set_blocking(screen, False)
    while time.perf_counter() < end:
        with contextlib.suppress(OSError):
            if screen is not None:
                os.read(screen, 100_000)
        time.sleep(min(0.01, max(0, end - time.perf_counter())))


def same(a, b):
    """Whether two values out of checkpoints are equal: tensors bit for bit, the rest by items."""
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


# ---------------------------------------------------------------------------- many blows

def blows(stage, seconds, largest, kills, rng):
    """Yield (kind, keywords of `call`, the exit codes that are right) of all blows to a stage.

    seconds: what the stage takes; largest: bytes of its largest file.
    """
    for kill in range(kills):
        if kill % 2 == 0:
            blow = {"after": seconds * rng.random(), "signals": [signal.SIGKILL]}
        else:
            blow = {"write": (rng.randrange(12), rng.choice(MOMENTS))}
        yield "kill", blow, {DONE, -signal.SIGKILL}
    for numbers in ([signal.SIGINT], [signal.SIGTERM], [signal.SIGHUP], [signal.SIGINT] * 2):
        for _ in range(max(1, kills // 4)):
            # The first moments of the process are Python's own.
            blow = {"after": 0.05 + seconds * rng.random(), "signals": numbers}
            yield "signal", blow, {DONE, STOPPED}
    for i in range(max(1, kills // 4)):
        blow = {"after": 0.05 + seconds * rng.random(), "terminal": True, "deaf": i % 2 == 1}
        yield "terminal", blow, {DONE} if i % 2 else {DONE, STOPPED}
    sizes = min(SIZES, kills)
    for i in range(sizes):
        yield "full disk", {"room": int(1.1 * largest * (i + 1) / sizes)}, {DONE, MISTAKE}
    yield "last save", {"last_save": stage}, {STOPPED}


def torture(stage, whole, folder, kills, rng):
    """All blows to one stage, each followed by --resume; whole: an undisturbed run.

    Returns (Counter of the blows, Counter of those that ended it, a list of what went wrong).
    """
    stages = list(configs.STAGES)
    later = stages[stages.index(stage) + 1:]
    left_out = {f"{name}{end}" for name in (stage, *later) for end in (".pt", ".resume.pt")}
    left_out |= {"embeddings.pt"} if stage == "prior" else set()
    said = folder.parent / "said"

    def prepare():
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole, folder, ignore=lambda _, names: [
            name for name in names if name in left_out or name.endswith(".png")])

    alone = [*SETTINGS, "--stage", stage, "--out", folder]
    prepare()
    code, seconds = call(alone, said)
    wrong = [f"{stage}: exit code {code}"] if code else []
    largest = (whole / f"{stage}.resume.pt").stat().st_size
    count, hit = collections.Counter(), collections.Counter()
    for kind, blow, right in blows(stage, seconds, largest, kills, rng):
        prepare()
        found = []
        # Only with all stages can it be seen that the next one does not begin.
        arguments = [*SETTINGS, "--out", folder, "--resume"] if kind == "last save" else alone
        code, _ = call(arguments, said, **blow)
        count[kind] += 1
        hit[kind] += code != DONE
        if code not in right:
            found.append(f"exit code {code}")
        if "Traceback" in said.read_text():
            found.append("a traceback")
        if kind == "last save" and any((folder / f"{name}.pt").exists() for name in later):
            found.append("a later stage began")
        found += broken(folder)
        code, _ = call([*alone, "--resume"], said)
        found += [f"resumed with exit code {code}"] if code else differences(stage, whole, folder)
        found += [f"{path.name} is left" for path in folder.glob(".*")]
        wrong += [f"{stage}, {kind} {blow}: {one}" for one in found]
    return count, hit, wrong


def differences(stage, whole, folder):
    """Say in what a stage of a run differs from that of the undisturbed run."""
    found = []
    for name, keys in ((f"{stage}.pt", ["ema"]),
                       (f"{stage}.resume.pt", ["ema", "model", "optimizer", "streams"])):
        a, b = (load_checkpoint(run / name) for run in (whole, folder))
        found += [f"{key} in {name} is another" for key in keys if not same(a[key], b[key])]
    a, b = ([(line["step"], line["loss"]) for line in read_metrics(run) if line["stage"] == stage]
            for run in (whole, folder))
    return found if a == b else [*found, "other losses"]


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20,
                        help="of each stage; of each other kind a quarter of it")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", nargs="+", choices=list(configs.MODELS),
                        default=list(configs.MODELS))
    args = parser.parse_args()
    # Threads do not survive a fork.
    torch.set_num_threads(1)
    rng, failed = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as temporary:
        whole = Path(temporary) / "whole"
        if call([*SETTINGS, "--out", whole], Path(temporary) / "said")[0]:
            sys.exit("the undisturbed run failed")
        for stage in args.stages:
            folder = Path(temporary) / "killed"
            count, hit, wrong = torture(stage, whole, folder, args.kills, rng)
            kinds = ", ".join(f"{kind} {n} ({hit[kind]} ended it)" for kind, n in count.items())
            print(f"{stage:<12}{kinds}: {'; '.join(wrong) or 'bit-identical'}", flush=True)
            failed += wrong
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
