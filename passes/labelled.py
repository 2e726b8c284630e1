"""Weights that are a tensor with attributes (GGUF's bytes and how they are packed): a class of tensors that does not say how operators compute with it.

Before: linear.weight is a `GGUFParameter` with `quant_type`; the layer unpacks its bytes
After:  %bytes = get_attr[_weight_0.content], and the operators that unpack them
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.compat import pytree
from seqpar.errors import TraceError
from seqpar.passes.effects import same

PLAIN = (Tensor, nn.Parameter, nn.Buffer, nn.UninitializedParameter, nn.UninitializedBuffer)

MISSING = object()
CONVERSIONS = ("_make_subclass", "as_subclass")


def is_labelled(weight: Any) -> bool:
    """True for a real tensor of a class of its own."""
    return isinstance(weight, Tensor) and type(weight) not in PLAIN and type(weight).__torch_dispatch__ is Tensor.__torch_dispatch__


class Content:
    """The numbers in such a weight of a model, as a plain tensor; the model may replace the weight. names: the dictionary that holds it."""

    def __init__(self, names: dict[str, Any], name: str) -> None:
        self.names, self.name = names, name

    @property
    def content(self) -> Tensor:
        return plain(self.names[self.name])


def plain(weight: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        content = weight.detach()
        return content if torch.compiler.is_compiling() else content.as_subclass(Tensor)  # a compiler sees no class here


class Likeness:
    """Mixed into the class of such a weight: a traced tensor that looks like it."""

    content: Tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        """Every operator sees the tensor inside, and returns plain ones."""
        args, kwargs = pytree.tree_map_only(Likeness, lambda likeness: likeness.content, (args, dict(kwargs or {})))
        return function(*args, **kwargs)


def likeness(kind: type, content: Tensor, attributes: Mapping[str, Any]) -> Any:
    """A traced tensor as one of class `kind`, with these attributes."""
    if not issubclass(kind, Likeness):
        kind = type(kind.__name__, (Likeness, kind), {"__module__": kind.__module__})
    with torch._C.DisableTorchFunctionSubclass():
        made: Any = Tensor._make_wrapper_subclass(kind, content.shape, strides=content.stride(), dtype=content.dtype, device=content.device)
    made.__dict__.update(attributes)
    made.content = content
    return made


def check_attributes(weight: Tensor, traced: Any, path: str) -> None:
    """Refuse a weight whose attributes a call changes.

    Raises:
        TraceError: names the attribute.
    """
    now = {name: value for name, value in vars(traced).items() if name != "content"}
    for name in now.keys() | vars(weight).keys():
        if name not in now or not same(vars(weight).get(name, MISSING), now[name]):
            raise TraceError(f"a call of the model changes the attribute {name} of its weight {path}: a program would leave that out. Keep it elsewhere, or pass it as an argument")


@contextmanager
def conversions_traced() -> Iterator[None]:
    """Let code turn likenesses into plain tensors and back, as it does with the weights; torch's own functions give a tensor another class, which no traced one can have."""
    make, turn = Tensor._make_subclass, Tensor.as_subclass
    before = {name: vars(Tensor)[name] for name in CONVERSIONS if name in vars(Tensor)}

    def converted(kind: type, data: Any, usual: Any) -> Any:
        if not isinstance(data, Likeness) and not issubclass(kind, Likeness):
            return usual()
        content = data.content if isinstance(data, Likeness) else data
        return likeness(kind, content, {}) if kind not in PLAIN else content

    Tensor._make_subclass = staticmethod(lambda kind, data, *more, **named: converted(kind, data, lambda: make(kind, data, *more, **named)))  # type: ignore[method-assign, assignment]
    Tensor.as_subclass = lambda data, kind: converted(kind, data, lambda: turn(data, kind))  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        for name in CONVERSIONS:
            setattr(Tensor, name, before[name]) if name in before else delattr(Tensor, name)
