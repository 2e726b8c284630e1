"""Models whose code does something else while it is traced than when it runs.

Before: `if torch.compiler.is_compiling(): mask = causal(…)`, in a model that attends both ways when it is called
After:  such code gets the answer it gets in an ordinary call, if only so the graph computes what the model does; if it does not even then, the model is refused
"""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from torch import Tensor

from seqpar.errors import TraceError
from seqpar.passes.arguments import Call
from seqpar.passes.kept_state import differ, results_of
from seqpar.passes.model_code import names_in_code

if TYPE_CHECKING:
    from seqpar.passes.trace import Traced

log = logging.getLogger("seqpar.trace")

QUESTIONS = ((torch.compiler, "is_compiling"), (torch.compiler, "is_exporting"), (torch.compiler, "is_dynamo_compiling"), (torch.jit, "is_tracing"))
TELLING = {"FakeTensor", *(name for _, name in QUESTIONS)}
FAR = (0.02, 0.2)  # more than rounding makes, and little beside what another mask makes; in half precision


def questions_in(model: torch.nn.Module) -> list[str]:
    """What the model's code names that tells whether it is traced."""
    return sorted(TELLING & names_in_code(model))


@contextmanager
def as_ever() -> Iterator[None]:
    """The user's code is told that nobody traces it."""

    def told(question: Callable[..., bool]) -> Callable[..., bool]:
        @functools.wraps(question)
        def answer(*args: Any, **kwargs: Any) -> bool:
            by_torch = str(sys._getframe(1).f_globals.get("__name__")).partition(".")[0] in ("torch", "seqpar")
            return by_torch and question(*args, **kwargs)

        return answer

    with ExitStack() as stack:
        for owner, name in QUESTIONS:
            stack.enter_context(mock.patch.object(owner, name, told(getattr(owner, name))))
        yield


def as_it_runs(model: torch.nn.Module, call: Call, traced: Traced, again: Callable[[], Traced]) -> Traced:
    """`traced`, or the trace `again` in which the model is told that nobody traces it: the one that computes what the model does. Compared only if its code asks.

    Raises:
        TraceError: neither does.
    """
    asked = questions_in(model)
    expected = results_of(model, call) if asked else []
    if not expected or not _differs(traced, expected) or _far(results_of(model, call), expected):  # the last: no two calls are alike
        return traced
    try:
        with as_ever():
            other = again()
    except TraceError as error:
        log.info("tracing %s as it runs failed: %s", type(model).__name__, error)
    else:
        if not _differs(other, expected):
            return other
    raise TraceError(
        f"{type(model).__name__} computes something else while it is traced than when it runs: its code asks whether it is traced ({', '.join(asked)}), and the results for the example "
        "inputs differ. Set what it decides there explicitly (pass the mask, choose the kind of attention in its configuration)"
    )


def _differs(traced: Traced, expected: list[Tensor]) -> bool:
    """Whether the graph's results for the example are far from these; False if they are not known."""
    try:
        with torch.inference_mode(False), torch.no_grad(), torch.random.fork_rng(devices=[]):
            found = traced.gm(*(traced.call.leaves[i].detach().clone(memory_format=torch.contiguous_format) for i in traced.input_positions))[: traced.num_outputs]
    except Exception as error:  # out of memory, for example: the program of a rank needs less
        log.info("the graph was not compared with the model: %s", error)
        return False
    return _far([leaf for leaf in found if isinstance(leaf, Tensor)], expected)


def _far(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Numbers that are not these, rounded. (An index of the largest of nearly equal ones may be another.)"""
    pairs = [(a, b) for a, b in zip(found, expected, strict=False) if b.is_floating_point() or b.is_complex()]
    return len(found) == len(expected) and any(differ(a, b, FAR) for a, b in pairs)
