"""Results of operators on meta tensors, remembered by what they depend on: the sizes, strides and dtypes of the operands.

Meta kernels written in Python take a thousand times longer than making an empty tensor, and a program calls the same operator on the same
sizes in every block and on every rank. An attention around a ring is a hundred of them.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from seqpar.compat import OpOverload, pytree
from seqpar.runtime.counting import CountingGroup

LITERALS = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class _Made:
    """How to make one result anew: new memory, or a view of the operand `of` (index among the tensor leaves) at `offset` from its start."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    of: int | None = None
    offset: int = 0

    def make(self, operands: Sequence[Tensor]) -> Tensor:
        if self.of is None:
            return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        base = operands[self.of]
        return base.as_strided(self.shape, self.stride, base.storage_offset() + self.offset)


@dataclass
class MetaResults:
    """Calls functional ATen operators on meta tensors, each once per kind of operands; all other calls just run.

    Invariants: a remembered result has the sizes, strides, dtype and aliasing that the operator itself gave.
    """

    _known: dict[Hashable, tuple[type, tuple[_Made, ...], Any]] = field(default_factory=dict)

    def __call__(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`target(*args, **kwargs)`; `kwargs` and nested lists included in what decides."""
        if not isinstance(target, OpOverload) or target._schema.is_mutable:
            return target(*args, **kwargs)
        return self.noted(target, args, kwargs, lambda: (target(*args, **kwargs), None))[0]

    def noted(self, target: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], run: Callable[[], tuple[Any, Any]]) -> tuple[Any, Any]:
        """The result of a call without side effects, and what `run`, which makes it, noted beside the result."""
        operands: list[Tensor] = []
        key = (target, _key(args, operands), _key(dict(kwargs), operands))
        if None in key:
            return run()
        found = self._known.get(key)
        if found is None:
            result, note = run()
            recorded = _record(result, operands)
            if recorded is not None:
                self._known[key] = (*recorded, note)
            return result, note
        kind, made, note = found
        results = [m.make(operands) for m in made]
        return results[0] if kind is Tensor else kind(results), note


def _key(value: Any, operands: list[Tensor]) -> Hashable | None:
    """What a result depends on in an argument; its tensors are added to `operands`. None: it cannot be told."""
    if isinstance(value, Tensor):
        if type(value) not in (Tensor, torch.nn.Parameter) or value.device.type != "meta" or value.is_conj() or value.is_neg():
            return None
        place = next((i for i, known in enumerate(operands) if known is value), len(operands))
        operands.append(value)
        return (place, value.shape, value.stride(), value.dtype)
    if isinstance(value, LITERALS):
        return (type(value), value)
    if isinstance(value, CountingGroup):
        return (CountingGroup, value.size, value.rank)
    if isinstance(value, list | tuple):
        parts = tuple(_key(v, operands) for v in value)
        return None if None in parts else (type(value), parts)
    if isinstance(value, dict):
        parts = tuple(_key(v, operands) for v in value.values())
        return None if None in parts else (tuple(value), parts)
    return None


def _record(result: Any, operands: Sequence[Tensor]) -> tuple[type, tuple[_Made, ...]] | None:
    """How to make `result` again from operands like these; None if that cannot be said."""
    kind = Tensor if isinstance(result, Tensor) else type(result)
    leaves = pytree.tree_leaves(result)
    if kind not in (Tensor, list, tuple) or not all(type(leaf) is Tensor for leaf in leaves) or len(leaves) != (1 if kind is Tensor else len(result)):
        return None
    storages = {leaf.untyped_storage()._cdata for leaf in leaves}
    owners: dict[int, list[int]] = {}
    for i, operand in enumerate(operands):
        owners.setdefault(operand.untyped_storage()._cdata, []).append(i)
    made = []
    for leaf in leaves:
        if leaf.is_conj() or leaf.is_neg() or leaf.device.type != "meta" or any(leaf is operand for operand in operands):
            return None
        own = owners.get(leaf.untyped_storage()._cdata, [])
        if len(own) > 1 or (not own and (len(storages) < len(leaves) or leaf.storage_offset())):
            return None  # a view of either of two operands; results that share new memory
        of = own[0] if own else None
        if of is not None and operands[of].dtype != leaf.dtype:
            return None  # as_strided counts in elements of its own dtype
        offset = 0 if of is None else leaf.storage_offset() - operands[of].storage_offset()
        made.append(_Made(tuple(leaf.shape), leaf.stride(), leaf.dtype, of, offset))
    return kind, tuple(made)
