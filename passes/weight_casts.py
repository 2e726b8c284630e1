"""Weights that are cast for the time of a call (layerwise casting): a program casts what it reads, the model's own stay as they are.

Before: module.to(torch.bfloat16) before its `forward`, module.to(torch.float8_e4m3fn) after it
After:  %w = get_attr[proj.weight] (float8); %c = aten._to_copy(%w, dtype=bfloat16); %y = aten.linear(%x, %c)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from seqpar.errors import TraceError
from seqpar.passes.trace_error import calling_line


@contextmanager
def casts_of_weights(model: nn.Module) -> Iterator[None]:
    """In a traced run of the model, let `Module.to` put another tensor in the place of a weight. torch's own gives the weight another content, which no tracer sees.

    Raises:
        TraceError: a weight is changed otherwise, or is not cast back.
    """
    before = [(path, names, dict(names)) for path, module in model.named_modules() for names in (module._parameters, module._buffers)]
    usual, changed = nn.Module._apply, False

    def apply(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        nonlocal changed
        for child in module.children() if recurse else ():
            child._apply(function)
        held: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for names in held:
            for name, weight in names.items():
                if weight is not None:
                    names[name] = cast(function, weight, f"{type(module).__name__}.{name}")
                    changed |= names[name] is not weight
        return module

    nn.Module._apply = apply  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module._apply = usual  # type: ignore[method-assign]
    for path, names, old in before if changed else ():
        for name, weight in old.items():
            now = names.get(name)
            if now is not weight and isinstance(now, Tensor) and isinstance(weight, Tensor):
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
