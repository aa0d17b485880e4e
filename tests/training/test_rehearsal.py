"""rehearsal.py: batches without contents, in the shapes of true ones."""

import pytest
import torch

from mini_dalle2 import configs
from mini_dalle2.training import rehearsal


@pytest.mark.parametrize("name", ["micro", "small", "paper"])
def test_blank_batches_have_the_shapes_of_true_ones(name):
    """And a caption ends, as every caption does."""
    config = configs.preset(name)
    D = config.clip.model.clip_dim
    L = config.clip.model.context_length
    S = config.clip.model.image_size
    s = config.decoder.model.image_size
    expected = {
        "clip": [(2, 3, S, S), (2, L)], "prior": [(2, D), (2, D), (2, L)],
        "ar_prior": [(2, D), (2, D), (2, L)], "sketch": [(2, 3, s, s), (2, D)],
        "decoder": [(2, 3, s, s), (2, D), (2, L)],
        "upsampler1": [(2, 3, *[config.upsampler1.model.crop_size] * 2)],
        "upsampler2": [(2, 3, *[config.upsampler2.model.crop_size] * 2)]}
    for stage, shapes in expected.items():
        cfg = getattr(config, stage).model
        batch = rehearsal.blank(stage, cfg, 2, "meta")
        assert [tuple(part.shape) for part in batch] == shapes, stage
        tokens = [part for part in rehearsal.blank(stage, cfg, 2) if part.dtype == torch.long]
        assert all(((part == cfg.eot_id).sum(dim=1) == 1).all() for part in tokens)


@pytest.mark.parametrize("stage", configs.MODELS)
def test_a_model_learns_from_a_blank_batch(stage):
    """On the CPU, where contents count: the loss is finite."""
    model = configs.build(getattr(configs.preset("micro"), stage).model)
    batch = rehearsal.blank(stage, model.cfg, 2)
    more = {} if stage in ("clip", "sketch") else {"generator": torch.Generator()}
    assert model.loss(*batch, **more).isfinite()
