"""train.py --from FOLDER: begin a run with the weights of another run, or with the bundled ones.

Sizes and tokenizer are those of the other run. A stage that is to be trained stands at step 0.
Read next: guards.py.
"""

from dataclasses import asdict, replace
from pathlib import Path

from .. import configs
from ..pipeline import load_model
from ..runtime.files import load_checkpoint, save_checkpoint, write_json
from ..tokenizer import BPETokenizer
from . import overrides


def origin_config(folder):
    """The configuration of the run that --from names: for each stage, what its checkpoint says.

    Raises FileNotFoundError, ValueError.
    """
    config = None
    own = {}
    for stage in configs.MODELS:
        path = Path(folder) / f"{stage}.pt"
        if stage != "clip" and not path.is_file():
            continue
        checkpoint = load_model(path, stage)[1]
        try:
            of_stage = overrides.from_dict(checkpoint.get("config"))
            if stage == "clip":
                BPETokenizer.from_state_dict(checkpoint.get("tokenizer"))
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        config = config or of_stage
        own[stage] = getattr(of_stage, stage)
        if stage == "decoder":
            # The sketch is a part of the decoder's weights.
            own["sketch"] = of_stage.sketch
    return replace(config, **own)


def sketch_in(checkpoint):
    """The weights of the sketch in a decoder's checkpoint; an empty dict without a sketch."""
    return {name.removeprefix("sketch."): value for name, value in checkpoint["ema"].items()
            if name.startswith("sketch.")}


def copy_origin(run, origin):
    """Copy the stages of another run into this one. Raises OSError, ValueError."""
    origin = Path(origin)
    has_sketch = "sketch" in configs.stages(run.config)
    in_decoder = has_sketch and (origin / "decoder.pt").is_file()
    for stage in configs.MODELS:
        if (origin / f"{stage}.pt").is_file():
            checkpoint = load_checkpoint(origin / f"{stage}.pt", stage)
        elif stage == "sketch" and in_decoder:
            checkpoint = sketch_checkpoint(run, origin)
        else:
            continue
        if stage == "clip":
            write_json(checkpoint.get("tokenizer"), run.folder / "tokenizer.json")
        if stage in run.names:
            steps = getattr(run.config, stage).train.steps
            checkpoint |= {"step": 0, "steps": steps, "seconds": 0.0}
        save_checkpoint(checkpoint, run.folder / f"{stage}.pt")


def sketch_checkpoint(run, origin):
    """A checkpoint of the sketch, made from the decoder's: the box has no sketch.pt."""
    checkpoint = load_checkpoint(origin / "decoder.pt", "decoder")
    cfg = run.config.sketch
    return checkpoint | {
        "stage": "sketch", "model_config": asdict(cfg.model), "ema": sketch_in(checkpoint),
        "step": cfg.train.steps, "steps": cfg.train.steps, "seconds": 0.0}
