"""pretrained: public weights in our modules: OpenAI's CLIP, LAION's, and Karlo.

Read next: rows.py.
"""

from .archive import read_weights, state_dict
from .beside import OPENAI_MEAN, OPENAI_STD
from .clip import PublicCLIP, clip_config, load_clip
from .karlo import KARLO_FILES, load_karlo
from .rows import fill, to_ours, to_theirs
from .tables import (
    clip_hf, clip_openai, decoder_diffusers, decoder_karlo, prior_diffusers, prior_karlo,
    upsampler_diffusers, upsampler_karlo)
from .vocabulary import load_tokenizer

__all__ = [
    "KARLO_FILES", "OPENAI_MEAN", "OPENAI_STD", "PublicCLIP", "clip_config", "clip_hf",
    "clip_openai", "decoder_diffusers", "decoder_karlo", "fill", "load_clip", "load_karlo",
    "load_tokenizer", "prior_diffusers", "prior_karlo", "read_weights", "state_dict", "to_ours",
    "to_theirs", "upsampler_diffusers", "upsampler_karlo"]
