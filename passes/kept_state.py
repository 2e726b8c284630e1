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

EQUAL = (1e-4, 1e-2)  # relative difference of two runs of the same kernels; in half precision


def check_no_state(model: torch.nn.Module, call: Call) -> None:
    """Eager calls with the same inputs, and others between them, for a model that assigned an attribute while it was traced (most keep something to look at, or a table).

    Raises:
        TraceError: their results differ.
    """
    with restored(model):
        first = results_of(model, call)
        watch = StateWatch(model)
        results_of(model, replace(call, leaves=tuple(map(stirred, call.leaves))))
        second = results_of(model, call)
        changed = watch.changed()
    if first and changed is not None and len(first) == len(second) and any(map(differ, first, second)):
        raise TraceError(
            f"{type(model).__name__} keeps state from one call to the next: called twice with the same inputs it returns something else, and changes {changed}. "
            "Pass that state as an argument and return it, reset it before each call, or write it in place into a registered buffer (`self.name.copy_(...)`)."
        )


def results_of(model: torch.nn.Module, call: Call) -> list[Tensor]:
    """The tensors of an eager call's result; none if it fails, or there are no values (on the meta device)."""
    results: list[Any] = []
    warm_up(model, *example(call), results=results)
    return [leaf for leaf in pytree.tree_leaves(results) if isinstance(leaf, Tensor)]


def differ(a: Tensor, b: Tensor, bounds: tuple[float, float] = EQUAL) -> bool:
    """Whether two results are different ones. bounds: relative difference of the same, and in half precision."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return True
    if not (a.is_floating_point() or a.is_complex()):
        return not torch.equal(a, b)
    bound = bounds[a.dtype.itemsize < 4]
    a, b = (x.nan_to_num().to(torch.complex128 if x.is_complex() else torch.float64) for x in (a, b))
    return bool((a - b).norm() > bound * a.norm())
