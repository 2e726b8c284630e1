"""A model as a function of its tensors alone, for the tracer."""

import builtins
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from seqpar.compat import pytree
from seqpar.passes.arguments import Call
from seqpar.passes.effects import StateWatch
from seqpar.passes.opaque import OpaqueReplayer
from seqpar.passes.replay import Replayer
from seqpar.passes.stamp import Stamper
from seqpar.passes.state import StateWrite, state_after, state_writes
from seqpar.passes.warm import restored
from seqpar.passes.weight_casts import Casts
from seqpar.passes.weight_parts import Parts


class Result:
    """What the model returned while it was traced. No container, so that torch.export does not put it back."""

    spec: Any = None
    in_graph: tuple[bool, ...] = ()
    literals: tuple[Any, ...] = ()
    states: tuple[StateWrite, ...] = ()  # outputs counted from the first of them
    assigns = False  # attributes of the model, or what they hold


class BufferAssigned(Exception):  # noqa: N818 - an answer, not an error
    """The model gives a buffer another tensor, which only torch.export sees."""


class FlatModel(torch.nn.Module):
    """The model as a function from a tuple of tensors to a tuple of tensors (outputs, then values read); everything else is fixed.

    `repeatable`: it is run more than once in one trace, and each run must find the model as the first did. `stamper`: copies what blocks that are alike do.
    """

    repeatable = False
    stamper: Stamper | None = None

    def __init__(self, model: torch.nn.Module, call: Call, positions: Sequence[int], replayer: Replayer, opaque: OpaqueReplayer):
        super().__init__()
        self.model = model
        self.call, self.positions = call, tuple(positions)
        self.replayer, self.opaque = replayer, opaque
        self.result = Result()
        self.parts = Parts(model)

    def forward(self, leaves: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        full = list(self.call.leaves)
        for position, leaf in zip(self.positions, leaves, strict=True):
            full[position] = leaf
        arguments = self.call.arguments(full)
        before = state_after(arguments)
        args, kwargs = self.call.bind(arguments)
        stamps = nullcontext() if self.stamper is None else self.stamper.active()
        casts = Casts(self.model)
        with self.parts.together(), casts.active(), self.replayer, self.opaque.active(), usual_extremes(), unchanging(self.model) if self.repeatable else nullcontext(), stamps as run:
            watch = StateWatch(self.model)
            returned = self.model(*args, **kwargs)
            casts.settle()
            self.result.assigns = watch.changed() is not None
        self.result.states, assigned = state_writes(before, state_after(arguments), leaves)
        outputs, self.result.spec = pytree.tree_flatten(returned)
        inside = tuple(isinstance(out, torch.Tensor | torch.SymInt) for out in outputs)
        self.result.in_graph = inside
        self.result.literals = tuple(None if traced else out for out, traced in zip(outputs, inside, strict=True))
        results = (*(out for out, traced in zip(outputs, inside, strict=True) if traced), *assigned, *self.replayer.asked)
        if run is not None:
            run.finish(results)
        return results


EXTREMES = {"max": builtins.max, "min": builtins.min}


@contextmanager
def usual_extremes() -> Iterator[None]:
    """Let `max(lengths)` and `min(lengths)` of one tensor go through it, as ever. torch.export puts `torch.maximum` in their place, which takes two."""

    def either(usual: Any, exported: Any) -> Any:
        return lambda *args, **kwargs: (usual if len(args) == 1 and isinstance(args[0], torch.Tensor) else exported)(*args, **kwargs)

    before = {name: getattr(builtins, name) for name in EXTREMES}
    try:
        for name, exported in before.items():
            setattr(builtins, name, either(EXTREMES[name], exported))
        yield
    finally:
        for name, exported in before.items():
            setattr(builtins, name, exported)


@contextmanager
def unchanging(model: torch.nn.Module) -> Iterator[None]:
    """Put the model's Python state back after a run. Raises BufferAssigned if the run assigned a buffer."""
    before = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    with restored(model):
        yield
        if any(now.keys() != old.keys() or any(now[name] is not old[name] for name in old) for now, old in before):
            raise BufferAssigned
