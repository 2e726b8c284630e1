"""The view of one graph node that a rule works on: its operands' axes, and verbs that relate them to the output's dims."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch.fx import Node
from torch.fx.node import map_arg

from seqpar.partitioner.atoms import AtomTable, Axis
from seqpar.partitioner.lengths import Length, simplify
from seqpar.partitioner.relation import Halo, Relation, Rewrite, Window
from seqpar.partitioner.shortened import SHORT, Ask, Shortened, left_by


def as_length(size: Any) -> Length:
    """int of an int; the sympy expression of a SymInt or of a node holding one."""
    if isinstance(size, Node):
        size = size.meta["val"]
    if isinstance(size, torch.SymInt):
        return simplify(size.node.expr)
    return int(size)


def shape_of(value: Any) -> tuple[Length, ...]:
    return tuple(as_length(s) for s in value.shape)


def is_tensor(node: Any) -> bool:
    return isinstance(node, Node) and isinstance(node.meta.get("val"), torch.Tensor)


def outputs_of(node: Node) -> tuple[torch.Tensor, ...]:
    """The tensors a node produces: one, or the entries of a tuple (entries that are no tensors are left out)."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else (value,)
    return tuple(v for v in values if isinstance(v, torch.Tensor))


def bind_arguments(node: Node) -> dict[str, Any]:
    """All arguments of a call by schema name, defaults filled in."""
    schema = node.target._schema  # type: ignore[union-attr]
    bound: dict[str, Any] = {}
    for i, argument in enumerate(schema.arguments):
        if i < len(node.args):
            bound[argument.name] = node.args[i]
        elif argument.name in node.kwargs:
            bound[argument.name] = node.kwargs[argument.name]
        else:
            bound[argument.name] = argument.default_value if argument.has_default_value() else None
    return bound


def per_dim(value: Any, dims: int) -> list[Any]:
    """One setting per dim, of an argument that may give one for all (strides, padding, dilation)."""
    settings = [value] if isinstance(value, int) else list(value)
    return settings * dims if len(settings) == 1 else settings


def _passes_twice(node: Node) -> bool:
    """Some tensor occurs more than once among the arguments."""
    found: list[Node] = []
    map_arg((node.args, node.kwargs), found.append)
    return len(set(found)) < len(found)


