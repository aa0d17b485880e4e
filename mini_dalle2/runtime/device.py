"""The device that models run on, its memory, and the precision of its arithmetic.

Read next: processes.py.
"""

import contextlib
import ctypes
import math
import os
import sys

import torch
from torch import nn

# Parameters of the C library's mallopt.
M_TRIM_THRESHOLD = -1
M_TOP_PAD = -2
M_MMAP_MAX = -4


# What --device takes. "mps" is the GPU of a Mac.
DEVICES = ("auto", "cpu", "cuda", "mps")


def pick_device(name="auto"):
    """Turn a name of DEVICES into a torch.device; "auto" takes CUDA, then MPS, then the CPU.

    A torch.device is returned as it is. Raises ValueError for a device that is not there.
    """
    if isinstance(name, torch.device):
        return name
    if name not in DEVICES:
        raise ValueError(f'unknown device "{name}": it is {", ".join(DEVICES)}')
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(kind for kind in there if there[kind])
    if not there[name]:
        raise ValueError(f"device {name} was asked for, but torch finds no usable GPU")
    return torch.device(name)


def off_mps(x):
    """Return x, or its copy on the CPU if it lies on a Mac's GPU.

    MPS has no float64, and not every kernel.
    """
    return x.cpu() if x.device.type == "mps" else x


@contextlib.contextmanager
def stream_kept(device):
    """A context that leaves torch's own random streams, of the CPU and of the device, as before."""
    on_mac = torch.mps.get_rng_state() if device.type == "mps" else None
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
    finally:
        if on_mac is not None:
            torch.mps.set_rng_state(on_mac)


def keep_memory():
    """Keep freed memory in the process (glibc only), so that the next step can reuse it.

    By default glibc returns large blocks to the system, which then clears every page again in
    every step. Results stay the same to the bit. The setting holds for the whole process: a
    script decides, not this package.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
        mallopt(M_TOP_PAD, 64 * 2 ** 20)


def shorten(model, dtype):
    """Store a model's matrices in a shorter float type, for autocast; None changes nothing.

    Returns the model.
    """
    for module in model.modules() if dtype is not None else ():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            module.to(dtype)
    return model


def out_of_memory(error):
    """Whether an exception says that memory ran out: of a GPU, of torch on a CPU, or of Python.

    torch has no exception type of its own for memory on a CPU or on MPS.
    """
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error) or "MPS backend out of memory" in str(error)


def machine_memory():
    """Bytes of memory that this machine has; infinity on a system that does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return math.inf


def on_device(batch, device):
    """Move a tensor to the device. Pinned memory lets the processor go on during the copy."""
    if batch.device.type == "cpu" and device.type == "cuda":
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=device.type == "cuda")


def in_float32(x):
    """A context without autocast, on the device of x: float32 stays float32.

    z_img tells which object has which colour only in its small digits.
    """
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)
