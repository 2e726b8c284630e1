"""Contractions: `linear`, `matmul` and friends. A contracted sequence dim becomes a partial sum."""

from __future__ import annotations

import torch

from seqpar.partitioner.equation import read_equation
from seqpar.partitioner.op import Op
from seqpar.partitioner.registry import rule
from seqpar.partitioner.relation import Rewrite

aten = torch.ops.aten


@rule(aten.linear.default)
def linear(op: Op) -> None:
    """`([..., k], [o, k], [o]) -> [..., o]`. A layer over tokens (token mixing, Linformer): rows of its weight for a part of the result, columns for a part of the input."""
    x, weight = op.index(op.args["input"]), op.index(op.args["weight"])
    op.carry_all(x, skip=(-1,))
    op.carry(weight, 0, len(op.out_shape) - 1)
    if op.args["bias"] is not None:
        op.carry(op.index(op.args["bias"]), 0, len(op.out_shape) - 1)
        op.rewrite = Rewrite("added once", data=(("bias", None),))
    if op.tie(x, op.rank(x) - 1, weight, 1):
        op.reduce(x, op.rank(x) - 1)
        op.reduce(weight, 1)
    op.reason = "linear layer over this dim"


def contract(op: Op, a: int, b: int) -> None:
    """`[..., m, k] @ [..., k, n]`, either side may be a vector."""
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
    """`beta * [m, n] + alpha * [m, k] @ [k, n]`, with a batch in front of all or not."""
    names = list(op.args)
    bias, a, b = (op.index(op.args[n]) for n in names[:3])
    out_rank = len(op.out_shape)
    for dim in range(op.rank(bias)):
        op.carry(bias, dim, dim + out_rank - op.rank(bias))
    for dim in range(op.rank(a) - 1):
        op.carry(a, dim, dim)
    op.carry(b, op.rank(b) - 1, out_rank - 1)
    if out_rank == 3:
        op.carry(b, 0, 0)
    if op.tie(a, op.rank(a) - 1, b, op.rank(b) - 2):
        op.reduce(a, op.rank(a) - 1)
        op.reduce(b, op.rank(b) - 2)
        op.rewrite = Rewrite("added once", data=(("beta", 0),))


@rule(aten.outer.default, aten.ger.default)
def outer(op: Op) -> None:
    a, b = op.index(op.args["self"]), op.index(op.args["vec2"])
    op.carry(a, 0, 0)
    op.carry(b, 0, 1)


@rule(aten.einsum.default)
def einsum(op: Op) -> None:
    """Read from the equation; nothing is said if a letter is repeated in one operand (a diagonal)."""
    operands = [op.index(node) for node in op.args["tensors"]]
    terms, out = read_equation(op.args["equation"], [op.rank(i) for i in operands])
    if any(len(set(term)) != len(term) for term in terms):
        return
    contracted: dict[str, list[tuple[int, int]]] = {}
    for term, operand in zip(terms, operands, strict=True):
        for dim, letter in enumerate(term):
            if letter in out:
                op.carry(operand, dim, out.index(letter))
            elif not op.is_one(operand, dim):
                contracted.setdefault(letter, []).append((operand, dim))
    for places in contracted.values():
        if all(op.tie(*places[0], *place) for place in places[1:]):
            for place in places:
                op.reduce(*place)
