"""Convolutions: batch keeps its place; so does space where the length is kept, or divided by a stride, with the neighbours' positions as a halo.

Zeros that were put around it before count as kept. Where the length changes otherwise, parts of the result are made of windows of the whole operand.
"""

from __future__ import annotations

import torch

from seqpar.partitioner.edges import CONV_EDGES
from seqpar.partitioner.lengths import same
from seqpar.partitioner.op import Op, per_dim
from seqpar.partitioner.pads import around
from seqpar.partitioner.registry import rule
from seqpar.partitioner.relation import Halo, Rewrite, Window
from seqpar.partitioner.rules.parts import single_factor

aten = torch.ops.aten


@rule(aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
def conv(op: Op) -> None:
    x, weight = op.index(op.args["input"]), op.index(op.args["weight"])
    spatial = op.rank(weight) - 2
    batched = op.rank(x) == spatial + 2
    if batched:
        op.carry(x, 0, 0)

    strides, paddings, dilations = (per_dim(op.args[name], spatial) for name in ("stride", "padding", "dilation"))
    zeros = around(op.operands[x], "constant")
    for i, (stride, padding, dilation) in enumerate(zip(strides, paddings, dilations, strict=True)):
        dim, kernel = i + 1 + batched, op.shapes[weight][i + 2]
        reach = dilation * (int(kernel) - 1)
        before, after = padding, reach - padding
        in_front, behind = zeros[spatial - 1 - i] if spatial - 1 - i < len(zeros) else (0, 0)
        if stride == 1 and padding == 0 and min(in_front, behind) >= 0 and in_front + behind == after > 0:
            _keep_length(op, x, dim, in_front, behind)
        else:
            _steps(op, x, dim, stride, before, after)
    op.rewrite = Rewrite("halo")
    op.reason = "a convolution over this dim"


@rule(CONV_EDGES)
def conv_edges(op: Op) -> None:
    """Zeros, or the edges of the whole, are at the ends of the first and the last part only."""
    x, weight = op.index(op.args["x"]), op.index(op.args["weight"])
    op.carry(x, 0, 0)
    pads, spatial = op.args["pads"], op.rank(weight) - 2
    for i in range(spatial):
        at = 2 * (spatial - 1 - i)
        before = pads[at] if at < len(pads) else 0
        _steps(op, x, i + 2, op.args["stride"][i], before, op.args["dilation"][i] * (int(op.shapes[weight][i + 2]) - 1) - before)
    op.rewrite = Rewrite("edges")
    op.reason = "a convolution over this dim"


def _steps(op: Op, x: int, dim: int, stride: int, before: int, after: int) -> None:
    """Position p of the result is made of the operand's from `before` positions before stride * p to `after` behind it; the operand ends where those of the last do, or earlier."""
    op.windows[dim] = Window(stride, -before, before + after + 1)
    if min(before, after) < 0 or op.is_one(x, dim):
        return
    if stride == 1 and same(op.shapes[x][dim], op.out_shape[dim]):
        op.carry(x, dim, dim)
    elif stride == 1 or not op.shorten(x, dim, dim, stride):
        return
    del op.windows[dim]
    behind = max(after - (stride - 1), 0)  # the part's own last positions are behind the last that is made
    if before or behind:
        op.halo[dim] = Halo(before, behind)


def _keep_length(op: Op, x: int, dim: int, before: int, after: int) -> None:
    """The operand has so many zeros more than the result has positions (a causal convolution has them all in front): they are read as a halo is."""
    factor = single_factor(op, x, dim)
    inside = None if factor is None else op.table.sublist(factor, before, before + op.out_shape[dim])
    if inside:
        op.place(x, dim, dim, op.table.expand_axis((inside,)))
        op.halo[dim] = Halo(before, after)


@rule(aten.conv1d.padding, aten.conv2d.padding, aten.conv3d.padding)
def other_conv(op: Op) -> None:
    x, weight = op.index(op.args["input"]), op.index(op.args["weight"])
    if op.rank(x) == op.rank(weight):
        op.carry(x, 0, 0)
    op.reason = "a convolution over this dim"


NEIGHBOURS = {
    1: (aten.reflection_pad1d.default, aten.replication_pad1d.default),
    2: (aten.reflection_pad2d.default, aten.replication_pad2d.default, aten.upsample_bilinear2d.vec),
    3: (aten.reflection_pad3d.default, aten.replication_pad3d.default),
}


@rule(*(target for targets in NEIGHBOURS.values() for target in targets))
def neighbours(op: Op) -> None:
    """Batch and channels keep their place; positions of the last dims are made of several."""
    spatial = next(n for n, targets in NEIGHBOURS.items() if op.node.target in targets)
    op.carry_all(skip=tuple(range(op.rank() - spatial, op.rank())))
    op.reason = "made of neighbouring positions"


POOLS = {
    1: (aten.avg_pool1d.default, aten.max_pool1d.default),
    2: (aten.avg_pool2d.default, aten.max_pool2d.default),
    3: (aten.avg_pool3d.default, aten.max_pool3d.default),
}


@rule(*(target for targets in POOLS.values() for target in targets))
def pool(op: Op) -> None:
    """Batch and channels keep their place, and of blocks beside each other one position is left; positions of other windows are made of several blocks."""
    spatial = next(n for n, targets in POOLS.items() if op.node.target in targets)
    first = op.rank() - spatial
    op.carry_all(skip=tuple(range(first, op.rank())))
    kernels = per_dim(op.args["kernel_size"], spatial)
    strides = per_dim(op.args["stride"], spatial) if op.args["stride"] else kernels
    paddings, dilations = (per_dim(op.args.get(name, n), spatial) for name, n in (("padding", 0), ("dilation", 1)))
    for dim, (kernel, stride, padding, dilation) in enumerate(zip(kernels, strides, paddings, dilations, strict=True), first):
        if kernel != stride or padding != 0 or dilation != 1:
            continue
        if stride == 1:
            op.carry(0, dim, dim)
        else:
            op.shorten(0, dim, dim, stride)
    op.reason = "made of neighbouring positions"
