"""Variants: what each changes in a run's configuration, and nothing else."""

from dataclasses import replace

import pytest

from mini_dalle2.configs import VARIANTS, preset
from mini_dalle2.training.variants import settings, variant

# As they were when the evaluation trained them itself.
SMALL_CLIP = {
    "tiny": {
        "clip.vision_width": 96,
        "clip.text_width": 96,
        "clip.clip_dim": 64,
        "clip.picture_weight": 0.0,
        "data.seed": 1,
    },
    "micro": {
        "clip.vision_width": 24,
        "clip.text_width": 24,
        "clip.clip_dim": 16,
        "clip.picture_weight": 0.0,
        "data.seed": 1,
    },
}
STEPS = {
    "tiny": {
        "judge": 1000,
        "with_sam": 333,
        "without_sam": 333,
        "without_sam_half": 166,
        "without_sam_quarter": 83,
    },
    "micro": {
        "judge": 15,
        "with_sam": 5,
        "without_sam": 5,
        "without_sam_half": 2,
        "without_sam_quarter": 1,
    },
}


@pytest.mark.parametrize("name", ["tiny", "micro"])
def test_small_clips_differ_from_the_run_s_as_said(name):
    for clip, steps in STEPS[name].items():
        rho = {"judge": {}, "with_sam": {"clip.sam_rho": 0.1}}.get(clip, {"clip.sam_rho": 0.0})
        assert settings(preset(name), clip) == SMALL_CLIP[name] | {"clip.steps": steps} | rho


@pytest.mark.parametrize("name", ["tiny", "micro"])
def test_the_baseline_sees_captions_alone(name):
    config = preset(name)
    assert settings(config, "glide") == {
        "decoder.z_drop": 1.0,
        "decoder.caption_drop": 0.2,
        "decoder.sketch": False,
    }
    glide = variant(config, "glide")
    assert glide.data == config.data and glide.decoder.train == config.decoder.train
    assert replace(glide, decoder=config.decoder) == config, "all else is the run's own"


def test_a_seed_next_to_the_largest_stays_a_seed():
    config = preset("micro")
    large = replace(config, data=replace(config.data, seed=2**62))
    assert settings(large, "judge")["data.seed"] == 0 == variant(large, "judge").data.seed


def test_every_variant_has_settings_and_no_other_name():
    for name in VARIANTS:
        assert variant(preset("micro"), name) != preset("micro")
    with pytest.raises(KeyError):
        settings(preset("micro"), "another")
