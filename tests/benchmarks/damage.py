"""Damages every file of a run and of the bundled weights, and counts what is believed.

    python tests/benchmarks/damage.py [--run runs/micro] [--bits 20] [--blocks 10] [--cuts 10]

Each damage is done to a copy: one flipped bit, twenty random bytes in a row, or a file that ends
early. A damage is *believed* when the file is read without a complaint, and gives other values than
before. *Harmless* means: read without a complaint, with the same values.

Without --run, a micro run is trained first. Pictures, metrics.jsonl, commands.txt and a run's
words.txt are left out: no training and no sampling takes a number from them.
Exit code 1 if anything is believed.
"""

import argparse
import collections
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import train                                                               # noqa: E402
from conftest import SMALL                                                 # noqa: E402
from kills import same                                                     # noqa: E402
from mini_dalle2.pipeline import WEIGHTS                                   # noqa: E402
from mini_dalle2.runtime.files import check_card, load_checkpoint, read_json   # noqa: E402
from mini_dalle2.tokenizer import BPETokenizer                             # noqa: E402
from mini_dalle2.training import overrides                                 # noqa: E402


def read(path):
    """Read a file as the commands do: its values. Raises ValueError, OSError for damage."""
    if path.suffix == ".pt":
        return load_checkpoint(path, path.name.split(".")[0])
    if path.name == "config.json":
        return overrides.to_dict(overrides.from_dict(read_json(path)))
    if path.name == "tokenizer.json":
        return BPETokenizer.from_state_dict(read_json(path)).state_dict()
    # The words of the bundled weights.
    check_card(path)
    return path.read_bytes()


def flip(content, rng):
    """Return the bytes with one bit flipped."""
    content = bytearray(content)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def scribble(content, rng):
    """Return the bytes with twenty others in a row."""
    start = rng.randrange(max(1, len(content) - 20))
    return content[:start] + rng.randbytes(20) + content[start + 20:]


def cut(content, rng):
    """Return the beginning of the bytes."""
    return content[:rng.randrange(len(content))]


def torture(path, counts, rng):
    """Damage a file again and again. Returns a Counter of what came of it."""
    content = path.read_bytes()
    before = read(path)
    found = collections.Counter()
    for damage, count in counts.items():
        for _ in range(count):
            path.write_bytes(damage(content, rng))
            try:
                found["harmless" if same(read(path), before) else "believed"] += 1
            except (ValueError, OSError):
                found["found"] += 1
    path.write_bytes(content)
    return found


def main():
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a finished run")
    parser.add_argument("--bits", type=int, default=20)
    parser.add_argument("--blocks", type=int, default=10)
    parser.add_argument("--cuts", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    counts = {flip: args.bits, scribble: args.blocks, cut: args.cuts}
    rng = random.Random(args.seed)
    total = collections.Counter()
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        if args.run:
            shutil.copytree(args.run, run)
        elif train.main([*SMALL, "--out", str(run)]):
            sys.exit("the run failed")
        box = Path(temporary) / "box"
        shutil.copytree(WEIGHTS, box)
        files = [*sorted(run.glob("*.pt")), run / "config.json", run / "tokenizer.json",
                 *sorted(box.glob("*.pt")), box / "words.txt"]
        print(f"{'file':<24}{'found':>9}{'harmless':>10}{'believed':>10}")
        for path in files:
            found = torture(path, counts, rng)
            total += found
            name = f"{path.parent.name}/{path.name}"
            print(f"{name:<24}{found['found']:>9}{found['harmless']:>10}{found['believed']:>10}",
                  flush=True)
        began = time.perf_counter()
        for path in box.glob("*.pt"):
            load_checkpoint(path)
        with_checks = time.perf_counter() - began
        began = time.perf_counter()
        for path in box.glob("*.pt"):
            torch.load(path, weights_only=True)
        alone = time.perf_counter() - began
        print(f"all {total['found']:>29}{total['harmless']:>10}{total['believed']:>10}\n"
              f"reading the bundled weights: {with_checks:.3f} s, without checks {alone:.3f} s")
    return total["believed"] > 0


if __name__ == "__main__":
    sys.exit(main())
