"""Views that need certain strides: local values may have others than whole ones."""

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.compiler.allow_in_graph  # Dynamo cannot ask for an offset; what lowers its graph can
def as_complex(x: Tensor) -> Tensor:
    """[.., 2] real -> [..] complex: a view where strides and offset permit, else of a copy."""
    fits = x.stride(-1) == 1 and x.storage_offset() % 2 == 0 and all(s % 2 == 0 for s in x.stride()[:-1])
    return torch.view_as_complex(x if fits else x.clone(memory_format=torch.contiguous_format))


@torch.compiler.allow_in_graph
def read_row(row: Tensor, size: Sequence[int], stride: Sequence[int], start: int) -> Tensor:
    """Elements start + i * stride[0] + j * stride[1] + … of `row` [N], as a tensor of shape `size`; a view if the row is contiguous."""
    row = row.contiguous()
    return row.as_strided(size, stride, row.storage_offset() + start)


def write_row(row: Tensor, source: Tensor, size: Sequence[int], stride: Sequence[int], start: int) -> Tensor:
    """A copy of `row` [N] with `source`, of shape `size`, in the elements that `read_row` would return."""
    return torch.ops.aten.as_strided_scatter.default(row.clone(memory_format=torch.contiguous_format), source, size, stride, start)


def write_slices(base: Tensor, sources: Sequence[Tensor], places: Sequence[tuple[int, int | None, int | None, int]], new: bool = False) -> Tensor:
    """A copy of `base` with `sources[i]` in the slice `places[i]` = (dim, start, stop, step), later ones over earlier ones.

    new: what is written nowhere is arbitrary, so `base` is not copied, only allocated like.
    """
    out = torch.empty_like(base) if new else base.clone()
    for source, (dim, start, stop, step) in zip(sources, places, strict=True):
        torch.ops.aten.slice.Tensor(out, dim, start, stop, step).copy_(source)
    return out
