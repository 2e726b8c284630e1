"""Enlarging by nearest neighbours: every position is repeated, if the length is multiplied by a whole number."""

from __future__ import annotations

import sympy
import torch

from seqpar.partitioner.lengths import Length, same
from seqpar.partitioner.op import Op
from seqpar.partitioner.registry import rule
from seqpar.partitioner.relation import Rewrite
from seqpar.partitioner.shortened import SHORT

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
    if None in factors.values():
        op.reason = "made of neighbouring positions"
        return
    for dim, times in factors.items():
        if times == 1:
            op.carry(0, dim, dim)
        elif not op.is_one(0, dim) and op.table.example_length(op.axis(0, dim)) >= SHORT:
            repeats = sympy.factorint(times, multiple=True)  # enlarged by 2 and again by 2 is enlarged by 4
            axis = (*op.axis(0, dim), *(factor for n in repeats for factor in op.table.fresh_axis(n)))
            op.place_product(0, dim, dim, axis)


def _times(op: Op, before: Length, after: Length) -> int | None:
    hint = op.table.sizes.hint
    times = hint(after) // max(hint(before), 1)
    return times if 0 < times <= LARGEST and same(before * times, after) else None
