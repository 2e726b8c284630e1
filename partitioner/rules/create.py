"""Operators that make values out of sizes: constants follow the local shape, numbered positions are made whole and cut."""

from __future__ import annotations

import torch

from seqpar.partitioner.op import Op
from seqpar.partitioner.registry import rule
from seqpar.partitioner.relation import Rewrite

aten = torch.ops.aten


def _free(op: Op, arg: int) -> None:
    """The same constant everywhere: any cut of the output is right."""
    op.free = set(range(len(op.operands)))
    op.rewrite = Rewrite("sizes", arg=arg)


@rule(aten.full.default, aten.zeros.default, aten.ones.default, aten.empty.memory_format)
def constant(op: Op) -> None:
    _free(op, 0)


@rule(aten.new_zeros.default, aten.new_ones.default, aten.new_full.default, aten.new_empty.default)
def new_constant(op: Op) -> None:
    _free(op, 1)


@rule(
    aten.arange.default,
    aten.arange.start,
    aten.arange.start_step,
    aten.linspace.default,
    aten.eye.default,
    aten.eye.m,
    aten.scalar_tensor.default,
    aten.tril_indices.default,
)
def numbered(op: Op) -> None:
    op.whole = set(range(len(op.out_shape)))
    op.reason = "positions are numbered from the start"
