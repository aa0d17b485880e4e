"""Public CLIPs in our CLIP: sizes from the shapes of their weights, then the weights themselves.

    OpenAI's own names          OpenAI's files, and those of open_clip (LAION and others)
    Hugging Face's names        transformers

Shapes do not say everything. The configuration beside the weights says the rest: the activation,
the epsilon of the norms, the number of heads. OpenAI's own files need none. Where nothing says the
activation, a warning says what was assumed.

References: the public code of CLIP and open_clip; the Hugging Face layout of their weights.
Read next: vocabulary.py.
"""

import os
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..clip import CLIP, CLIPConfig
from ..runtime.checks import check_above_zero, check_bounds, check_choice, check_types
from ..transformer import MLP, QuickGELU
from .archive import unwrapped, without_buffers, without_prefixes
from .beside import (
    ACTIVATIONS, OPENAI_MEAN, OPENAI_STD, check_is_clip, described, end_of_text, pixels)
from .pieces import from_file, part
from .rows import fill, to_ours
from .tables import clip_hf, clip_openai

# Of every public CLIP, and of Karlo; but ViT-H has wider heads.
HEAD_DIM = 64
HEAD_DIMS = {1280: 80}
# Only OpenAI's own files have these entries.
OPENAI_MARKS = {"input_resolution", "context_length", "vocab_size"}
# Words in the name of a file or its folders, and the activation of such weights.
NAMED = {"quickgelu": "quick_gelu", "laion": "gelu", "datacomp": "gelu"}

# {what: its name in OpenAI's layout, its name in the Hugging Face layout}; {} is a block's number.
OPENAI_NAMES = {
    "patches": "visual.conv1.weight", "places": "visual.positional_embedding",
    "tokens": "token_embedding.weight", "context": "positional_embedding",
    "projection": "text_projection",
    "vision_block": "visual.transformer.resblocks.{}.ln_1.weight",
    "text_block": "transformer.resblocks.{}.ln_1.weight",
    "vision_mlp": "visual.transformer.resblocks.0.mlp.c_fc.weight",
    "text_mlp": "transformer.resblocks.0.mlp.c_fc.weight"}
HF_NAMES = {
    "patches": "vision_model.embeddings.patch_embedding.weight",
    "places": "vision_model.embeddings.position_embedding.weight",
    "tokens": "text_model.embeddings.token_embedding.weight",
    "context": "text_model.embeddings.position_embedding.weight",
    "projection": "text_projection.weight",
    "vision_block": "vision_model.encoder.layers.{}.layer_norm1.weight",
    "text_block": "text_model.encoder.layers.{}.layer_norm1.weight",
    "vision_mlp": "vision_model.encoder.layers.0.mlp.fc1.weight",
    "text_mlp": "text_model.encoder.layers.0.mlp.fc1.weight"}


@dataclass(frozen=True)
class PublicCLIPConfig(CLIPConfig):
    """CLIP's sizes, and what others have changed: the activation and the norms' epsilon."""

    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        super().__post_init__()
        check_choice("activation", self.activation, ACTIVATIONS)
        check_above_zero(self, "layer_norm_eps")


class PublicCLIP(CLIP):
    """CLIP with the activation and the epsilon that its weights were trained with."""

    def add_layers(self):
        """Exchange the activations, and set the epsilon of all norms."""
        activation = nn.GELU if self.cfg.activation == "gelu" else QuickGELU
        for module in self.modules():
            if isinstance(module, MLP):
                module.act = activation()
            if isinstance(module, nn.LayerNorm):
                module.eps = self.cfg.layer_norm_eps


def depth(theirs, pattern):
    """Count the blocks whose names have this form; {} in the pattern is the number."""
    n = 0
    while pattern.format(n) in theirs:
        n += 1
    return n


def is_openai(theirs):
    """Return whether a state dict has OpenAI's own names, as open_clip's have too."""
    return OPENAI_NAMES["patches"] in theirs


def heads(width):
    """Return the number of heads that public CLIPs of this width have."""
    return max(1, width // HEAD_DIMS.get(width, HEAD_DIM))


def check_whole(theirs, what):
    """Raise ValueError if a state dict in either layout has one tower of a CLIP only."""
    starts = {name.partition(".")[0] for name in theirs}
    if len(starts & {"vision_model", "text_model"}) == 1 or starts <= {"visual"}:
        missing = "image" if "text_model" in starts else "text"
        raise ValueError(f"{what} is half of a CLIP: the {missing} tower is missing")


def check_mlp(theirs, names, what):
    """Raise ValueError if the MLP of a tower is not four times as wide as the tower, as ours is."""
    for tower in ("vision", "text"):
        wide, width = theirs.get(names[f"{tower}_mlp"], torch.empty(4, 1)).shape
        if wide != 4 * width:
            raise ValueError(f"{what}: the {tower} tower has an MLP of {wide / width:.4g} times its "
                             f"width (mlp_ratio), and ours has 4: use other weights")


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
    matrices = (places, tokens, context, projection)
    if len(patches) != 4 or any(len(shape) != 2 or 0 in shape for shape in matrices):
        raise ValueError(f"{what} is no CLIP with a vision transformer: its tensors have other "
                         f"shapes")
    check_mlp(theirs, names, what)
    # OpenAI's projection is (text W, D), Hugging Face's (D, text W).
    clip_dim = projection[1] if is_openai(theirs) else projection[0]
    patch_size = patches[-1]
    sizes = dict(
        clip_dim=clip_dim, image_size=round((places[0] - 1) ** 0.5) * patch_size,
        patch_size=patch_size, vision_width=patches[0],
        vision_layers=depth(theirs, names["vision_block"]), vision_heads=heads(patches[0]),
        vocab_size=tokens[0], context_length=context[0], eot_id=end_of_text(None, tokens[0]),
        text_width=tokens[1], text_layers=depth(theirs, names["text_block"]),
        text_heads=heads(tokens[1]), image_mean=OPENAI_MEAN, image_std=OPENAI_STD)
    try:
        check_bounds(sizes)
        return PublicCLIPConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{what} is no CLIP that could be built: {error}") from None


def check_shapes(cfg, rows, theirs, what):
    """Compare all shapes with those of our CLIP before any memory is taken for it.

    Raises ValueError.
    """
    # "meta" has shapes without memory.
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in PublicCLIP(cfg).named_parameters()}
    to_ours(rows, {name: value.to("meta") for name, value in theirs.items()}, shapes, what)


