"""Random numbers for a batch, whoever draws them: one process or many, in one piece or in parts.

Each process draws the numbers of the whole batch from the same stream. It keeps those of its own
rows. This costs a little time. In return, training on four GPUs is exactly the training that one
GPU would have done: the same t, the same ε, the same dropped conditions.

All functions here draw on the generator's device. A CPU generator therefore gives the same numbers
whatever `device` the result is for. `generator` may be one of four things:
    None               torch's global generator
    torch.Generator    a stream of its own
    Share              a stream that several processes, or several parts of a batch, draw from
    a list             one generator for each example, so that an example's numbers do not depend
                       on the batch it is in

Read next: ../diffusion.py.
"""

import functools
import zlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Share:
    """A random stream as the `index`-th of `count` equal parts of a batch sees it."""

    generator: torch.Generator
    index: int
    count: int

    @property
    def device(self):
        """The device that the stream makes its numbers on."""
        return self.generator.device


def rows_of(whole, generator, dim=0):
    """Return the rows of a batch (B, ...) that belong to a Share: (B / count, ...).

    For any other generator return the whole batch. Raises ValueError if `count` does not divide B.
    """
    if not isinstance(generator, Share):
        return whole
    if whole.shape[dim] % generator.count:
        raise ValueError(f"a batch of {whole.shape[dim]} cannot be divided among "
                         f"{generator.count}: choose a batch_size that is a multiple of "
                         f"{generator.count}")
    return whole.chunk(generator.count, dim)[generator.index]


def draw_rows(distribution, shape, generator=None, device=None, dim=0):
    """Draw distribution(shape, generator=, device=), for example of torch.rand.

    With a Share, `shape` is the shape of its own rows, which lie along `dim`: all rows are drawn,
    and the other rows are thrown away. With a list of generators, each fills an equal part of the
    first dimension. Raises ValueError when the list does not divide the rows.
    """
    if isinstance(generator, (list, tuple)):
        each, rest = divmod(shape[0], len(generator))
        if rest:
            raise ValueError(f"{shape[0]} rows cannot be divided among {len(generator)} "
                             f"generators: give one generator for each row, or for each group "
                             f"of rows")
        parts = [distribution((each, *shape[1:]), generator=one, device=one.device)
                 for one in generator]
        return torch.cat(parts).to(device)
    if isinstance(generator, Share):
        whole = [size * generator.count if i == dim else size for i, size in enumerate(shape)]
        drawn = distribution(whole, generator=generator.generator, device=generator.device)
        return rows_of(drawn, generator, dim).to(device)
    own_device = device if generator is None else generator.device
    return distribution(shape, generator=generator, device=own_device).to(device)


def rand(shape, generator=None, device=None, dim=0):
    """Draw uniform numbers in [0, 1)."""
    return draw_rows(torch.rand, shape, generator, device, dim)


def randn(shape, generator=None, device=None, dtype=None):
    """Draw standard normal numbers."""
    return draw_rows(functools.partial(torch.randn, dtype=dtype), shape, generator, device)


def randn_like(x, generator=None):
    """Draw Gaussian noise with the shape, type and device of x."""
    return randn(x.shape, generator, x.device, x.dtype)


def randint(high, shape, generator=None, device=None, low=0):
    """Draw whole numbers in low..high−1, int64."""
    return draw_rows(functools.partial(torch.randint, low, high), shape, generator, device)


def seeded(*key):
    """Make a torch.Generator from a key of printable things, such as (seed, "decoder").

    The same key gives the same numbers. The key is hashed to the 32 bits that torch reads of a
    seed. The generator lives on the CPU, so that a GPU samples the same pictures.
    """
    return torch.Generator().manual_seed(zlib.crc32(repr(key).encode()))
