"""Variants: models that only an evaluation needs. train.py trains them as it trains any stage.

    python train.py --stage evaluation --out runs/tiny        all of them, after the run itself

A variant is a stage of the run with a few other settings; `configs.VARIANTS` says of which stage.
judge               a CLIP of another seed and width: the prior was optimised against the run's own
glide               the paper's baseline: the decoder without z_img, told only the caption
with_sam, without_sam, without_sam_half, without_sam_quarter
                    small CLIPs, alike but for SAM or for fewer steps (unCLIP §2.2)

References: unCLIP (2204.06125) §2.2 and §5; GLIDE (2112.10741) §4. Read next: ../evaluate/lab.py.
"""

from ..configs import changed

# unCLIP App. C
SAM_RHO = 0.1
# Of the run's steps of CLIP: these take one divided by …
DIVISORS = {"with_sam": 6, "without_sam": 6, "without_sam_half": 12, "without_sam_quarter": 24}


def settings(config, name):
    """What a variant changes in the run's configuration: {"section.key": value}.

    Raises KeyError for a name that is not in VARIANTS.
    """
    if name == "glide":
        # GLIDE left out every fifth caption in training (GLIDE §4). The unCLIP decoder leaves out
        # every second, which would be too few for a model that sees nothing else.
        found = {"decoder.z_drop": 1.0, "decoder.caption_drop": 0.2}
        if hasattr(config.decoder.model, "sketch"):
            found["decoder.sketch"] = False
        return found
    if name == "judge":
        return small_clip(config, divisor=2)
    return small_clip(config, DIVISORS[name]) | {
        "clip.sam_rho": SAM_RHO if name == "with_sam" else 0.0}


def small_clip(config, divisor):
    """Settings of a CLIP three quarters as wide as the run's, of another seed, trained on captions
    alone, for 1 / divisor of the run's steps."""
    clip, seed = config.clip, config.data.seed

    def narrower(width, heads):
        return heads * max(1, round(0.75 * width / heads))

    settings = {
        "clip.vision_width": narrower(clip.model.vision_width, clip.model.vision_heads),
        "clip.text_width": narrower(clip.model.text_width, clip.model.text_heads),
        "clip.clip_dim": max(8, clip.model.clip_dim // 2),
        "clip.steps": max(1, clip.train.steps // divisor),
        "data.seed": seed + 1 if seed < 2 ** 62 else 0}
    if hasattr(clip.model, "picture_weight"):
        settings["clip.picture_weight"] = 0.0
    return settings


def variant(config, name):
    """The run's configuration with a variant's settings: its stage is `VARIANTS[name]`."""
    return changed(config, settings(config, name))