def told_config(cfg, folder, openai):
    """Add to the sizes what the configuration in the folder says; None where there is none."""
    told = described(folder, openai, vars(cfg))
    if told is None:
        return None
    mean, std = pixels(folder, openai)
    values = dict(
        activation=told.activation, layer_norm_eps=told.layer_norm_eps,
        vision_heads=told.vision_heads or cfg.vision_heads,
        text_heads=told.text_heads or cfg.text_heads,
        eot_id=end_of_text(told.eot_id, cfg.vocab_size), image_mean=mean, image_std=std)
    try:
        check_types(PublicCLIPConfig, values)
        check_bounds(values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the configuration in {folder} cannot be used: {error}") from None
    return replace(cfg, **values)


def assumed(cfg, path, what, given):
    """Assume what no configuration says, and warn. Returns the configuration.

    given: the activation that load_clip was given, or None.
    """
    named = "/".join(path.absolute().parts[-4:]).lower().replace("-", "") if path else ""
    word = next((word for word in NAMED if word in named), None)
    activation = given or NAMED.get(word, "quick_gelu")
    reason = f'"{word}" is in its name' if word else "OpenAI's have it"
    about = "" if given else f"the activation {activation} ({reason}), "
    warnings.warn(
        f"no configuration is beside {what}: it is taken to have {about}{cfg.vision_heads} heads "
        f"for pictures and {cfg.text_heads} for texts. If this is wrong, the embeddings are too: "
        f"copy its config.json or open_clip_config.json beside it", stacklevel=3)
    return replace(cfg, activation=activation)


def plain_names(theirs):
    """Take away what frameworks and open_clip put before the names of a CLIP's weights."""
    theirs = without_prefixes(theirs, ("model.", "clip.", "clip_model."))
    # open_clip's CLIP with a text tower of its own has the same tower under another name.
    if is_openai(theirs) and "text.token_embedding.weight" in theirs:
        theirs = {name.removeprefix("text."): value for name, value in theirs.items()}
    return theirs


def load_clip(path_or_state_dict, activation=None):
    """Load a public CLIP (ViT) into our module, in eval mode.

    Takes a file or its state dict, in OpenAI's layout (open_clip's too) or Hugging Face's, or a
    folder with either. A configuration beside the file is read. activation: "quick_gelu" or "gelu",
    where nothing says it. Warns of what it assumed. The model takes pixels in [-1, 1], and applies
    the CLIP's own mean and deviation. Raises FileNotFoundError, ValueError.
    """
    path = None
    if isinstance(path_or_state_dict, dict):
        what = "this state dict"
        # Copies, because the model may change its weights later.
        theirs = {name: value.detach().clone()
                  for name, value in unwrapped(path_or_state_dict, what).items()}
    else:
        if not isinstance(path_or_state_dict, (str, os.PathLike)):
            raise ValueError(f"load_clip takes a path or a state dict, "
                             f"not {type(path_or_state_dict).__name__}: give model.state_dict()")
        path = Path(path_or_state_dict)
        what = str(path)
        theirs = part(path) if path.is_dir() else from_file(path)
    theirs = plain_names(theirs)
    is_openais_own = is_openai(theirs) and bool(OPENAI_MARKS & theirs.keys())
    theirs = without_buffers(theirs)
    # OpenAI's own files need no configuration, and one beside them is about other weights.
    folder = None
    if path and not is_openais_own:
        folder = path if path.is_dir() else path.parent
    if folder and not is_openai(theirs):
        check_is_clip(folder)
    check_whole(theirs, what)
    cfg = clip_config(theirs, what)
    told = told_config(cfg, folder, is_openai(theirs)) if folder else None
    if told is None and not is_openais_own:
        told = assumed(cfg, path, what, activation)
    cfg = told or cfg
    if activation is not None:
        cfg = replace(cfg, activation=activation)
    rows = clip_openai(cfg) if is_openai(theirs) else clip_hf(cfg)
    check_shapes(cfg, rows, theirs, what)
    return fill(PublicCLIP(cfg), rows, theirs, what)
