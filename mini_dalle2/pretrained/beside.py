"""What the configuration beside a CLIP's weights says, and their shapes cannot tell.

    config.json                 Hugging Face: activation, heads, epsilon, end-of-text
    preprocessor_config.json    Hugging Face: how pixels are normalised
    open_clip_config.json       open_clip: all of this

A setting that our CLIP has is read. One that it does not have is refused, so that no weights are
used in another way than they were trained. What a file leaves out has the library's default.

References: the configurations of transformers' CLIPModel and of open_clip. Read next: clip.py.
"""

from typing import NamedTuple

from ..runtime.checks import brief
from ..runtime.files import read_json

# Of the pictures that OpenAI's CLIP was trained on, for pixels in [0, 1].
OPENAI_MEAN = (0.48145466, 0.4578275, 0.40821073)
OPENAI_STD = (0.26862954, 0.26130258, 0.27577711)
ACTIVATIONS = ("quick_gelu", "gelu")
# The id of end-of-text in CLIP's own vocabulary, behind which others may have added tokens.
CLIP_EOT = 49407
# transformers took the highest id of a caption for its end while configurations said 2.
OLD_EOT = 2

# What open_clip's towers may say and ours do: {setting: the values that are ours}.
# A setting with None is seen from the shapes, or only matters for training.
OPEN_CLIP_TOWER = dict.fromkeys((
    "width", "layers", "mlp_ratio", "norm_kwargs", "output_tokens", "final_ln_after_pool"))
OPEN_CLIP_VISION = OPEN_CLIP_TOWER | dict.fromkeys((
    "image_size", "patch_size", "head_width", "patch_dropout", "attn_pooler_queries",
    "attn_pooler_heads", "timm_pool", "timm_proj", "timm_drop")) | {
        "pool_type": ("tok",), "pos_embed_type": ("learnable",), "block_type": ("default",)}
OPEN_CLIP_TEXT = OPEN_CLIP_TOWER | dict.fromkeys((
    "context_length", "vocab_size", "heads", "hf_tokenizer_name", "tokenizer_kwargs",
    "tokenizer_mode", "eos_id", "hf_model_pretrained", "hf_proj_type", "hf_pooler_type")) | {
        "pool_type": ("argmax", "eos"), "proj_type": ("linear",), "block_type": ("default",)}


class Told(NamedTuple):
    """What a configuration says. A value of None: it does not say."""

    activation: str
    layer_norm_eps: float
    vision_heads: int | None
    text_heads: int | None
    eot_id: int | None
    # {size: number}, to see whether these are the weights that the file is about.
    sizes: dict


def read(path):
    """Read a configuration: dict. Raises ValueError for a file that is none."""
    try:
        told = read_json(path)
    except ValueError:
        told = None
    if not isinstance(told, dict):
        raise ValueError(f"{path} is no configuration: copy it again, or take it away")
    return told


def first_of(folder, *names):
    """Return the first of these files that is in the folder, or None."""
    return next((folder / name for name in names if (folder / name).is_file()), None)


def agreed(path, what, vision, text):
    """Return what both towers say alike; None stands for a tower that is not there."""
    if None not in (vision, text) and vision != text:
        raise ValueError(f"{path}: the image tower has {what} {brief(vision)} and the text tower "
                         f"{brief(text)}, but both of ours have the same: these weights cannot be "
                         f"used")
    return text if vision is None else vision


def checked_activation(path, name):
    """Return the name of an activation. Raises ValueError for one that ours does not have."""
    if name not in ACTIVATIONS:
        raise ValueError(f"{path}: this CLIP has the activation {brief(name)}, but ours has "
                         f"{' or '.join(ACTIVATIONS)}: use other weights")
    return name


def check_kind(path, kind):
    """Raise ValueError if a configuration is about something else than CLIP or one of its towers."""
    if kind not in ("clip", "clip_text_model", "clip_vision_model"):
        raise ValueError(f"{path} describes a model of the type {brief(kind)}, not clip: "
                         f"use the weights of a CLIP")


def hugging_face(path, told):
    """Understand a Hugging Face configuration, of a whole CLIP or of one tower: Told."""
    kind = told.get("model_type", "clip")
    check_kind(path, kind)
    # Older files have each tower twice, and the second is the one that counts.
    towers = {}
    for name in ("vision", "text"):
        towers[name] = told.get(f"{name}_config_dict")
        if towers[name] is None:
            towers[name] = told.get(f"{name}_config") or {}
    if kind != "clip":
        towers = {"vision": None, "text": None, kind.split("_")[1]: told}
    vision = towers["vision"]
    text = towers["text"]

    def both(what, default):
        return agreed(path, what, *(
            None if tower is None else tower.get(what, default) for tower in (vision, text)))

    sizes = {}
    if vision is not None:
        sizes |= {"vision_width": vision.get("hidden_size"),
                  "vision_layers": vision.get("num_hidden_layers"),
                  "patch_size": vision.get("patch_size")}
    if text is not None:
        sizes |= {"text_width": text.get("hidden_size"),
                  "text_layers": text.get("num_hidden_layers")}
    return Told(
        activation=checked_activation(path, both("hidden_act", "quick_gelu")),
        layer_norm_eps=both("layer_norm_eps", 1e-5),
        vision_heads=None if vision is None else vision.get("num_attention_heads", 12),
        text_heads=None if text is None else text.get("num_attention_heads", 8),
        eot_id=None if text is None else text.get("eos_token_id"), sizes=sizes)


