"""Models whose result depends on what an earlier call left on them: refused, because a program computes from inputs and weights alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from seqpar.compat import pytree
from seqpar.errors import TraceError
from seqpar.passes.arguments import Call
from seqpar.passes.effects import StateWatch
from seqpar.passes.read_guard import stirred
from seqpar.passes.replay import example
from seqpar.passes.warm import restored, warm_up

EQUAL = 1e-4  # relative difference of two runs of the same kernels; in half precision:
EQUAL_HALF = 1e-2


def check_no_state(model: torch.nn.Module, call: Call) -> None:
    """Eager calls with the same inputs, and others between them, for a model that assigned an attribute while it was traced (most keep something to look at, or a table).

    Raises:
        TraceError: their results differ.
    """
    with restored(model):
        first = _run(model, call)
        watch = StateWatch(model)
        _run(model, replace(call, leaves=tuple(map(stirred, call.leaves))))
        second = _run(model, call)
        changed = watch.changed()
    if first and changed is not None and len(first) == len(second) and any(map(_differ, first, second)):
        raise TraceError(
            f"{type(model).__name__} keeps state from one call to the next: called twice with the same inputs it returns something else, and changes {changed}. "
            "Pass that state as an argument and return it, reset it before each call, or write it in place into a registered buffer (`self.name.copy_(...)`)."
        )


def _run(model: torch.nn.Module, call: Call) -> list[Tensor]:
    """The tensors of the result; none if the call fails."""
    results: list[Any] = []
    warm_up(model, *example(call), results=results)
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


def _differ(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return not torch.equal(a, b)
    bound = EQUAL_HALF if a.dtype.itemsize < 4 else EQUAL
    a, b = (x.nan_to_num().to(torch.complex128 if x.is_complex() else torch.float64) for x in (a, b))
    return bool((a - b).norm() > bound * a.norm())
