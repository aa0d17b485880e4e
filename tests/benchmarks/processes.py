"""How much faster do two processes train, each on one core, than one process on one core?

    python tests/benchmarks/processes.py [--run runs/tiny] [--steps 40] [--rounds 2] [--stages clip prior ...]

Both see the same batches, so that twice the speed would be all there is to gain; a machine whose cores share memory and clock gives less even
to two processes that know nothing of each other. So two of these are timed too, each with half a batch: "apart" is the most that two could reach
here, about, and what "together" lacks of it is the price of averaging gradients. By turns, each `rounds` times, and the best of each counts; the first
window of steps does not. Prints a table and writes RUN/processes.json. Give it a machine with nothing else to do.
"""

import argparse
import json
import os
import shlex
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


def arguments(run, folder, stage, steps):
    """train.py's, to train a stage for some steps on what the run's earlier stages made, which are copied to `folder`."""
    folder.mkdir()
    stages = stages_of(run)
    for name in ["config.json", "tokenizer.json", "embeddings.pt", *(f"{name}.pt" for name in stages[1:stages.index(stage)])]:
        shutil.copy(run / name, folder / name)
    return ["train.py", "--device=cpu", "--out", str(folder), "--stage", stage, f"--{stage}.steps={steps}",
            f"--{stage}.log_every={max(1, steps // 4)}", f"--{stage}.warmup=0", f"--{stage}.save_every={steps}"]


def seconds_a_step(run, stage, steps, how):
    """Seconds of one step; how: "one" process, two "together", or two "apart", each with half the batch (then those of the slower one)."""
    with tempfile.TemporaryDirectory() as temporary:
        folders = [Path(temporary) / str(i) for i in range(2 if how == "apart" else 1)]
        commands = [[sys.executable, *arguments(run, folder, stage, steps)] for folder in folders]
        if how == "together":
            commands[0][1:1] = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        if how == "apart":
            batch = read_json(run / "config.json")[stage]["train"]["batch_size"]
            commands = [[*command, f"--{stage}.batch_size={batch // 2}"] for command in commands]
        running = [subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
                                    stderr=subprocess.DEVNULL) for command in commands]
        if any([child.wait() for child in running]):
            raise SystemExit(f"processes.py: {stage} could not be trained: {shlex.join(commands[0])}")
        taken = []
        for folder in folders:
            lines = [line for line in read_metrics(folder) if line["stage"] == stage]
            taken.append((lines[-2]["seconds"] - lines[0]["seconds"]) / (lines[-2]["step"] - lines[0]["step"]))   # the last window saves
        return max(taken)


def main():
    """Prints the table; writes RUN/processes.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/tiny"))
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--stages", nargs="+", choices=list(configs.MODEL_CONFIGS))
    args = parser.parse_args()
    results = {}
    print(f"{'stage':<12}{'one, s/step':>14}{'together':>14}{'apart':>14}{'times faster':>14}{'at most':>10}")
    for stage in args.stages or stages_of(args.run)[1:]:
        taken = {"one": [], "together": [], "apart": []}
        for _ in range(args.rounds):
            for how, seconds in taken.items():
                seconds.append(seconds_a_step(args.run, stage, args.steps, how))
        best = {how: min(seconds) for how, seconds in taken.items()}
        results[stage] = best | {"times faster": best["one"] / best["together"], "at most": best["one"] / best["apart"], "all": taken}
        print(f"{stage:<12}{best['one']:>14.4f}{best['together']:>14.4f}{best['apart']:>14.4f}{results[stage]['times faster']:>14.2f}"
              f"{results[stage]['at most']:>10.2f}", flush=True)
    (args.run / "processes.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
