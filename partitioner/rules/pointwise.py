"""Operators that treat every position alike: `([b,s,d],[1,s,1])->([b,s,d])`, right-aligned broadcasting."""

from __future__ import annotations

import torch

from seqpar.partitioner.op import Op
from seqpar.partitioner.registry import rule

aten = torch.ops.aten


@rule(
    torch.Tag.pointwise,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.contiguous.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.copy.default,
    aten.polar.default,
    aten.complex.default,
    aten._conj.default,
    aten.resolve_conj.default,
    aten.resolve_neg.default,
    aten.real.default,
    aten.imag.default,
    aten.conj.default,
    aten.where.Scalar,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.pow.Scalar,
    aten.floor_divide.default,
    aten.floor_divide.Scalar,
    aten.dropout.default,
    aten.hardswish.default,
    aten.log_sigmoid.default,
    aten._prelu_kernel.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.__and__.Scalar,
    aten.__and__.Tensor,
    aten.__or__.Scalar,
    aten.__or__.Tensor,
    aten.__xor__.Scalar,
    aten.__xor__.Tensor,
)
def pointwise(op: Op) -> None:
    op.alike = True
    out_rank = len(op.out_shape)
    for operand in range(len(op.operands)):
        offset = out_rank - op.rank(operand)
        for dim in range(op.rank(operand)):
            op.carry(operand, dim, dim + offset)


@rule(aten.bucketize.Tensor, aten.isin.Tensor_Tensor)
def looked_up(op: Op) -> None:
    """Every position is compared with all of a table."""
    op.carry_all(op.index(op.args["self" if "self" in op.args else "elements"]))


@rule(aten.type_as.default)
def type_as(op: Op) -> None:
    first = op.index(op.args["self"])
    op.alike = True
    op.carry_all(first)
    op.free = set(range(len(op.operands))) - {first}


@rule(aten.view_as_complex.default)
def view_as_complex(op: Op) -> None:
    op.carry_all(skip=(-1,))


@rule(aten.view_as_real.default)
def view_as_real(op: Op) -> None:
    op.carry_all()


@rule(
    aten.softmax.int,
    aten._softmax.default,
    aten._safe_softmax.default,
    aten.log_softmax.int,
    aten._log_softmax.default,
    aten.cumsum.default,
    aten.cumprod.default,
    aten.sort.default,
    aten.sort.stable,
    aten.argsort.default,
    aten.argsort.stable,
    aten.topk.default,
    aten.logcumsumexp.default,
    aten.glu.default,
    aten.cummax.default,
    aten.cummin.default,
    aten.linalg_cross.default,
)
def whole_along_dim(op: Op) -> None:
    """Every position of one dim depends on all of that dim."""
    dim = op.args.get("dim", -1)
    _along(op, -1 if dim is None else dim)


@rule(aten.flip.default, aten.roll.default)
def whole_along_dims(op: Op) -> None:
    dims = op.args["dims"] or list(range(op.rank()))
    op.carry_all(skip=tuple(dims))
    op.reason = "positions change places along this dim"


def _along(op: Op, dim: int) -> None:
    for operand in range(len(op.operands)):
        op.carry_all(operand, skip=(dim,))
    op.reason = "every position depends on all positions along this dim"


@rule(aten.tril.default, aten.triu.default)
def triangle(op: Op) -> None:
    op.carry_all(skip=(-1, -2))
    op.reason = "the triangle depends on global positions"


@rule(aten.one_hot.default)
def one_hot(op: Op) -> None:
    """Without `num_classes` their number is read from all the data."""
    if op.args["num_classes"] >= 0:
        op.carry_all()
