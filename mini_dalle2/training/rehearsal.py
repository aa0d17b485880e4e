"""One step on a batch without contents: do the sizes of a model work, before anything is written?

Read next: pace.py, which takes such steps to see how long they last.
"""

import torch

from .. import configs


def blank(stage, cfg, n, device="cpu"):
    """A batch of n examples without contents, as the model of a stage takes them; a tuple.

    cfg: the model's configuration.
    """
    large = stage.startswith("upsampler")
    side = cfg.crop_size if large else getattr(cfg, "image_size", 1)
    images = torch.zeros(n, 3, side, side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    if large:
        return (images,)
    z = torch.full((n, cfg.clip_dim), cfg.clip_dim ** -0.5, device=device)
    if stage == "sketch":
        return images, z
    tokens = torch.zeros(n, cfg.context_length, dtype=torch.long, device=device)
    tokens[:, -1] = cfg.eot_id
    if stage == "clip":
        return images, tokens
    return (z, z, tokens) if stage in ("prior", "ar_prior") else (images, z, tokens)


def check_one_step(stage, cfg):
    """Take one step of a model on torch's "meta" device, which follows shapes and nothing else.

    Sizes that cannot work show at once. Raises ValueError.
    """
    try:
        with torch.device("meta"), torch.no_grad():
            loss_of_nothing(stage, configs.build(cfg))
    except (ValueError, RuntimeError, ArithmeticError, IndexError, TypeError) as error:
        raise ValueError(f"{stage} cannot work with these sizes: {error}") from None


def loss_of_nothing(stage, model):
    """The loss of two examples without contents."""
    cfg = model.cfg
    if stage.startswith("upsampler"):
        # Only the network: the loss degrades pictures, which takes real ones.
        low = torch.empty(2, 3, cfg.low_size, cfg.low_size)
        high = model.enlarge(low)
        return model(high, torch.zeros(2, dtype=torch.long), high)
    return model.loss(*blank(stage, cfg, 2, "meta"))
