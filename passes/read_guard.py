"""Values read from tensors as a condition for using a program: computed again from the inputs of a call, and compared.

Before: the traced graph with an extra output per value the model read
After:  the graph without them, and a small program that computes just them from the inputs

A value that the model's parameters and its inputs determine together (an activation) is refused: each call would have another
program, and the guard would be a part of the model. So is a length, a list or a mask that follows from the fractions of floating
inputs. A condition (`if x.max() > 1:`) on inputs is not: it has two programs at most. Input tensors of whole numbers are taken for
masks, ids and lengths whatever their dtype.

The guard is right for any input: a value is compared only if all values the model read before it are equal, so that the program
computed it as the model does. Every rank decides alike, because every rank has the same full inputs; no communication.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from seqpar.errors import TraceError
from seqpar.passes.labelled import Content
from seqpar.passes.replay import Record
from seqpar.passes.share import share_graph
from seqpar.runtime.opaque import run_opaque

aten = torch.ops.aten
# What these return depends on the shape of their first argument only; a number: what they fill with; None: an argument says it.
FILLS: dict[Any, int | None] = {
    aten.zeros_like.default: 0, aten.ones_like.default: 1, aten.empty_like.default: 0, aten.full_like.default: None,
    aten.new_zeros.default: 0, aten.new_ones.default: 1, aten.new_empty.default: 0, aten.new_full.default: None,
}  # fmt: skip
COPIES = (aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default)
FAILURES = (RuntimeError, IndexError, ValueError, TypeError, AssertionError)


@dataclass(frozen=True)
class Unguarded:
    """A value read that no guard can cover, and why."""

    record: Record
    why: str


class ActivationRead(TraceError):
    """The model's control flow depends on activations: no program is valid for more than one call. `reads`: the values it depends on."""

    def __init__(self, message: str, reads: Sequence[Unguarded]) -> None:
        super().__init__(message)
        self.reads = tuple(reads)


