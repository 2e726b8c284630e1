"""Inline a function of single positions once, on index tensors that broadcast.

Before: f(b, h, i, j, table) = table[i] >= j                                       %b, %h, %i, %j 0-d
After:  %i [1, 1, Q, 1], %j [1, 1, 1, K]: ge(index(%table, [%i]), %j) -> [1, 1, Q, K]

What depends on positions has four dims (batch, head, query, key), of length 1 where it does not depend on that one.
Tensors have at least one dim wherever the function had none, so types promote as they did there.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule, Node

from seqpar.partitioner.registry import registry
from seqpar.partitioner.rules.pointwise import pointwise
from seqpar.passes.build import Builder

aten = torch.ops.aten
CONSTANTS: Mapping[Any, Callable[[dict[str, Any]], Any]] = {
    aten.new_ones.default: lambda a: 1,
    aten.ones.default: lambda a: 1,
    aten.new_zeros.default: lambda a: 0,
    aten.zeros.default: lambda a: 0,
    aten.new_full.default: lambda a: a["fill_value"],
    aten.full.default: lambda a: a["fill_value"],
    aten.scalar_tensor.default: lambda a: a["s"],
}


class NotUnderstood(Exception):  # noqa: N818 - an answer, not an error
    """The function does something that cannot be inlined; the node stays as it is."""


@dataclass(frozen=True)
class Plain:
    """A tensor of the outer graph that does not depend on positions."""

    node: Node


@dataclass(frozen=True)
class Spread:
    """A value per position: a node of four dims that broadcast."""

    node: Node


@dataclass(frozen=True)
class Constant:
    """A 0-d tensor whose value is known."""

    number: float
    dtype: torch.dtype


@dataclass(frozen=True)
class Partial:
    """A tensor indexed along its first dims only, so far: by numbers, or by values per position."""

    base: Node
    indices: tuple[Any, ...]


class Inliner:
    """Runs one function graph; subclasses understand more values by overriding `special`."""

    def __init__(self, build: Builder, device: torch.device) -> None:
        self.build, self.device = build, device

    def run(self, gm: GraphModule, arguments: Sequence[Any]) -> Any:
        """The value that `gm` returns for these argument values.

        Raises:
            NotUnderstood: something in it has no meaning per position, or no known one.
        """
        known: dict[Node, Any] = {}
        inputs = iter(arguments)
        for node in gm.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(inputs)
            elif node.op == "get_attr":
                known[node] = self._attribute(getattr(gm, str(node.target), None))
            elif node.op == "output":
                return self._read(node.args[0], known)
            elif node.op == "call_function":
                known[node] = self._call(node.target, self._read(node.args, known), self._read(node.kwargs, known))
            else:
                raise NotUnderstood(node.format_node())
        raise NotUnderstood("no output")

    def special(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A value for calls that are treated apart, or None."""
        return None

    def node(self, value: Any) -> Any:
        """The value as a node that broadcasts: four dims."""
        if isinstance(value, Spread):
            return value.node
        if isinstance(value, Constant):
            return self.build.call(aten.full.default, [1, 1, 1, 1], value.number, dtype=value.dtype, device=self.device)
        if isinstance(value, Plain) and len(value.node.meta["val"].shape) == 0:
            return self.build.call(aten.view.default, value.node, [1, 1, 1, 1])
        raise NotUnderstood(f"{value} is not one number per position")

    # -- calls ---------------------------------------------------------------------------------------
    def _read(self, argument: Any, known: Mapping[Node, Any]) -> Any:
        if isinstance(argument, (list, tuple)):
            return type(argument)(self._read(a, known) for a in argument)
        if isinstance(argument, dict):
            return {k: self._read(a, known) for k, a in argument.items()}
        return known[argument] if isinstance(argument, Node) else argument

    def _attribute(self, value: Any) -> Constant:
        if not isinstance(value, torch.Tensor) or value.ndim or hasattr(value, "fake_mode") or value.dtype.is_complex:
            raise NotUnderstood("a constant that is not a number")
        return Constant(value.item(), value.dtype)

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        found = self.special(target, args, kwargs)
        if found is not None:
            return found
        values = _values((args, kwargs))
        if target in CONSTANTS:
            return _constant(target, args, kwargs)
        if (kept := _unchanged(target, args)) is not None:
            return kept
        if target is aten.index.Tensor:
            return self._index(args[0], args[1])
        if target is aten.select.int and isinstance(args[0], Partial) and args[1] == 0 and args[2] >= 0:
            return self._indexed(args[0], (args[2],))
        if values and all(isinstance(v, Plain) for v in values):
            placed = _map((args, kwargs), lambda v: v.node)
            return Plain(self.build.call(target, *placed[0], **placed[1]))
        if target is not operator.getitem and registry.find(target) is pointwise:
            placed = _map((args, kwargs), self.node)
            return Spread(self.build.call(target, *placed[0], **placed[1]))
        raise NotUnderstood(str(target))

    def _index(self, base: Any, indices: Sequence[Any]) -> Any:
        if not isinstance(base, (Plain, Partial)) or any(not isinstance(i, (Spread, Plain, Constant)) for i in indices):
            raise NotUnderstood("an index that leaves dims out")
        if any(not isinstance(i, Constant) and i.node.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices):
            raise NotUnderstood("an index that is a mask")
        return self._indexed(base, tuple(indices))

    def _indexed(self, base: Plain | Partial, more: tuple[Any, ...]) -> Any:
        """`base[more]`; a node once every dim has its index."""
        tensor, indices = (base.base, (*base.indices, *more)) if isinstance(base, Partial) else (base.node, more)
        rank = len(tensor.meta["val"].shape)
        if len(indices) < rank:
            return Partial(tensor, indices)
        if len(indices) > rank:
            raise NotUnderstood("more indices than dims")
        for dim in reversed(range(rank)):
            if isinstance(indices[dim], int):
                tensor = self.build.call(aten.select.int, tensor, dim, indices[dim])
        left = [self.node(i) for i in indices if not isinstance(i, int)]
        return Spread(self.build.call(aten.index.Tensor, tensor, left)) if left else Plain(tensor)


