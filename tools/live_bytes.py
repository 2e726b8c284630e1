"""How many bytes of tensors a call keeps alive at its peak, on any device."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from seqpar.compat import TorchDispatchMode, pytree


class LiveBytes(TorchDispatchMode):
    """While active, `peak` is the most bytes that were alive after any operator in tensors made since the start.

    Not seen: what an operator allocates and frees within itself. `known`: tensors (weights, inputs) whose views are not new.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        self.peak = max(self.peak, self._now)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._known and key not in self._alive:
            self._alive[key] = storage.nbytes()
            self._now += storage.nbytes()
            weakref.finalize(storage, self._forget, key).atexit = False

    def _forget(self, key: int) -> None:
        self._now -= self._alive.pop(key)
