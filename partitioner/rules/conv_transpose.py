"""Transposed convolutions that multiply a length by their stride: `n x stride` positions, made of the operand's with the neighbours' as a halo."""

from __future__ import annotations

import torch

from seqpar.partitioner.lengths import same
from seqpar.partitioner.op import Op, per_dim
from seqpar.partitioner.registry import rule
from seqpar.partitioner.relation import Halo, Rewrite

aten = torch.ops.aten


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(op: Op) -> None:
    """Position p of the operand is added to the result's from stride * p - padding to `reach` behind it."""
    x, weight = op.index(op.args["input"]), op.index(op.args["weight"])
    spatial, batched = op.rank(weight) - 2, op.rank(x) == op.rank(weight)
    if batched:
        op.carry(x, 0, 0)
    op.rewrite = Rewrite("transposed")
    op.reason = "a transposed convolution over this dim"
    settings = (per_dim(op.args[name], spatial) for name in ("stride", "padding", "dilation"))
    for i, (stride, padding, dilation) in enumerate(zip(*settings, strict=True)):
        dim, reach = i + 1 + batched, dilation * (int(op.shapes[weight][i + 2]) - 1)
        if same(op.shapes[x][dim] * stride, op.out_shape[dim]) and reach >= padding and not op.is_one(x, dim):
            op.lengthen(x, dim, dim, stride)
            # From the operand's positions that reach the part's first result to those that begin before its end.
            before, after = (reach - padding) // stride, -(-padding // stride)
            if before or after:
                op.halo[dim] = Halo(before, after)