@dataclass(frozen=True, eq=False)
class ReadGuard:
    """The values a program relies on.

    Invariants: output i of `gm` (same placeholders as the program's) is compared with `reads[i].value`, shape and content.
    """

    gm: fx.GraphModule
    reads: tuple[Record, ...]

    def __post_init__(self) -> None:
        assert self.reads

    @cached_property
    def recorded(self) -> Tensor:
        """All recorded values as bytes."""
        return as_bytes([read.value for read in self.reads])

    def holds(self, inputs: Sequence[Tensor]) -> bool:
        """True if the model would read the recorded values from these inputs (one synchronisation with the device)."""
        values = self.compute(inputs)
        if values is None or any(v.shape != r.value.shape or v.dtype != r.value.dtype for v, r in zip(values, self.reads, strict=True)):
            return False
        return torch.equal(as_bytes(values).cpu(), self.recorded)

    def compute(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
        """The values for these inputs, or None where they cannot be computed: then another one, on which its sizes rely, differs."""
        with torch.no_grad():
            try:
                return self.gm(*inputs)
            except FAILURES:
                return None

    def changed(self, inputs: Sequence[Tensor]) -> Record | None:
        """The first read whose value differs, for messages."""
        values = self.compute(inputs)
        if values is None:
            return self.reads[0]
        return next((r for v, r in zip(values, self.reads, strict=True) if v.shape != r.value.shape or not torch.equal(v.cpu(), r.value)), None)


def as_bytes(values: Iterable[Tensor]) -> Tensor:
    """[n] uint8: the contents, one after the other, on the device of the values."""
    flat = [value.detach().reshape(-1).contiguous().view(torch.uint8) for value in values]
    return flat[0] if len(flat) == 1 else torch.cat([part.to(flat[0].device) for part in flat])


def build_guard(model: torch.nn.Module, asked: Sequence[fx.Node], records: Sequence[Record], constants: Mapping[str, Any], example: Sequence[Tensor]) -> ReadGuard | None:
    """The guard of a traced graph, or None if no read depends on a call.

    Args:
        asked: the node of each recorded value, in the graph of the program.
        constants: what `get_attr` nodes of the graph may name besides the model's own state.
        example: the tensors the values were recorded from, in placeholder order.

    Raises:
        ActivationRead: a value depends on activations, on random numbers, or on the fractions of floating inputs.
        TraceError: the model reads something else for the same inputs.
    """
    parameters = dict(model.named_parameters())
    origins: dict[fx.Node, frozenset[str]] = {}
    kept, refused = [], []
    for node, record in zip(asked, records, strict=True):
        found = origin(node, parameters, constants, origins)
        if "random" in found:
            refused.append(refusal(record, "it is a random number"))
        elif {"input", "parameter"} <= found:
            refused.append(refusal(record, "it is an activation, computed from inputs and parameters"))
        elif found:
            kept.append((node, record))
    raise_all(refused)
    if not kept:
        return None
    graph, nodes = extract([node for node, _ in kept])
    distinct = {node: record for node, (_, record) in reversed(list(zip(nodes, kept, strict=True)))}  # a value read twice: its first reader
    outputs = list(dict.fromkeys(nodes))
    graph.output(tuple(outputs))
    graph.lint()
    gm = share_graph(model, graph, constants, "SequenceParallelGuard")
    guard = ReadGuard(gm, tuple(distinct[node] for node in outputs))
    if any(tensor.device.type == "meta" for tensor in example):
        return guard
    if (changed := guard.changed(example)) is not None:
        raise TraceError(f"{changed.function} reads a value that is not the same when the model runs again with the same inputs, at {changed.where}")
    check_fractions(guard, example)
    return guard


def refusal(record: Record, why: str) -> ActivationRead:
    return ActivationRead(
        "the program of the model depends on data that changes with every call\n"
        f"  operator: {record.function}\n"
        f"  where:    {record.where}\n"
        f"  why:      the value it reads cannot be fixed: {why}\n"
        "  try:      an option of the model without this control flow (for example a dense form of its routing), or pass the value as a Python argument",
        (Unguarded(record, why),),
    )


def raise_all(refused: Sequence[ActivationRead]) -> None:
    """The first refusal, with the reads of all."""
    if refused:
        raise ActivationRead(str(refused[0]), [read for one in refused for read in one.reads])


def origin(node: fx.Node, parameters: Mapping[str, Any], constants: Mapping[str, Any], known: dict[fx.Node, frozenset[str]]) -> frozenset[str]:
    """What the content of a value depends on: "input", "parameter", "buffer", "random"."""
    stack = [node]
    while stack:
        current = stack[-1]
        if current in known:
            stack.pop()
            continue
        needed = [] if is_fill(current) else [n for n in current.all_input_nodes if n not in known]
        if needed:
            stack += needed
            continue
        stack.pop()
        found: set[str] = set()
        if current.op == "placeholder":
            found.add("input")
        elif current.op == "get_attr":
            if current.target not in constants:
                found.add("parameter" if is_parameter(str(current.target), parameters, constants) else "buffer")
        elif not is_fill(current):
            found.update(*(known[n] for n in current.all_input_nodes))
            if current.target is run_opaque:
                found.update(("input", "parameter"))
            if torch.Tag.nondeterministic_seeded in getattr(current.target, "tags", ()) and not zero_dropout(current):
                found.add("random")
        known[current] = frozenset(found)
    return known[node]


def is_parameter(target: str, parameters: Mapping[str, Any], constants: Mapping[str, Any]) -> bool:
    """Whether a program reads a parameter by this path, or a tensor in one that is made of several."""
    beginnings = itertools.accumulate(target.split("."), "{}.{}".format)
    return any(beginning in parameters or isinstance(constants.get(beginning), Content) for beginning in beginnings)


def zero_dropout(node: fx.Node) -> bool:
    """True for attention or dropout that is random in name only."""
    return "dropout" in str(node.target) or "attention" in str(node.target)


def is_fill(node: fx.Node) -> bool:
    """True for a tensor of one value whose sizes are numbers."""
    if node.target not in FILLS or not all(isinstance(size, int) for size in node.meta["val"].shape):
        return False
    return FILLS[node.target] is not None or not isinstance(node.args[-1], fx.Node)


def extract(outputs: Sequence[fx.Node]) -> tuple[fx.Graph, list[fx.Node]]:
    """A graph of what `outputs` depend on, with all placeholders of theirs, and the copies of `outputs` in it.

    Before: %a = clone(%mask), %b = clone(%mask), %c = zeros_like(%activation)
    After:  %mask, full(...)   (equal nodes are one, copies are none, a tensor of one value needs no other)
    """
    needed: set[fx.Node] = set()
    stack = list(outputs)
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += [] if is_fill(node) else node.all_input_nodes
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    seen: dict[str, fx.Node] = {}
    for node in outputs[0].graph.nodes:
        if node.op == "placeholder":
            env[node] = graph.node_copy(node)
        elif node in needed and (node.target in COPIES or (node in outputs and node.target is aten.clone.default)):
            env[node] = env[node.args[0]]
        elif node in needed:
            target, args, kwargs = fill_call(node) if is_fill(node) else (node.target, node.args, node.kwargs)
            args, kwargs = fx.map_arg(args, env.__getitem__), fx.map_arg(kwargs, env.__getitem__)
            text = f"{node.op} {target} {args} {kwargs}"
            if text not in seen:
                seen[text] = graph.create_node(node.op, target, args, kwargs, name=node.name)
                seen[text].meta = dict(node.meta)
            env[node] = seen[text]
    return graph, [env[node] for node in outputs]


def fill_call(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The same tensor made from its shape."""
    value, fill = node.meta["val"], FILLS[node.target]
    return aten.full.default, (list(value.shape), node.args[-1] if fill is None else fill), {"dtype": value.dtype, "device": value.device}


def check_fractions(guard: ReadGuard, example: Sequence[Tensor]) -> None:
    """Refuse a length, list or mask that another content of a floating input would change."""
    placeholders = [node for node in guard.gm.graph.nodes if node.op == "placeholder"]
    moved = list(example)
    names = []
    for i, (node, tensor) in enumerate(zip(placeholders, example, strict=True)):
        if node.users and tensor.is_floating_point() and not torch.equal(tensor, tensor.round()):
            moved[i] = stirred(tensor)
            names.append(node.name)
    if not names:
        return
    values = guard.compute(moved)
    refused = []
    for index, read in enumerate(guard.reads):
        condition = read.value.dtype == torch.bool and read.value.dim() == 0
        if not condition and (values is None or not torch.equal(values[index].cpu(), read.value)):
            refused.append(refusal(read, f"it follows from the content of the floating input {' or '.join(names)}"))
    raise_all(refused)


def stirred(tensor: Any) -> Any:
    """Another tensor of about the same distribution, the same one each time; whatever is no tensor of floating numbers stays."""
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or not tensor.numel():
        return tensor
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    noise = torch.randn(tensor.numel(), generator=generator).to(tensor)
    flat = tensor.reshape(-1)[order]
    return (flat * (1 + noise / 4) + noise * tensor.float().nan_to_num().abs().mean().to(tensor.dtype) / 4).reshape(tensor.shape)
