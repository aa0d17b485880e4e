"""How much faster do two processes train, each on one core, than one process on one core?

    python tests/benchmarks/processes.py [--run runs/tiny] [--steps 16] [--rounds 7] [--stages clip prior ...] [--batch-times 1]

Both see the same batches, so that twice the speed would be all there is to gain; a machine whose cores share memory and clock gives less even
to two processes that know nothing of each other. So three things are timed, by turns and within seconds of each other, since such a machine
may be half as fast a minute later: "one" takes whole batches while the other waits; two "together" are what torchrun does; two "apart" take half
a batch each and average nothing, which is about the most that two could reach here. What "together" lacks of it is the price of averaging
gradients. That and the weights' update, which both make, take as long for any batch: `--batch-times 4`, of four times the run's own, loses less.
It is train.py's own loop (training.fit) on its own batches. A ratio is the median of those of single rounds. Prints a table and writes
RUN/processes.json. Give it a machine with nothing else to do.
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
from mini_dalle2 import configs, training          # noqa: E402
from mini_dalle2.runtime import processes as distributed          # noqa: E402
from mini_dalle2.training import stages          # noqa: E402
from mini_dalle2.training import overrides          # noqa: E402

HOW = ("one", "together", "apart")
IMAGES = 2048                           # or the run's own number, or a batch: more would only take longer to draw


def as_if(how):
    """A context in which this process trains alone, or with the other one, or takes its half of the batches but does not talk to it."""
    if how == "one":
        return mock.patch.object(dist, "is_initialized", lambda: False)
    # training.py and stages.py keep the true number, so that batches are still shared out; only distributed.py, which would talk, believes this.
    return mock.patch.object(distributed, "world", lambda: 1) if how == "apart" else contextlib.nullcontext()


def timed_fit(rounds, seconds):
    """What is called in place of training.fit: it trains in the three ways by turns, and notes in `seconds` what a step took, round by round."""

    def fit(stage, model, draw, loss_fn, cfg, *arguments):
        for how in HOW * rounds:
            distributed.barrier()
            stamps = []

            def noting(generator, step):
                if step == 2 and how != "one":
                    dist.barrier()
                stamps.append(time.perf_counter())
                batch = draw(generator, step)
                rows = len(batch if torch.is_tensor(batch) else batch[0])
                assert rows == (cfg.batch_size if how == "one" else cfg.batch_size // 2)
                return batch

            if how != "one" or distributed.is_main():
                with as_if(how):
                    trained = training.fit(stage, model, noting, loss_fn, cfg, *arguments)
                seconds[how].append((stamps[-1] - stamps[2]) / (len(stamps) - 3))                     # the first two warm up
        return trained

    return fit


def seconds_of(stage, config, args, device):
    """(batch, {how: [seconds of a step in each round]} of each process) for one stage of a run."""
    cfg, names = getattr(config, stage).train, configs.stages(config)
    cfg = replace(cfg, batch_size=args.batch_times * cfg.batch_size, steps=args.steps, log_every=args.steps, save_every=args.steps, warmup=0,
                  accumulate=1, shard=False)
    pictures = f"{stage}_images" if stage.startswith("upsampler") else "images"
    few = max(cfg.batch_size, min(getattr(config.data, pictures), IMAGES))
    config = replace(config, data=replace(config.data, **{pictures: few}), **{stage: replace(getattr(config, stage), train=cfg)})
    seconds = {how: [] for how in HOW}
    with (tempfile.TemporaryDirectory() as folder, mock.patch.object(stages, "fit", timed_fit(args.rounds, seconds)),
          mock.patch.object(training, "tqdm", functools.partial(training.tqdm, leave=False))):
        for name in ["tokenizer.json", *(f"{name}.pt" for name in names[1:names.index(stage)])]:
            shutil.copy(args.run / name, folder)
        stages.TRAIN[stage](stages.Job(config, Path(folder), device, resume=False))
    return cfg.batch_size, distributed.collect(seconds)


def child(args):
    """One of the two processes; the first one prints and writes."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(os.environ["LOCAL_RANK"]) % len(cores)]})
    torch.set_float32_matmul_precision("high")                             # as train.py
    training.keep_memory()
    with distributed.processes(torch.device("cpu")) as device:
        config, results = overrides.from_dict(stages.read_json(args.run / "config.json")), {}
        print(f"{'stage':<12}{'batch':>7}" + "".join(f"{how:>12}" for how in HOW) + f"{'times faster':>14}{'at most':>10}   seconds a step")
        for stage in args.stages or configs.stages(config)[1:]:
            batch, (first, second) = seconds_of(stage, config, args, device)
            taken = first | {"apart": [max(pair) for pair in zip(first["apart"], second["apart"])]}       # of the slower one
            middle = {how: statistics.median(taken[how]) for how in HOW}
            faster, most = (statistics.median(one / two for one, two in zip(taken["one"], taken[how])) for how in HOW[1:])
            results[stage] = middle | {"batch": batch, "times faster": faster, "at most": most, "all": [first, second]}
            print(f"{stage:<12}{batch:>7}" + "".join(f"{middle[how]:>12.4f}" for how in HOW) + f"{faster:>14.2f}{most:>10.2f}", flush=True)
        if distributed.is_main():
            stages.write_json(results, args.run / "processes.json")


def main():
    """Prints the table; writes RUN/processes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch-times", type=int, default=1, help="how many times the run's own batch a step takes")
    parser.add_argument("--stages", nargs="+", choices=list(configs.MODEL_CONFIGS))
    args = parser.parse_args()
    if args.steps < 4 or args.rounds < 1 or args.batch_times < 1:
        parser.error("--steps must be at least 4, of which the first two warm up, --rounds and --batch-times at least 1")
    if "LOCAL_RANK" in os.environ:
        return child(args)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", __file__, *sys.argv[1:]]
    return subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode


if __name__ == "__main__":
    sys.exit(main())
