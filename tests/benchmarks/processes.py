"""How much faster do two processes train, each on one core, than one process on one core?

    python tests/benchmarks/processes.py [--run runs/tiny] [--steps 40] [--rounds 2] [--stages clip prior ...]

Both see the same batches, so that twice the speed would be all there is to gain. By turns, each `rounds` times, and the best of each counts;
the first window of steps does not. Prints a table and writes RUN/processes.json. Give it a machine with nothing else to do.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from mini_dalle2 import configs                                            # noqa: E402
from mini_dalle2.stages import read_json                                   # noqa: E402
from mini_dalle2.training import read_metrics                              # noqa: E402


def stages_of(run):
    """What there is to train in a run."""
    return configs.stages(configs.from_dict(read_json(run / "config.json")))


def seconds_a_step(run, stage, steps, processes):
    """Trains a stage for some steps on what the run's earlier stages made: seconds of one step."""
    window, stages = max(1, steps // 4), stages_of(run)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "run"
        folder.mkdir()
        kept = ["config.json", "tokenizer.json", "embeddings.pt", *(f"{name}.pt" for name in stages[1:stages.index(stage)])]
        for name in kept:
            shutil.copy(run / name, folder / name)
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
        command = [sys.executable, *launch, "train.py", "--device=cpu", "--out", str(folder), "--stage", stage, f"--{stage}.steps={steps}",
                   f"--{stage}.log_every={window}", f"--{stage}.warmup=0", f"--{stage}.save_every={steps}"]
        subprocess.run(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True, capture_output=True)
        lines = [line for line in read_metrics(folder) if line["stage"] == stage]
    return (lines[-2]["seconds"] - lines[0]["seconds"]) / (lines[-2]["step"] - lines[0]["step"])           # the last window ends with a checkpoint


def main():
    """Prints the table; writes RUN/processes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--stages", nargs="+", choices=list(configs.MODEL_CONFIGS))
    args = parser.parse_args()
    results = {}
    print(f"{'stage':<12}{'one, s/step':>14}{'two, s/step':>14}{'times faster':>14}")
    for stage in args.stages or stages_of(args.run)[1:]:
        taken = {1: [], 2: []}
        for _ in range(args.rounds):
            for processes in taken:
                taken[processes].append(seconds_a_step(args.run, stage, args.steps, processes))
        one, two = min(taken[1]), min(taken[2])
        results[stage] = {"one": one, "two": two, "times faster": one / two}
        print(f"{stage:<12}{one:>14.4f}{two:>14.4f}{one / two:>14.2f}", flush=True)
    (args.run / "processes.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
