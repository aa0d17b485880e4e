"""How much faster do two processes train, each on one core, than one process on one core?

    python tests/benchmarks/processes.py [--run runs/tiny] [--steps 16] [--rounds 7]
                                         [--stages clip prior ...] [--batch-times 1]

Both processes see the same batches, so twice the speed is the most that could be gained. Two
cores that share memory and clock give less, even to two processes that know nothing of each
other. So three ways are timed by turns, within seconds of each other:
one       takes whole batches, while the other process waits
together  what torchrun does
apart     each takes half a batch, and nothing is averaged: about the most that two could reach
What "together" lacks of "apart" is the price of averaging gradients. This price, and the update
of the weights, which both processes make, are the same for any batch. So a larger batch loses
less: try `--batch-times 4`. The loop and the batches are train.py's own. A ratio is the median of
the ratios of single rounds. Prints a table and writes RUN/processes.json. Give it a machine with
nothing else to do.
"""

import argparse
import contextlib
import functools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
import train                                               # noqa: E402
from mini_dalle2 import configs                            # noqa: E402
from mini_dalle2.runtime import processes                  # noqa: E402
from mini_dalle2.runtime.device import keep_memory         # noqa: E402
from mini_dalle2.runtime.files import read_json, write_json          # noqa: E402
from mini_dalle2.training import log, overrides            # noqa: E402
from mini_dalle2.training.run import Run                   # noqa: E402
from mini_dalle2.training.stages import open_stage         # noqa: E402

HOW = ("one", "together", "apart")
# Pictures to learn from, or the run's own number, or a batch. More would only take longer to make.
IMAGES = 2048


def as_if(how):
    """A context in which this process trains alone, together with the other one, or apart.

    apart: it takes its half of the batches, and does not talk to the other process.
    """
    if how == "one":
        return mock.patch.object(dist, "is_initialized", lambda: False)
    if how == "apart":
        # Only runtime/processes.py, which would talk, believes that there is one process. The
        # other modules keep the true number, so that batches are still divided.
        return mock.patch.object(processes, "world", lambda: 1)
    return contextlib.nullcontext()


def time_batches(stage, how, stamps):
    """Let a stage note in `stamps` when each batch is asked for."""
    make_batch = type(stage).batch

    def batch(data, step):
        if step == 2 and how != "one":
            dist.barrier()
        stamps.append(time.perf_counter())
        made = make_batch(stage, data, step)
        size = stage.cfg.batch_size
        assert len(made[0]) == (size if how == "one" else size // 2)
        return made

    stage.batch = batch


def time_stage(run, name, rounds):
    """{how: [seconds of a step in each round]}: trains a stage in the three ways, by turns."""
    seconds = {how: [] for how in HOW}
    stage = open_stage(run, name)
    stage.load()
    # The pictures are there now, for all rounds.
    stage.load = lambda: None
    for how in HOW * rounds:
        processes.barrier()
        if how == "one" and not processes.is_main():
            continue
        stamps = []
        time_batches(stage, how, stamps)
        with as_if(how):
            train.train(run, stage)
        # The first two steps warm up.
        seconds[how].append((stamps[-1] - stamps[2]) / (len(stamps) - 3))
    return seconds


def seconds_of(stage, config, args, device):
    """(batch, {how: [seconds of a step in each round]} of each process) for a stage of a run."""
    cfg = getattr(config, stage).train
    names = configs.stages(config)
    cfg = replace(cfg, batch_size=args.batch_times * cfg.batch_size, steps=args.steps, warmup=0,
                  log_every=args.steps, save_every=args.steps, accumulate=1, shard=False)
    pictures = f"{stage}_images" if stage.startswith("upsampler") else "images"
    few = max(cfg.batch_size, min(getattr(config.data, pictures), IMAGES))
    config = replace(config, data=replace(config.data, **{pictures: few}),
                     **{stage: replace(getattr(config, stage), train=cfg)})
    silent = functools.partial(log.tqdm, leave=False)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(log, "tqdm", silent):
        earlier = [f"{name}.pt" for name in names[1:names.index(stage)]]
        for name in ["tokenizer.json", *earlier]:
            shutil.copy(args.run / name, folder)
        seconds = time_stage(Run(config, Path(folder), device), stage, args.rounds)
    return cfg.batch_size, processes.collect(seconds)


def child(args):
    """One of the two processes. The first one prints and writes."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    # As train.py does.
    torch.set_float32_matmul_precision("high")
    keep_memory()
    with processes.processes(torch.device("cpu")) as device:
        config = overrides.from_dict(read_json(args.run / "config.json"))
        results = {}
        print(f"{'stage':<12}{'batch':>7}" + "".join(f"{how:>12}" for how in HOW)
              + f"{'times faster':>14}{'at most':>10}   seconds a step")
        for stage in args.stages or configs.stages(config)[1:]:
            results[stage] = row_of(stage, *seconds_of(stage, config, args, device))
        if processes.is_main():
            write_json(results, args.run / "processes.json")


def row_of(stage, batch, both):
    """Print the row of a stage in the table. Return its figures."""
    first, second = both
    # Of two that work apart, the slower one counts.
    taken = first | {"apart": [max(pair) for pair in zip(first["apart"], second["apart"])]}
    middle = {how: statistics.median(taken[how]) for how in HOW}
    faster, most = (statistics.median(one / two for one, two in zip(taken["one"], taken[how]))
                    for how in HOW[1:])
    print(f"{stage:<12}{batch:>7}" + "".join(f"{middle[how]:>12.4f}" for how in HOW)
          + f"{faster:>14.2f}{most:>10.2f}", flush=True)
    return middle | {"batch": batch, "times faster": faster, "at most": most,
                     "all": [first, second]}


def main():
    """Print the table and write RUN/processes.json."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-times", type=int, default=1,
                        help="how many times the run's own batch a step takes")
    parser.add_argument("--stages", nargs="+", choices=list(configs.MODELS))
    args = parser.parse_args()
    if args.steps < 4 or args.rounds < 1 or args.batch_times < 1:
        parser.error("--steps must be at least 4 (two of them warm up), "
                     "--rounds and --batch-times at least 1")
    if "LOCAL_RANK" in os.environ:
        return child(args)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "--", __file__, *sys.argv[1:]]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