class Op:
    """One node while its rule runs; `relation()` is the result.

    Whatever a rule does not mention needs whole operands and produces whole outputs: forgetting something is safe. A tensor that
    is passed twice plays two parts, so nothing flows then unless the rule says that its parts are `alike`.
    """

    def __init__(self, node: Node, table: AtomTable, axes: dict[Node, tuple[tuple[Axis, ...], ...]], fused: dict[tuple[str, int], tuple[int, int]], shortened: Shortened) -> None:
        self.node = node
        self.table = table
        self._fused = fused
        self._shortened = shortened
        self.args = bind_arguments(node) if hasattr(node.target, "_schema") else {}
        self.operands: tuple[Node, ...] = tuple(n for n in node.all_input_nodes if is_tensor(n))
        self.operand_axes = [axes[n][0] for n in self.operands]
        self.shapes = [shape_of(n.meta["val"]) for n in self.operands]
        self.out_shapes = [shape_of(v) for v in outputs_of(node)]
        self._out: list[dict[int, Axis]] = [{} for _ in self.out_shapes]
        self._flows: dict[tuple[int, int], list[int]] = {}
        self._reduces: dict[tuple[int, int], str] = {}
        self._blocked: set[int] = set()
        self._asks: list[tuple[int, int, int]] = []
        self.conflicts: list[tuple[Axis, int]] = []
        self.merges: list[tuple[int, Axis]] = []
        self.dropping = False
        self.alike = False
        self.free: set[int] = set()
        self.whole: set[int] = set()
        self.halo: dict[int, Halo] = {}
        self.windows: dict[int, Window] = {}
        self.pooled: set[int] = set()
        self.rewrite: Rewrite | None = None
        self.reason = ""
        self.attention: Any = None
        self.seen = True
        self.fixed = False  # the same in every call, whole on every rank

    # -- reading --------------------------------------------------------------------------------
    def index(self, operand: Any) -> int:
        """Position of an argument among the tensor operands."""
        return self.operands.index(operand)

    def axis(self, operand: int, dim: int) -> Axis:
        return self.table.expand_axis(self.operand_axes[operand][dim % len(self.shapes[operand])])

    def rank(self, operand: int = 0) -> int:
        return len(self.shapes[operand])

    @property
    def out_shape(self) -> tuple[Length, ...]:
        return self.out_shapes[0]

    def is_one(self, operand: int, dim: int) -> bool:
        length = self.shapes[operand][dim]
        return isinstance(length, int) and length == 1

    # -- relating -------------------------------------------------------------------------------
    def carry(self, operand: int, dim: int, out_dim: int) -> None:
        """Positions of the operand's dim are the positions of the output's dim (a dim of length 1 is broadcast)."""
        if self.is_one(operand, dim):
            return
        self.place(operand, dim, out_dim, self.axis(operand, dim))

    def place(self, operand: int, dim: int, out_dim: int, axis: Axis, output: int = 0) -> None:
        """Like `carry`, with an axis made of the operand's atoms (part of them, or rearranged)."""
        known = self._out[output].get(out_dim)
        if known is None:
            self._out[output][out_dim] = axis
        elif not self.table.unify_axes(known, axis):
            self._blocked.add(out_dim)
            self.conflicts += [(a, out_dim) for a in map(self.table.expand_axis, (known, axis)) if len(a) > 1]
        targets = self._flows.setdefault((operand, dim), [])
        if out_dim not in targets:
            targets.append(out_dim)

    def carry_all(self, operand: int = 0, skip: tuple[int, ...] = ()) -> None:
        """All dims but `skip` keep their place (in every output)."""
        rank = self.rank(operand)
        for dim in range(rank):
            if dim not in {s % rank for s in skip}:
                self.carry(operand, dim, dim)

    def merge(self, out_dim: int, axis: Axis, output: int = 0) -> Axis:
        """The product `axis` for an output dim, or one new atom where an earlier reading found it to be one sequence."""
        mark = self._fused.get((self.node.name, out_dim))
        self.merges.append((out_dim, axis))
        if mark is not None:
            start, width = mark
            run = axis[start : start + width]
            axis = (*axis[:start], *self.table.fresh_axis(self.table.axis_length(run)), *axis[start + width :])
        return axis

    def place_product(self, operand: int, dim: int, out_dim: int, axis: Axis) -> None:
        """`place` a product made of the operand's dim; where `merge` makes a new sequence of it, nothing flows."""
        merged = self.merge(out_dim, axis)
        if merged == axis:
            self.place(operand, dim, out_dim, axis)
        else:
            self.set_out(out_dim, merged)

    def shorten(self, operand: int, dim: int, out_dim: int, stride: int) -> bool:
        """Of every `stride` positions one is left. False if the operand's dim is no such product: it is asked for, where it can be one."""
        axis, (length, shorter) = self.axis(operand, dim), map(self.table.sizes.hint, (self.shapes[operand][dim], self.out_shape[out_dim]))
        if length != shorter * stride or shorter == 1:  # where it is so for one multiple of the stride, it is for all
            return False
        left = left_by(self.table, axis, stride)
        if left is not None:
            self.place(operand, dim, out_dim, left)
        elif len(axis[0]) == 1 and shorter >= SHORT and stride % (inner := self.table.example_length(axis[1:])) == 0:
            self._asks.append((axis[0][0], out_dim, stride // inner))
        return left is not None

    def lengthen(self, operand: int, dim: int, out_dim: int, times: int) -> None:
        """Every position becomes `times` beside each other. A dim of few positions can be cut better as a sequence of its own afterwards."""
        if times == 1:
            self.carry(operand, dim, out_dim)
        elif not self.is_one(operand, dim) and self.table.example_length(self.axis(operand, dim)) >= SHORT:
            repeats = sympy.factorint(times, multiple=True)  # enlarged by 2 and again by 2 is enlarged by 4
            self.place_product(operand, dim, out_dim, (*self.axis(operand, dim), *(factor for n in repeats for factor in self.table.fresh_axis(n))))

    def begins(self, out_dim: int) -> bool:
        """True if an output dim was chosen to be one new sequence, whatever it is made of."""
        return (self.node.name, out_dim) in self._fused

    def set_out(self, out_dim: int, axis: Axis, output: int = 0) -> None:
        self._out[output][out_dim] = axis

    def reduce(self, operand: int, dim: int, kind: str = "sum") -> None:
        if not self.is_one(operand, dim):
            self._reduces[(operand, dim)] = kind

    def tie(self, operand_a: int, dim_a: int, operand_b: int, dim_b: int) -> bool:
        """Two operand dims must be cut alike (contraction dims, keys and values)."""
        return self.table.unify_axes(self.axis(operand_a, dim_a), self.axis(operand_b, dim_b))

    def block(self, out_dim: int) -> None:
        self._blocked.add(out_dim)

    # -- result ----------------------------------------------------------------------------------
    def relation(self) -> Relation:
        two_parts = not self.alike and _passes_twice(self.node)
        flows = {}
        for key, targets in self._flows.items():
            kept = tuple(t for t in targets if t not in self._blocked)
            if kept and not two_parts:
                flows[key] = kept
        out_axes = []
        for output, (shape, known) in enumerate(zip(self.out_shapes, self._out, strict=True)):
            axes = []
            for dim, length in enumerate(shape):
                axis = None if dim in self._blocked else self._axis_for(known, dim, length)
                axes.append(self._shortened.begin(self.table, (self.node.name, output, dim), length) if axis is None else axis)
            out_axes.append(tuple(axes))
        self._shortened.asks += [Ask(atom, out_axes[0][dim], stride) for atom, dim, stride in self._asks]
        return Relation(
            operands=self.operands,
            operand_axes=tuple(tuple(a) for a in self.operand_axes),
            out_axes=tuple(out_axes),
            flows=flows,
            reduces={} if two_parts else dict(self._reduces),
            dropping=self.dropping,
            free=frozenset(self.free),
            whole=frozenset(self.whole | self._blocked),
            halo=dict(self.halo),
            windows=dict(self.windows),
            pooled=frozenset(self.pooled),
            rewrite=self.rewrite,
            reason=self.reason,
            attention=self.attention,
            seen=self.seen,
        )

    def _axis_for(self, known: dict[int, Axis], dim: int, length: Length) -> Axis | None:
        axis = known.get(dim)
        if axis is None and len(self._out) > 1:
            axis = self._out[0].get(dim)
        if axis is None:
            return None
        hint = self.table.sizes.hint
        return axis if hint(self.table.axis_length(axis)) == hint(length) else None
