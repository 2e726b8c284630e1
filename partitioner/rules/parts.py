"""Concatenating and cutting dims: the operators that make and find text/image boundaries."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from seqpar.partitioner.atoms import Axis, Factor
from seqpar.partitioner.lengths import Length, Sizes, minus, same
from seqpar.partitioner.op import Op, as_length
from seqpar.partitioner.registry import rule
from seqpar.partitioner.relation import Rewrite

aten = torch.ops.aten
NOTHING: Axis = ((),)


def single_factor(op: Op, operand: int, dim: int) -> Factor | None:
    """The factor of a dim that is a plain concatenation of atoms; a dim of length 1 is one short atom; None for a product."""
    axis = op.axis(operand, dim)
    if is_empty(op.shapes[operand][dim]):
        return ()
    if len(axis) == 1:
        return axis[0]
    return None if axis else (op.table.fresh(1),)


def is_empty(length: Length) -> bool:
    """No positions, whatever the inputs: such a part must not keep its neighbours from being recognised."""
    return isinstance(length, int) and length == 0


def concatenate(op: Op, parts: list[int], dim: int) -> None:
    """`[.., a, ..], [.., b, ..] -> [.., a + b, ..]`"""
    factors: list[Factor] = []
    for operand in parts:
        factor = single_factor(op, operand, dim)
        if factor is None:
            op.reason = "concatenates a dim that is a product of dims"
            op.block(dim)
            return
        factors.append(factor)
    axis: Axis = (tuple(a for f in factors for a in f),)
    for operand in parts:
        if op.is_one(operand, dim):
            op.set_out(dim, axis)
        else:
            op.place(operand, dim, dim, axis)


@rule(aten.cat.default, aten.concat.default)
def cat(op: Op) -> None:
    tensors = [t for t in op.args["tensors"] if len(t.meta["val"].shape) == len(op.out_shape)]
    if len(tensors) != len(op.args["tensors"]):
        return  # legacy: 1-d empty tensors among the operands
    dim = op.args["dim"] % len(op.out_shape)
    parts = [op.index(t) for t in tensors]
    op.alike = True
    concatenate(op, parts, dim)
    for operand in dict.fromkeys(parts):
        for d in range(op.rank(operand)):
            if d != dim:
                op.carry(operand, d, d)


@rule(aten.stack.default)
def stack(op: Op) -> None:
    at = op.args["dim"] % len(op.out_shape)
    op.alike = True
    for operand in range(len(op.operands)):
        for d in range(op.rank(operand)):
            op.carry(operand, d, d + (d >= at))


def clamp_position(sizes: Sizes, position: Any, length: Length, default: Length, about: set[int]) -> Length:
    """A python slice bound as a position in [0, length]."""
    if position is None:
        return default
    value = as_length(position)
    if isinstance(value, int) and value >= 2**62:
        return length
    if sizes.less(value, 0, about):
        value = value + length if not isinstance(value, int) or not isinstance(length, int) else max(value + length, 0)
    return length if not same(value, length) and sizes.less(length, value, about) else value


def slice_of_product(op: Op, dim: int, start: Length, stop: Length) -> bool:
    """Whole rows of a product, `[batch * tokens] -> [tokens]` of one sample. The outer factor may not be cut; the others go on."""
    outer, *inner = op.axis(0, dim)
    first, last = (times(position, op.table.axis_length(tuple(inner))) for position in (start, stop))
    if first is None or last is None or last <= first:
        return False

    def rows(count: int) -> Axis:
        return ((op.table.fresh(count),) if count else (), *inner)

    if last - first == 1:
        kept = tuple(inner)
        op.place(0, dim, dim, kept)
    else:
        kept = rows(last - first)
        op.place_product(0, dim, dim, kept)
    op.rewrite = Rewrite("slice", dim=dim, data=(rows(first), kept))
    return True


def times(length: Length, unit: Length) -> int | None:
    """How many times `unit` a length is, if it is so for all sizes."""
    found = sympy.cancel(sympy.sympify(length) / unit)
    return int(found) if found.is_Integer else None


@rule(aten.slice.Tensor, aten.slice_copy.Tensor)
def slice_(op: Op) -> None:
    """Positions outside the range ask for nothing; an empty range leaves an empty factor."""
    dim = op.args["dim"] % op.rank()
    op.carry_all(skip=(dim,))
    length = op.shapes[0][dim]
    sizes = op.table.sizes
    about = op.table.roots(op.axis(0, dim))
    start = clamp_position(sizes, op.args["start"], length, 0, about)
    stop = clamp_position(sizes, op.args["end"], length, length, about)
    if op.args["step"] != 1:
        op.reason = "a slice with a step"
        return
    if same(start, 0) and same(stop, length):
        op.carry(0, dim, dim)
        op.rewrite = Rewrite("slice", dim=dim, data=(NOTHING, op.axis(0, dim)))
        return
    if is_empty(op.out_shape[dim]):  # nothing is left, so nothing is asked for
        op.place(0, dim, dim, ((),))
        op.dropping = True
        op.rewrite = Rewrite("slice", dim=dim, data=(NOTHING, NOTHING))
        return
    if op.fixed or (isinstance(length, int) and not isinstance(op.out_shape[dim], int)):
        return  # as many rows of a table as somebody needs: rows for the queries and rows for other keys would be one sequence, and compare unrelated sizes
    if isinstance(op.out_shape[dim], int) and op.out_shape[dim] == 1:
        return  # one position: cheaper to hold whole than to cut an atom for it
    if sizes.hint(op.out_shape[dim]) <= 0:
        return
    factor = single_factor(op, 0, dim)
    kept = None if factor is None else op.table.sublist(factor, start, stop)
    if factor is None or kept is None:
        if factor is not None or not slice_of_product(op, dim, start, stop):
            op.reason = "a slice of a dim that is a product of dims"
        return
    before = op.table.sublist(factor, 0, start)
    op.place(0, dim, dim, (kept,))
    op.dropping = True
    op.rewrite = Rewrite("slice", dim=dim, data=((before or (),), (kept,)))


@rule(aten.narrow.default)
def narrow(op: Op) -> None:
    op.carry_all(skip=(op.args["dim"],))


@rule(aten.select.int)
def select(op: Op) -> None:
    at = op.args["dim"] % op.rank()
    for d in range(op.rank()):
        if d != at:
            op.carry(0, d, d - (d > at))
    op.reason = "one position is taken out of this dim"


@rule(aten.unbind.int)
def unbind(op: Op) -> None:
    select(op)


@rule(aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.split_with_sizes_copy.default, aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default)
def split(op: Op) -> None:
    dim = op.args["dim"] % op.rank()
    op.carry_all(skip=(dim,))
    factor = single_factor(op, 0, dim)
    lengths = [shape[dim] for shape in op.out_shapes]
    if factor is None or len(lengths) == 1 and op.is_one(0, dim):
        op.reason = "a split of a dim that is a product of dims"
        return
    if all(isinstance(n, int) and n == 1 for n in lengths):
        return
    position: Length = 0
    axes: list[Axis] = []
    for length in lengths:
        kept = op.table.sublist(factor, position, position + length)
        if kept is None:
            op.reason = "the parts of this split overlap in their atoms"
            return
        axes.append((kept,))
        position = position + length
    for output, axis in enumerate(axes):
        op.place(0, dim, dim, op.table.expand_axis(axis), output=output)
    op.rewrite = Rewrite("split", dim=dim)


@rule(aten.constant_pad_nd.default)
def constant_pad(op: Op) -> None:
    """`pad` puts a new atom before and after; its positions are the pad value on whichever rank holds them."""
    _pad(op, op.args["pad"])


@rule(aten.pad.default)
def pad(op: Op) -> None:
    pads = op.args["pad"]
    if op.args["mode"] == "constant":
        _pad(op, pads)
    else:
        op.carry_all(skip=tuple(op.rank() - 1 - i // 2 for i, n in enumerate(pads) if not same(as_length(n), 0)))
        op.reason = "padded with positions from elsewhere in this dim"


def _pad(op: Op, pads: list[Any]) -> None:
    rank = op.rank()
    padded: list[tuple[int, Length, Length]] = []
    for i in range(0, len(pads), 2):
        before, after = as_length(pads[i]), as_length(pads[i + 1])
        if not (same(before, 0) and same(after, 0)):
            padded.append((rank - 1 - i // 2, before, after))
    op.carry_all(skip=tuple(d for d, _, _ in padded))
    sizes = op.table.sizes
    for dim, before, after in padded:
        factor = single_factor(op, 0, dim)
        if factor is None or sizes.less(before, 0, factor) or sizes.less(after, 0, factor):
            op.reason = "pads a dim that is a product of dims"
            op.block(dim)
            continue
        head = () if same(before, 0) else (op.table.fresh(before),)
        tail = () if same(after, 0) else (op.table.fresh(after),)
        axis: Axis = ((*head, *factor, *tail),)
        if op.is_one(0, dim):
            op.set_out(dim, axis)
            op.block(dim)
        else:
            op.place(0, dim, dim, axis)
    data = tuple((d, int(not same(b, 0)), int(not same(a, 0))) for d, b, a in padded)
    op.rewrite = Rewrite("pad", arg=1, data=data)


@rule(aten.pad_sequence.default)
def pad_sequence(op: Op) -> None:
    """`[n_i, …] -> [batch, max n, …]`: shorter sequences share the first atoms of the longest."""
    first = bool(op.args["batch_first"])
    seq = 1 if first else 0
    nodes = op.args["sequences"]
    op.alike = True
    longest = max(nodes, key=lambda n: op.table.sizes.hint(as_length(n.meta["val"].shape[0])))
    order = [longest] + [n for n in nodes if n is not longest]
    for node in order:
        operand = op.index(node)
        for d in range(1, op.rank(operand)):
            op.carry(operand, d, d + 1)
        length = op.shapes[operand][0]
        whole = op.out_shape[seq]
        if same(length, whole):
            op.carry(operand, 0, seq)
            continue
        target = op._out[0].get(seq)
        kept = op.table.sublist(target[0], 0, length) if target and len(target) == 1 else None
        if kept is None or not op.table.unify_axes((kept,), op.axis(operand, 0)):
            op.block(seq)
            return
        op._flows.setdefault((operand, 0), []).append(seq)


@rule(aten.slice_scatter.default)
def slice_scatter(op: Op) -> None:
    """Other dims keep their place; the written dim stays whole unless it is written completely in steps."""
    dim = op.args["dim"] % op.rank()
    x, src = op.index(op.args["self"]), op.index(op.args["src"])
    op.carry_all(x, skip=(dim,))
    op.carry_all(src, skip=(dim,))
    op.reason = "writes into a range of this dim"
    sizes = op.table.sizes
    length = op.shapes[x][dim]
    about = op.table.roots(op.axis(x, dim))
    start = clamp_position(sizes, op.args["start"], length, 0, about)
    stop = clamp_position(sizes, op.args["end"], length, length, about)
    if op.args["step"] != 1 or x == src:
        return
    factor = single_factor(op, x, dim)
    kept = None if factor is None else op.table.sublist(factor, start, minus(stop, 0))
    if factor is None or kept is None or op.is_one(src, dim) or not op.table.unify_axes((kept,), op.axis(src, dim)):
        return
    before = op.table.sublist(factor, 0, start)
    op.place(x, dim, dim, (op.table.expand(factor),))
    op._flows[(src, dim)] = [dim]
    op.rewrite = Rewrite("slice_scatter", dim=dim, data=((before or (),), (kept,)))


@rule(aten.select_scatter.default)
def select_scatter(op: Op) -> None:
    dim = op.args["dim"] % op.rank()
    x, src = op.index(op.args["self"]), op.index(op.args["src"])
    op.carry_all(x, skip=(dim,))
    for d in range(op.rank(src)):
        op.carry(src, d, d + (d >= dim))
