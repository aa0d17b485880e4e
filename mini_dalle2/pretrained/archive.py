"""Weights from files: safetensors, torch, and TorchScript archives. No code in a file is ever run.

OpenAI publishes CLIP as TorchScript archives: zip files with a pickled description of the module,
data.pkl, and each tensor's plain bytes, data/NUMBER. `Archive` reads the tensors alone.

References: torch's serialisation format. Read next: pieces.py.
"""

import importlib.util
import io
import pickle
import zipfile
from pathlib import Path

import torch

from ..runtime.device import out_of_memory
from ..runtime.files import is_pointer

# Entries of state dicts that are no weights, by the last part of their names.
NOT_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "position_ids", "attn_mask")
# Where training frameworks keep the weights in a checkpoint, and what they put before each name.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module")
PREFIXES = ("module.", "_orig_mod.")
STORAGES = {
    "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64}


class Holder:
    """Stand for any object of a TorchScript archive. Its fields are what the archive says."""


class Archive(pickle.Unpickler):
    """The tensors of a TorchScript archive. Only tensors and holders are made.

    torch.jit.load reads the same tensors, but it also compiles the archive's code, and is
    deprecated.
    """

    def __init__(self, archive):
        """archive: an open ZipFile."""
        self.archive = archive
        described = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
        self.root = described.removesuffix("data.pkl")
        super().__init__(io.BytesIO(archive.read(described)))

    def find_class(self, module, name):
        if module.startswith("__torch__"):
            return type("Holder", (Holder,), {})
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return lambda storage, offset, size, stride, *_: storage.as_strided(
                size, stride, offset)
        if module == "torch" and name.endswith("Storage"):
            return name
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        # Lists of numbers and the like.
        if module == "torch.jit._pickle":
            return lambda data, *_: data
        raise pickle.UnpicklingError(f"{module}.{name} is not needed for weights")

    def persistent_load(self, key):
        _, kind, number, *_ = key
        if kind not in STORAGES:
            raise pickle.UnpicklingError(f"{kind}: there are no such numbers in weights")
        data = bytearray(self.archive.read(f"{self.root}data/{number}"))
        return torch.frombuffer(data, dtype=STORAGES[kind])

    def state_dict(self):
        """Return {name: tensor} of the whole module."""
        return dict(named_tensors(self.load(), ""))


def named_tensors(item, name):
    """Yield (name, tensor) of a tensor, or of all tensors in a Holder."""
    if torch.is_tensor(item):
        yield name, item
    elif isinstance(item, Holder):
        for key, value in vars(item).items():
            yield from named_tensors(value, f"{name}.{key}" if name else key)


def read_weights(path):
    """Return what a file of weights holds, on the CPU, without running anything in it.

    .safetensors needs the package of that name. A TorchScript archive gives its state dict.
    Raises FileNotFoundError, ValueError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there are no weights {path}: nothing is downloaded, so name a file "
                                f"or a folder of this machine")
    if path.suffix == ".json":
        raise ValueError(f"{path} is a configuration: name the weights beside it, or the folder")
    if path.suffix == ".safetensors" and not importlib.util.find_spec("safetensors"):
        raise ValueError(f"to read {path}, first: pip install safetensors")
    with open(path, "rb") as file:
        if is_pointer(file.read(64)):
            raise ValueError(f"{path} only stands for the weights, which git-lfs keeps elsewhere: "
                             f"run `git lfs pull` in its folder")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                    return Archive(archive).state_dict()
                # torch does not compare the checksums.
                if archive.testzip():
                    raise zipfile.BadZipFile
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(f"{path} is damaged, or a whole model that would run code when it is "
                         f"read: it was not read; save its model.state_dict()") from None
    # A damaged file raises half a dozen types, all with long texts.
    except Exception as error:
        # These two are no fault of the file.
        if isinstance(error, PermissionError) or out_of_memory(error):
            raise
        raise ValueError(f"{path} cannot be read as weights: it is damaged or not one "
                         f"({type(error).__name__})") from None


def state_dict(path):
    """Return {name: tensor} of a file, without what a training framework wraps around it.

    Raises as `read_weights` does.
    """
    return unwrapped(read_weights(path), path)


def unwrapped(saved, what):
    """Return {name: tensor} of what was saved, without what a training framework wraps around it.

    what: where it comes from, for messages. Raises ValueError where there are no weights.
    """
    inner = saved
    # Not without end: a dict may hold itself.
    for _ in WRAPPERS:
        if isinstance(inner, dict):
            saved = inner
            inner = next((saved[key] for key in WRAPPERS if isinstance(saved.get(key), dict)), None)
    is_weights = isinstance(saved, dict) and saved and all(
        isinstance(name, str) and torch.is_tensor(value) for name, value in saved.items())
    if not is_weights:
        raise ValueError(f"{what} holds no weights of a model: "
                         f"weights are names with a tensor each")
    # torch.compile marks each module that it compiled, wherever the module lies.
    saved = {name.replace("._orig_mod.", "."): value for name, value in saved.items()}
    return without_prefixes(saved, PREFIXES)


def without_prefixes(weights, prefixes):
    """Take away a prefix that all names {name: tensor} have, as long as there is one."""
    def common():
        return next((one for one in prefixes
                     if all(name.startswith(one) for name in weights)), None)

    while weights and (prefix := common()):
        weights = {name.removeprefix(prefix): value for name, value in weights.items()}
    return weights


def without_buffers(weights):
    """Leave out the entries {name: tensor} that are no weights."""
    return {name: value for name, value in weights.items()
            if name.rpartition(".")[2] not in NOT_WEIGHTS}
