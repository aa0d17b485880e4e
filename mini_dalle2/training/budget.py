"""A budget for your own pictures: as many steps as their number needs.

    python train.py --data my_pictures --out runs/mine

A preset's steps are for the thousands of pictures that the preset names. Thirty pictures are
learned long before its last step. So a run on a folder, without --preset, takes the sizes of
`tiny`, and steps by the number of pictures. So does --from. `--preset tiny` takes all of tiny's
steps, and a setting on the command line wins in any case.

Read next: guards.py, which asks here what a run begins with.
"""

import contextlib
import io
import math

import torch

from .. import configs
from ..data.tables import Pictures
from ..tokenizer import BPETokenizer
from . import overrides

# With so many steps the preset tiny learned so many pictures.
PICTURES = 32
STEPS = {"clip": 300, "prior": 1000, "ar_prior": 200, "sketch": 600, "decoder": 600,
         "upsampler1": 150, "upsampler2": 80}
# A row of tokens is never chosen to be longer.
LONGEST = 128


def steps_for(n, most):
    """Choose the steps of each stage for n pictures: {stage: steps}.

    most: {stage: steps}, the most that may be chosen. The numbers for 32 pictures were found by
    trial: of 32 emoji (29 to learn), each of the 29 could be recognised in samples of 512 px,
    after four minutes on one CPU core. More pictures get √n times as many steps, because pictures
    have much in common: of 128 emoji, all 40 that were sampled could be recognised even before
    half of these steps. From about 3,200 pictures on, `tiny` keeps all its steps.
    """
    share = math.sqrt(max(n, PICTURES) / PICTURES)
    return {stage: min(most[stage], math.ceil(steps * share)) for stage, steps in STEPS.items()}


def begin(args, saved, changes):
    """Choose the configuration to which the changes of a command line are applied.

    args: what train.parse returns. saved: the configuration to go on with, or that of --from;
    None for a new run. changes: settings, as in "--data.source=my_pictures". Prints a line where
    the number of pictures decides. Raises OSError, ValueError.
    """
    config = saved or configs.preset(args.preset or "tiny")
    goes_on = saved is not None and args.origin is None
    if args.preset or goes_on:
        return config
    of_data = [change for change in changes if change.startswith("--data.")]
    data = overrides.override(config, of_data).data
    return config if data.source == "shapes" else for_pictures(config, data, args.origin)


def for_pictures(config, data, origin):
    """Return a configuration with steps by the number of pictures. Print a line if these are fewer.

    A new run also gets a context that is as long as the longest caption. origin: that of --from.
    """
    # Run opens the pictures again, and prints the report about them.
    with contextlib.redirect_stdout(io.StringIO()):
        pictures = Pictures(data, torch.device("cpu"))
    # Older runs name presets that are gone.
    usual = configs.PRESETS.get(config.preset, configs.tiny)()
    own, most = ({stage: getattr(one, stage).train.steps for stage in configs.MODELS}
                 for one in (config, usual))
    steps = steps_for(pictures.available, {stage: min(own[stage], most[stage]) for stage in own})
    if steps == own:
        return config
    values = {f"{stage}.steps": count for stage, count in steps.items()}
    other = origin or f"the preset {config.preset}"
    print(f"note: there are {pictures.available} pictures to learn, so each stage takes fewer steps "
          f"than {other} has. To choose the steps yourself, add for example "
          f"--decoder.steps={own['decoder']}")
    if origin is None:
        length = config.clip.model.context_length
        values["clip.context_length"] = max(length, min(LONGEST, longest(pictures, config)))
    return configs.changed(config, values)


def longest(pictures, config):
    """Count the tokens of the longest caption, with start and end, by the tokenizer to be."""
    captions = pictures.captions()
    tokenizer = BPETokenizer.train(captions, config.tokenizer.vocab_size)
    return max(len(tokenizer.encode(caption)) for caption in captions) + 2
