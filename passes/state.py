"""Plain Python objects that hold tensors (a cache of keys and values): arguments whose attributes a model reads and assigns.

Before: `cache.key = k` in the model, `cache` an argument
After:  the tensors of `cache` are inputs, `k` is an output, and `cache.key` is assigned after the program ran
"""

from __future__ import annotations

import enum
import inspect
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from seqpar.compat import pytree

PLAIN = (
    bool, int, float, str, bytes, complex, range, enum.Enum, torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size,
    type, types.FunctionType, types.BuiltinFunctionType, type(None), torch.Tensor,
)  # fmt: skip
DEPTH = 8


@dataclass(frozen=True)
class Mutation:
    """The model writes to a buffer or to an input: output `output` of the graph is the new content.

    Invariants: exactly one of `buffer` (qualified name) and `placeholder` (index) is set.
    """

    output: int
    buffer: str | None = None
    placeholder: int | None = None

    def __post_init__(self) -> None:
        assert (self.buffer is None) != (self.placeholder is None)


class Opened:
    """An object as its class and its attributes."""

    def __init__(self, kind: type, attributes: dict[str, Any]):
        self.kind, self.attributes = kind, attributes


def _flatten(opened: Opened) -> tuple[list[Any], Any]:
    return list(opened.attributes.values()), (opened.kind, tuple(opened.attributes))


def _flatten_with_keys(opened: Opened) -> tuple[list[tuple[Any, Any]], Any]:
    return [(pytree.GetAttrKey(name), value) for name, value in opened.attributes.items()], (opened.kind, tuple(opened.attributes))


def _unflatten(values: Any, context: Any) -> Opened:
    return Opened(context[0], dict(zip(context[1], values, strict=True)))


pytree.register_pytree_node(Opened, _flatten, _unflatten, flatten_with_keys_fn=_flatten_with_keys)


def is_state(value: Any, depth: int = DEPTH) -> bool:
    """True for an object of a class nobody registered, all of whose attributes are tensors, plain values, containers of them, or such objects."""
    kind = type(value)
    if isinstance(value, dict | list | tuple | set | frozenset) or any(getattr(base, "__slots__", ()) for base in kind.__mro__):
        return False  # content beside the attributes
    if isinstance(value, PLAIN) or kind in pytree.SUPPORTED_NODES or isinstance(value, torch.nn.Module) or not hasattr(value, "__dict__"):
        return False
    if kind.__module__.partition(".")[0] in ("torch", "builtins", "numpy") or inspect.ismodule(value) or (callable(value) and not vars(value)):
        return False
    return depth > 0 and all(is_readable(item, depth - 1) for item in vars(value).values())


def is_readable(value: Any, depth: int) -> bool:
    if isinstance(value, PLAIN):
        return True
    if type(value) in pytree.SUPPORTED_NODES:
        return depth > 0 and all(is_readable(item, depth - 1) for item in pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0])
    return is_state(value, depth)


def open_state(value: Any) -> Any:
    """`value` with every such object replaced by an `Opened`; containers are copied."""
    if is_state(value):
        return Opened(type(value), {name: open_state(item) for name, item in vars(value).items()})
    if type(value) in pytree.SUPPORTED_NODES and not isinstance(value, Opened):
        items, context = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
        return pytree.SUPPORTED_NODES[type(value)].unflatten_fn([open_state(item) for item in items], context)
    return value


def close_state(value: Any) -> Any:
    """The inverse of `open_state`, with objects of their own."""
    if isinstance(value, Opened):
        made: Any = object.__new__(value.kind)
        made.__dict__.update({name: close_state(item) for name, item in value.attributes.items()})
        return made
    if type(value) in pytree.SUPPORTED_NODES:
        items, context = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
        return pytree.SUPPORTED_NODES[type(value)].unflatten_fn([close_state(item) for item in items], context)
    return value


def holds_state(value: Any) -> bool:
    """True if an opened value has an `Opened` somewhere in it."""
    if isinstance(value, Opened):
        return True
    return type(value) in pytree.SUPPORTED_NODES and any(holds_state(item) for item in pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)[0])


@dataclass(frozen=True)
class StateWrite:
    """What one argument that holds objects looks like after the call.

    Invariants: `sources` has one entry per leaf of `spec` (an opened value): ("output", index of the graph's output),
    ("input", index of the placeholder), or ("literal", value).
    """

    argument: str
    spec: Any
    sources: tuple[tuple[str, Any], ...]

    def __post_init__(self) -> None:
        assert len(self.sources) == self.spec.num_leaves

    def moved(self, first: int) -> StateWrite:
        """The same with the number of the first output given."""
        return StateWrite(self.argument, self.spec, tuple((kind, value + first if kind == "output" else value) for kind, value in self.sources))

    def apply(self, target: Any, inputs: Sequence[Any], outputs: Sequence[Any]) -> None:
        """Assign the new attributes to the objects in `target`, the argument of the call."""
        leaves = [inputs[value] if kind == "input" else outputs[value] if kind == "output" else value for kind, value in self.sources]
        assign(target, pytree.tree_unflatten(leaves, self.spec))


def assign(target: Any, value: Any) -> Any:
    """Make `target` look like the opened `value`, object by object; returns what belongs in its place."""
    if isinstance(value, Opened):
        if type(target) is not value.kind:
            return close_state(value)
        new = {name: assign(target.__dict__.get(name), item) for name, item in value.attributes.items()}
        for name in [name for name in target.__dict__ if name not in new]:
            del target.__dict__[name]
        target.__dict__.update(new)
        return target
    if type(value) is list and type(target) is list:
        target[:] = [assign(target[i] if i < len(target) else None, item) for i, item in enumerate(value)]
        return target
    if type(value) is dict and type(target) is dict:
        new = {key: assign(target.get(key), item) for key, item in value.items()}
        target.clear()
        target.update(new)
        return target
    if type(value) is tuple and type(target) is tuple:
        return tuple(assign(target[i] if i < len(target) else None, item) for i, item in enumerate(value))
    return value


def state_after(arguments: Mapping[str, Any]) -> dict[str, tuple[list[Any], Any]]:
    """Argument name -> (leaves, spec) of its opened value, for the arguments that hold objects."""
    found = {}
    for name, value in arguments.items():
        opened = open_state(value)
        if holds_state(opened):
            found[name] = pytree.tree_flatten(opened)
    return found


def state_writes(before: Mapping[str, Any], after: Mapping[str, Any], inputs: Sequence[torch.Tensor]) -> tuple[tuple[StateWrite, ...], list[Any]]:
    """What the model assigned on the objects in its arguments, and the new tensors (output numbers count from the first of them)."""
    writes: list[StateWrite] = []
    assigned: list[Any] = []
    places = {id(leaf): index for index, leaf in enumerate(inputs)}
    for name, (leaves, spec) in after.items():
        old_leaves, old_spec = before[name]
        if spec == old_spec and all(old is new or (not isinstance(new, torch.Tensor) and old == new) for old, new in zip(old_leaves, leaves, strict=True)):
            continue
        sources: list[tuple[str, Any]] = []
        for leaf in leaves:
            if id(leaf) in places:
                sources.append(("input", places[id(leaf)]))
            elif isinstance(leaf, torch.Tensor | torch.SymInt):
                sources.append(("output", len(assigned)))
                assigned.append(leaf)
            else:
                sources.append(("literal", leaf))
        writes.append(StateWrite(name, spec, tuple(sources)))
    return tuple(writes), assigned
