"""Several processes that train one model, or draw with it, `torchrun --nproc_per_node=N train.py`:
what they must agree on, and who writes.

    gradient of the whole batch = mean over processes of the gradients of their shares
    (torch's DistributedDataParallel)

Every process runs the same program. Each learns from its share of every batch; the gradients are
averaged, so that all keep the same weights. With `shard`, torch's fully_shard, each process keeps
but a part of every weight, gradient and average of the optimiser, and fetches a block's weights
when it gets to that block: for models that one GPU cannot hold. The first process alone writes
files. When pictures are drawn (sample.py, evaluate.py), each process draws some. Without torchrun
there is one process, and everything here does nothing.

References: torch.distributed (gloo between CPUs, nccl between GPUs). Read next: training.py.
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
    """Which of them this one is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def is_main():
    """Whether this is the process that writes."""
    return rank() == 0


def launcher():
    """What one types before the name of a script to have as many processes again."""
    return "python" if world() == 1 else f"torchrun --nproc_per_node={os.environ.get('LOCAL_WORLD_SIZE', world())}"


def left_alone(error):
    """Whether an exception says that another process has ended, so that this one waits in vain.
    gloo has no type of its own for it."""
    return isinstance(error, dist.DistError) or any(text in str(error) for text in ("Connection closed by peer", "Connection reset by peer"))


@contextlib.contextmanager
def processes(device):
    """Joins the other processes that torchrun started, if it did: yields this process's device.
    Only the first one prints."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or dist.is_initialized():
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    # They wait for each other while the first one embeds all pictures, or draws some: for longer
    # than torch would.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(days=1))
    try:
        with contextlib.ExitStack() as silence:
            if not is_main():
                silence.enter_context(contextlib.redirect_stdout(silence.enter_context(open(os.devnull, "w"))))
            yield device
    finally:
        sys.stdout.flush()
        # A sharded model keeps its group, and gloo's threads with it: what they free when Python
        # has shut down ends the process with SIGABRT.
        gc.collect()
        dist.destroy_process_group()


def barrier():
    """Waits until all processes are here."""
    if world() > 1:
        dist.barrier()


@contextlib.contextmanager
def main_first():
    """The first process goes through this block alone; then the others, who will find the files
    that it made."""
    if not is_main():
        barrier()
    yield
    if is_main():
        barrier()


def wrap(module, shard=False):
    """The module, with its gradients averaged over all processes in `backward`; shard: and its
    weights divided among them.

    Its parameters are then others than before: an optimiser has to be made afterwards. Raises
    ValueError when this torch cannot do it.
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
    blocks = [block for part in module.modules() if isinstance(part, nn.ModuleList) for block in part]     # of transformers and U-Nets
    for part in (*blocks, module):                         # the module itself has what is in no block
        fully_shard(part, mesh=mesh)
    return module


@contextlib.contextmanager
def alone(module):
    """In this context the gradients of a wrapped module are not averaged; with
    DistributedDataParallel they are its process's own."""
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
    """A tensor with all its shards, on the CPU if there were some; all processes must ask. What is
    no sharded tensor stays as it is."""
    return value.full_tensor().cpu() if hasattr(value, "full_tensor") else value


def like(value, other):
    """A whole tensor, sharded as `other` is, if that is sharded."""
    if not hasattr(other, "full_tensor"):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(other.device), other.device_mesh, other.placements)


def mean(values):
    """The mean of a tensor over all processes."""
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
    """The first process's plain value, in all of them: what it has found on disk they all go by,
    and none waits for one that has gone elsewhere."""
    values = [value]
    if world() > 1:
        dist.broadcast_object_list(values)
    return values[0]


def own_part(rows):
    """The part of rows (a list, or a tensor's first dimension) that this process is to work on: as
    even as can be, perhaps none."""
    return rows[len(rows) * rank() // world():len(rows) * (rank() + 1) // world()]


def collect(value):
    """[each process's value], of a plain value or a tensor on the CPU, in order."""
    values = [None] * world()
    if world() == 1:
        return [value]
    dist.all_gather_object(values, value)
    return values


class AllGather(torch.autograd.Function):
    """(b, ...) of each process -> (N·b, ...), b the same everywhere; backward, the sum of all
    processes' gradients of one's own rows."""

    @staticmethod
    def forward(ctx, rows):
        parts = [torch.empty_like(rows) for _ in range(world())]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)           # which all_reduce writes into
        dist.all_reduce(gradient)
        return gradient.chunk(world())[rank()]


def gather_rows(rows):
    """(b, ...) of each process -> (B, ...) of all, in order; b may differ. Gradients flow back to
    the process that the rows came from.

    There they are the sum of what all processes hand back: a loss that all of them compute alike
    counts N times, and the mean over N processes, which `wrap` takes, is then the gradient of the
    one loss.
    """
    if world() == 1:
        return rows
    counts = AllGather.apply(torch.tensor([len(rows)], device=rows.device)).tolist()
    if not any(counts):
        return rows
    padded = torch.cat([rows, rows.new_zeros(max(counts) - len(rows), *rows.shape[1:])])   # all must send as much
    parts = AllGather.apply(padded).chunk(world())
    return torch.cat([part[:count] for part, count in zip(parts, counts)])
