"""A stand-in for the GPU of a Mac: tensors on the CPU that behave as if they were on MPS.

    with mac(monkeypatch): train.main([..., "--device=mps"])

It computes with real numbers. It refuses what MPS refuses: float64, kernels that MPS lacks, and
mixing with tensors or random streams of the CPU. Kernels writes down what is computed, to compare it
with torch's own table of the kernels of MPS. Neither can tell how MPS rounds, or how fast it is.
Source of the limits: torch's page "MPS backend", and the issues pytorch/pytorch 79019 and 141287.
"""

import contextlib
import re
from pathlib import Path

import torch
import torchgen
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

MPS = torch.device("mps")
# Kernels that some or all versions of torch lack on MPS.
LACKING = {"eigh", "eigvalsh", "svdvals", "qr", "bucketize", "cdist", "pin_memory"}
# Functions that take tensors of two devices.
MIXING_IS_ALLOWED = {"copy_", "__get__", "__set__", "to", "type_as", "_has_compatible_shallow_copy_type"}


def is_on_mac(x):
    return isinstance(x, Mac)


class Mac(torch.Tensor):
    """A tensor that says that it is on MPS."""

    device = property(lambda self: MPS)
    is_cpu = property(lambda self: False)

    def __reduce_ex__(self, protocol):
        # What torch.save writes: a tensor that can be loaded anywhere.
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(torch.Tensor).__reduce_ex__(protocol)

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", str(function))
        if name in ("cpu", "numpy", "item", "tolist", "__repr__", "__format__"):
            with torch._C.DisableTorchFunctionSubclass():
                result = function(*args, **kwargs)
                return result.as_subclass(torch.Tensor) if isinstance(result, torch.Tensor) else result
        check(name, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass(), Kernels.on_mac():
            result = function(*args, **kwargs)
        return to_mac(result)


class Kernels(TorchDispatchMode):
    """Writes down the names of the kernels that tensors on the Mac are given to: `used`."""

    depth = 0

    def __init__(self):
        super().__init__()
        self.used = set()

    @classmethod
    @contextlib.contextmanager
    def on_mac(cls):
        """A context of kernels that run on the Mac, backward ones too; others run on the CPU."""
        cls.depth += 1
        try:
            yield
        finally:
            cls.depth -= 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if Kernels.depth:
            self.used.add(function.name().removeprefix("aten::"))
        return function(*args, **(kwargs or {}))

    def lacking(self):
        """Those of the kernels that torch's table does not have for MPS."""
        table = kernels_of_mps()
        # Attention chooses its kernel by the device.
        return {name for name in self.used if name not in table and "attention_for_cpu" not in name}


def kernels_of_mps():
    """The names of the kernels that torch has for MPS, by the table that comes with this torch."""
    file = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
    entries = {entry.split("(")[0]: entry for entry in re.split(r"^- func: ", file.read_text(), flags=re.M)[1:]}
    return {name for name in entries if is_for_mps(name, entries)}


def is_for_mps(name, entries):
    """Whether an entry of the table names MPS, or is made of other kernels on every device."""
    delegate = re.search(r"^  structured_delegate: (\S+)", entries[name], re.M)
    if delegate:
        return is_for_mps(delegate[1], entries)
    dispatch = re.search(r"^  dispatch:\n((?:    .*\n?)+)", entries[name], re.M)
    if not dispatch:
        return True
    keys = re.findall(r"\w+", " ".join(re.findall(r"^    ([\w, ]+):", dispatch[1], re.M)))
    return any(key == "MPS" or key.startswith("Composite") for key in keys)


def check(name, args, kwargs):
    """Refuse what MPS refuses."""
    if name.removeprefix("linalg_") in LACKING:
        raise NotImplementedError(f"{name} is not there on MPS")
    # "area" is there for some sizes only.
    if name == "interpolate" and (kwargs.get("antialias") or kwargs.get("mode") == "area"):
        raise NotImplementedError(f"interpolate {kwargs} is not there on MPS")
    others = [x for x in tensors_in((args, kwargs.values())) if not is_on_mac(x) and x.ndim]
    if name in ("__getitem__", "index_select", "__setitem__") and is_on_mac(args[0]):
        # Indices may lie on the CPU.
        others = []
    if others and name not in MIXING_IS_ALLOWED:
        raise RuntimeError(f"{name}: tensors on mps and on the cpu: {[tuple(x.shape) for x in others]}")


def tensors_in(values):
    """The tensors in nested lists and tuples."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)


def to_mac(x):
    """Plain tensors, also in lists and tuples, as tensors on MPS. Raises TypeError for float64."""
    if type(x) in (list, tuple):
        return type(x)(to_mac(value) for value in x)
    if not isinstance(x, torch.Tensor) or is_on_mac(x):
        return x
    if x.dtype == torch.float64:
        raise TypeError("MPS has no float64")
    return x.as_subclass(Mac)


class Moves(TorchFunctionMode):
    """Catch what makes a tensor on MPS, and what moves one away."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = getattr(function, "__name__", "")
        if name == "to":
            return move(*args, **kwargs)
        place = torch.device(kwargs.get("device") or "cpu")
        stream = kwargs.get("generator")
        if stream is not None and "device" in kwargs and stream.device.type != place.type:
            raise RuntimeError(f"{name}: numbers on {place} from a stream on {stream.device}")
        if place.type == "mps":
            kwargs["device"] = "cpu"
            return to_mac(function(*args, **kwargs))
        return function(*args, **kwargs)


def move(x, *rest, **options):
    """Tensor.to: to another device, another type, or both."""
    device, dtype = options.pop("device", None), options.pop("dtype", None)
    options.pop("non_blocking", None)
    for item in rest:
        if isinstance(item, torch.Tensor):
            device, dtype = item.device, item.dtype
        elif isinstance(item, torch.dtype):
            dtype = item
        elif isinstance(item, (torch.device, str)):
            device = item
    target = x.device if device is None else torch.device(device)
    with torch._C.DisableTorchFunctionSubclass():
        plain = x.as_subclass(torch.Tensor)
        result = plain if dtype is None else plain.to(dtype, **options)
        if target.type != x.device.type and result is plain:
            result = plain.clone()
    return to_mac(result) if target.type == "mps" else result


class Generator(torch.Generator):
    """A random stream that says on which device it is; here they all lie on the CPU."""

    device = property(lambda self: self.place)

    def __new__(cls, device="cpu"):
        stream = super().__new__(cls, "cpu")
        stream.place = torch.device(device)
        return stream


@contextlib.contextmanager
def mac(monkeypatch):
    """A machine with MPS and without CUDA."""
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: torch.get_rng_state())
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda state: torch.set_rng_state(state))
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with Moves():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
