"""Train DALL·E 2, stage by stage, from captioned pictures.

    python train.py                                     the preset tiny on captioned shapes
    python train.py --data my_pictures --out runs/mine  your own folder of captioned pictures
    python train.py --stage decoder --out runs/tiny     one stage; those before it must be there
    python train.py --resume                            go on after Ctrl-C or a power cut
    python train.py --from mini_dalle2/weights --out runs/more
                                                        begin with weights that are trained already
    python train.py --out runs/slow --decoder.lr=3e-4 --decoder.steps=8000
    python train.py --dtype bf16 --compile --decoder.accumulate=4 --decoder.recompute=true
                                                        a fast GPU with little memory
    python train.py --stage evaluation --out runs/tiny  the models that only an evaluation needs
    torchrun --nproc_per_node=4 train.py                four GPUs, or four processes on the CPU

my_pictures holds pictures and metadata.jsonl, with one line for each picture:
    {"file_name": "cat.png", "text": "a grey cat"}
or metadata.csv with the columns file_name and text, or a text file beside each picture: cat.png
and cat.txt. Thirty pictures take about four minutes,
more take longer (training/budget.py); --preset tiny takes all the steps that the shapes get.

Stages: tokenizer, clip, prior, ar_prior, sketch, decoder, upsampler1, upsampler2. A run folder
(runs/PRESET, or --out) holds config.json, tokenizer.json, metrics.jsonl and commands.txt, and for
each stage a checkpoint STAGE.pt, a loss curve and a picture. A run keeps its configuration: with
--resume, or for one more stage, give only what changes.

Read next: mini_dalle2/training/stages.py for what each model learns, state.py for the rest.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from mini_dalle2 import configs
from mini_dalle2.runtime.commands import Parser, run_command
from mini_dalle2.runtime.device import DEVICES, out_of_memory
from mini_dalle2.runtime.processes import barrier, is_main
from mini_dalle2.runtime.signals import Interrupt
from mini_dalle2.training import hints
from mini_dalle2.training.log import Log
from mini_dalle2.training.pace import announce
from mini_dalle2.training.run import Run
from mini_dalle2.training.stages import learn_tokenizer, open_stage
from mini_dalle2.training.state import State, lr_at, network_options


def parse(argv):
    """Command line -> namespace, with the changed settings as a list in `settings`."""
    sections = ", ".join(configs.STAGES)
    parser = Parser(
        prog="train.py", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"--SECTION.NAME=VALUE sets any number of configs.py; sections: data, {sections}")
    # How Karlo was trained is not published.
    presets = [name for name in configs.PRESETS if name != "karlo"]
    stages = ["all", *configs.STAGES, "evaluation", *configs.VARIANTS]
    add = parser.add_argument
    add("--preset", choices=presets, help="sizes and budgets (default: tiny, or the run's own)")
    add("--stage", default="all", choices=stages, metavar="STAGE",
        help=f"train this stage only: {', '.join(stages[1:])}")
    add("--data", metavar="shapes|FOLDER", help="captioned shapes (default), or your own pictures")
    add("--out", metavar="FOLDER", help="the run folder (default: runs/PRESET)")
    add("--from", dest="origin", metavar="FOLDER",
        help="begin with the weights, sizes and tokenizer of another run, or with the bundled ones")
    add("--resume", action="store_true", help="go on with what is in the run folder")
    add("--device", default="auto", choices=DEVICES)
    add("--dtype", choices=["fp32", "bf16"], help="precision of the matrix products, all stages")
    add("--compile", action="store_true", help="use torch.compile in all stages")
    add("--shard", action="store_true", help="torchrun: divide the weights, in all stages but clip")
    args, settings = parser.parse_known_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    args.run = Path(args.out or f"runs/{args.preset or 'tiny'}")
    args.settings = []
    for stage in configs.MODELS:
        args.settings += [f"--{stage}.dtype={args.dtype}"] if args.dtype else []
        args.settings += [f"--{stage}.compile=true"] if args.compile else []
        args.settings += [f"--{stage}.shard=true"] if args.shard and stage != "clip" else []
    # A setting of one stage comes later, and wins.
    args.settings += settings
    return args


def train(run, stage):
    """Train the model of a stage, or go on with it. Return it with its EMA weights, in eval mode.

    run: the run folder (training/run.py); stage: what is learned (training/stages.py).
    Raises FloatingPointError when the loss is not finite, KeyboardInterrupt after a Ctrl-C (all
    is saved), ValueError for a bad checkpoint.
    """
    cfg = stage.cfg
    stage.load()
    model = stage.new_model()
    with network_options(model, cfg):
        state = State(stage, model, run.folder, run.resume)
        with Log(stage, run.folder, state.step, state.seconds) as log, Interrupt() as interrupt:
            if state.finished():
                # The machine may have gone down between the two files of the last step.
                state.save(log.seconds())
            while state.step < cfg.steps:
                lr = lr_at(state.step, cfg)
                state.set_lr(lr)
                total = 0
                # One part, unless the batch is divided among processes or computed in parts.
                for data, noise, context in state.parts():
                    batch = stage.batch(data, state.step)
                    with context:
                        if cfg.sam_rho:
                            loss = state.sam_backward(batch, noise)
                        else:
                            loss = state.objective(batch, noise) / cfg.accumulate
                            loss.backward()
                    total += loss.detach()
                norm = clip_grad_norm_(state.parameters, cfg.grad_clip or math.inf)
                state.optimizer.step()
                state.optimizer.zero_grad(set_to_none=True)
                state.ema.update(state.step)
                state.step += 1
                log.add(state.step, total, norm, lr)
                stop = state.must_stop(interrupt)
                if stop or state.must_save():
                    # The log comes first: it refuses a state that is not finite.
                    log.flush()
                    state.save(log.seconds())
                    if not (stop or state.finished()):
                        log.preview()
                if stop:
                    raise KeyboardInterrupt(f"{stage.name} stopped and saved at step {state.step} "
                                            f"of {cfg.steps}")
    model.load_state_dict(state.ema.shadow)
    return model.eval()


def work(args, device):
    """Train the stages that are asked for, and show what each has learned. Return the exit code."""
    run = Run.open(args, device)
    minutes = {}
    try:
        announce(run)
        for name in run.names:
            began = time.perf_counter()
            if run.is_done(name):
                print(f"{name}: was finished before")
                if name != "tokenizer":
                    open_stage(run, name).show()
                continue
            if name != "tokenizer":
                run.adopt_tokenizer()
            if not minutes:
                run.note_command(args.given)
            if name == "tokenizer":
                learn_tokenizer(run)
                barrier()
            else:
                stage = open_stage(run, name)
                stage.forget_pictures()
                model = stage.finish(train(run, stage))
                # The other processes must not look for its files before they are there.
                barrier()
                stage.show(model)
            minutes[name] = (time.perf_counter() - began) / 60
    except KeyboardInterrupt as stop:
        if is_main():
            print(f"\n{str(stop) or 'stopped'}; go on with: {run.go_on}", file=sys.stderr)
        return 130
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        raise ValueError(f"there is not enough memory for {name}: "
                         f"{hints.less_memory(run, name)}") from None
    if is_main():
        hints.summary(run, minutes)
    return 0


def main(argv=None):
    """The command. Exit code 0: all went well; 2: a mistake, in one sentence; 130: Ctrl-C."""
    # TF32 on GPUs that have it.
    torch.set_float32_matmul_precision("high")
    return run_command("train.py", parse, work, argv, owns=lambda args: args.run,
                       less="close other programs, or begin a run with a smaller --preset")


if __name__ == "__main__":
    sys.exit(main())
