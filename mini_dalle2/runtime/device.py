"""The device that models run on, its memory, and the precision of its arithmetic.

Read next: processes.py.
"""

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


def pick_device(name="auto"):
    """Turn "auto", "cpu" or "cuda" into a torch.device; "auto" takes a GPU if there is one.

    A torch.device is returned as it is. Raises ValueError for a device that is not there.
    """
    if isinstance(name, torch.device):
        return name
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f'unknown device "{name}": it is auto, cpu or cuda')
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no usable GPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


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

    torch has no exception type of its own for memory on a CPU.
    """
    if isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)):
        return True
    return "DefaultCPUAllocator" in str(error)


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
    return batch.to(device, non_blocking=True)


def in_float32(x):
    """A context without autocast, on the device of x: float32 stays float32.

    z_img tells which object has which colour only in its small digits.
    """
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)
