"""What a module does besides returning its results: seen by comparing before and after an eager call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar.passes.warm import DEPTH, remember

VALUE_DEPTH = 4  # global variables lead to registries of whole libraries
SIMPLE = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class StateWatch:
    """Attributes, buffers and parameters of a module and of the modules in it, and the content of other values, as they were."""

    def __init__(self, module: torch.nn.Module | None = None, values: Sequence[Any] = ()) -> None:
        self.containers: list[tuple[Any, Any]] = []
        seen: set[int] = set()
        for part in () if module is None else module.modules():
            remember(part.__dict__, self.containers, seen, DEPTH)
        for value in values:
            remember(value, self.containers, seen, VALUE_DEPTH)
        self.versions = [(label, value, version(value)) for container, _ in self.containers for label, value in entries(container) if isinstance(value, Tensor)]

    def changed(self) -> str | None:
        """What is not as it was, in words."""
        for container, before in self.containers:
            now, old = dict(entries(container)), dict(entries(before))
            for label in [*now, *(label for label in old if label not in now)]:
                if label not in old or label not in now or not same(old[label], now[label]):
                    return f"the attribute {label}" if isinstance(container, dict) else "the content of an attribute"
        return next((f"the content of {label}" for label, value, before in self.versions if version(value) != before), None)


def entries(container: Any) -> Iterator[tuple[str, Any]]:
    """(name, value) of a container."""
    if isinstance(container, dict):
        yield from ((str(key), value) for key, value in container.items())
    elif isinstance(container, set):
        yield from ((repr(value), value) for value in container)
    else:
        yield from ((str(index), value) for index, value in enumerate(container))


def same(old: Any, new: Any) -> bool:
    """The same object, or equal plain values (in tuples too, such as a shape noted anew in each call)."""
    if old is new:
        return True
    if type(old) is not type(new):
        return False
    if isinstance(old, tuple):
        return len(old) == len(new) and all(map(same, old, new))
    return isinstance(old, SIMPLE) and (old == new or (old != old and new != new))


def version(value: Tensor) -> int:
    """Counts the writes to a tensor; an inference tensor does not count."""
    return -1 if value.is_inference() else value._version


class RandomState:
    """The state of the random generators that a module could use."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.devices = sorted({tensor.device.index or 0 for tensor in tensors if tensor.device.type == "cuda"})
        self.before = self.read()

    def read(self) -> list[Tensor]:
        return [torch.get_rng_state(), *(torch.cuda.get_rng_state(device) for device in self.devices)]

    def used(self) -> bool:
        return not all(torch.equal(a, b) for a, b in zip(self.before, self.read(), strict=True))


def writes(state: StateWatch, tensors: Sequence[Tensor], versions: Sequence[int], leaves: Sequence[Any], leaves_after: Sequence[Any], random: RandomState) -> str | None:
    """Why a call of a module cannot be repeated by just calling it with the same inputs; None if it can.

    Args:
        tensors, versions: its tensor arguments, and their versions before the call.
        leaves, leaves_after: all leaves of its arguments before and after.
    """
    if (changed := state.changed()) is not None:
        return f"it changes {changed}"
    if any(version(tensor) != before for tensor, before in zip(tensors, versions, strict=True)):
        return "it writes to its inputs"
    if len(leaves) != len(leaves_after) or not all(same(a, b) for a, b in zip(leaves, leaves_after, strict=True)):
        return "it changes the containers it is called with"
    if random.used():
        return "it draws random numbers, and ranks cannot reproduce those of one process"
    return None
