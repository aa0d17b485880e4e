"""What may change when a run goes on, and when a run begins with the weights of another.

    setting                                 where models exist already
    sizes of a model, the tokenizer         never
    data.*                                  never; but a folder of pictures may move, or grow
    habits such as dropout and guidance     while the model is trained on
    learning rate, batch, precision, …      at any time
    steps                                   at any time; but not those of CLIP or of the sketch
                                            when other models have learned from it

Whatever cannot go together is said before anything is trained. Read next: guards.py.
"""

from dataclasses import asdict
from pathlib import Path

from .. import configs
from ..data.tables import folder_digest
from ..runtime.commands import word
from ..runtime.files import load_checkpoint, read_json
from ..runtime.processes import is_main

# {stage: the stages that learn from what it has learned}.
LEARN_FROM = {"clip": configs.ON_CLIP, "sketch": ("decoder",)}


def check_changes(args, config, saved, there, learning):
    """Refuse what may not change. Raises FileNotFoundError, ValueError.

    args: the command line. config: what it asks for; saved: that of the folder, or of --from.
    there: the stages that the folder holds. learning: those that this call trains.
    """
    check_sizes(args, config, saved, there, learning)
    if args.stage in LEARN_FROM and args.origin is not None:
        left = [other for other in LEARN_FROM[args.stage]
                if (Path(args.origin) / f"{other}.pt").is_file()]
        if left:
            raise ValueError(f"{', '.join(left)} of {args.origin} would not know the "
                             f"{args.stage} that --from trains on: leave out --stage {args.stage}")
    if args.origin is None:
        check_data(args, config, saved, there)
        check_nobody_is_left_behind(args, config, there, learning)


def check_sizes(args, config, saved, there, learning):
    """Refuse other sizes or data for models that exist: in the folder, or with --from.

    Habits, such as dropout, may change only while a model is trained on. Raises ValueError.
    """
    other_data = (args.origin is None
                  and is_other_data(args.run, config.data.source, saved.data.source,
                                    config.data.outside))
    for stage in there if args.origin is None else configs.STAGES:
        if stage == "tokenizer":
            resized = config.tokenizer != saved.tokenizer
            other = False
        else:
            now = getattr(config, stage).model
            then = getattr(saved, stage).model
            resized = configs.sizes(now) != configs.sizes(then)
            other = now != then
        if args.origin is not None and resized:
            raise ValueError(f"{args.origin} holds a {stage} of other sizes, and with --from they "
                             f"cannot be changed: leave out the settings of sizes, or --from")
        if args.origin is None and (resized or other_data):
            raise ValueError(f"{args.run} already holds a {stage} of other sizes or from other "
                             f"data: choose another folder with --out")
        if other and stage not in learning:
            habits = [name for name in configs.HABITS
                      if getattr(now, name, None) != getattr(then, name, None)]
            steps = 2 * getattr(saved, stage).train.steps
            more = "" if args.resume or args.origin is not None else "--resume "
            raise ValueError(f"{args.origin or args.run} holds a {stage} with another "
                             f"{' and '.join(habits)}, which can only change while it is trained: "
                             f"let this call train it, with {more}--{stage}.steps={steps} say")


def check_data(args, config, saved, there):
    """Refuse other training pictures where stages have learned from some. Raises ValueError."""
    now = asdict(config.data)
    for key, then in asdict(saved.data).items():
        # Each upsampler has pictures of its own.
        own = key.removesuffix("_images")
        learned = [stage for stage in there if own not in configs.MODELS or stage == own]
        if key not in ("source", "outside") and now[key] != then and learned:
            raise ValueError(f"{args.run} already holds {', '.join(learned)}, which learned with "
                             f"--data.{key}={then}: leave this setting out, or choose another "
                             f"folder with --out")


def check_nobody_is_left_behind(args, config, there, learning):
    """Refuse to train a model on when others have learned from what it is now.

    Raises ValueError.
    """
    for stage, others in LEARN_FROM.items():
        if stage not in there or stage not in learning:
            continue
        # An interrupted training goes on as it was meant to. With --from all begin at step 0.
        step, steps = steps_of(args.run, stage)
        left = [other for other in others if other in there and steps_of(args.run, other)[0] > 0]
        if 0 < steps <= step and left:
            steps = getattr(config, stage).train.steps
            raise ValueError(
                f"{', '.join(left)} in {args.run} have learned from {stage} as it is now, and more "
                f"steps would change it: begin a new run with these weights, as in python train.py "
                f"--from {word(args.run)} --out {word(f'{args.run}-more')} --{stage}.steps={steps}")


def steps_of(folder, stage):
    """Return (steps done, steps in all) of a stage's checkpoint; (0, 0) without one."""
    path = folder / f"{stage}.pt"
    if not path.is_file():
        return 0, 0
    checkpoint = load_checkpoint(path, stage)
    return checkpoint.get("step", 0), checkpoint.get("steps", 0)


# ---------------------------------------------------------------------------- a folder of pictures

def is_other_data(run_folder, now, then, outside=False):
    """Whether a run that began with the pictures of `then` is given others by `now`.

    now, then: "shapes" or a folder. A folder is known by what it holds, wherever it lies now.
    outside: see CaptionedFolder.
    Raises FileNotFoundError if `now` is no folder, ValueError if it has no pictures.
    """
    if "shapes" in (now, then):
        return now != then
    if Path(now).resolve() == Path(then).resolve():
        return False
    known = recorded_digest(run_folder) or digest_if_there(then, outside)
    if known is None and is_main():
        print(f"note: {run_folder} does not say what its pictures were, and {then} is gone: "
              f"those in {now} are taken for the same")
    return known not in (None, folder_digest(now, outside))


def digest_if_there(folder, outside):
    """Return the digest of a folder of pictures; None if there is no such folder any more."""
    try:
        return folder_digest(folder, outside)
    except (FileNotFoundError, ValueError):
        return None


def recorded_digest(run_folder):
    """Return the digest of the folder of pictures that a run has learned from.

    None for runs of older versions, and for a damaged record.
    """
    try:
        return read_json(run_folder / "pictures.json")["digest"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
