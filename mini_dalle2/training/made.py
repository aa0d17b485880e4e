"""What a run folder holds: which stages are made, and whether they belong together.

Sampling loads all stages. So all of them are read before any of them is trained, and a stage that
sampling would refuse is refused then.

check_models     every stage's file: damage, version, sizes, tokenizer, CLIP and sketch
check_files      what the stages of this call need, and which of them are finished

Read next: changes.py for what a resume may change.
"""

from dataclasses import asdict, replace

import torch

from .. import configs
from ..pipeline import check_fits
from ..runtime.commands import how_to_delete, how_to_train_again, is_run, train_command, word
from ..runtime.files import load_checkpoint, signature
from . import overrides
from .origin import sketch_in
from .state import check_moments, make_optimizer

# Settings of a training that do not change what a model learns.
MEMORY_AND_SPEED = ("accumulate", "recompute", "shard", "compile", "save_every", "log_every")


def is_made(folder, stage):
    """Whether a run folder holds anything of a stage or a variant."""
    names = [f"{stage}.pt", f"{stage}.resume.pt"]
    if stage == "tokenizer":
        names = ["tokenizer.json"]
    return any((folder / name).is_file() for name in names)


def is_begun(folder):
    """Whether a run folder holds a run that can go on."""
    return is_run(folder) and any(is_made(folder, stage) for stage in configs.STAGES)


def newest(folder, stage):
    """The checkpoint of a stage, or what it would go on from; None without both.

    Raises ValueError.
    """
    for name in (f"{stage}.pt", f"{stage}.resume.pt"):
        if (folder / name).is_file():
            return load_checkpoint(folder / name, stage)
    return None


def steps_taken(folder, stage):
    """The steps that a stage has taken: 0 for a copy by --from, None without its files."""
    checkpoint = newest(folder, stage)
    return None if checkpoint is None else checkpoint["step"]


def is_finished(run, name):
    """Whether a stage needs no more steps.

    Raises ValueError when it needs some and cannot take them, or does not belong to the run.
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
                         f"which is needed to go on, is not there: delete {name}.pt, "
                         f"and begin it anew")
    check_belongs(run, name, checkpoint, run.frozen_clip()[1] if base in configs.ON_CLIP else None)
    return done


# ---------------------------------------------------------------------------- what belongs together

def check_models(run):
    """Read every stage of the folder as sampling will. Raises ValueError."""
    clip = None
    for name in configs.stages(run.config)[1:]:
        path = run.folder / f"{name}.pt"
        if not path.is_file():
            continue
        checkpoint = load_checkpoint(path, name)
        check_fits(path, checkpoint)
        if name == "clip":
            clip = signature(checkpoint["ema"])
            # Sampling goes by the record.
            if checkpoint.get("clip_signature") != clip:
                raise ValueError(f"{path} is damaged: it holds other weights than it says; "
                                 f"{how_to_train_again(run.folder, name)}")
        if not has_the_runs_sizes(run, name, checkpoint):
            raise ValueError(f"{path} has other sizes than {run.folder}/config.json says: "
                             f"{how_to_train_again(run.folder, name)}")
        # What --from has copied is yet to learn from the others.
        if checkpoint["step"] > 0:
            check_belongs(run, name, checkpoint, clip)


def has_the_runs_sizes(run, name, checkpoint):
    """Whether a stage's or a variant's checkpoint has the sizes that the run's settings say."""
    base = configs.VARIANTS.get(name, name)
    then = configs.model_config(base, checkpoint["model_config"])
    return configs.sizes(then) == configs.sizes(getattr(run.config_of(name), base).model)


def check_belongs(run, name, checkpoint, clip):
    """Refuse a stage or variant of another tokenizer, CLIP or sketch. Raises ValueError.

    clip: the signature of the run's CLIP, None if there is none or it does not matter.
    """
    path = run.folder / f"{name}.pt"
    base = configs.VARIANTS.get(name, name)
    tokenizer = checkpoint.get("tokenizer")
    if tokenizer and is_made(run.folder, "tokenizer") and tokenizer != run.tokenizer().state_dict():
        raise ValueError(f"{path} knows another tokenizer than {run.folder}/tokenizer.json: "
                         f"{how_to_train_again(run.folder, name)}")
    if base in configs.ON_CLIP and clip not in (None, checkpoint.get("clip_signature")):
        raise ValueError(of_another_clip(run, name, clip))
    if base == "decoder" and not has_the_runs_sketch(run, checkpoint):
        raise ValueError(f"{path} was shown another sketch than {run.folder}/sketch.pt: "
                         f"{how_to_train_again(run.folder, name)}")


