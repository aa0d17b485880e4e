"""mini_dalle2: DALL·E 2 (unCLIP, arXiv 2204.06125), one file for each part of the paper.

Read the files of this folder in this order:

    tokenizer.py    turns captions into integers.
    transformer.py  is the transformer that CLIP, the priors and the decoder's text encoder share.
    clip.py         embeds captions and images in one space, by a contrastive loss.
    diffusion.py    adds noise to data, and says what a network must learn to remove the noise.
    sampling.py     goes from noise back to data, step by step, with guidance.
    prior.py        samples an image embedding for a caption, by diffusion (§2.2).
    ar_prior.py     does the same autoregressively, one principal component after another (§2.2).
    unet.py         is the network of the decoder and of the upsamplers.
    decoder.py      samples a small picture from an image embedding and a caption (§2.1).
    upsampler.py    enlarges the small picture, twice (§2.1).
    degradation.py  makes the flawed small pictures that the upsamplers learn from (§2.1).
    pipeline.py     puts all parts together: from captions to pictures.
    latents.py      starts from a picture: variations, interpolations, text diffs (§3, §4).
    configs.py      holds every number, as presets.

The folders beside them hold what the paper's parts need around them: data, training, metrics,
evaluation, public weights, and the tricks of a small budget.
"""

import warnings

# `python -m mini_dalle2.configs` runs a file that pipeline.py has already imported. Python warns of
# this; here it does no harm.
warnings.filterwarnings("ignore", message=".*mini_dalle2.configs.* found in sys.modules")

from .pipeline import DALLE2  # noqa: E402

__all__ = ["DALLE2"]
