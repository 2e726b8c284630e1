"""What two calls must have in common to run the same program, and what a call must have in common with the example."""

import enum
import inspect
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy
import torch

from seqpar.compat import pytree
from seqpar.errors import SignatureError
from seqpar.passes.arguments import Call, canonical_call
from seqpar.passes.state import Opened, is_state

Key = tuple[Any, ...]
# Compared by value; anything else could change between two calls without being noticed.
CONSTANTS = (
    bool, int, str, bytes, complex, range, enum.Enum, numpy.generic, torch.dtype, torch.device, torch.layout,
    torch.memory_format, torch.Size, type, types.FunctionType, types.BuiltinFunctionType,
)  # fmt: skip


def read(value: Any, key: list[Any], tensors: list[torch.Tensor]) -> None:
    """Append to `key` what identifies `value` (shape, dtype, device; type and value), and its tensors to `tensors`.

    Shapes are the only `torch.Size` items of a key. The order of the tensors is pytree's.
    """
    kind = type(value)
    if kind is torch.Tensor or isinstance(value, torch.Tensor):
        tensors.append(value)
        key += (value.shape, value.dtype, value.device)
    elif value is None or kind is bool or kind is int or kind is str:
        key += (kind, value)
    elif kind is float:
        key += (float, value.hex())  # tells 0.0 from -0.0, and nan equals itself
    elif kind is list or kind is tuple:
        key += (kind, len(value))
        for item in value:
            read(item, key, tensors)
    elif kind is dict:
        key += (dict, tuple(value))
        for item in value.values():
            read(item, key, tensors)
    elif kind in pytree.SUPPORTED_NODES:
        children, context = pytree.SUPPORTED_NODES[kind].flatten_fn(value)
        key += (kind, str(context))
        for item in children:
            read(item, key, tensors)
    elif isinstance(value, CONSTANTS):
        key.append((kind, value))
    elif is_state(value):
        key += (kind, tuple(value.__dict__))
        for item in value.__dict__.values():
            read(item, key, tensors)
    else:
        raise SignatureError(
            f"an argument holds a {kind.__module__}.{kind.__qualname__}, whose content cannot be compared between calls: pass tensors, numbers, "
            "strings, None and lists, tuples or dicts of them, or register the type with torch.utils._pytree.register_pytree_node"
        )


def fixed_part(key: Key) -> Key:
    """The key with each shape replaced by its number of dims: what a symbolic program requires to be equal."""
    return tuple(len(item) if isinstance(item, torch.Size) else item for item in key)


class Marker:
    """Stands for the n-th argument of a call while it is bound to parameter names."""

    def __init__(self, index: int):
        self.index = index


