"""Two writers of one file, and two trainings of one folder, at the same time.

    python tests/benchmarks/writers.py [--pairs 60] [--trainings 18]

checkpoints  Two processes save different numbers under one name: the file holds those of one.
pictures     Two commands sample.py with one --out: the picture is one of the two.
names        Two commands sample.py without --out: both pictures are there.
trainings    Two commands train.py with one --out: one trains as if it were alone, and the other
             ends with one sentence.

Exit code 1 if anything else is found.
"""

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import sample                                                              # noqa: E402
import train                                                               # noqa: E402
from conftest import SMALL                                                 # noqa: E402
from kills import differences                                              # noqa: E402
from mini_dalle2 import configs                                            # noqa: E402
from mini_dalle2.runtime.files import load_checkpoint, save_checkpoint     # noqa: E402


def together(works, said):
    """Do several works, each in a process of its own, at the same moment: their exit codes.

    What process i prints is in the file said-i.
    """
    ready, begin = os.pipe()
    children = []
    for i, work in enumerate(works):
        child = os.fork()
        if child == 0:
            os.close(begin)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with open(f"{said}-{i}", "w") as file, contextlib.redirect_stdout(file), \
                    contextlib.redirect_stderr(file):
                # Until the parent closes the other end.
                os.read(ready, 1)
                code = 1
                try:
                    code = work() or 0
                finally:
                    file.flush()
                    os._exit(code)
        children.append(child)
    os.close(ready)
    os.close(begin)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def checkpoints(folder, pairs):
    """Save pairs of checkpoints under one name. Return what went wrong."""
    wrong = []
    for pair in range(pairs):
        # Of different lengths, some larger than what a file buffers.
        sizes = 1000 * (pair + 1), 1500 * (pair + 1)
        codes = together([lambda i=i: save_checkpoint(
            {"stage": "toy", "w": torch.full((sizes[i],), float(i))}, folder / "a.pt")
            for i in range(2)], folder / "said")
        found = load_checkpoint(folder / "a.pt")["w"]
        i = int(found[0])
        if codes != [0, 0] or not torch.equal(found, torch.full((sizes[i],), float(i))):
            wrong.append(f"checkpoints {pair}: a mixture, exit codes {codes}")
    return wrong


def pictures(run, folder, pairs):
    """Sample pairs of pictures into one file, and into new files. Return what went wrong."""
    def sampling(seed, *more):
        return lambda: sample.main(["text", "a red circle", "--run", str(run), "--device", "cpu",
                                    "--stage", "base", "--seed", str(seed), *more])

    samples = run / "samples"
    alone = []
    for seed in range(2):
        together([sampling(seed, "--out", str(folder / "alone.png"))], folder / "said")
        alone.append((folder / "alone.png").read_bytes())
    wrong = [] if alone[0] != alone[1] else ["the two pictures are the same"]
    for pair in range(pairs):
        codes = together([sampling(seed, "--out", str(folder / "a.png")) for seed in range(2)],
                         folder / "said")
        if codes != [0, 0] or (folder / "a.png").read_bytes() not in alone:
            wrong.append(f"pictures {pair}: another picture, exit codes {codes}")
    for pair in range(pairs):
        shutil.rmtree(samples, ignore_errors=True)
        codes = together([sampling(seed) for seed in range(2)], folder / "said")
        found = sorted(path.read_bytes() for path in samples.glob("*.png"))
        if codes != [0, 0] or found != sorted(alone) or len(list(samples.iterdir())) != 2:
            wrong.append(f"names {pair}: {len(found)} pictures, exit codes {codes}")
    return wrong


def trainings(whole, folder, pairs):
    """Begin pairs of trainings, or go on with them, in one folder. Return what went wrong."""
    wrong = []
    for pair in range(pairs):
        shutil.rmtree(folder, ignore_errors=True)
        more = []
        if pair % 2:
            # Half of the pairs go on with a run.
            shutil.copytree(whole, folder, ignore=lambda _, names: [
                name for name in names if name.startswith(("decoder", "upsampler"))])
            more = ["--resume"]
        arguments = [*SMALL, "--out", str(folder), *more]
        said = folder.parent / "said"
        codes = together([lambda: train.main(arguments)] * 2, said)
        texts = [Path(f"{said}-{i}").read_text() for i in range(2)]
        found = [one for stage in configs.MODELS for one in differences(stage, whole, folder)]
        loser = texts[codes.index(2)] if sorted(codes) == [0, 2] else ""
        if "is in use by another process, number" not in loser or len(loser.splitlines()) != 1:
            found.append(f"exit codes {codes}: {loser}")
        wrong += [f"trainings {pair}: {one}" for one in found]
    return wrong


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--trainings", type=int, default=18)
    args = parser.parse_args()
    # Threads do not survive a fork.
    torch.set_num_threads(1)
    wrong = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        whole = folder / "whole"
        if together([lambda: train.main([*SMALL, "--out", str(whole)])], folder / "said")[0]:
            sys.exit("the undisturbed run failed")
        works = {
            f"{args.pairs} pairs of checkpoints": lambda: checkpoints(folder, args.pairs),
            f"{args.pairs} pairs of pictures, twice": lambda: pictures(whole, folder, args.pairs),
            f"{args.trainings} pairs of trainings": lambda: trainings(
                whole, folder / "run", args.trainings)}
        for name, work in works.items():
            found = work()
            print(f"{name}: {'; '.join(found) or 'no mixture'}", flush=True)
            wrong += found
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