def check_known(path, tower, known):
    """Raise ValueError for a setting of open_clip that is on, and that our CLIP does not have."""
    for key, value in tower.items():
        ours = known.get(key, ())
        if value and ours is not None and value not in ours:
            raise ValueError(f"{path}: this CLIP has {key:.40} {brief(value)}, which ours does "
                             f"not have: use other weights")


def open_clip(path, told):
    """Understand open_clip's configuration of a model: Told."""
    vision = told.get("vision_cfg") or {}
    text = told.get("text_cfg") or {}
    check_known(path, vision, OPEN_CLIP_VISION)
    check_known(path, text, OPEN_CLIP_TEXT)
    norms = [tower.get("norm_kwargs") or {} for tower in (vision, text)]
    if any(norm.keys() - {"eps"} for norm in norms):
        raise ValueError(f"{path}: this CLIP has norms with other settings than eps, which ours "
                         f"does not have: use other weights")
    width = vision.get("width", 768)
    return Told(
        activation="quick_gelu" if told.get("quick_gelu") else "gelu",
        layer_norm_eps=agreed(path, "eps", *(norm.get("eps", 1e-5) for norm in norms)),
        vision_heads=width // vision.get("head_width", 64), text_heads=text.get("heads", 8),
        eot_id=text.get("eos_id") if text.get("pool_type") == "eos" else None,
        sizes={"vision_width": width, "vision_layers": vision.get("layers"),
               "patch_size": vision.get("patch_size"), "text_width": text.get("width"),
               "text_layers": text.get("layers")})


def pixels(folder, openai):
    """Read how pixels in [0, 1] are normalised: (mean, std), three numbers each.

    openai: whether the weights have OpenAI's names. Without a file these are OpenAI's numbers.
    """
    names = ["preprocessor_config.json", "processor_config.json"]
    path = first_of(folder, *(["open_clip_config.json", *names] if openai else names))
    told = read(path) if path else {}
    told = told.get("preprocess_cfg") or told.get("image_processor") or told
    scale = told.get("rescale_factor", 1 / 255) if isinstance(told, dict) else None
    if not isinstance(scale, (int, float)):
        raise ValueError(f"{path} is no configuration of pixels: copy it again")
    if False in (told.get("do_rescale"), told.get("do_normalize")) or abs(scale * 255 - 1) > 1e-3:
        raise ValueError(f"{path}: pixels are not put into [0, 1] and normalised, as ours are: "
                         f"use other weights")
    mean = told.get("image_mean") or told.get("mean") or OPENAI_MEAN
    std = told.get("image_std") or told.get("std") or OPENAI_STD
    for numbers in (mean, std):
        if not isinstance(numbers, (list, tuple)) or not all(
                isinstance(x, (int, float)) for x in numbers) or len(numbers) != 3:
            raise ValueError(f"{path}: the mean and spread of pixels are three numbers each, not "
                             f"{brief(numbers)}: copy it again")
    return tuple(mean), tuple(std)


def end_of_text(told, vocab_size):
    """Return the id of end-of-text, of what a configuration says (or None) and the vocabulary.

    The last id is end-of-text in a vocabulary as it was learned. Tokens that were added lie behind.
    """
    if isinstance(told, list) and len(told) == 1:
        told = told[0]
    if told in (None, OLD_EOT):
        return min(vocab_size - 1, CLIP_EOT)
    return told


def check_is_clip(folder):
    """Raise ValueError if the folder's config.json is about another model than a whole CLIP."""
    path = folder / "config.json"
    kind = read(path).get("model_type", "clip") if path.is_file() else "clip"
    if kind in ("clip_text_model", "clip_vision_model"):
        raise ValueError(f"{path} describes one tower, {kind}: use the weights of the whole CLIP")
    check_kind(path, kind)


def described(folder, openai, sizes):
    """Return what the configuration in the folder of a CLIP's weights says: Told, or None.

    openai: whether the weights have OpenAI's names, as open_clip's have. sizes: what their shapes
    say, {name: number}. Raises ValueError where the file is about other weights, or asks for what
    our CLIP does not have.
    """
    names = ["open_clip_config.json", "config.json"]
    path = first_of(folder, *(names if openai else names[::-1]))
    told = read(path) if path else {}
    try:
        if isinstance(told.get("model_cfg", told).get("vision_cfg"), dict):
            told = open_clip(path, told.get("model_cfg", told))
        elif told.keys() & {"model_type", "vision_config", "text_config"}:
            told = hugging_face(path, told)
        else:
            # The file is about something else.
            return None
    except (TypeError, AttributeError, ZeroDivisionError):
        raise ValueError(f"{path} is no configuration of a CLIP: copy it again") from None
    for name, number in told.sizes.items():
        if number not in (None, sizes[name]):
            raise ValueError(f"{path} is about other weights: {name} is {brief(number)} there and "
                             f"{sizes[name]} here: keep each model in a folder of its own")
    return told


def check_stated(path, wanted):
    """Raise ValueError if a configuration states another value than wanted, {key: value}."""
    told = read(path) if path.is_file() else {}
    for key, value in wanted.items():
        if told.get(key, value) != value:
            raise ValueError(f"{path} says {key} {brief(told[key])}, but this model has {value}: "
                             f"wrong model")
