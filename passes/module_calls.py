"""Every call of a module, by way of a function of one's own.

Before: module(x)                       # forward and hooks
After:  handle(module, call, (x,), {})   # while `module_calls(handle)` is active; `call(module, x)` is what would have run
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def module_calls(handle: Callable[..., Any]) -> Iterator[Callable[[], None]]:
    """Send every call of a module to `handle(module, call, args, kwargs)`; `call` is what would have run.

    Gives a function that does so again where a tracer inside the block (that of a higher-order operator) has put its own in place.
    """
    usual = torch.nn.Module.__call__

    def call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return handle(module, usual, args, kwargs)

    def install() -> None:
        torch.nn.Module.__call__ = call  # type: ignore[method-assign]

    try:
        install()
        yield install
    finally:
        torch.nn.Module.__call__ = usual  # type: ignore[method-assign]
