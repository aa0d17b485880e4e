"""The checks before a training: a mistake is one sentence, and comes before anything is written.

In the order in which Run.open asks:
settle           the configuration: the folder's own, or a preset's, with the changes asked for
stages_to_train  the stages of this call
check_memory     whether the models and the pictures fit into this machine
check_compile    whether torch.compile works here, if it is asked for
check_files      whether what the first stage needs is there, and which stages are finished

Read next: run.py, which calls them.
"""

import os
import shutil
from dataclasses import asdict, replace

import torch

from .. import configs
from ..data.tables import is_large
from ..pipeline import check_fits
from ..runtime.commands import is_run, word
from ..runtime.device import machine_memory
from ..runtime.files import load_checkpoint, read_json
from ..runtime.processes import world
from . import budget, hints, overrides
from .changes import check_changes
from .origin import origin_config, sketch_in
from .rehearsal import check_one_step
from .variants import variant

# Settings of a training that do not change what a model learns.
MEMORY_AND_SPEED = ("accumulate", "recompute", "shard", "compile", "save_every", "log_every")


# ---------------------------------------------------------------------------- the configuration

def settle(args):
    """The run's configuration: the folder's or --from's, else the preset's; then the changes.

    args: what train.parse returns. Raises FileNotFoundError, ValueError.
    """
    check_flags(args)
    there = [stage for stage in configs.STAGES if is_made(args.run, stage)]
    saved = saved_config(args, there)
    if saved and args.preset not in (None, saved.preset):
        raise ValueError(f"{args.run} was begun with the preset {saved.preset}, "
                         f"not {args.preset}: choose another --out")
    changes = [] if args.data is None else [f"--data.source={args.data}"]
    changes += args.settings
    config = overrides.override(budget.begin(args, saved, changes), changes)
    if is_of_variants(args):
        check_variants_can_follow(args, config, saved, changes)
    # Sizes come first: to a run of other sizes, --resume is no remedy.
    if saved:
        learning = [stage for stage in configs.MODELS if learns_on(args, config, stage)]
        check_changes(args, config, saved, there, learning)
    check_nothing_is_overwritten(args)
    for stage in configs.MODELS:
        check_one_step(stage, getattr(config, stage).model)
        check_batch_divides(stage, getattr(config, stage).train)
    return config


def check_flags(args):
    """Refuse flags that do not go together. Raises ValueError."""
    if args.out == "":
        raise ValueError("--out is empty: it names the run folder")
    if args.origin is None:
        return
    if args.resume and is_begun(args.run):
        raise ValueError(f"{args.run} has taken over the weights already: leave out --from")
    if args.resume or args.preset or args.stage == "tokenizer":
        raise ValueError("--from begins a run with the sizes and the tokenizer of another: "
                         "leave out --resume, --preset and --stage tokenizer")


def is_made(folder, stage):
    """Whether a run folder holds anything of a stage or a variant."""
    names = [f"{stage}.pt", f"{stage}.resume.pt"]
    if stage == "tokenizer":
        names = ["tokenizer.json"]
    return any((folder / name).is_file() for name in names)


def is_begun(folder):
    """Whether a run folder holds a run that can go on."""
    return is_run(folder) and any(is_made(folder, stage) for stage in configs.STAGES)


def is_of_variants(args):
    """Whether this call trains models that only an evaluation needs."""
    return args.stage == "evaluation" or args.stage in configs.VARIANTS


def asked(args):
    """The names that --stage stands for."""
    groups = {"all": list(configs.STAGES), "evaluation": list(configs.VARIANTS)}
    return groups.get(args.stage, [args.stage])


def saved_config(args, there):
    """The configuration to go on with: the folder's own, or that of --from; None for a new run.

    there: the stages that the folder holds. Raises FileNotFoundError, ValueError.
    """
    path = args.run / "config.json"
    saved = None
    if path.is_file():
        try:
            saved = overrides.from_dict(read_json(path))
        except ValueError as error:
            raise ValueError(f"{path} cannot be used: {error}") from None
    if saved is None and set(there) - {"tokenizer"}:
        raise FileNotFoundError(f"{args.run} holds {', '.join(there)}, but no config.json, "
                                f"which says what they are: choose another folder with --out")
    if saved is None and args.resume:
        raise FileNotFoundError(f"there is nothing to resume in {args.run}: "
                                f"{hints.begun_runs(args)}")
    if args.origin is None:
        # A call that failed early may have left a config.json with nothing beside it.
        return saved if there or args.resume else None
    if there:
        raise ValueError(f"{args.run} already holds {', '.join(there)}: --from begins a new run, "
                         f"choose another folder with --out")
    return origin_config(args.origin)


