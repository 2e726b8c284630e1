"""Enlarging by nearest neighbours: every position is repeated, if the length is multiplied by a whole number."""

from __future__ import annotations

import torch

from seqpar.partitioner.lengths import Length, same
from seqpar.partitioner.op import Op
from seqpar.partitioner.registry import rule
from seqpar.partitioner.relation import Rewrite

aten = torch.ops.aten
LARGEST = 24  # in float32, 1 / n is not below its true value up to here, so that position n * i is made of position i


@rule(
    aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec,
    aten._upsample_nearest_exact1d.vec, aten._upsample_nearest_exact2d.vec, aten._upsample_nearest_exact3d.vec,
)  # fmt: skip
def upsample_nearest(op: Op) -> None:
    """A dim of n x times positions is `dim x times`."""
    rank = op.rank()
    op.carry(0, 0, 0)
    op.carry(0, 1, 1)
    op.rewrite = Rewrite("upsample")
    factors = {dim: _times(op, op.shapes[0][dim], op.out_shape[dim]) for dim in range(2, rank)}
    if not all(factors.values()):
        op.reason = "made of neighbouring positions"
        return
    for dim, times in factors.items():
        op.lengthen(0, dim, dim, times)


def _times(op: Op, before: Length, after: Length) -> int:
    """How often a position is repeated; 0 where it is not a whole number of times."""
    hint = op.table.sizes.hint
    times = hint(after) // max(hint(before), 1)
    return times if 0 < times <= LARGEST and same(before * times, after) else 0
