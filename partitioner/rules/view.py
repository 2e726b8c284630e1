"""Operators that rearrange dims without touching values: view, permute, expand, squeeze, repeat, …"""

from __future__ import annotations

import sympy
import torch

from seqpar.partitioner.atoms import Factor
from seqpar.partitioner.lengths import Length, same
from seqpar.partitioner.op import Op
from seqpar.partitioner.registry import rule
from seqpar.partitioner.relation import Rewrite

aten = torch.ops.aten


@rule(aten.view.default, aten._unsafe_view.default, aten.reshape.default)
def view(op: Op) -> None:
    """Match the row-major factors of the input with the output dims; what is split inside a factor needs it whole."""
    op.rewrite = Rewrite("sizes", arg=1)
    op.reason = "a view takes this dim apart"
    sizes = op.table.sizes
    if any(sizes.hint(s) == 0 for s in (*op.shapes[0], *op.out_shape)):
        return
    factors = _distinct_factors(op)
    outs = [(d, n) for d, n in enumerate(op.out_shape) if not (isinstance(n, int) and n == 1)]
    while factors or outs:
        taken, dims = _match(op, factors, outs)
        if len(dims) == 1 and taken:
            axis = tuple(f for f, _ in taken)
            axis = op.merge(dims[0], axis) if len(axis) > 1 else axis
            fused = len(axis) != len(taken)
            if fused:
                _place_fused(op, dims[0], axis, taken)
                continue
            if all(d < 0 for _, d in taken):
                op.set_out(dims[0], axis)
            for d in {d for _, d in taken if d >= 0}:
                op.place(0, d, dims[0], axis)


def _distinct_factors(op: Op) -> list[tuple[Factor, int]]:
    """(factor, dim) in row-major order. A factor that shares atoms with an earlier one (rows and columns numbered by one table) gets
    atoms of its own and no dim, so that merging dims never makes it unclear which of them is cut."""
    seen: set[int] = set()
    factors: list[tuple[Factor, int]] = []
    for d in range(op.rank()):
        for factor in (part for whole in op.axis(0, d) for part in _equal_parts(op, whole)):
            if seen & set(factor):
                factors.append(((op.table.fresh(op.table.factor_length(factor)),), -1))
            else:
                factors.append((factor, d))
            seen |= set(factor)
    return factors


