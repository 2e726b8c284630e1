"""Weights that are cast for the time of a call (layerwise casting): a program casts what it reads, the model's own stay as they are.

Before: module.to(torch.bfloat16) before its `forward`, module.to(torch.float8_e4m3fn) after it
After:  %w = get_attr[proj.weight] (float8); %c = aten._to_copy(%w, dtype=bfloat16); %y = aten.linear(%x, %c)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.errors import TraceError
from seqpar.passes.trace_error import calling_line


class Casts:
    """In a traced run of a model, `Module.to` of its layers puts another tensor in the place of a weight. torch's own gives the weight another content, which no tracer sees."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(model.named_modules())
        self.before: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
        self.places: dict[int, list[tuple[dict[str, Any], str]]] = {}  # of the tensor that is there now
        self.made: list[Tensor] = []  # kept, so that no other gets their identity

    @contextmanager
    def active(self) -> Iterator[None]:
        """Around a run, and around what compares Python state before and after parts of it."""
        self.before = [(path, names, dict(names)) for path, module in self.modules.items() for names in (module._parameters, module._buffers)]
        for _, names, old in self.before:
            for name, weight in old.items():
                self.places.setdefault(id(weight), []).append((names, name))
        for module in self.modules.values():
            module.__dict__["_apply"] = partial(self.apply, module)
        try:
            yield
        finally:
            for module in self.modules.values():
                module.__dict__.pop("_apply", None)  # some share a dictionary

    def apply(self, module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`Module._apply`; a weight with several places is changed in all of them."""
        for child in module.children() if recurse else ():
            child._apply(function)
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for name, weight in [item for names in held for item in names.items()]:
            if weight is None:
                continue
            made = cast(function, weight, f"{type(module).__name__}.{name}")
            if made is not weight:
                made._is_param = getattr(weight, "_is_param", False)
                self.made.append(made)
                self.places[id(made)] = self.places.pop(id(weight), [])
                for names, place in self.places[id(made)]:
                    names[place] = made
        return module

    def settle(self) -> None:
        """The model has run.

        Raises:
            TraceError: a weight is not cast back.
        """
        for path, names, old in self.before if self.made else ():
            for name, weight in old.items():
                now = names.get(name)
                if now is weight or not isinstance(now, Tensor) or not isinstance(weight, Tensor):
                    continue
                if (now.dtype, now.device) != (weight.dtype, weight.device):
                    raise TraceError(f"a call of the model leaves {path}.{name} as {now.dtype} on {now.device}; it found it as {weight.dtype} on {weight.device}. Cast it back, or before compiling")
                names[name] = weight


def cast(function: Callable[[Tensor], Tensor], weight: Tensor, name: str) -> Tensor:
    """What `function` makes of a weight: the same one, or one of another dtype."""
    with torch.no_grad():
        made = function(weight)
    if made is not weight and (made.shape != weight.shape or (made.dtype, made.device) == (weight.dtype, weight.device)):
        raise TraceError(f"the model changes its weight {name} during a call, at {calling_line()}: a program would leave that out. Do it before compiling")
    return made
