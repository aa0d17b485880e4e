"""The checks before a training: a mistake is one sentence, and comes before anything is written.

In the order in which Run.open asks:
settle           the configuration: the folder's own, or a preset's, with the changes asked for
stages_to_train  the stages of this call
check_memory     whether the models and the pictures fit into this machine
check_compile    whether torch.compile works here, if it is asked for
check_folder     whether what is there belongs together, and which stages are finished

Read next: run.py, which calls them; changes.py for what a resume may change.
"""

import os
import shutil

import torch

from .. import configs
from ..data.tables import is_large
from ..runtime.commands import word
from ..runtime.device import machine_memory
from ..runtime.files import read_json
from ..runtime.processes import world
from . import budget, changes, hints, made, overrides
from .changes import asked
from .made import is_begun, is_made
from .origin import origin_config
from .rehearsal import check_one_step
from .variants import variant


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
    settings = [] if args.data is None else [f"--data.source={args.data}"]
    settings += args.settings
    config = overrides.override(budget.begin(args, saved, settings), settings)
    if is_of_variants(args):
        check_variants_can_follow(args, config, saved, settings)
    # Sizes come first: to a run of other sizes, --resume is no remedy.
    if saved:
        changes.check_unchanged(args, config, saved, there)
        changes.check_data(args, config, saved, there)
    if args.origin is not None:
        changes.check_origin(args, config, saved)
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


def is_of_variants(args):
    """Whether this call trains models that only an evaluation needs."""
    return args.stage == "evaluation" or args.stage in configs.VARIANTS


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


def check_variants_can_follow(args, config, saved, settings):
    """The models of an evaluation need a run, and follow its settings.

    Raises FileNotFoundError, ValueError.
    """
    if saved is None:
        raise FileNotFoundError(f"{args.run} holds no run that --stage {args.stage} could belong "
                                f"to: run `python train.py --out {word(args.run)}` first")
    if config != saved:
        raise ValueError(f"--stage {args.stage} follows the settings in {args.run}/config.json: "
                         f"leave out {' '.join(settings).replace('--data.source=', '--data ')}")
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

def check_folder(run):
    """Read all that the run folder holds. Return the names of the stages that are finished.

    Raises FileNotFoundError, ValueError when something is missing, damaged or of another run.
    """
    made.check_models(run)
    changes.check_steps(run)
    changes.note_variants(run)
    return made.check_files(run)
