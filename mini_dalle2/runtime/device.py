"""The device that models run on, and the memory of the machine.

Read next: processes.py.
"""

import ctypes
import math
import os
import sys

import torch
from torch import nn


M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4                       # of the C library's mallopt


def pick_device(name="auto"):
    """"auto", "cpu" or "cuda" -> torch.device; "auto" is the GPU if there is one. Raises ValueError when that device cannot be had.

    A torch.device stays what it is.
    """
    if isinstance(name, torch.device):
        return name
    if name not in ("auto", "cpu", "cuda"):
        raise ValueError(f'unknown device "{name}": it is auto, cpu or cuda')
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device cuda was asked for, but torch finds no usable GPU")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def keep_memory():
    """Freed memory stays with this process, at hand for the next step: only with the GNU C library, which by default gives it back.

    Large tensors are then no longer asked of the system one by one, which makes and zeroes each of their pages again in every step. The results
    are the same to the bit. It is a setting of the whole process, and therefore made by the commands.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        for parameter, value in ((M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, 64 * 2 ** 20)):
            mallopt(parameter, value)


def shorten(model, dtype):
    """Keeps the matrices of a model in a shorter floating point type, which autocast then multiplies in; None: as they are. Returns it."""
    for module in model.modules() if dtype is not None else ():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.Embedding)):
            module.to(dtype)
    return model


def out_of_memory(error):
    """Whether an exception says that memory ran out, of a GPU, of torch on the CPU (which has no type of its own for it), or of Python."""
    return isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error)


def machine_memory():
    """Bytes of memory that this machine has; infinitely many on a system that does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError):
        return math.inf


def on_device(batch, device):
    """A tensor on the device. From memory to a GPU by way of pinned memory: the processor does not wait for the copy."""
    if batch.device.type == "cpu" and device.type == "cuda":
        batch = batch.pin_memory()
    return batch.to(device, non_blocking=True)


def in_float32(x):
    """Where autocast would multiply in short floats: not here. What z_img says of which thing has which colour is small print."""
    return torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False)
