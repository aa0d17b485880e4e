"""Several processes that train one model, or sample from it, started by torchrun.

    gradient of the whole batch = mean over processes of the gradients of their shares

Every process runs the same program on its own share of every batch. torch averages the gradients
(DistributedDataParallel), so all processes keep the same weights. With `shard` (fully_shard) each
process holds only a part of every weight, gradient and optimizer state. It fetches the weights of
a block when they are needed: this is for models that one GPU cannot hold. In sampling and in the
evaluation each process makes some of the pictures. Only the first process writes files. Without
torchrun there is one process, and the functions here do nothing.

References: torch.distributed (gloo between CPUs, nccl between GPUs).
Read next: ../training/state.py.
"""

import contextlib
import datetime
import gc
import os
import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn.parallel import DistributedDataParallel


def world():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """The number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main():
    """Whether this is the process that writes."""
    return rank() == 0


def launcher():
    """The words before the name of a script that start as many processes again."""
    if world() == 1:
        return "python"
    return f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', world())}"


def left_alone(error):
    """Whether an exception says that another process has ended, so that waiting is in vain.

    gloo has no exception type of its own for this.
    """
    if isinstance(error, dist.DistError):
        return True
    texts = ("Connection closed by peer", "Connection reset by peer")
    return any(text in str(error) for text in texts)


@contextlib.contextmanager
def processes(device):
    """Join the processes that torchrun started, if any. Yield the device of this process.

    Only the first process prints.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # Processes wait while the first one embeds all pictures. torch's default is less patient.
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(days=1))
    try:
        with contextlib.ExitStack() as silence:
            if not is_main():
                nowhere = silence.enter_context(open(os.devnull, "w"))
                silence.enter_context(contextlib.redirect_stdout(nowhere))
            yield device
    finally:
        sys.stdout.flush()
        # A sharded model keeps its process group alive, and with it gloo's threads. Freed after
        # Python's shutdown, these end the process with SIGABRT.
        gc.collect()
        dist.destroy_process_group()


def barrier():
    """Wait until all processes are here."""
    if world() > 1:
        dist.barrier()


@contextlib.contextmanager
def main_first():
    """Let the first process go through this block alone. The others follow, and find its files."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


# ---------------------------------------------------------------------------- training together

def parallel_module(module, shard=False):
    """The module with its gradients averaged over all processes in `backward`.

    shard: also divide its weights among the processes. The module then has other parameters
    than before, so the optimizer must be made afterwards.
    Raises ValueError when this version of torch cannot shard.
    """
    if world() == 1:
        return module
    if not shard:
        return DistributedDataParallel(module)
    try:
        from torch.distributed.fsdp import fully_shard
    except ImportError:
        raise ValueError("to shard a model takes torch 2.6 or newer") from None
    mesh = init_device_mesh(next(module.parameters()).device.type, (world(),))
    # The blocks of transformers and U-Nets first; the module then takes what is in no block.
    lists = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    blocks = [block for part in lists for block in part]
    for part in (*blocks, module):
        fully_shard(part, mesh=mesh)
    return module


@contextlib.contextmanager
def own_gradients(module):
    """A context in which a parallel module does not average its gradients.

    With DistributedDataParallel every process then keeps the gradient of its own share.
    """
    if isinstance(module, DistributedDataParallel):
        with module.no_sync():
            yield
        return
    sharded = hasattr(module, "set_requires_gradient_sync")
    if sharded:
        module.set_requires_gradient_sync(False)
    yield
    if sharded:
        module.set_requires_gradient_sync(True)


def whole(value):
    """A sharded tensor in one piece, on the CPU; every process must call this together.

    Any other value is returned as it is.
    """
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def like(value, other):
    """A whole tensor, sharded in the same way as `other` if that is sharded."""
    if not hasattr(other, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


# ---------------------------------------------------------------------------- exchanging values

def mean_over_processes(values):
    """The mean of a tensor over all processes. The tensor itself is overwritten."""
    if world() > 1:
        dist.all_reduce(values)
        values /= world()
    return values


def anyone(flag, device):
    """Whether `flag` is true in any process."""
    if world() == 1:
        return flag
    flags = torch.tensor(float(flag), device=device)
    dist.all_reduce(flags)
    return bool(flags > 0)


def agreed(value):
    """The first process's plain value, in every process, so that all take the same branch."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def own_part(rows):
    """This process's part of a list, or of a tensor's first dimension.

    The parts are as even as possible. Some may be empty.
    """
    start = len(rows) * rank() // world()
    return rows[start:len(rows) * (rank() + 1) // world()]


def collect(value):
    """[value of each process], in order. A value is plain, or a tensor on the CPU."""
    if world() == 1:
        return [value]
    values = [None] * world()
    dist.all_gather_object(values, value)
    return values


class AllGather(torch.autograd.Function):
    """(b, ...) of each process -> (N·b, ...), with the same b in every process.

    Backward, a process gets the sum of all processes' gradients of its own rows.
    """

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        # A copy, because all_reduce writes into it.
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient.chunk(world())[rank()]


def gather_rows(rows):
    """(b, ...) of each process -> (B, ...) of all processes, in order; b may differ.

    Gradients flow back to the process that the rows came from, summed over all processes. When
    every process computes the same loss from all rows, that loss counts N times. The mean over
    N processes, which `parallel_module` takes, then gives the gradient of the one loss.
    """
    if world() == 1:
        return rows
    counts = AllGather.apply(torch.tensor([len(rows)], device=rows.device)).tolist()
    if not any(counts):
        return rows
    # Every process must send the same number of rows.
    padding = rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])
    parts = AllGather.apply(torch.cat([rows, padding])).chunk(world())
    return torch.cat([part[:count] for part, count in zip(parts, counts)])
