"""Products of quantised numbers: rows of the activations stay where they are, weights and their scales are whole."""

from __future__ import annotations

import torch

from seqpar.partitioner.cost import QUANTISED_ELSEWHERE
from seqpar.partitioner.op import Op
from seqpar.partitioner.registry import rule

aten = torch.ops.aten


@rule(aten._int_mm.default, aten._weight_int8pack_mm.default, aten._weight_int4pack_mm_for_cpu.default, aten._dyn_quant_matmul_4bit.default, *QUANTISED_ELSEWHERE)
def weight_only(op: Op) -> None:
    """`[..., k]` and a weight in one of many layouts `-> [..., n]`."""
    op.carry_all(0, skip=(-1,))
    op.reason = "product of quantised numbers over this dim"


@rule(aten._scaled_mm.default)
def scaled_mm(op: Op) -> None:
    """`[m, k] @ [k, n] -> [m, n]`, with a scale for all of the activations (one number) or one per row `[m, 1]`. Nothing is said of blocks of rows."""
    x, scale = op.index(op.args["self"]), op.index(op.args["scale_a"])
    by_row = op.shapes[scale] == (op.out_shape[0], 1)
    if by_row or all(op.is_one(scale, dim) for dim in range(op.rank(scale))):
        op.carry(x, 0, 0)
    if by_row:
        op.carry(scale, 0, 0)
    op.reason = "product of quantised numbers over this dim"
