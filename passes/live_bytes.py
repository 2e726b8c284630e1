"""How many bytes of tensors a call keeps alive at its peak, on any device (meta included)."""

import weakref
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

from seqpar.compat import TorchDispatchMode, pytree


class LiveBytes(TorchDispatchMode):
    """While active, `peak` is the most bytes that were alive after any operator in tensors made since the start.

    Not seen: what an operator allocates and frees within itself. `known`: tensors (weights, inputs) whose views are not new.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = 0
        self._now = 0
        self._known: dict[int, Tensor] = {}  # kept alive: another storage could get the address of one that is gone
        self._alive: dict[int, int] = {}
        for tensor in known:
            self.know(tensor)

    def know(self, tensor: Tensor) -> None:
        """This tensor, and views of it, are not counted."""
        self._known[tensor.untyped_storage()._cdata] = tensor

    def see(self, values: Any) -> None:
        """Count the tensors among these results of one operator."""
        for tensor in pytree.tree_leaves(values):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        self.peak = max(self.peak, self._now)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # what it wraps is seen instead
        result = func(*args, **(kwargs or {}))
        self.see(result)
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
