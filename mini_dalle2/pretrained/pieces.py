"""Which files of a folder hold its weights: one whole file, one in half precision, or pieces.

    model.safetensors                       whole
    model.fp16.safetensors                  in half precision
    model-00001-of-00002.safetensors, …     pieces, listed in model.safetensors.index.json

The whole file comes first: an index beside it is left over. Numbers of full length come before
those of half length.

References: the public code of transformers, diffusers and open_clip, for the names.
Read next: beside.py.
"""

import importlib.util
import re
from pathlib import Path

from ..runtime.files import read_json
from .archive import state_dict

STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "open_clip_model",
         "open_clip_pytorch_model")
VARIANTS = ("", ".fp16", ".bf16")
# Endings of other files that may hold weights.
WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".th"}
PIECE = re.compile(r"-\d{5}-of-\d{5}\.")


def find(folder, *names):
    """Return the first of these files in the folder. Raises FileNotFoundError naming them all."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has none of {', '.join(names)}")


def part(folder):
    """Return the weights {name: tensor} in one folder of the Hugging Face or diffusers layout.

    Raises FileNotFoundError, ValueError.
    """
    suffixes = (".bin", ".safetensors")
    if importlib.util.find_spec("safetensors"):
        suffixes = (".safetensors", ".bin")
    kinds = [(suffix, variant) for suffix in suffixes for variant in VARIANTS]
    incomplete = None
    for suffix, variant in kinds:
        for stem in STEMS:
            if (folder / f"{stem}{variant}{suffix}").is_file():
                return state_dict(folder / f"{stem}{variant}{suffix}")
        for index in indexes(folder, suffix, variant):
            if not missing_pieces(index):
                return joined_pieces(index)
            incomplete = index
    if incomplete:
        raise FileNotFoundError(f"{incomplete} lists {missing_pieces(incomplete)[0]}, which is "
                                f"not beside it: copy all pieces into one folder")
    others = sorted(path.name for path in folder.glob("*") if path.suffix in WEIGHTS)
    found = f"only {', '.join(others[:3])}" if others else "no weights"
    remedy = "name the file itself" if others else "name a folder that holds the weights"
    raise FileNotFoundError(f"{folder} has {found}, where model.safetensors or pytorch_model.bin "
                            f"was looked for: {remedy}")


def from_file(path):
    """Return the weights {name: tensor} of one file, or of all pieces that an index lists.

    Raises FileNotFoundError, ValueError.
    """
    path = Path(path)
    if path.suffix == ".json" and ".index" in path.suffixes:
        if not path.is_file():
            raise FileNotFoundError(f"there are no weights {path}")
        if missing := missing_pieces(path):
            raise FileNotFoundError(f"{path} lists {missing[0]}, which is not beside it: copy all "
                                    f"pieces into one folder")
        return joined_pieces(path)
    if PIECE.search(path.name) and path.is_file():
        raise ValueError(f"{path} is one piece of several: name the folder with all of them")
    return state_dict(path)


def indexes(folder, suffix, variant):
    """List the indexes of pieces in a folder, in either order of their names' parts."""
    names = [f"{stem}{end}" for stem in STEMS for end in (
        f"{suffix}.index{variant}.json", f"{variant}{suffix}.index.json")]
    return [folder / name for name in dict.fromkeys(names) if (folder / name).is_file()]


def pieces(index):
    """List the files that an index names. Raises ValueError for a file that is no index."""
    try:
        listed = sorted(set(read_json(index)["weight_map"].values()))
        # Beside the index, and nowhere else.
        if any(Path(name).name != name or len(name) > 255 for name in listed):
            raise ValueError
        return listed
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} is no index of pieces: copy it again") from None


def missing_pieces(index):
    """List the files that an index names and that are not beside it."""
    return [name for name in pieces(index) if not (index.parent / name).is_file()]


def joined_pieces(index):
    """Return the weights {name: tensor} of all pieces that an index names."""
    weights = {}
    for name in pieces(index):
        weights |= state_dict(index.parent / name)
    return weights
