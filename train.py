"""Train DALL·E 2, stage by stage, from captioned pictures.

    python train.py                                          the preset `tiny` on captioned shapes, into runs/tiny
    python train.py --preset micro --data my_pictures        your own folder (metadata.jsonl, or one .txt beside each picture)
    python train.py --stage decoder --out runs/tiny          one stage; those before it must be there
    python train.py --resume                                 go on after Ctrl-C, or after the power went
    python train.py --from mini_dalle2/weights --data my_pictures --out runs/mine        begin with weights that have learned something already
    python train.py --out runs/slow --decoder.lr=3e-4 --decoder.steps=8000
    python train.py --dtype bf16 --compile --decoder.accumulate=4 --decoder.recompute=true       a GPU that is fast, but small
    torchrun --nproc_per_node=4 train.py                     four GPUs, or four processes on the CPU, share each batch

Stages: tokenizer, clip, prior, ar_prior, sketch, decoder, upsampler1, upsampler2 (mini_dalle2/stages.py says what each learns from). A run
folder holds config.json, tokenizer.json, a checkpoint STAGE.pt, a loss curve and a picture for each stage, metrics.jsonl and commands.txt. A run
keeps its configuration: with --resume, or for one more stage, only the changes need to be given. Read next: mini_dalle2/stages.py.
"""

import argparse
import os
import shlex
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch

from mini_dalle2 import configs
from mini_dalle2.runtime.commands import run_command
from mini_dalle2.runtime.commands import Parser
from mini_dalle2.runtime.processes import barrier, is_main, launcher, main_first, world
from mini_dalle2.data.tables import is_large
from mini_dalle2.runtime.device import machine_memory
from mini_dalle2.pipeline import load_model
from mini_dalle2.runtime.files import read_json, write_json
from mini_dalle2.training.run import Job
from mini_dalle2.training.stages import learn, show
from mini_dalle2.tokenizer import BPETokenizer
from mini_dalle2.runtime.files import atomic_open, load_checkpoint, read_metrics, save_checkpoint
from mini_dalle2.training import overrides


def parse(argv):
    """Command line -> namespace, with the overrides as a list in `settings`."""
    parser = Parser(prog="train.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
                    epilog="--SECTION.NAME=VALUE sets any number of configs.py; sections: data, " + ", ".join(configs.STAGES))
    presets = [name for name in configs.PRESETS if name != "karlo"]        # whose training is not published
    parser.add_argument("--preset", choices=presets, help="sizes and budgets (default: tiny, or what --out was begun with)")
    parser.add_argument("--stage", default="all", choices=["all", *configs.STAGES], help="train this stage only")
    parser.add_argument("--data", metavar="shapes|FOLDER", help="captioned shapes (default) or your own captioned pictures")
    parser.add_argument("--out", metavar="FOLDER", help="the run folder (default: runs/PRESET)")
    parser.add_argument("--from", dest="origin", metavar="FOLDER",
                        help="begin with the weights of another run, or of those in the box, mini_dalle2/weights; sizes and tokenizer are theirs")
    parser.add_argument("--resume", action="store_true", help="go on with what is in the run folder")
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="of the matrix products in all stages (one stage: --decoder.dtype=bf16)")
    parser.add_argument("--compile", action="store_true", help="torch.compile all stages (one stage: --decoder.compile=true)")
    parser.add_argument("--shard", action="store_true", help="torchrun: each process keeps a part of the weights only, in all stages but clip")
    args, args.settings = parser.parse_known_args(argv)
    args.given = sys.argv[1:] if argv is None else argv
    flags = {"dtype": args.dtype, "compile": args.compile and "true", "shard": args.shard and "true"}
    args.settings = [f"--{stage}.{key}={value}" for key, value in flags.items() for stage in configs.MODEL_CONFIGS
                     if value and (stage, key) != ("clip", "shard")] + args.settings
    if args.out == "":
        raise ValueError("--out is empty: it names the run folder")
    if args.origin is not None and (args.resume or args.preset or args.stage == "tokenizer"):
        raise ValueError("--from begins a run with the sizes and the tokenizer of another: it goes with neither --resume, --preset nor --stage tokenizer")
    args.run = Path(args.out or f"runs/{args.preset or 'tiny'}")
    args.stages = list(configs.STAGES) if args.stage == "all" else [args.stage]
    return args


def made(run, stage):
    """Whether a run folder holds anything of a stage."""
    names = ["tokenizer.json"] if stage == "tokenizer" else [f"{stage}.pt", f"{stage}.resume.pt"]
    return any((run / name).is_file() for name in names)


