"""Rows between public weights and ours: what one line of a table is, and how a table is used.

    theirs  --table-->  ours
    "transformer.resblocks.3.attn.c_qkv.weight"  ->  "transformer.blocks.3.attn.c_attn.weight"

Each architecture has one table per file format. A row has our names, their names, and the way from
one to the other and back. Every tensor of a file is used exactly once; a tensor that is missing,
left over or of another shape is named.

Most rows copy. A matrix that multiplies from the other side is turned. Query, key and value that
lie apart are joined, and those that lie head by head are sorted.

Read next: tables.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..runtime.device import shorten
from ..runtime.files import FLOATS, is_sound


class Row(NamedTuple):
    """One line of a table. load: their tensors -> our tensors; save: ours -> theirs.

    Both take and return as many tensors as are named.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    load: Callable
    save: Callable


def same(ours, theirs):
    """Take a tensor as it is."""
    return [Row((ours,), (theirs,), lambda x: (x,), lambda x: (x,))]


def turned(ours, theirs):
    """Turn a matrix that multiplies from the other side."""
    def turn(x):
        return (x.T.contiguous(),)

    return [Row((ours,), (theirs,), turn, turn)]


def layer(ours, theirs):
    """Take weight and bias of a layer as they are."""
    return same(f"{ours}.weight", f"{theirs}.weight") + same(f"{ours}.bias", f"{theirs}.bias")


def pointwise(ours, theirs):
    """Take a linear layer that is a convolution of one pixel there: (out, in, 1)."""
    weight = Row((f"{ours}.weight",), (f"{theirs}.weight",),
                 lambda x: (x.squeeze(-1),), lambda x: (x.unsqueeze(-1),))
    return [weight, *same(f"{ours}.bias", f"{theirs}.bias")]


def joined(ours, theirs):
    """Join a layer that is several there, such as query, key and value, one above the other."""
    return [Row((f"{ours}.{kind}",), tuple(f"{name}.{kind}" for name in theirs),
                lambda *xs: (torch.cat(xs),), lambda x: x.chunk(len(theirs)))
            for kind in ("weight", "bias")]


def by_head(ours, theirs, parts, head_dim):
    """Sort a layer whose rows lie head by head there, (heads, parts, d), and part by part here.

    The parts are all queries, all keys, all values.
    """
    def load(x):
        return (x.reshape(-1, parts, head_dim, *x.shape[1:]).transpose(0, 1).reshape(x.shape),)

    def save(x):
        return (x.reshape(parts, -1, head_dim, *x.shape[1:]).transpose(0, 1).reshape(x.shape),)

    return [Row((f"{ours}.{kind}",), (f"{theirs}.{kind}",), load, save)
            for kind in ("weight", "bias")]


def unsqueezed(row, dim):
    """Return the row for a tensor with one more dimension of length 1 there."""
    return Row(row.ours, row.theirs, lambda x: row.load(x.squeeze(dim)),
               lambda *xs: tuple(x.unsqueeze(dim) for x in row.save(*xs)))


def under(prefix, rows, of="theirs"):
    """Return the rows with a prefix before one side's names."""
    return [row._replace(**{of: tuple(prefix + name for name in getattr(row, of))})
            for row in rows]


def some(names):
    """Return a few of many names, for a message."""
    names = sorted(names)
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def to_ours(rows, theirs, shapes, what):
    """Put their state dict through a table: {our name: tensor}.

    shapes: {our name: shape} of all that ours must have. Raises ValueError naming the tensors of
    `what` that are missing, left over or of another shape.
    """
    wanted = {name for row in rows for name in row.theirs}
    if missing := wanted - theirs.keys():
        raise ValueError(f"{what} is missing {some(missing)}: wrong model or truncated file")
    if surplus := theirs.keys() - wanted:
        raise ValueError(f"{what} holds {some(surplus)}, which this model does not have: "
                         f"wrong model")
    for name in wanted:
        if theirs[name].dtype not in FLOATS:
            raise ValueError(f"{what}: {name} holds {theirs[name].dtype}, and weights are floats: "
                             f"use the weights in full or half precision")
    ours = {}
    for row in rows:
        try:
            tensors = row.load(*(theirs[name] for name in row.theirs))
            ours |= dict(zip(row.ours, tensors, strict=True))
        except (RuntimeError, IndexError):
            raise ValueError(f"{what}: {some(row.theirs)} cannot be laid out as this model needs "
                             f"it: it is of another size") from None
    for name, shape in shapes.items():
        if name not in ours:
            # A hole in a table, not in a file.
            raise ValueError(f"{what}: nothing in it is our {name}")
        if ours[name].shape != shape:
            source = next(row.theirs for row in rows if name in row.ours)
            raise ValueError(f"{what}: {some(source)} should become our {name}, {tuple(shape)}, "
                             f"but gives {tuple(ours[name].shape)}: it is of another size")
    return ours


def to_theirs(rows, ours):
    """Put our state dict through a table: {their name: tensor}."""
    theirs = {}
    for row in rows:
        tensors = row.save(*(ours[name] for name in row.ours))
        theirs |= dict(zip(row.theirs, tensors, strict=True))
    return theirs


def fill(model, rows, theirs, what, dtype=None):
    """Put their state dict into the parameters of a model; buffers stay.

    dtype: of its matrices (see DALLE2). Returns the model in eval mode.
    """
    shapes = {name: p.shape for name, p in model.named_parameters()}
    # First of all, because a table may write out what is not stored.
    for name, value in theirs.items():
        if not is_sound(value):
            raise ValueError(f"{what}: {name} is not whole, or not finite: copy the file again")
    ours = to_ours(rows, theirs, shapes, what)
    ours = {name: value.float().contiguous() for name, value in ours.items()}
    model.load_state_dict(ours, strict=False, assign=True)
    # Now, and not when all models are there, which takes twice the memory.
    return shorten(model.eval().requires_grad_(False), dtype)
