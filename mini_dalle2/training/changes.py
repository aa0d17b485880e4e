"""What a resume may change: the rules for a run whose stages are made already.

setting                     may it change?
sizes, tokenizer            no: the stages would not fit each other
data.source                 only to a copy of the same pictures
data.seed                   no: it chooses the pictures, and which of them are for validation
data.val_images             shapes: yes. A folder: fewer, because more would be trained on already
data.near_misses            while CLIP learns
data.images, upsampler…     yes: more or fewer pictures of the same split. A note says so
habits, such as dropout     while the model learns
steps                       yes, but not of a CLIP or a sketch that others have learned from
lr, batch_size and the rest yes: a stage goes on with them

--from begins a new run with the weights of another, and may have any data. From the same folder of
pictures it keeps the validation pictures. A CLIP or a sketch whose files are lost is learned again
with the settings that it had, and a note says so.

Read next: guards.py, which asks here.
"""

from pathlib import Path

from .. import configs
from ..data.tables import folder_digest
from ..runtime.commands import how_to_delete
from ..runtime.files import load_checkpoint, read_json
from ..runtime.processes import is_main
from . import hints, overrides
from .made import check_variant, is_made, newest, steps_taken, what_is_learned

# These stages are a part of what others learn: they may take no more steps then.
LEARNED_FROM = {"clip": configs.ON_CLIP, "sketch": ("decoder",)}


def asked(args):
    """The names that --stage stands for."""
    groups = {"all": list(configs.STAGES), "evaluation": list(configs.VARIANTS)}
    return groups.get(args.stage, [args.stage])


def learns_on(args, config, stage):
    """Whether this call takes further steps of a model that exists. Raises OSError, ValueError."""
    if stage not in asked(args):
        return False
    path = args.run / f"{stage}.pt"
    if args.origin is not None or not path.is_file():
        return True
    return load_checkpoint(path, stage)["step"] < getattr(config, stage).train.steps


# ---------------------------------------------------------------------------- models

def check_unchanged(args, config, saved, there):
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
        if other and not learns_on(args, config, stage):
            habits = [name for name in configs.HABITS
                      if getattr(now, name, None) != getattr(then, name, None)]
            steps = 2 * getattr(saved, stage).train.steps
            more = "" if args.resume or args.origin is not None else "--resume "
            raise ValueError(f"{args.origin or args.run} holds a {stage} with another "
                             f"{' and '.join(habits)}, which can only change while it is trained: "
                             f"let this call train it, with {more}--{stage}.steps={steps} say")


def check_origin(args, config, saved):
    """Refuse --from with a CLIP or sketch that the other stages would no longer know.

    Raises ValueError.
    """
    origin = Path(args.origin)
    for base, others in LEARNED_FROM.items():
        known = [name for name in others if (origin / f"{name}.pt").is_file()]
        steps = getattr(config, base).train.steps
        if known and args.stage == base:
            raise ValueError(f"{', '.join(known)} of {origin} would not know the {base} after "
                             f"further steps of it alone: leave out --stage {base}")
        # Of a sketch that lies in a decoder, nobody asks how many steps it took.
        there = (origin / f"{base}.pt").is_file()
        if there and base not in asked(args) and steps > getattr(saved, base).train.steps:
            raise ValueError(f"--stage {args.stage} does not train the {base}: "
                             f"leave out --{base}.steps={steps}")


def check_steps(run):
    """Refuse more steps of a CLIP or a sketch that other stages have learned from.

    Raises ValueError.
    """
    for base in (name for name in LEARNED_FROM if name in configs.stages(run.config)):
        known = [name for name in LEARNED_FROM[base] if steps_taken(run.folder, name)]
        step = steps_taken(run.folder, base)
        if known and step is None and base in run.names:
            check_lost(run, base, known)
        elif known and step is not None and step < getattr(run.config, base).train.steps:
            raise ValueError(
                f"{run.folder}/{base}.pt cannot take more steps, because {', '.join(known)} "
                f"learned from it: keep --{base}.steps={step}, or begin a new run that trains "
                f"all of them further, with `{hints.new_run(run)}`")


def check_lost(run, base, known):
    """Say what follows when a CLIP or a sketch is learned again because its files are lost.

    known: the stages that learned from it. They also know its settings. Raises ValueError for
    others.
    """
    lost = f"{', '.join(known)} learned from a {base} that is not in {run.folder} any more"
    then = overrides.from_dict(newest(run.folder, known[0]).get("config"))
    if what_is_learned(then, base) != what_is_learned(run.config, base):
        raise ValueError(f"{lost}, and these settings make another one: go back to its settings, "
                         f"or {how_to_delete(run.folder, known)}")
    if is_main():
        print(f"note: {lost}; should the new one differ, they must be trained again")


def note_variants(run):
    """Say which models of an evaluation do not belong to the run as it is now."""
    stale = []
    for name in configs.VARIANTS:
        path = run.folder / f"{name}.pt"
        if name in run.names or not path.is_file() or not is_made(run.folder, "tokenizer"):
            continue
        try:
            check_variant(run, name, load_checkpoint(path, name), path)
        except ValueError:
            stale.append(name)
    if stale and is_main():
        print(f"note: {', '.join(stale)} no longer belong to this run; "
              f"an evaluation will ask for them again")


# ---------------------------------------------------------------------------- data

def check_data(args, config, saved, there):
    """Refuse data that would mix training and validation pictures, or stages of other pictures.

    there: the stages that exist. Prints a note where a number of pictures changes.
    Raises ValueError.
    """
    if not there and args.origin is None:
        return
    now, then = config.data, saved.data
    of_folder = now.source != "shapes"
    folder, way = args.run, "choose another folder with --out"
    if args.origin is not None:
        folder, way = args.origin, "leave out --from"
    if args.origin is None or of_folder and now.source == then.source:
        if now.seed != then.seed:
            raise ValueError(f"{folder} learned from the pictures of --data.seed={then.seed}, and "
                             f"another seed chooses others: keep it, or {way}")
        if of_folder and now.val_images > then.val_images:
            raise ValueError(f"{folder} has trained on pictures that --data.val_images="
                             f"{now.val_images} would make validation pictures: "
                             f"keep --data.val_images={then.val_images}, or {way}")
    learned = "clip" in there and not learns_on(args, config, "clip")
    if learned and now.near_misses != then.near_misses:
        raise ValueError(f"{folder} holds a clip that learned with --data.near_misses="
                         f"{str(then.near_misses).lower()}: keep it, or {way}")
    if args.origin is None:
        note_numbers(now, then, there)


def note_numbers(now, then, there):
    """Say which stages learned from another number of pictures. now, then: DataConfigs."""
    for stages in (("clip", *configs.ON_CLIP), ("upsampler1",), ("upsampler2",)):
        key = f"{stages[0]}_images" if len(stages) == 1 else "images"
        before, after = getattr(then, key), getattr(now, key)
        known = [stage for stage in stages if stage in there]
        if known and before != after and is_main():
            print(f"note: {', '.join(known)} learned from up to {before} pictures; "
                  f"with --data.{key}={after}, what is trained from here on learns from these")


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