def origin_config(folder):
    """The configuration of the run that --from names: of each stage, what its checkpoint says. Raises FileNotFoundError, ValueError."""
    config, own = None, {}
    for stage in configs.MODEL_CONFIGS:
        path = Path(folder) / f"{stage}.pt"
        if stage == "clip" or path.is_file():
            checkpoint = load_model(path, stage)[1]
            try:
                of_stage = overrides.from_dict(checkpoint.get("config"))
                if stage == "clip":
                    BPETokenizer.from_state_dict(checkpoint.get("tokenizer"))
            except ValueError as error:
                raise ValueError(f"{path} is damaged: {error}") from None
            config = config or of_stage
            own |= {name: getattr(of_stage, name) for name in ((stage, "sketch") if stage == "decoder" else (stage,))}     # it lies in the decoder
    return replace(config, **own)


def sketch_in(checkpoint):
    """The weights of the sketch in a decoder's checkpoint."""
    return {name.removeprefix("sketch."): value for name, value in checkpoint["ema"].items() if name.startswith("sketch.")}


def begin(job, origin, stages):
    """Copies the stages of another run into this one; those that are to be trained stand at step 0. Raises OSError, ValueError."""
    for stage in configs.MODEL_CONFIGS:
        in_decoder = stage == "sketch" and job.config.decoder.model.sketch and not (Path(origin) / "sketch.pt").is_file()
        source = "decoder" if in_decoder else stage
        if (Path(origin) / f"{source}.pt").is_file():
            checkpoint = load_checkpoint(Path(origin) / f"{source}.pt", source)
            if in_decoder:
                steps = job.config.sketch.train.steps
                checkpoint |= {"stage": stage, "model_config": asdict(job.config.sketch.model), "ema": sketch_in(checkpoint), "step": steps,
                               "steps": steps, "seconds": 0.0}
            if stage == "clip":
                write_json(checkpoint.get("tokenizer"), job.run / "tokenizer.json")
            if stage in stages:
                checkpoint |= {"step": 0, "steps": getattr(job.config, stage).train.steps, "seconds": 0.0}
            save_checkpoint(checkpoint, job.run / f"{stage}.pt")


def saved_config(args, there):
    """The configuration that this call goes on with: the run folder's own or that of --from, None for a new run. Raises as `settle`."""
    path, saved = args.run / "config.json", None
    if path.is_file():
        try:
            saved = overrides.from_dict(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}") from None
    if saved is None and set(there) - {"tokenizer"}:
        raise FileNotFoundError(f"{args.run} holds {', '.join(there)}, but no config.json any more, which says what they are")
    if saved is None and args.resume:
        raise FileNotFoundError(f"there is nothing to resume in {args.run}")
    if args.origin is None:
        return saved if there or args.resume else None                     # else left by a call that failed before it made anything
    if there:
        raise ValueError(f"{args.run} already holds {', '.join(there)}: --from begins a new run, choose another folder with --out")
    return origin_config(args.origin)


def check_unchanged(args, config, saved, there):
    """Sizes, and the run's data, stay as they were for what is there already, or comes with --from; habits, unless it learns on. Raises ValueError."""
    for stage in there if args.origin is None else configs.STAGES:
        if stage == "tokenizer":
            resized, other = config.tokenizer != saved.tokenizer, False
        else:
            now, then = getattr(config, stage).model, getattr(saved, stage).model
            resized, other = configs.sizes(now) != configs.sizes(then), now != then
        if args.origin is not None and resized:
            raise ValueError(f"{args.origin} holds a {stage} of other sizes: with --from they cannot be changed")
        if args.origin is None and (resized or config.data.source != saved.data.source):
            raise ValueError(f"{args.run} already holds a {stage} of other sizes or from other data: choose another folder with --out")
        if other and not learns_on(args, config, stage):
            habits = [name for name in configs.HABITS if getattr(now, name, None) != getattr(then, name, None)]
            raise ValueError(f"{args.origin or args.run} holds a {stage} with another {' and '.join(habits)}, which can only change "
                             f"while it is trained: let this call train it, with --{stage}.steps={2 * getattr(saved, stage).train.steps} say")


def learns_on(args, config, stage):
    """Whether this call takes further steps of a stage that is there already, or comes with --from. Raises OSError, ValueError."""
    if stage not in args.stages:
        return False
    path = args.run / f"{stage}.pt"
    return args.origin is not None or not path.is_file() or load_checkpoint(path, stage)["step"] < getattr(config, stage).train.steps


