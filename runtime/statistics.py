"""Statistics over positions that are divided over the ranks: partial sums, an all-reduce, and the whole result on every rank."""

import torch
from torch import Tensor

from seqpar.runtime.groups import Group, all_reduce


def variance_and_mean(x: Tensor, dims: list[int], correction: float, keepdim: bool, count: int, *, group: Group) -> tuple[Tensor, Tensor]:
    """Variance and mean over `dims` of all ranks' x, `count` positions in all, in x's dtype; like `torch.var_mean` of the whole.

    x: local part, floating point; it may be empty. Taken around the common mean, so that nothing cancels; half precision is
    summed in float32. Two all-reduces of the result's size.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean = all_reduce(wide.sum(dims, keepdim=True), "sum", group) / count
    squares = all_reduce((wide - mean).square().sum(dims, keepdim=keepdim), "sum", group)
    if not keepdim:
        mean = mean.reshape(squares.shape)
    return (squares / max(count - correction, 0)).to(x.dtype), mean.to(x.dtype)


def variance(x: Tensor, dims: list[int], correction: float, keepdim: bool, count: int, *, group: Group) -> Tensor:
    """The first result of `variance_and_mean`."""
    return variance_and_mean(x, dims, correction, keepdim, count, group=group)[0]


def deviation(x: Tensor, dims: list[int], correction: float, keepdim: bool, count: int, *, group: Group) -> Tensor:
    """Its square root."""
    return variance(x, dims, correction, keepdim, count, group=group).sqrt()


def deviation_and_mean(x: Tensor, dims: list[int], correction: float, keepdim: bool, count: int, *, group: Group) -> tuple[Tensor, Tensor]:
    """Standard deviation and mean."""
    squared, mean = variance_and_mean(x, dims, correction, keepdim, count, group=group)
    return squared.sqrt(), mean


def euclidean_norm(x: Tensor, dims: list[int], keepdim: bool, *, group: Group) -> Tensor:
    """Root of the sum of squares over `dims` of all ranks' x (floating point, may be empty), in x's dtype. One all-reduce."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return all_reduce(wide.square().sum(dims, keepdim=keepdim), "sum", group).sqrt().to(x.dtype)


def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, count: int, *, group: Group) -> Tensor:
    """`F.group_norm` of x [B, C, *positions_r], whose positions are divided over the ranks, `count` in all."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).reshape(x.shape[0], groups, x.shape[1] // groups, *x.shape[2:])
    squared, mean = variance_and_mean(wide, list(range(2, wide.ndim)), 0, True, count * wide.shape[2], group=group)
    y = ((wide - mean) * torch.rsqrt(squared + eps)).reshape(x.shape)
    shape = (1, -1, *[1] * (x.ndim - 2))
    y = y if weight is None else y * weight.reshape(shape)
    return (y if bias is None else y + bias.reshape(shape)).to(x.dtype)
