"""Weights that are made of other tensors: quantised ones, of which a program reads the tensors inside.

Before: linear.weight is an `Int8Tensor` of `qdata` and `scale` (torchao, quanto); its class says what a linear with it is
After:  %qdata = get_attr[linear.weight.qdata], %scale = get_attr[linear.weight.scale], and the operators that the class makes of a linear
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from seqpar.compat import is_wrapper
from seqpar.passes.labelled import Content, check_attributes, conversions_traced, is_labelled, likeness, plain


@dataclass(frozen=True)
class MadeOf:
    """A weight that is made of others, and where the model keeps it. names: one of the dictionaries `_parameters` and `_buffers` of a module."""

    names: dict[str, Any]
    name: str
    path: str
    weight: Any


def made_of_parts(model: nn.Module) -> list[MadeOf]:
    """The weights of a model that are made of others."""
    found = []
    for prefix, module in model.named_modules():
        for names in (module._parameters, module._buffers):
            found += [MadeOf(names, name, f"{prefix}.{name}" if prefix else name, weight) for name, weight in names.items() if is_wrapper(weight) or is_labelled(weight)]
    return found


def parts_of(weight: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """(path, tensor) of the plain tensors in a weight."""
    if not is_wrapper(weight):
        yield path, plain(weight)
        return
    for name in weight.__tensor_flatten__()[0]:
        yield from parts_of(getattr(weight, name), f"{path}.{name}")


def rebuilt(weight: Any, parts: Iterator[Tensor]) -> Any:
    """The same weight with other tensors in it, in the order of `parts_of`."""
    if is_labelled(weight):
        return likeness(type(weight), next(parts), vars(weight))
    if not is_wrapper(weight):
        return next(parts)
    names, context = weight.__tensor_flatten__()
    made = type(weight).__tensor_unflatten__({name: rebuilt(getattr(weight, name), parts) for name in names}, context, weight.shape, weight.stride())
    if isinstance(weight, nn.Parameter):
        made._is_param = True
    return made


class Parts(nn.Module):
    """The plain tensors in all such weights of a model, for a tracer that knows no others: as buffers of this module.

    Attributes:
        paths: name of a buffer, as the tracer says it -> what a program reads it by.
        contents: what a program needs for that besides the model, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.weights = made_of_parts(model)
        self.paths: dict[str, str] = {}
        self.contents: dict[str, Content] = {}
        self.distinct = list({id(kept.weight): kept for kept in self.weights}.values())  # a weight may have several places
        for kept in self.distinct:
            path = kept.path
            if is_labelled(kept.weight):
                path = f"_weight_{len(self.contents)}"
                self.contents[path] = Content(kept.names, kept.name)
                path += ".content"
            for part, tensor in parts_of(kept.weight, path):
                name = f"part_{len(self.paths)}"
                self.register_buffer(name, tensor.detach())
                self.paths[f"parts.{name}"] = part

    @contextmanager
    def apart(self) -> Iterator[None]:
        """The model without these weights, as the tracer must see it."""
        try:
            for kept in self.weights:
                kept.names[kept.name] = None
            yield
        finally:
            for kept in self.weights:
                kept.names[kept.name] = kept.weight

    @contextmanager
    def together(self) -> Iterator[None]:
        """In a run of the model: the weights again, of the traced tensors that this module holds now."""
        parts = iter(list(self._buffers.values()))
        with conversions_traced() if self.contents else nullcontext():
            try:
                traced = {id(kept.weight): rebuilt(kept.weight, parts) for kept in self.distinct}  # type: ignore[arg-type]
                for kept in self.weights:
                    kept.names[kept.name] = traced[id(kept.weight)]
                yield
                for kept in self.distinct:
                    if is_labelled(kept.weight):
                        check_attributes(kept.weight, traced[id(kept.weight)], kept.path)
            finally:
                for kept in self.weights:
                    kept.names[kept.name] = None