def of_another_clip(run, name, clip):
    """A sentence about all stages that were trained on another CLIP, `name` among them."""
    if name in configs.VARIANTS:
        return (f"{run.folder}/{name}.pt was trained on the embeddings of another CLIP: "
                f"{how_to_delete(run.folder, [name])}, and go on with "
                f"{train_command(run.folder, '--stage', name)}")
    others = []
    for other in configs.ON_CLIP:
        if steps_taken(run.folder, other) and (run.folder / f"{other}.pt").is_file():
            theirs = load_checkpoint(run.folder / f"{other}.pt", other).get("clip_signature")
            others += [other] if theirs != clip else []
    files = ", ".join(f"{run.folder}/{other}.pt" for other in others)
    return (f"{files} {'were' if others[1:] else 'was'} trained on the embeddings of another CLIP: "
            f"{how_to_train_again(run.folder, *others)}")


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
    """The settings that a stage's or a variant's weights depend on. What is off is left out.

    A model's class may differ then: the paper's cannot say that a trick is off.
    """
    stage = getattr(config, configs.VARIANTS.get(name, name))
    model = {key: value for key, value in asdict(stage.model).items()
             if not (key in configs.OFF and configs.OFF[key] == value)}
    usual = configs.TrainConfig()
    same = {key: getattr(usual, key) for key in MEMORY_AND_SPEED}
    return config.data, model, replace(stage.train, **same)


# ---------------------------------------------------------------------------- what a call needs

def needed(run, name):
    """The earlier stages that a stage or variant learns from."""
    base = configs.VARIANTS.get(name, name)
    names = [] if name == "tokenizer" else ["tokenizer"]
    names += ["clip"] if base in configs.ON_CLIP else []
    has_sketch = base == "decoder" and "sketch" in configs.stages(run.config_of(name))
    return names + (["sketch"] if has_sketch else [])


def check_files(run):
    """Read what the stages of this call need. Return the names of those that are finished.

    Raises FileNotFoundError, ValueError when something is missing or damaged.
    """
    there = {"tokenizer": run.tokenizer, "clip": run.frozen_clip, "sketch": run.frozen_sketch}
    done = []
    learning = []
    for name in run.names:
        bases = needed(run, name)
        # This call makes the others.
        for base in (base for base in bases if base not in learning):
            there[base]()
        fixed = not set(bases) & set(learning)
        if run.resume and fixed and is_finished(run, name):
            done.append(name)
            continue
        learning.append(name)
        latest = run.folder / f"{name}.resume.pt"
        if run.resume and latest.is_file():
            check_can_go_on(run, name, latest, fixed)
    return done


def check_can_go_on(run, name, latest, fixed):
    """Refuse a NAME.resume.pt that is not of this model. Raises ValueError.

    fixed: whether what the stage learns from is there, and stays as it is.
    """
    base = configs.VARIANTS.get(name, name)
    saved = load_checkpoint(latest, name)
    untrained = ValueError(f"{latest} is not from training")
    if "optimizer" not in saved:
        raise untrained
    if name in configs.VARIANTS:
        check_variant(run, name, saved, latest)
    check_fits(latest, saved)
    try:
        # EMA weights and weights are of one model.
        configs.check_weights(saved["ema"], saved["model"])
        fits = has_the_runs_sizes(run, name, saved)
    except (KeyError, RuntimeError):
        fits = False
    if not fits:
        raise ValueError(f"{latest} belongs to a model of other sizes")
    stage = getattr(run.config_of(name), base)
    # "meta" has shapes without memory.
    with torch.device("meta"):
        optimizer = make_optimizer(configs.build(stage.model), stage.train)
    try:
        check_moments(optimizer, saved["optimizer"])
    except (AttributeError, KeyError, RuntimeError):
        raise untrained from None
    if fixed and base in configs.ON_CLIP and saved.get("clip_signature") != run.frozen_clip()[1]:
        raise ValueError(f"{latest} was trained on the embeddings of another CLIP: "
                         f"{how_to_train_again(run.folder, name)}")