def check_nothing_is_overwritten(args):
    """Refuse to train a stage again without --resume. Raises ValueError."""
    made = [name for name in asked(args) if is_made(args.run, name)]
    if made and not args.resume:
        raise ValueError(f"{args.run} already holds {', '.join(made)}: add --resume to go on "
                         f"with it, or choose another folder with --out")


def learns_on(args, config, stage):
    """Whether this call takes further steps of a model that exists. Raises OSError, ValueError."""
    if stage not in asked(args):
        return False
    path = args.run / f"{stage}.pt"
    if args.origin is not None or not path.is_file():
        return True
    return load_checkpoint(path, stage)["step"] < getattr(config, stage).train.steps


def check_variants_can_follow(args, config, saved, changes):
    """The models of an evaluation need a run, and follow its settings.

    Raises FileNotFoundError, ValueError.
    """
    if saved is None:
        raise FileNotFoundError(f"{args.run} holds no run that --stage {args.stage} could belong "
                                f"to: run `python train.py --out {word(args.run)}` first")
    if config != saved:
        raise ValueError(f"--stage {args.stage} follows the settings in {args.run}/config.json: "
                         f"leave out {' '.join(changes).replace('--data.source=', '--data ')}")
    for name in asked(args):
        check_one_step(configs.VARIANTS[name],
                       getattr(variant(config, name), configs.VARIANTS[name]).model)


def check_batch_divides(stage, cfg):
    """Every process, and every part of its share, must get as many examples. Raises ValueError."""
    if cfg.batch_size % (world() * cfg.accumulate):
        raise ValueError(f"--{stage}.batch_size={cfg.batch_size} must be a multiple of "
                         f"processes × accumulate ({world()} × {cfg.accumulate})")


def stages_to_train(args, config):
    """The names of the stages that this call trains, in order. Raises ValueError."""
    stages = configs.stages(config)
    if args.stage == "all":
        return stages
    if args.stage in configs.STAGES and args.stage not in stages:
        raise ValueError(f"there is no {args.stage} to train: a new run of the preset tiny or "
                         f"micro has one, unless --decoder.sketch=true is changed")
    return asked(args)


# ---------------------------------------------------------------------------- memory and disk

def needs(run, name):
    """(bytes of the weights in training, bytes of the pictures) that a stage needs at least."""
    base = configs.VARIANTS.get(name, name)
    config = run.config_of(name)
    cfg = getattr(config, base).model
    # "meta" has shapes without memory.
    with torch.device("meta"):
        model = configs.build(cfg)
    numbers = sum(p.numel() for p in model.parameters() if p.requires_grad)
    if base.startswith("upsampler"):
        images = getattr(config.data, f"{base}_images")
        side = cfg.high_size
    else:
        # The pictures of the priors are CLIP's: they are embedded.
        images = config.data.images + config.data.val_images
        side = getattr(cfg, "image_size", config.clip.model.image_size)
    # Weights, gradients, AdamW's two averages and the EMA weights, of 4 bytes each.
    parts = world() if getattr(config, base).train.shard else 1
    return 5 * 4 * numbers // parts, min(images, run.pictures.available) * 3 * side ** 2


def check_memory(run):
    """Compare what the stages need with what this machine has. Raises ValueError."""
    gpu = run.device.type == "cuda"
    memory = torch.cuda.mem_get_info(run.device)[0] if gpu else machine_memory()
    # The processes that torchrun started on this machine. A GPU holds one of them.
    here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    folders = (run.folder, *run.folder.absolute().parents)
    disk = next(shutil.disk_usage(folder).free for folder in folders if folder.is_dir())
    for name in run.names:
        if name == "tokenizer":
            continue
        model, pictures = needs(run, name)
        large = is_large(pictures)
        weights = (1 if gpu else here) * model
        in_memory = weights + (0 if gpu or large else here * pictures)
        on_disk = here * pictures if large else 0
        for needed, of_weights, there, where in (
                (in_memory, weights, memory, "the GPU" if gpu else "this machine"),
                (on_disk, 0, disk, f"the disk of {run.folder}")):
            if needed > there:
                each = f" in each of {here} processes" if here > 1 else ""
                raise ValueError(
                    f"{name} needs at least {model / 1e9:,.1f} GB for its weights and "
                    f"{pictures / 1e9:,.1f} GB for its pictures{each}, and {where} has "
                    f"{there / 1e9:,.1f} GB: {hints.smaller(name, of_weights > there)}")


def check_compile(run):
    """Let torch.compile compile something small. Raises ValueError where that does not work."""
    trained = [configs.VARIANTS.get(name, name) for name in run.names if name != "tokenizer"]
    if not any(getattr(run.config, stage).train.compile for stage in trained):
        return
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2, device=run.device))
    except Exception as error:
        # torch has many exceptions for this, all with long texts.
        reason = str(error).partition("\n")[0]
        raise ValueError(f"torch.compile does not work on this machine ({reason}): install a C++ "
                         f"compiler such as g++, or leave out --compile") from None


