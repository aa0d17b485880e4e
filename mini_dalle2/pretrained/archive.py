"""Weights from files: safetensors, torch, TorchScript archives. Nothing in a file is ever run.

Read next: clip.py.
"""

import importlib.util
import io
import pickle
import zipfile
from pathlib import Path

import torch

from ..runtime.device import out_of_memory

NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")


class Holder:
    """Stands for any object of a TorchScript archive; its fields are what the archive says of it."""


class Archive(pickle.Unpickler):
    """The tensors of a TorchScript archive, as OpenAI publishes CLIP. Its code is not looked at; only tensors and holders are made.

    data.pkl in it describes the module; each tensor refers to a storage, data/NUMBER, of plain bytes. torch.jit.load does the same and
    also compiles the code, but is deprecated.
    """

    def __init__(self, archive):
        self.archive = archive
        self.root = next(name for name in archive.namelist() if name.endswith("/data.pkl")).removesuffix("data.pkl")
        super().__init__(io.BytesIO(archive.read(f"{self.root}data.pkl")))

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return type("Holder", (Holder,), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(size, stride, offset)
        if module == "torch" and name.endswith("Storage"):
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if module == "torch.jit._pickle":                                  # lists of numbers and the like
            return lambda data, *_: data
        raise pickle.UnpicklingError(f"{module}.{name} is not needed for weights")

    def persistent_load(self, key):
        _, kind, number, *_ = key
        types = {"FloatStorage": torch.float32, "HalfStorage": torch.float16, "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64}
        if kind not in types:
            raise pickle.UnpicklingError(f"{kind}: there are no such numbers in weights")
        return torch.frombuffer(bytearray(self.archive.read(f"{self.root}data/{number}")), dtype=types[kind])

    def state_dict(self):
        """{name: tensor} of the whole module."""
        def walk(item, name):
            if torch.is_tensor(item):
                yield name, item
            elif isinstance(item, Holder):
                for key, value in vars(item).items():
                    yield from walk(value, f"{name}.{key}" if name else key)

        return dict(walk(self.load(), ""))


def read_weights(path):
    """What a file of weights holds, on the CPU, without running anything in it. Raises FileNotFoundError, ValueError.

    .safetensors needs the package of that name. A TorchScript archive, as OpenAI publishes CLIP, gives its state dict.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights {path}")
    if path.suffix == ".safetensors" and not importlib.util.find_spec("safetensors"):
        raise ValueError(f"to read {path}, first: pip install safetensors")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return Archive(archive).state_dict()
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is damaged, or would run code when it is read: it was not read") from None
    except Exception as error:                                             # half a dozen types for a damaged file, all with long texts
        if isinstance(error, PermissionError) or out_of_memory(error):     # these are no fault of the file
            raise
        raise ValueError(f"{path} cannot be read as weights: it is damaged or not one ({type(error).__name__})") from None


def state_dict(path):
    """{name: tensor} of a file of weights, out of what a training framework wraps it in. Raises as `read_weights` does."""
    saved = read_weights(path)
    saved = saved.get("state_dict", saved) if isinstance(saved, dict) else saved
    if not isinstance(saved, dict) or not saved or not all(torch.is_tensor(value) for value in saved.values()):
        raise ValueError(f"{path} is a torch file, but holds no weights of a model")
    return saved


def find(folder, *names):
    """The first of these files that is in the folder. Raises FileNotFoundError naming them all."""
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise FileNotFoundError(f"{folder} has none of {', '.join(names)}")


def part(folder):
    """The weights in one folder of the Hugging Face or the diffusers layout."""
    suffixes = (".safetensors", ".bin") if importlib.util.find_spec("safetensors") else (".bin", ".safetensors")
    if any(folder.glob("*.index.json")):
        raise ValueError(f"{folder} holds weights in several pieces, which is not supported: use the original files")
    return state_dict(find(folder, *(f"{stem}{variant}{suffix}" for suffix in suffixes for variant in ("", ".fp16")
                                     for stem in ("diffusion_pytorch_model", "model", "pytorch_model"))))