def settle(args):
    """The run's configuration: that of the folder if it has one, or of --from, else the preset, then the command line's changes.

    Raises FileNotFoundError, ValueError.
    """
    there = [stage for stage in configs.STAGES if made(args.run, stage)]
    saved = saved_config(args, there)
    if saved and args.preset not in (None, saved.preset):
        raise ValueError(f"{args.run} was begun with the preset {saved.preset}, not {args.preset}: choose another --out")
    config = saved or configs.preset(args.preset or "tiny")
    config = overrides.override(config, ([] if args.data is None else [f"--data.source={args.data}"]) + args.settings)
    if not args.resume and set(there) & set(args.stages):
        raise ValueError(f"{args.run} already holds {', '.join(s for s in there if s in args.stages)}: add --resume to go on with it, "
                         f"or choose another folder with --out")
    if saved:
        check_unchanged(args, config, saved, there)
    for stage in configs.MODEL_CONFIGS:
        rehearse(stage, getattr(config, stage).model)
        size, parts = getattr(config, stage).train.batch_size, getattr(config, stage).train.accumulate
        if size % (world() * parts):
            raise ValueError(f"--{stage}.batch_size={size} cannot be divided among {world()} processes, {parts} parts each")
    return config


def rehearse(stage, cfg):
    """One step of a stage's model on torch's "meta" device, which only follows the shapes: sizes that cannot work show at once.

    Raises ValueError.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            model = configs.build(cfg)
            if stage.startswith("upsampler"):                              # not its loss: spoiling pictures needs real ones
                low = torch.empty(2, 3, cfg.low_size, cfg.low_size)
                high = model.enlarge(low)
                model(high, torch.zeros(2, dtype=torch.long), high)
                return
            z, tokens = torch.empty(2, cfg.clip_dim), torch.empty(2, getattr(cfg, "context_length", 1), dtype=torch.long)
            images = torch.empty(2, 3, cfg.image_size, cfg.image_size) if stage in ("clip", "sketch", "decoder") else None
            model.loss(*{"clip": (images, tokens), "sketch": (images, z), "decoder": (images, z, tokens)}.get(stage, (z, z, tokens)))
    except (ValueError, RuntimeError, ArithmeticError, IndexError, TypeError) as error:
        raise ValueError(f"{stage} cannot work with these sizes: {error}") from None


def check_memory(job, stages):
    """Compares what the stages need with what this machine has, before anything is trained. Raises ValueError."""
    gpu = job.device.type == "cuda"
    memory = torch.cuda.mem_get_info(job.device)[0] if gpu else machine_memory()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))                      # torchrun's processes on this machine; a GPU holds one of them
    disk = next(shutil.disk_usage(folder).free for folder in (job.run, *job.run.absolute().parents) if folder.is_dir())
    for stage in stages:
        model, pictures = job.needs(stage) if stage != "tokenizer" else (0, 0)
        large = is_large(pictures)
        for needed, there, where in [((1 if gpu else here) * (model + (0 if gpu or large else pictures)), memory, "the GPU" if gpu else "this machine"),
                                     (here * pictures if large else 0, disk, f"the disk of {job.run}")]:
            if needed > there:
                each = f" in each of {here} processes" if here > 1 else ""
                raise ValueError(f"{stage} needs at least {model / 1e9:,.1f} GB for its weights and {pictures / 1e9:,.1f} GB for its "
                                 f"pictures{each}, and {where} has {there / 1e9:,.1f} GB: lower --data.images, or take a smaller --preset")


def finished(job, stage):
    """Whether a stage needs no more steps. Raises ValueError when it does and cannot: something is gone, or CLIP is another one."""
    path = job.run / f"{stage}.pt"
    if stage == "tokenizer" or not path.is_file():
        return stage == "tokenizer" and made(job.run, stage)
    checkpoint = load_checkpoint(path, stage)
    step, steps = checkpoint["step"], getattr(job.config, stage).train.steps
    # The prior measures its analytic variance when it is trained; this may have been interrupted too, and is then done again.
    done = step >= steps and (stage != "prior" or bool(checkpoint["ema"]["cov"].any()))
    if step == 0:                                                          # where --from begins
        return False
    if not done and not (job.run / f"{stage}.resume.pt").is_file():
        raise ValueError(f"{path} is not finished ({step} of {steps} steps), and {stage}.resume.pt, which is needed to go on, is not there")
    if stage in configs.ON_CLIP and checkpoint["clip_signature"] != job.frozen_clip()[1]:
        raise ValueError(f"{path} was trained on the embeddings of another CLIP: delete it and {stage}.resume.pt, or use another --out")
    shown = sketch_in(checkpoint) if stage == "decoder" else {}
    if shown and (job.run / "sketch.pt").is_file():
        now = load_checkpoint(job.run / "sketch.pt", "sketch")["ema"]
        if any(not torch.equal(value.float(), now[name].float()) for name, value in shown.items()):
            raise ValueError(f"{path} was shown another sketch than {job.run / 'sketch.pt'}: delete it and {stage}.resume.pt, or use another --out")
    return done


def check_files(job, stages, resume):
    """Reads what the first stage that is to be trained needs, before anything is written; returns the stages that are finished before it.

    Raises FileNotFoundError, ValueError when something is gone or damaged.
    """
    before = []
    for stage in stages:
        if resume and finished(job, stage):
            before.append(stage)
            continue
        if stage != "tokenizer":
            job.tokenizer()
        if stage in configs.ON_CLIP:
            job.frozen_clip()
        if stage == "decoder":
            job.frozen_sketch()
        latest = job.run / f"{stage}.resume.pt"
        if resume and latest.is_file():
            saved, now = load_checkpoint(latest, stage), getattr(job.config, stage).model
            if "optimizer" not in saved:
                raise ValueError(f"{latest} is not from training")
            if configs.sizes(configs.model_config(stage, saved["model_config"])) != configs.sizes(now):
                raise ValueError(f"{latest} belongs to a model of other sizes")
        break
    return before


def keep(config, run):
    """Writes the configuration into the run folder."""
    if is_main():
        write_json(overrides.to_dict(config), run / "config.json")


def note_command(args):
    """Adds the command line to commands.txt of the run folder, which says how the run came about."""
    if is_main():
        path = args.run / "commands.txt"
        before = path.read_bytes() if path.is_file() else b""
        with atomic_open(path) as file:
            file.write(before + f"{launcher()} {shlex.join(['train.py', *args.given])}\n".encode())


def summary(job, minutes):
    """Prints a table of the stages and the command to run next."""
    print(f"\n{'stage':<12}{'steps':>8}{'minutes':>10}{'loss':>10}")
    for stage, spent in minutes.items():
        lines = [line for line in read_metrics(job.run) if line["stage"] == stage][-5:]
        steps, loss = (lines[-1]["step"], f"{sum(line['loss'] for line in lines) / len(lines):.4f}") if lines else ("", "")
        print(f"{stage:<12}{steps:>8}{spent:>10.1f}{loss:>10}")
    print(f"{'together':<12}{sum(minutes.values()):>18.1f}\n")
    missing = [stage for stage in configs.stages(job.config) if not made(job.run, stage)]
    caption = "a red circle above a blue square" if job.config.data.source == "shapes" else job.pictures.captions()[0]
    run = shlex.quote(str(job.run))
    print(f"next: python train.py --stage {missing[0]} --out {run}" if missing else
          f"next: python sample.py text {shlex.quote(caption)} --run {run}")


def work(args, device):
    """Runs the stages. Returns the exit code."""
    config = settle(args)
    if args.stage == "all":
        args.stages = configs.stages(config)
    elif args.stage not in configs.stages(config):
        raise ValueError(f"there is no {args.stage} to train: --decoder.sketch=true shows the decoder one")
    job = Job(config, args.run, device, args.resume or args.origin is not None)
    check_memory(job, args.stages)
    if args.run.exists() and not args.run.is_dir():
        raise ValueError(f"--out {args.run} is a file: it names the run folder")
    if args.origin is None:
        before = check_files(job, args.stages, args.resume)
    args.run.mkdir(parents=True, exist_ok=True)
    barrier()                                                              # until then others may still be looking at what the folder holds
    if args.origin is not None:
        with main_first():
            if is_main():
                begin(job, args.origin, args.stages)
        before = check_files(job, args.stages, True)
    keep(config, args.run)
    minutes = {}
    try:
        for stage in args.stages:
            began = time.perf_counter()
            if stage in before or job.resume and finished(job, stage):
                print(f"{stage}: was finished before")
                show(job, stage)
                continue
            if stage != "tokenizer":
                tokenizer = job.tokenizer()
                job.config = configs.changed(job.config, {"clip.vocab_size": tokenizer.vocab_size, "clip.eot_id": tokenizer.eot_id})
                keep(job.config, args.run)
            if not minutes:
                note_command(args)
            learn(job, stage)
            minutes[stage] = (time.perf_counter() - began) / 60
    except KeyboardInterrupt as stop:
        only = "" if args.stage == "all" else f" --stage {args.stage}"
        if is_main():
            print(f"\n{str(stop) or 'stopped'}; go on with: {launcher()} train.py --out {shlex.quote(str(args.run))}{only} --resume", file=sys.stderr)
        return 130
    if is_main():
        summary(job, minutes)
    return 0


def main(argv=None):
    """The command: 0 when all went well, 2 after a mistake (one sentence on standard error), 130 after Ctrl-C."""
    torch.set_float32_matmul_precision("high")                             # TF32 on GPUs that have it
    return run_command("train.py", parse, work, argv, less="make a batch smaller, as in --decoder.batch_size=16")


if __name__ == "__main__":
    sys.exit(main())
