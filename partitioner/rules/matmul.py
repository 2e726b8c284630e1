"""Contractions: `linear`, `matmul` and friends. A contracted sequence dim becomes a partial sum."""

from __future__ import annotations

import torch

from seqpar.partitioner.op import Op
from seqpar.partitioner.registry import rule

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(op: Op) -> None:
    """`([..., k], [o, k], [o]) -> [..., o]`"""
    x = op.index(op.args["input"])
    op.carry_all(x, skip=(-1,))
    op.reason = "linear layer over this dim"


def contract(op: Op, a: int, b: int) -> None:
    """`[..., m, k] @ [..., k, n]`, either side may be a vector."""
    if a == b:
        return
    rank_a, rank_b, out_rank = op.rank(a), op.rank(b), len(op.out_shape)
    row = out_rank - (1 if rank_b == 1 else 2)
    if rank_a > 1:
        op.carry(a, rank_a - 2, row)
    if rank_b > 1:
        op.carry(b, rank_b - 1, out_rank - 1)
    batch = min(out_rank, out_rank - (rank_a > 1) - (rank_b > 1))
    for operand, rank in ((a, rank_a), (b, rank_b)):
        for dim in range(rank - 2):
            op.carry(operand, dim, dim + batch - (rank - 2))
    k_a, k_b = rank_a - 1, max(rank_b - 2, 0)
    if op.tie(a, k_a, b, k_b):
        op.reduce(a, k_a)
        op.reduce(b, k_b)


@rule(aten.matmul.default, aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def matmul(op: Op) -> None:
    names = [n for n in op.args if isinstance(op.args[n], torch.fx.Node)]
    contract(op, op.index(op.args[names[0]]), op.index(op.args[names[1]]))


@rule(aten.addmm.default, aten.baddbmm.default)
def addmm(op: Op) -> None:
    """Contraction dims stay whole here: the added operand must enter the sum once."""
    names = list(op.args)
    bias, a, b = (op.index(op.args[n]) for n in names[:3])
    if len({bias, a, b}) < 3:
        return
    out_rank = len(op.out_shape)
    for dim in range(op.rank(bias)):
        op.carry(bias, dim, dim + out_rank - op.rank(bias))
    for dim in range(op.rank(a) - 1):
        op.carry(a, dim, dim)
    op.carry(b, op.rank(b) - 1, out_rank - 1)
    if out_rank == 3:
        op.carry(b, 0, 0)


@rule(aten.outer.default, aten.ger.default)
def outer(op: Op) -> None:
    a, b = op.index(op.args["self"]), op.index(op.args["vec2"])
    if a != b:
        op.carry(a, 0, 0)
        op.carry(b, 0, 1)


@rule(aten.einsum.default)
def einsum(op: Op) -> None:
    """Read from the equation; an ellipsis or a repeated letter in one operand is left whole."""
    equation: str = op.args["equation"].replace(" ", "")
    terms = op.args["tensors"]
    if "..." in equation or "->" not in equation or len(set(terms)) != len(terms):
        return
    sides, out = equation.split("->")
    letters = sides.split(",")
    where: dict[str, tuple[int, int]] = {}
    for term, node in zip(letters, terms, strict=True):
        if len(set(term)) != len(term):
            return
        operand = op.index(node)
        for dim, letter in enumerate(term):
            if letter in out:
                op.carry(operand, dim, out.index(letter))
            elif letter not in where:
                where[letter] = (operand, dim)
                op.reduce(operand, dim)
            elif op.tie(*where[letter], operand, dim):
                op.reduce(operand, dim)
            else:
                op._reduces.pop(where[letter], None)
