"""The commands that messages name. Each works as printed, in the state in which it is printed.

Read next: pace.py.
"""

import shlex
from pathlib import Path

import torch

from .. import configs
from ..pipeline import check_captions
from ..runtime.commands import word
from ..runtime.device import pick_device
from ..runtime.files import read_metrics
from ..runtime.processes import launcher
from .log import recent_loss

# Steps that take so many times as long as they should are worth a note.
SLOW = 3
# So many pictures show too few combinations of their words.
FEW = 1000


def go_on(folder, device, stage="all"):
    """The command that goes on with a run after it was stopped. stage: that of the command line."""
    only = "" if stage == "all" else f" --stage {stage}"
    # The run folder knows all settings, but not the device.
    other = "" if device.type == pick_device().type else f" --device {device.type}"
    return f"{launcher()} train.py --out {word(folder)}{only}{other} --resume"


def begun_runs(args):
    """What to do when there is nothing to go on with: the latest run beside the folder, or none."""
    found = sorted(args.run.parent.glob("*/config.json"), key=lambda path: path.stat().st_mtime)
    if not found:
        return "leave out --resume to begin a run"
    return f"name the run, as in python train.py --out {word(found[-1].parent)} --resume"


def without(words, flags):
    """The words of a command line, without some flags that take a value."""
    kept = []
    rest = iter(words)
    for one in rest:
        if one in flags:
            next(rest)
        elif one.partition("=")[0] not in flags:
            kept.append(one)
    return kept


def instead(words, stage):
    """The command line, for another stage."""
    kept = [*without(words, ["--stage"]), "--stage", stage]
    return f"{launcher()} train.py {shlex.join(kept)}"


def new_run(run):
    """The command that trains the stages of a run further, in a folder beside it."""
    kept = without(run.words, ["--stage", "--out", "--preset", "--from"])
    kept = [one for one in kept if one != "--resume"]
    beside = (Path(f"{run.folder}-{i}") for i in range(2, 1000))
    out = next(folder for folder in beside if not folder.exists())
    more = f" {shlex.join(kept)}" if kept else ""
    return f"{launcher()} train.py --from {word(run.folder)} --out {word(out)}{more}"


def smaller(name, weights):
    """What to do when a stage is too large for the machine. weights: not only its pictures are."""
    if weights:
        return "begin a new run with a smaller --preset"
    base = configs.VARIANTS.get(name, name)
    own = f"data.{base}_images"
    return f"lower --{own if base.startswith('upsampler') else 'data.images'}"


def less_memory(run, name):
    """What to do when the memory does not suffice for a stage. Ends in a command."""
    if name in configs.VARIANTS or name == "tokenizer":
        return f"close other programs, and go on with {run.go_on}"
    cfg = getattr(run.config, name).train
    smaller = f"--{name}.batch_size={cfg.batch_size // 2}"
    if name != "clip" and cfg.batch_size % (2 * cfg.accumulate) == 0:
        # The same batch, computed in parts.
        smaller = f"--{name}.accumulate={2 * cfg.accumulate}"
    return f"go on with {run.go_on} {smaller}"


def lower_rate(run, name):
    """What to do when the loss of a stage is not finite. Ends in a command, if one can help."""
    base = configs.VARIANTS.get(name, name)
    rate = f"--{base}.lr={getattr(run.config, base).train.lr / 3:.1e}"
    if name in configs.VARIANTS:
        return f"it follows the settings of its run: begin a new run with a lower rate, say {rate}"
    return f"go on with a lower rate, as in {run.go_on} {rate}"


def slow_note(run, name, seconds, usual):
    """A sentence if a step takes several times its usual seconds on a CPU, else None."""
    threads = torch.get_num_threads()
    if run.device.type != "cpu" or threads == 1 or seconds < SLOW * usual:
        return None
    return (f"note: a step of {name} takes {seconds:.2g} s instead of {usual:.2g} s, because other "
            f"programs use this machine, and {threads} threads wait for each other. One thread may "
            f"be faster: press Ctrl-C, then run OMP_NUM_THREADS=1 {run.go_on}")


def summary(run, minutes):
    """Print a table of the stages trained, {stage: minutes}, and the command to run next."""
    print_table(run.folder, minutes)
    print(f"next: {next_step(run)}")
    source = run.config.data.source
    if source != "shapes" and run.pictures.available < FEW:
        print(f"This run learned from {run.pictures.available} pictures. Captions like theirs work "
              f"best; a new combination of their words may fail.")


def print_table(folder, minutes):
    """Print steps, minutes and loss of the stages trained, {stage: minutes}."""
    print(f"\n{'stage':<12}{'steps':>8}{'minutes':>10}{'loss':>10}")
    for name, spent in minutes.items():
        lines = [line for line in read_metrics(folder) if line["stage"] == name]
        steps = lines[-1]["step"] if lines else ""
        losses = [(line["step"], line["loss"]) for line in lines]
        loss = f"{recent_loss(losses):.4f}" if lines else ""
        print(f"{name:<12}{steps:>8}{spent:>10.1f}{loss:>10}")
    print(f"{'together':<12}{sum(minutes.values()):>18.1f}\n")


def next_step(run):
    """The command to run after a training, or what must be mended before."""
    of_variants = bool(run.names) and set(run.names) <= set(configs.VARIANTS)
    names = list(configs.VARIANTS) if of_variants else configs.stages(run.config)
    folder = word(run.folder)
    try:
        missing = run.lacks(names)
    except ValueError as error:
        return str(error)
    if of_variants:
        more = f"train.py --stage evaluation --out {folder} --resume"
        return f"python {more if missing else f'-m mini_dalle2.evaluate --run {folder}'}"
    if missing:
        return f"python train.py --out {folder} --resume"
    return f"python sample.py text {shlex.quote(example(run))} --run {folder}"


def example(run):
    """A caption of the run that sample.py takes: the first that fits, or its beginning."""
    if run.config.data.source == "shapes":
        return "a red circle above a blue square"
    captions = run.pictures.captions()
    fitting = [caption for caption in captions if is_taken(run, caption)]
    caption = (fitting or captions)[0].lstrip("- ")
    while caption and not is_taken(run, caption):
        caption = caption.rsplit(maxsplit=1)[0] if " " in caption else caption[:-1]
    return caption or "a picture"


def is_taken(run, caption):
    """Whether sample.py takes a caption: a word that is no option, and has few enough tokens."""
    try:
        check_captions([caption])
        run.tokenizer().tokenize([caption], run.config.clip.model.context_length)
    except ValueError:
        return False
    return not caption.startswith("-")