def _constant(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Constant:
    schema = target._schema.arguments
    bound = {a.name: v for a, v in zip(schema, args, strict=False)} | kwargs
    number = CONSTANTS[target](bound)
    dtype = bound.get("dtype")
    if bound.get("size") or not isinstance(number, (int, float, bool)) or dtype is None:
        raise NotUnderstood(str(target))
    return Constant(number, dtype)


def _unchanged(target: Any, args: tuple[Any, ...]) -> Spread | None:
    """The operand that a call returns as it is: `i + 0`, `mask & True`. Functions composed of parts are full of these."""
    if target is aten.add.Tensor and len(args) == 2 and isinstance(args[0], Spread) and args[1] == 0 and isinstance(args[1], int):
        return args[0]
    if target in (aten.__and__.Tensor, aten.bitwise_and.Tensor, aten.logical_and.default):
        for one, other in (args, args[::-1]):
            if isinstance(one, Constant) and one == Constant(1, torch.bool) and isinstance(other, Spread) and other.node.meta["val"].dtype == torch.bool:
                return other
    return None


def is_minus_infinity(value: Any) -> bool:
    """Whether this is the number that hides a score."""
    number = value.number if isinstance(value, Constant) else value
    return isinstance(number, float) and math.isinf(number) and number < 0


VALUES = (Plain, Spread, Constant, Partial)


def _values(argument: Any) -> list[Any]:
    if isinstance(argument, (list, tuple)):
        return [v for a in argument for v in _values(a)]
    if isinstance(argument, dict):
        return [v for a in argument.values() for v in _values(a)]
    return [argument] if isinstance(argument, VALUES) else []


def _map(argument: Any, place: Callable[[Any], Any]) -> Any:
    if isinstance(argument, (list, tuple)):
        return type(argument)(_map(a, place) for a in argument)
    if isinstance(argument, dict):
        return {k: _map(a, place) for k, a in argument.items()}
    return place(argument) if isinstance(argument, VALUES) else argument