# ---------------------------------------------------------------------------- what is there

def is_finished(run, name):
    """Whether a stage needs no more steps.

    Raises ValueError when it needs some and cannot take them, or belongs to another CLIP.
    """
    path = run.folder / f"{name}.pt"
    if name == "tokenizer":
        return is_made(run.folder, name)
    if not path.is_file():
        return False
    base = configs.VARIANTS.get(name, name)
    checkpoint = load_checkpoint(path, name)
    step = checkpoint["step"]
    # This is where --from begins.
    if step == 0:
        return False
    if name in configs.VARIANTS:
        check_variant(run, name, checkpoint, path)
    steps = getattr(run.config_of(name), base).train.steps
    # The prior measures its analytic variance after the last step. Ctrl-C may have come between.
    done = step >= steps and (base != "prior" or bool(checkpoint["ema"]["cov"].any()))
    if not done and not (run.folder / f"{name}.resume.pt").is_file():
        raise ValueError(f"{path} is not finished ({step} of {steps} steps), and {name}.resume.pt, "
                         f"which is needed to go on, is not there: delete {name}.pt, and begin it anew")
    remedy = (f"delete it and {name}.resume.pt, then run python train.py --stage {name} "
              f"--out {word(run.folder)}")
    if base in configs.ON_CLIP and checkpoint["clip_signature"] != run.frozen_clip()[1]:
        raise ValueError(f"{path} was trained on the embeddings of another CLIP: {remedy}")
    if base == "decoder" and not has_the_runs_sketch(run, checkpoint):
        sketch = run.folder / "sketch.pt"
        raise ValueError(f"{path} was shown another sketch than {sketch}: {remedy}")
    return done


def has_the_runs_sketch(run, checkpoint):
    """Whether the sketch in a decoder's checkpoint is the run's, as far as there are sketches."""
    shown = sketch_in(checkpoint)
    path = run.folder / "sketch.pt"
    if not shown or not path.is_file():
        return True
    now = load_checkpoint(path, "sketch")["ema"]
    return all(torch.equal(value.float(), now[name].float()) for name, value in shown.items())


def check_variant(run, name, checkpoint, path):
    """Refuse a variant that was made from another run. Raises ValueError."""
    try:
        then = overrides.from_dict(checkpoint.get("config"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    now = run.config_of(name)
    same = (what_is_learned(then, name) == what_is_learned(now, name)
            and checkpoint.get("tokenizer") == run.tokenizer().state_dict())
    if not same:
        raise ValueError(f"{path} was trained with other settings or another tokenizer than the "
                         f"run has now: delete {name}.pt and {name}.resume.pt, and train it again "
                         f"with --stage {name} --out {word(run.folder)}")


def what_is_learned(config, name):
    """The settings that a variant's weights depend on. What is off is left out.

    A model's class may differ then: the paper's cannot say that a trick is off.
    """
    stage = getattr(config, configs.VARIANTS[name])
    model = {key: value for key, value in asdict(stage.model).items()
             if not (key in configs.OFF and configs.OFF[key] == value)}
    usual = configs.TrainConfig()
    same = {key: getattr(usual, key) for key in MEMORY_AND_SPEED}
    return config.data, model, replace(stage.train, **same)


def check_files(run):
    """Read what the first unfinished stage needs. Return the names of those finished before it.

    Raises FileNotFoundError, ValueError when something is missing or damaged.
    """
    for name in configs.MODELS:
        path = run.folder / f"{name}.pt"
        if path.is_file():
            # It may be from another version, and then the run would end unusable.
            check_fits(path, load_checkpoint(path, name))
    done = []
    for name in run.names:
        if run.resume and is_finished(run, name):
            done.append(name)
            continue
        base = configs.VARIANTS.get(name, name)
        if name != "tokenizer":
            run.tokenizer()
        if base in configs.ON_CLIP:
            run.frozen_clip()
        if base == "decoder" and "sketch" in configs.stages(run.config_of(name)):
            run.frozen_sketch()
        latest = run.folder / f"{name}.resume.pt"
        if run.resume and latest.is_file():
            check_can_go_on(run, name, latest)
        break
    return done


def check_can_go_on(run, name, latest):
    """Refuse a NAME.resume.pt that is not of this model. Raises ValueError."""
    base = configs.VARIANTS.get(name, name)
    saved = load_checkpoint(latest, name)
    if "optimizer" not in saved:
        raise ValueError(f"{latest} is not from training")
    if name == "clip":
        run.check_tokenizer(saved)
    if name in configs.VARIANTS:
        check_variant(run, name, saved, latest)
    check_fits(latest, saved)
    now = getattr(run.config_of(name), base).model
    then = configs.model_config(base, saved["model_config"])
    if configs.sizes(then) != configs.sizes(now):
        raise ValueError(f"{latest} belongs to a model of other sizes")