def _equal_parts(op: Op, factor: Factor) -> tuple[Factor, ...]:
    """Samples one after another, `(tokens, tokens)`, as the product of how many there are and the tokens of one, where the view takes them apart."""
    count = len(factor)
    period = next((n for n in range(1, count) if count % n == 0 and factor == factor[:n] * (count // n)), count)
    one, whole = (op.table.factor_length(part) for part in (factor[:period], factor))
    if period == count or any(same(length, whole) for length in op.out_shape) or not any(same(length, one) for length in op.out_shape):
        return (factor,)
    return (op.table.fresh(count // period),), factor[:period]


def _place_fused(op: Op, out_dim: int, axis: tuple[Factor, ...], taken: list[tuple[Factor, int]]) -> None:
    """Part of the product became one new atom: that part needs whole operands, the rest still flows."""
    op.set_out(out_dim, axis)
    for factor, dim in taken:
        if factor in axis and dim >= 0:
            op._flows.setdefault((0, dim), []).append(out_dim)


def _match(op: Op, factors: list[tuple[Factor, int]], outs: list[tuple[int, Length]]) -> tuple[list[tuple[Factor, int]], list[int]]:
    """Take the shortest run of factors and the shortest run of output dims with equal products off both lists."""
    sizes, table = op.table.sizes, op.table
    taken: list[tuple[Factor, int]] = []
    dims: list[int] = []
    left: Length = 1
    right: Length = 1
    while True:
        if (taken or dims) and sizes.hint(left) == sizes.hint(right):
            if not same(left, right):
                sizes.assume(sympy.Eq(left, right), {a for d in range(op.rank()) for a in op.table.roots(op.axis(0, d))})
            return taken, dims
        if factors and (sizes.hint(left) <= sizes.hint(right) or not outs):
            factor, dim = factors.pop(0)
            taken.append((factor, dim))
            left = left * table.factor_length(factor)
        elif outs:
            dim, length = outs.pop(0)
            dims.append(dim)
            right = right * length
        else:
            return taken, dims


@rule(aten.permute.default)
def permute(op: Op) -> None:
    for out_dim, dim in enumerate(op.args["dims"]):
        op.carry(0, dim % op.rank(), out_dim)


@rule(aten.transpose.int)
def transpose(op: Op) -> None:
    rank = op.rank()
    order = list(range(rank))
    a, b = op.args["dim0"] % rank, op.args["dim1"] % rank
    order[a], order[b] = order[b], order[a]
    for out_dim, dim in enumerate(order):
        op.carry(0, dim, out_dim)


@rule(aten.t.default, aten.numpy_T.default)
def reverse_dims(op: Op) -> None:
    for dim in range(op.rank()):
        op.carry(0, dim, op.rank() - 1 - dim)


@rule(aten.unsqueeze.default)
def unsqueeze(op: Op) -> None:
    at = op.args["dim"] % (op.rank() + 1)
    for dim in range(op.rank()):
        op.carry(0, dim, dim + (dim >= at))


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(op: Op) -> None:
    dim = op.args.get("dim")
    dims = range(op.rank()) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % op.rank() for d in dims if op.is_one(0, d % op.rank())}
    kept = [d for d in range(op.rank()) if d not in gone]
    for out_dim, d in enumerate(kept):
        op.carry(0, d, out_dim)
    # An explicit view: a local part of length 1 must not be squeezed away.
    op.rewrite = Rewrite("view")


@rule(aten.expand.default, aten.broadcast_to.default)
def expand(op: Op) -> None:
    op.rewrite = Rewrite("sizes", arg=1)
    offset = len(op.out_shape) - op.rank()
    for dim in range(op.rank()):
        op.carry(0, dim, dim + offset)


@rule(aten.expand_as.default)
def expand_as(op: Op) -> None:
    x, other = op.index(op.args["self"]), op.index(op.args["other"])
    offset = len(op.out_shape) - op.rank(x)
    for dim in range(op.rank(x)):
        op.carry(x, dim, dim + offset)
    op.carry_all(other)


@rule(aten.repeat.default)
def repeat(op: Op) -> None:
    """A repeated dim is `repeats x dim`."""
    repeats = op.args["repeats"]
    offset = len(repeats) - op.rank()
    for out_dim, times in enumerate(repeats):
        dim = out_dim - offset
        if dim < 0:
            continue
        if isinstance(times, int) and times == 1:
            op.carry(0, dim, out_dim)
        elif not op.is_one(0, dim) and isinstance(times, int) and times > 0:
            axis = (*op.table.fresh_axis(times), *op.axis(0, dim))
            op.place_product(0, dim, out_dim, axis)


@rule(aten.repeat_interleave.self_int)
def repeat_interleave(op: Op) -> None:
    """A dim whose positions are repeated one by one is `dim x repeats`."""
    at, times = op.args["dim"], op.args["repeats"]
    if at is None or not isinstance(times, int):
        return
    at %= op.rank()
    op.carry_all(skip=(at,))
    op.place_product(0, at, at, (*op.axis(0, at), *op.table.fresh_axis(times)))
    op.rewrite = Rewrite("repeat_interleave", dim=at)


@rule(aten.unfold.default)
def unfold(op: Op) -> None:
    op.carry_all(skip=(op.args["dimension"],))
    op.reason = "windows over this dim overlap the cuts"


@rule(aten.diag_embed.default)
def diag_embed(op: Op) -> None:
    if (op.args["dim1"], op.args["dim2"]) == (-2, -1):
        op.carry_all(skip=(-1,))


@rule(aten.linalg_qr.default)
def matrices(op: Op) -> None:
    """One result per matrix in the last two dims."""
    op.carry_all(skip=(-1, -2))


@rule(aten.meshgrid.default, aten.meshgrid.indexing)
def meshgrid(op: Op) -> None:
    """`[a], [b], … -> [a, b, …]` for each operand; "xy" exchanges the first two dims. Every grid has every operand's length."""
    grids = op.args["tensors"]
    if len(set(grids)) != len(grids):
        return
    places = list(range(len(grids)))
    if op.args.get("indexing") == "xy" and len(grids) > 1:
        places[:2] = [1, 0]
    for place, grid in zip(places, grids, strict=True):
        operand = op.index(grid)
        if op.rank(operand) == 1:
            op.carry(operand, 0, place)
