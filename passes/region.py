"""The nodes that one call of a module made: what they say, whether they depend on the call's inputs alone, and copies of them for another call.

Before: %in_0, %in_1 stand for the inputs;  %linear = linear(%in_0, %in_1); %relu = relu(%linear)
After:  %linear_4 = linear(%h, %w); %relu_4 = relu(%linear_4)                                     # `Region.copy`, for inputs %h, %w
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from seqpar.compat import Tape, is_traced, pytree, unbacked_symbols

SIZES = (torch.SymInt, torch.SymFloat, torch.SymBool)
Modules = Mapping[str, tuple[str, str]]  # of a node: key -> (path, class), outermost first


@dataclass(frozen=True)
class Line:
    """A node with its arguments as they were when it was made; inputs of the region are the nodes that stand for them."""

    node: fx.Node
    args: Any
    kwargs: Any

    @property
    def is_size(self) -> bool:
        return isinstance(self.node.meta.get("val"), SIZES)


class Region:
    """The nodes of one call.

    inputs: nodes that stand for its tensors, in order. outputs: nodes of the tensors that are new. modules: those that were running, the called one the
    last. calls: how often each module had been called, by its path, before and after.
    """

    def __init__(self, nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], outputs: Sequence[fx.Node], modules: Modules, calls: tuple[Mapping[str, int], Mapping[str, int]]) -> None:
        self.lines = [Line(node, node.args, node.kwargs) for node in nodes]
        self.inputs, self.outputs, self.modules = list(inputs), list(outputs), modules
        self.path = list(modules.values())[-1][0]
        before, after = calls
        self.called = {path: (before.get(path, 0), count - before.get(path, 0)) for path, count in after.items() if count != before.get(path, 0)}

    def depends_on(self) -> fx.Node | None:
        """A tensor from elsewhere that it uses, if there is one; sizes are no tensors."""
        nodes = {*self.inputs, *(line.node for line in self.lines)}
        used = (node for line in self.lines for node in line.node.all_input_nodes)
        return next((node for node in (*used, *self.outputs) if node not in nodes and not is_known_size(node)), None)

    def used_by(self) -> fx.Node | None:
        """A node elsewhere that uses what is no output, if there is one."""
        nodes = {line.node for line in self.lines}
        inner = (line.node for line in self.lines if line.node not in self.outputs and not line.is_size)
        return next((user for node in inner for user in node.users if user not in nodes), None)

    def form(self) -> list[Any] | None:
        """What it computes, in terms of its inputs; None if it has parts that are no copies of one another in calls that are alike."""
        if not all(map(self.is_plain, self.lines)) or not all(path.startswith(f"{self.path}.") for path in self.called):
            return None
        places = {node: ("input", i) for i, node in enumerate(self.inputs)} | {line.node: ("node", i) for i, line in enumerate(self.lines)}

        def place(leaf: Any) -> Any:
            return places.get(leaf, leaf) if isinstance(leaf, fx.Node) else (type(leaf), repr(leaf))  # a size from elsewhere is itself

        return [
            [
                (line.node.target, base_name(line.node), values(line.node.meta.get("val")), line.node.meta.get("stack_trace"), self.inner_modules(line.node)),
                fx.node.map_aggregate((line.args, tuple(line.kwargs.items())), place),
            ]
            for line in self.lines
        ] + [[places[node] for node in self.outputs]]

    def is_plain(self, line: Line) -> bool:
        """A functional operator without constants, subgraphs and values read from tensors, noted below the called module."""
        node = line.node
        if node.op != "call_function" or isinstance(node.target, torch._ops.HigherOrderOperator) or "val" not in node.meta:
            return False
        mutable = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        unbacked = any(unbacked_symbols(size) for value in pytree.tree_leaves(node.meta.get("val")) for size in sizes_of(value))
        return not mutable and not unbacked and "unbacked_bindings" not in node.meta and self.inner_modules(node) is not None

    def inner_modules(self, node: fx.Node) -> list[tuple[str, str, str]] | None:
        """Its modules below the called one: the path from there, which of the calls, the class; None if it is not below."""
        entries = list(node.meta.get("nn_module_stack", {}).items())
        depth = len(self.modules)
        if [key for key, _ in entries[:depth]] != list(self.modules):
            return None
        found = []
        for key, (path, kind) in entries[depth:]:
            if not path.startswith(f"{self.path}."):
                return None
            found.append((path.removeprefix(self.path), str(call_of(key) - self.called[path][0]), kind))
        return found

    def copy(self, tape: Tape, inputs: Sequence[fx.Node]) -> list[fx.Node]:
        """Append the same nodes for another call, which is running; returns its outputs."""
        new = dict(zip(self.inputs, inputs, strict=True))
        modules = tape.modules
        path = list(modules.values())[-1][0]
        calls = {old: tape.calls.get(path + old.removeprefix(self.path), 0) for old in self.called}
        stacks: dict[tuple[tuple[str, str, str], ...], dict[str, tuple[str, str]]] = {}

        def moved(inner: tuple[tuple[str, str, str], ...]) -> dict[str, tuple[str, str]]:
            below = ((path + rest, calls[self.path + rest] + int(call), kind) for rest, call, kind in inner)
            return {**modules, **{f"{place}@{call}" if call else place: (place, kind) for place, call, kind in below}}

        for line in self.lines:
            args, kwargs = (fx.map_arg(part, lambda node: new.get(node, node)) for part in (line.args, line.kwargs))
            made = tape.graph.create_node(line.node.op, line.node.target, args, kwargs, name=base_name(line.node))
            inner = tuple(self.inner_modules(line.node) or ())
            if inner not in stacks:
                stacks[inner] = moved(inner)
            made.meta = {**line.node.meta, "nn_module_stack": dict(stacks[inner])}
            new[line.node] = made
        for old, (_, count) in self.called.items():
            tape.calls[path + old.removeprefix(self.path)] = calls[old] + count
        return [new[node] for node in self.outputs]


def is_known_size(node: fx.Node) -> bool:
    """True for a size that follows from those of the inputs."""
    value = node.meta.get("val")
    return isinstance(value, SIZES) and not unbacked_symbols(value)


def base_name(node: fx.Node) -> str:
    """Its name without the number that makes it unique."""
    return re.sub(r"_\d+$", "", node.name)


def call_of(key: str) -> int:
    """`"blocks.0.norm@2"` -> 2."""
    return int(key.rpartition("@")[2]) if "@" in key else 0


def size(value: Any) -> Any:
    """A number; of a symbol what it stands for."""
    return value.node.expr if isinstance(value, SIZES) else value


def layout(tensor: torch.Tensor) -> list[Any]:
    """Sizes, strides and offset of a strided tensor."""
    return [*tensor.shape, *tensor.stride(), tensor.storage_offset()]


def is_usual(tensor: torch.Tensor) -> bool:
    """A traced tensor with nothing special: neither sparse nor lazily conjugated, without attributes that somebody set, of sizes that follow from inputs'."""
    return (
        is_traced(tensor)
        and tensor.layout is torch.strided
        and not (tensor.is_conj() or tensor.is_neg())
        and not any(unbacked_symbols(size) for size in layout(tensor))
    )


def sizes_of(value: Any) -> list[Any]:
    if isinstance(value, torch.Tensor):
        return layout(value) if value.layout is torch.strided else list(value.shape)
    return [value] if isinstance(value, SIZES) else []


def values(value: Any) -> Any:
    """Shapes, strides and dtypes of the tensors in a value."""
    return [described(leaf) for leaf in pytree.tree_leaves(value)]


def described(value: Any) -> Any:
    """All of a tensor but its content; what else it is, as it is."""
    if not isinstance(value, torch.Tensor):
        return size(value)
    if value.layout is not torch.strided:
        return value.layout
    return type(value), tuple(map(size, layout(value))), value.dtype, value.device, value.requires_grad
