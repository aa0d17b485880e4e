"""OpenAI's CLIP in our CLIP.

Read next: karlo.py.
"""

import json
from pathlib import Path

from ..clip import CLIP, CLIPConfig
from ..configs import OPENAI_MEAN, OPENAI_STD
from .archive import NOT_WEIGHTS, part, state_dict
from .tables import clip_hf, clip_openai, fill


HEAD_DIM = 64                           # of every public CLIP and of Karlo: the files do not say it


def depth(theirs, pattern):
    """How many blocks there are whose names have this form, pattern with {} for the number."""
    n = 0
    while pattern.format(n) in theirs:
        n += 1
    return n


def clip_config(theirs, what="these weights"):
    """The sizes of a CLIP from the shapes of its weights, in OpenAI's or in the Hugging Face layout. Raises ValueError."""
    try:
        if "visual.conv1.weight" in theirs:
            patches, places = theirs["visual.conv1.weight"], theirs["visual.positional_embedding"]
            tokens, context, clip_dim = theirs["token_embedding.weight"], theirs["positional_embedding"], theirs["text_projection"].shape[1]
            layers = depth(theirs, "visual.transformer.resblocks.{}.ln_1.weight"), depth(theirs, "transformer.resblocks.{}.ln_1.weight")
        else:
            see, read = "vision_model.embeddings", "text_model.embeddings"
            patches, places = theirs[f"{see}.patch_embedding.weight"], theirs[f"{see}.position_embedding.weight"]
            tokens, context = theirs[f"{read}.token_embedding.weight"], theirs[f"{read}.position_embedding.weight"]
            clip_dim = theirs["text_projection.weight"].shape[0]
            layers = depth(theirs, "vision_model.encoder.layers.{}.layer_norm1.weight"), depth(theirs, "text_model.encoder.layers.{}.layer_norm1.weight")
    except KeyError as error:
        raise ValueError(f"{what} is no CLIP with a vision transformer: there is no {error.args[0]} in it") from None
    side = round((places.shape[0] - 1) ** 0.5) * patches.shape[-1]
    return CLIPConfig(clip_dim=clip_dim, image_size=side, patch_size=patches.shape[-1], vision_width=patches.shape[0], vision_layers=layers[0],
                      vision_heads=max(1, patches.shape[0] // HEAD_DIM), vocab_size=tokens.shape[0], context_length=context.shape[0],
                      eot_id=tokens.shape[0] - 1, text_width=tokens.shape[1], text_layers=layers[1],
                      text_heads=max(1, tokens.shape[1] // HEAD_DIM), image_mean=OPENAI_MEAN,
                      image_std=OPENAI_STD)


def check_activation(path):
    """Raises ValueError if a config.json of the Hugging Face layout, where there is one, asks for another activation than OpenAI's."""
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for tower in (told.get("text_config") or {}, told.get("vision_config") or {}):
        if tower.get("hidden_act", "quick_gelu") != "quick_gelu":
            raise ValueError(f"{path}: a CLIP with {tower['hidden_act']}, but this one has QuickGELU, as OpenAI's")


def load_clip(path_or_state_dict):
    """OpenAI's CLIP (ViT) in our module: a file, or its state dict, in OpenAI's layout or Hugging Face's, or a folder of the latter.

    Sizes follow from the shapes. What they do not tell is taken to be as in OpenAI's models: heads of 64 and QuickGELU.

    Raises FileNotFoundError, ValueError.
    """
    if isinstance(path_or_state_dict, dict):
        what, theirs = "this state dict", {name: value.detach().clone() for name, value in path_or_state_dict.items()}      # ours to change
    else:
        path = Path(path_or_state_dict)
        what, theirs = str(path), part(path) if path.is_dir() else state_dict(path)
        check_activation(path / "config.json")
    theirs = {name: value for name, value in theirs.items() if name not in NOT_WEIGHTS}
    cfg = clip_config(theirs, what)
    table = clip_openai if "visual.conv1.weight" in theirs else clip_hf
    return fill(CLIP(cfg), table(cfg), theirs, what)
