"""Random numbers for a batch, or for a part of one: the same ones, however many processes and parts a batch is divided among.

Each process draws the numbers of the whole batch from the same stream and keeps those of its own rows. That costs a little time, and makes
a training on four GPUs the very training that one GPU would have done: the same t, the same ε, the same dropped conditions.

Read next: diffusion.py.
"""

import zlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Share:
    """A random stream, seen by the `index`-th of `count` equal parts of a batch. Can be given for a generator where rows are drawn."""
    generator: torch.Generator
    index: int
    count: int

    @property
    def device(self):
        """Where the stream makes its numbers."""
        return self.generator.device


def rows_of(whole, generator, dim=0):
    """What of a whole batch (B, ...) belongs to a Share: (B / count, ...); all of it to a plain generator, or None.

    Raises ValueError when B cannot be shared out evenly.
    """
    if not isinstance(generator, Share):
        return whole
    if whole.shape[dim] % generator.count:
        raise ValueError(f"a batch of {whole.shape[dim]} cannot be divided among {generator.count}: let batch_size be a multiple of that")
    return whole.chunk(generator.count, dim)[generator.index]


def draw_rows(distribution, shape, generator=None, device=None, dim=0):
    """distribution(shape, generator=, device=), such as torch.rand, drawn on the generator's device, whatever `device` it ends up on.

    With a Share, `shape` is that of its rows, which lie along `dim`: all rows are drawn, the others' thrown away. With a list of generators
    each fills an equal part of the rows (the first dimension), which is then the same in any company. Raises ValueError if they do not divide.
    """
    if isinstance(generator, (list, tuple)):
        each, rest = divmod(shape[0], len(generator))
        if rest:
            raise ValueError(f"{shape[0]} rows cannot be divided among {len(generator)} generators")
        return torch.cat([distribution((each, *shape[1:]), generator=g, device=g.device) for g in generator]).to(device)       # in one copy
    if isinstance(generator, Share):
        whole = [size * generator.count if i == dim else size for i, size in enumerate(shape)]
        return rows_of(distribution(whole, generator=generator.generator, device=generator.device), generator, dim).to(device)
    return distribution(shape, generator=generator, device=noise_device(generator, device)).to(device)


def noise_device(generator, device):
    """The device that random numbers are to be drawn on: the generator's own; `device` if there is no generator."""
    return device if generator is None else generator.device


def seeded(*key):
    """A random generator for anything that prints, such as (seed, "decoder"): equal keys give equal numbers, other keys other ones.

    The key is hashed to the 32 bits that torch reads of a seed. Generators live on the CPU, so that a GPU draws the same pictures.
    """
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