class Signature:
    """The call signature of a model together with an example: brings calls into canonical form.

    Invariants: the tensors of a canonical call are in the order of its flattened leaves.
    """

    def __init__(self, signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]):
        self.parameters = signature
        self.example = self.canonical(args, kwargs).without_data()

    @staticmethod
    def of(example: Call) -> "Signature":
        """The signature of an example that was saved."""
        made = object.__new__(Signature)
        made.parameters, made.example = example.signature, example
        return made

    def canonical(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """Bind the call and fill in the defaults.

        Raises:
            SignatureError: an argument is missing, unknown or given twice.
        """
        return canonical_call(self.parameters, args, kwargs)

    def bound(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        """The arguments of a call by name."""
        bound = self.parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        return bound.arguments

    def check(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
        """The canonical call, if its structure is the example's.

        Lengths of lists and tuples, shapes, dtypes and values may differ (they lead to another program); names, container types, dict
        keys, and whether something is a tensor, None or a plain value may not.

        Raises:
            SignatureError: names the argument (`encoder_hidden_states[1]`) and what was expected.
        """
        call = self.canonical(args, kwargs)
        expected = pytree.tree_unflatten(list(self.example.leaves), self.example.spec)
        actual = pytree.tree_unflatten(list(call.leaves), call.spec)
        for name in actual:
            if name not in expected:
                raise SignatureError(f"the argument {name} was not in the example inputs; they had {tuple(expected)}")
            compare(expected[name], actual[name], name)
        for name in expected:
            if name not in actual:
                raise SignatureError(f"the argument {name} of the example inputs is missing")
        return call

    def tensor_order(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[int, ...] | None:
        """Where the tensors of the canonical call are among the tensors met by reading args, then kwargs as written.

        None if a default value holds a tensor: such a call has no fast path.
        """
        spans: list[range] = []
        start = 0
        for value in (*args, *kwargs.values()):
            tensors: list[torch.Tensor] = []
            read(value, [], tensors)
            spans.append(range(start, start + len(tensors)))
            start += len(tensors)
        markers = [Marker(index) for index in range(len(spans))]
        bound = self.parameters.bind(*markers[: len(args)], **dict(zip(kwargs, markers[len(args) :], strict=True)))
        bound.apply_defaults()
        order: list[int] = []
        for leaf in pytree.tree_leaves(dict(bound.arguments)):
            if isinstance(leaf, Marker):
                order += spans[leaf.index]
            elif isinstance(leaf, torch.Tensor):
                return None
        return tuple(order)


def kind_of(value: Any) -> str:
    """How an error message calls this kind of argument; two arguments may replace each other if it is equal."""
    if isinstance(value, torch.Tensor):
        return "a tensor"
    if value is None:
        return "None"
    if isinstance(value, Opened):
        return f"a {value.kind.__name__}"
    if type(value) in pytree.SUPPORTED_NODES:
        return f"a {type(value).__name__}"
    return "a plain value (number, string, ...)"


def compare(expected: Any, actual: Any, path: str) -> None:
    """Raise SignatureError naming `path` (or a place below it) if the structures differ."""
    if kind_of(expected) != kind_of(actual):
        raise SignatureError(
            f"{path} is {kind_of(actual)}, but was {kind_of(expected)} in the example inputs; the program was made for that: "
            "call sp_compile with example inputs of this structure"
        )
    if isinstance(actual, Opened):
        return  # a cache is empty in one call and filled in the next
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        if expected.keys() != actual.keys():
            raise SignatureError(f"{path} has the keys {sorted(map(str, actual))}, but had {sorted(map(str, expected))} in the example inputs")
        for key in actual:
            compare(expected[key], actual[key], f"{path}[{key!r}]")
    elif type(actual) in pytree.SUPPORTED_NODES:
        old, new = ([child for _, child in children(value)] for value in (expected, actual))
        # A longer list is compared with the example's last entry, so that another number of images is no other structure.
        for index, item in enumerate(new if old else ()):
            compare(old[min(index, len(old) - 1)], item, f"{path}[{index}]")


def children(value: Any) -> list[tuple[Any, Any]]:
    """The direct (key, child) pairs of a registered container."""
    items, _ = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
    return list(enumerate(items))


def summary(call: Call) -> dict[str, str]:
    """Each leaf of a call as text, by path; keeps no tensor alive."""
    return {path: describe(leaf) for path, leaf in zip(call.paths, call.leaves, strict=True)}


def differences(before: Mapping[str, str], after: Mapping[str, str], limit: int = 3) -> str:
    """The first places where two summaries differ, for the log: `hidden_states [1, 16, 8] -> [1, 24, 8]`."""
    paths = dict.fromkeys([*after, *before])
    found = [f"{path} {before.get(path, 'absent')} -> {after.get(path, 'absent')}" for path in paths if before.get(path) != after.get(path)]
    return "; ".join(found[:limit]) + (f" and {len(found) - limit} more" if len(found) > limit else "")


def describe(value: Any) -> str:
    """`[2, 16, 8] float32 cpu` for a tensor, else its repr."""
    if isinstance(value, torch.Tensor):
        return f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')} {value.device}"
    return repr(value)
