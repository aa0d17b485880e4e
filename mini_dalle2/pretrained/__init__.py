"""pretrained: public weights in our modules: OpenAI's CLIP, and Karlo.

Read next: tables.py.
"""

from .archive import read_weights, state_dict
from .clip import OPENAI_MEAN, OPENAI_STD, clip_config, load_clip
from .karlo import KARLO_FILES, load_karlo
from .tables import (
    clip_hf, clip_openai, decoder_diffusers, decoder_karlo, fill, prior_diffusers, prior_karlo,
    to_ours, to_theirs, upsampler_diffusers, upsampler_karlo)

__all__ = [
    "KARLO_FILES", "OPENAI_MEAN", "OPENAI_STD", "clip_config", "clip_hf", "clip_openai",
    "decoder_diffusers", "decoder_karlo", "fill", "load_clip", "load_karlo", "prior_diffusers",
    "prior_karlo", "read_weights", "state_dict", "to_ours", "to_theirs", "upsampler_diffusers",
    "upsampler_karlo"]
