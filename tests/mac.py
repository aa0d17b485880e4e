"""A stand-in for the GPU of a Mac: tensors on the CPU that behave as if they were on MPS.

    with mac(monkeypatch): train.main([..., "--device=mps"])

It computes with real numbers. It refuses what MPS refuses: float64, kernels that MPS lacks, and
mixing with tensors on the CPU. It cannot tell how MPS rounds, how fast it is, or what else it lacks.
Source of the limits: torch's page "MPS backend", and the issues pytorch/pytorch 79019 and 141287.
"""

import contextlib

import torch
from torch.overrides import TorchFunctionMode

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
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
        return to_mac(result)


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
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "mps":
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
    """A random stream on any device; here they all lie on the CPU."""

    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


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
