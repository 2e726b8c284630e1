"""Normalisations: the others keep their place; normalised dims are whole, but for the positions of a group norm, whose statistics can be shared."""

from __future__ import annotations

import torch

from seqpar.partitioner.op import Op
from seqpar.partitioner.registry import rule
from seqpar.partitioner.relation import Rewrite

aten = torch.ops.aten


@rule(aten.layer_norm.default, aten.rms_norm.default)
def last_dims(op: Op) -> None:
    x = op.index(op.args["input"])
    width = len(op.args["normalized_shape"])
    op.carry_all(x, skip=tuple(range(op.rank(x) - width, op.rank(x))))
    op.reason = "normalised over this dim"


@rule(aten.native_layer_norm.default)
def native_layer_norm(op: Op) -> None:
    last_dims(op)


@rule(aten._native_batch_norm_legit_no_training.default)
def batch_norm(op: Op) -> None:
    """[B, C, *positions] with known statistics: a scale and a shift per channel."""
    op.carry_all(op.index(op.args["input"]), skip=(1,))
    op.reason = "has its own statistics along this dim"


@rule(aten.group_norm.default)
def group_norm(op: Op) -> None:
    """[B, C, *positions]"""
    batch_only(op)
    for dim in range(2, op.rank(0)):
        if not op.is_one(0, dim):
            op.carry(0, dim, dim)
            op.pooled.add(dim)
    op.rewrite = Rewrite("group_norm")


@rule(aten.instance_norm.default)
def batch_only(op: Op) -> None:
    op.carry(0, 0, 0)
    op.reason = "normalised over this dim"
