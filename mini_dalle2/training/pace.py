"""How long a run will take: every stage tries a few steps, before the first stage begins.

    minutes of a run = sum over stages of (steps still to take × seconds of one step) / 60

The steps are taken by a model of their own, on a batch without contents, with everything that a
step of the loop does. They leave nothing behind: neither weights nor random numbers. The loop
compares its steps with these seconds (log.py), and says so when they take several times as long.

Read next: log.py.
"""

import math
import time
from dataclasses import replace

import torch
from torch.nn.utils import clip_grad_norm_

from .. import configs
from ..runtime.device import out_of_memory, stream_kept
from ..runtime.files import load_checkpoint
from ..runtime.processes import agreed, world
from . import hints
from .rehearsal import blank
from .stages import SketchedDecoderStage, open_stage
from .state import EMA, Objective, make_optimizer, network_options

# A stage of fewer steps is not measured: that would take as long as the stage.
WORTH = 50
# A step should not take more seconds: large batches are measured on fewer examples, from FEW on.
LONG = 1.5
FEW = 4


def announce(run):
    """Print how many stages this call trains, and how many minutes they will take.

    Also notes in run.pace the seconds that a step of each stage takes: {stage: seconds}.
    """
    names = [name for name in run.names if name not in run.done]
    minutes = {}
    for name in names:
        steps = steps_left(run, name)
        # One process may be too small for a model that several shall share.
        if steps < WORTH or open_stage(run, name).is_sharded():
            continue
        try:
            run.pace[name] = seconds_of_a_step(run, name)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            # The stage itself says so, when its turn comes.
            continue
        minutes[name] = steps * run.pace[name] / 60
    each = ", ".join(f"{name} {spent:.1f}" for name, spent in minutes.items())
    print(f"{len(names)} of {len(run.names)} stages to train, {about(sum(minutes.values()))}"
          + (f": {each}" if each else ""), flush=True)


def about(minutes):
    """Say roughly how long something takes."""
    if minutes < 1:
        return "less than a minute"
    # Pictures to load and to draw come on top of the steps.
    whole = math.ceil(minutes)
    return f"about {whole} minutes" if whole < 120 else f"about {minutes / 60:.1f} hours"


def steps_left(run, name):
    """The steps that a stage has still to take."""
    if name == "tokenizer":
        return 0
    base = configs.VARIANTS.get(name, name)
    steps = getattr(run.config_of(name), base).train.steps
    path = run.folder / f"{name}.pt"
    behind = load_checkpoint(path, name)["step"] if run.resume and path.is_file() else 0
    return max(0, steps - behind)


def seconds_of_a_step(run, name):
    """Take a few steps of a stage, on examples without contents. Return the seconds of one.

    A first step takes longer than others, and is not counted. A CPU that other programs use too
    may be faster with one thread than with several: a note says so.
    """
    stage = open_stage(run, name)
    with stream_kept(run.device):
        step = trial(stage)
        n = examples(stage)
        some = min(FEW, n)
        step(some)
        # All processes must come to the same decision.
        seconds = agreed(step(some))
        while some < n and seconds < LONG / 4:
            some = min(n, 4 * some)
            seconds = agreed(step(some))
        seconds = min(seconds, agreed(step(some))) * n / some
        if not run.pace:
            seconds = min(seconds, with_one_thread(stage, step, some, seconds))
    return seconds


def with_one_thread(stage, step, n, seconds):
    """The seconds of a step with one thread, measured with n examples. They suffice to see
    whether several threads, which take `seconds`, wait for each other: then prints a note.
    """
    threads = torch.get_num_threads()
    if stage.run.device.type != "cpu" or threads == 1:
        return seconds
    torch.set_num_threads(1)
    alone = step(n) * examples(stage) / n
    torch.set_num_threads(threads)
    note = hints.slow_note(stage.run, stage.name, seconds, alone)
    if note:
        print(note)
    return alone


def examples(stage):
    """How many examples a process computes at once."""
    data = stage.config.data
    kept = getattr(data, f"{stage.base}_images", data.images)
    n = min(stage.cfg.batch_size, kept, stage.run.pictures.available)
    return max(1, n // (world() * stage.cfg.accumulate))


def trial(stage):
    """A function that takes a step of a new model on n examples, and returns its seconds."""
    device = stage.run.device
    cfg = replace(stage.cfg, compile=False)
    model = configs.build(stage.model_config).to(device, memory_format=torch.channels_last)
    objective = Objective(model.train(), stage.loss, cfg.dtype == "bf16")
    optimizer = make_optimizer(model, cfg)
    ema = EMA(model, cfg.ema)
    parameters = [p for p in model.parameters() if p.requires_grad]
    noise = torch.Generator(device).manual_seed(0)
    passes = cfg.accumulate * (2 if cfg.sam_rho else 1)

    def step(n):
        began = time.perf_counter()
        with network_options(model, cfg):
            for _ in range(passes):
                objective(batch_of(stage, n), noise).backward()
        clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(0)
        # A GPU works on behind the program. To read a value is to wait for it.
        parameters[0].sum().item()
        return time.perf_counter() - began

    return step


def batch_of(stage, n):
    """A batch of n examples without contents, in the form of stage.batch."""
    batch = blank(stage.base, stage.model_config, n, stage.run.device)
    data = stage.config.data
    if stage.base == "clip" and data.near_misses and data.source == "shapes":
        images, tokens = batch
        return images, tokens.repeat(2, 1)
    return (*batch, 0.0) if isinstance(stage, SketchedDecoderStage) else batch
