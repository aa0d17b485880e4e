"""OpenAI's CLIP in our CLIP: sizes from the shapes of its weights, then the weights themselves.

The files do not say everything. The width of a head and the activation are taken to be as in all of
OpenAI's vision transformers: 64 and QuickGELU.

References: the public code of CLIP; the Hugging Face layout of its weights.
Read next: karlo_models.py.
"""

import json
from pathlib import Path

from ..clip import CLIP, CLIPConfig
from .archive import NOT_WEIGHTS, part, state_dict
from .tables import clip_hf, clip_openai, fill

# Of the pictures that OpenAI's CLIP was trained on, for pixels in [0, 1].
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
# Of every public CLIP, and of Karlo.
HEAD_DIM = 64

# {what: its name in OpenAI's layout, its name in the Hugging Face layout}; {} is a block's number.
OPENAI_NAMES = {
    "patches": "visual.conv1.weight", "places": "visual.positional_embedding",
    "tokens": "token_embedding.weight", "context": "positional_embedding",
    "projection": "text_projection",
    "vision_block": "visual.transformer.resblocks.{}.ln_1.weight",
    "text_block": "transformer.resblocks.{}.ln_1.weight"}
HF_NAMES = {
    "patches": "vision_model.embeddings.patch_embedding.weight",
    "places": "vision_model.embeddings.position_embedding.weight",
    "tokens": "text_model.embeddings.token_embedding.weight",
    "context": "text_model.embeddings.position_embedding.weight",
    "projection": "text_projection.weight",
    "vision_block": "vision_model.encoder.layers.{}.layer_norm1.weight",
    "text_block": "text_model.encoder.layers.{}.layer_norm1.weight"}


def depth(theirs, pattern):
    """Count the blocks whose names have this form; {} in the pattern is the number."""
    n = 0
    while pattern.format(n) in theirs:
        n += 1
    return n


def is_openai(theirs):
    """Return whether a state dict has OpenAI's own names."""
    return OPENAI_NAMES["patches"] in theirs


def clip_config(theirs, what="these weights"):
    """Read the sizes of a CLIP off the shapes of its weights, in either layout.

    theirs: {name: tensor}. what: where they come from, for messages. Raises ValueError.
    """
    names = OPENAI_NAMES if is_openai(theirs) else HF_NAMES
    try:
        patches = theirs[names["patches"]].shape                           # (W, 3, P, P)
        places = theirs[names["places"]].shape                             # (N + 1, W)
        tokens = theirs[names["tokens"]].shape                             # (vocabulary, text W)
        context = theirs[names["context"]].shape                           # (L, text W)
        projection = theirs[names["projection"]].shape
    except KeyError as error:
        raise ValueError(f"{what} is no CLIP with a vision transformer: "
                         f"there is no {error.args[0]} in it") from None
    # OpenAI's projection is (text W, D), Hugging Face's (D, text W).
    clip_dim = projection[1] if is_openai(theirs) else projection[0]
    patch_size = patches[-1]
    return CLIPConfig(
        clip_dim=clip_dim, image_size=round((places[0] - 1) ** 0.5) * patch_size,
        patch_size=patch_size, vision_width=patches[0],
        vision_layers=depth(theirs, names["vision_block"]),
        vision_heads=max(1, patches[0] // HEAD_DIM), vocab_size=tokens[0],
        context_length=context[0], eot_id=tokens[0] - 1, text_width=tokens[1],
        text_layers=depth(theirs, names["text_block"]), text_heads=max(1, tokens[1] // HEAD_DIM),
        image_mean=OPENAI_MEAN, image_std=OPENAI_STD)


def check_activation(path):
    """Raise ValueError if a Hugging Face config.json asks for another activation than QuickGELU.

    There may be no such file.
    """
    told = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for tower in (told.get("text_config") or {}, told.get("vision_config") or {}):
        if tower.get("hidden_act", "quick_gelu") != "quick_gelu":
            raise ValueError(f"{path}: this CLIP has {tower['hidden_act']}, but ours has QuickGELU "
                             f"as OpenAI's: use weights trained with quick_gelu")


def load_clip(path_or_state_dict):
    """Load OpenAI's CLIP (ViT) into our module, in eval mode.

    Takes a file or its state dict, in OpenAI's layout or Hugging Face's, or a folder of the latter.
    Raises FileNotFoundError, ValueError.
    """
    if isinstance(path_or_state_dict, dict):
        what = "this state dict"
        # Copies, because the model may change its weights later.
        theirs = {name: value.detach().clone() for name, value in path_or_state_dict.items()}
    else:
        path = Path(path_or_state_dict)
        what = str(path)
        theirs = part(path) if path.is_dir() else state_dict(path)
        check_activation(path / "config.json")
    theirs = {name: value for name, value in theirs.items() if name not in NOT_WEIGHTS}
    cfg = clip_config(theirs, what)
    table = clip_openai if is_openai(theirs) else clip_hf
    return fill(CLIP(cfg), table(cfg), theirs, what)
