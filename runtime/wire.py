"""Wire buffers: many tensors packed into one flat buffer with one copy, and read back as views.

What a compiler reads of a copy of many pieces is one operator: of more than FEW, Inductor makes a kernel each, with symbolic lengths after seconds of algebra.
"""

import functools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from seqpar.compat import being_compiled

Block = tuple[Sequence[Tensor], int]
"""Pieces, and the dim along which they are concatenated on the wire."""

FEW = 8  # pieces that Inductor joins in one kernel, together with what makes them (its `max_pointwise_cat_inputs`)


def to_wire(x: Tensor) -> Tensor:
    """`x` in a dtype that every collective can carry: complex gains a last dim of 2, bool becomes uint8."""
    if x.is_complex():
        return torch.view_as_real(x.resolve_conj())
    return x.view(torch.uint8) if x.dtype == torch.bool else x


def from_wire(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Inverse of `to_wire` for a tensor that had `dtype`."""
    if dtype.is_complex:
        return torch.view_as_complex(x)
    return x.view(torch.bool) if dtype == torch.bool else x


def pack(blocks: Sequence[Block], like: Tensor, size: int | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """A 1-D buffer holding the blocks one after another, each in the order `torch.cat(pieces, dim)` has.

    The device is that of `like`, and so is the dtype if none is given; the copy converts. `size` is the buffer's length when it is more than the blocks need
    (what follows is never read). A single contiguous piece that fills the buffer is returned as a view.
    """
    shapes = [_cat_shape(pieces, dim) for pieces, dim in blocks]
    numels = [math.prod(shape) for shape in shapes]
    total = sum(numels)
    size, dtype = total if size is None else size, dtype or like.dtype
    pieces = [piece for row, _ in blocks for piece in row]
    if len(pieces) > FEW and being_compiled(like):
        return torch.ops.seqpar.packed(pieces, [len(row) for row, _ in blocks], [dim for _, dim in blocks], size, dtype)
    if being_compiled(like):  # writes into views would be functionalised into one full copy per piece, and Inductor of torch 2.11 loses their order
        flat = torch.cat([torch.cat(list(row), dim).reshape(-1) for row, dim in blocks]).to(dtype)
        return F.pad(flat, (0, size - total))  # unlike a cat with zeros, adds no guard on the difference
    if len(pieces) == 1 and pieces[0].is_contiguous() and size == total and like.dtype == dtype:
        return pieces[0].view(-1)
    buffer, offset = like.new_empty(size, dtype=dtype), 0
    for (row, dim), shape, numel in zip(blocks, shapes, numels, strict=True):
        strides = contiguous_strides(shape)
        start = offset
        for piece in row:  # as_strided: one view where narrow, view and narrow would be three
            buffer.as_strided(piece.shape, strides, start).copy_(piece)
            start += piece.shape[dim] * strides[dim]
        offset += numel
    return buffer


def joined(pieces: Sequence[Tensor], dim: int) -> Tensor:
    """`torch.cat`; a single piece as it is."""
    if len(pieces) == 1:
        return pieces[0]
    if len(pieces) > FEW and being_compiled(pieces[0]):
        return torch.ops.seqpar.joined(list(pieces), dim)
    return torch.cat(list(pieces), dim)


def unpack(flat: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    """Views of the 1-D `flat` with the given shapes, one after another; `flat` holds exactly these."""
    if len(shapes) == 1:
        return [flat.view(tuple(shapes[0]))]
    parts = flat.split([math.prod(shape) for shape in shapes])
    return [part.view(tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]


def with_dim(shape: Sequence[int], dim: int, length: int) -> list[int]:
    """`shape` with the size of one dim replaced."""
    return [length if i == dim else n for i, n in enumerate(shape)]


def contiguous_strides(shape: Sequence[int]) -> list[int]:
    """Strides of a contiguous tensor of this shape."""
    strides, step = [0] * len(shape), 1
    for dim in reversed(range(len(shape))):
        strides[dim] = step
        step *= shape[dim]
    return strides


def _cat_shape(pieces: Sequence[Tensor], dim: int) -> list[int]:
    return with_dim(pieces[0].shape, dim, sum(piece.shape[dim] for piece in pieces))


@torch.library.custom_op("seqpar::packed", mutates_args=())
def _packed(pieces: Sequence[Tensor], counts: Sequence[int], dims: Sequence[int], size: int, dtype: torch.dtype) -> Tensor:
    """`pack` of blocks of so many pieces each."""
    left = iter(pieces)
    return pack([([next(left) for _ in range(count)], dim) for count, dim in zip(counts, dims, strict=True)], pieces[0], size, dtype)


@_packed.register_fake
def _(pieces: Sequence[Tensor], counts: Sequence[int], dims: Sequence[int], size: int, dtype: torch.dtype) -> Tensor:
    return pieces[0].new_empty(size, dtype=dtype)


@torch.library.custom_op("seqpar::joined", mutates_args=())
def _joined(pieces: Sequence[Tensor], dim: int) -> Tensor:
    return torch.cat(list(pieces), dim)


@_joined.register_fake
def _(pieces: Sequence[Tensor], dim: int) -> Tensor:
    return pieces[0].new_empty(_cat_shape(pieces, dim), dtype=functools.reduce(torch.promote_types, [piece.dtype for piece in pieces]))
