"""Memory of one rank, estimated on meta tensors: what the emitted program keeps alive, in its order of execution.

The peak counts the storages of all values between their operator and their last reader (views share their base), wire buffers of exchanges
and rings included. Not counted: what a kernel allocates and frees within itself, fragmentation, other caches of the allocator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from seqpar.compat import pytree
from seqpar.passes.count import CountInterpreter, Counts, counting_groups, to_meta
from seqpar.passes.live_bytes import LiveBytes
from seqpar.passes.weight_parts import parts_of


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank (the busiest). parameters (buffers and constants included) and inputs are whole on every rank.

    peak_alone: activations at their peak in one process that runs the whole model; peak: of this rank's program.
    """

    parameters: int
    inputs: int
    peak_alone: int
    peak: int

    @property
    def total_alone(self) -> int:
        """All bytes of one process."""
        return self.parameters + self.inputs + self.peak_alone

    @property
    def total(self) -> int:
        """All bytes of one of the ranks."""
        return self.parameters + self.inputs + self.peak


class LiveInterpreter(CountInterpreter):
    """Runs a program on meta tensors and sees the result of every operator; inside seqpar's own functions, of all they call."""

    def __init__(self, gm: fx.GraphModule, groups: dict[str, Any], live: LiveBytes) -> None:
        super().__init__(gm, groups, Counts())
        self.live = live

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        for tensor in pytree.tree_leaves(value):
            if isinstance(tensor, Tensor):
                self.live.know(tensor)
        return value

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(target, "__module__", "").startswith("seqpar."):
            with self.live:
                return super().call_function(target, args, kwargs)
        # An operator is seen whole: on meta tensors it may be composed of others than on the device.
        result = super().call_function(target, args, kwargs)
        self.live.see(result)
        return result


def peak_bytes(gm: fx.GraphModule, example: Sequence[Tensor], *, ulysses: int = 1, ring: int = 1, rank: int = 0) -> int:
    """Most bytes alive at once in tensors that the program of `rank` makes; weights and full example inputs are not counted."""
    inputs = [to_meta(x) for x in example]
    live = LiveBytes(inputs)
    interpreter = LiveInterpreter(gm, counting_groups(ulysses, ring, rank, Counts().traffic), live)
    with torch.no_grad():
        interpreter.run(*inputs)
    return live.peak


def weight_bytes(gm: fx.GraphModule) -> int:
    """Bytes of all parameters, buffers and constants of a program, shared storages once."""
    constants = [v for v in gm.__dict__.get("_seqpar_extra", {}).values() if isinstance(v, Tensor)]
    tensors = [part for t in (*gm.parameters(), *gm.buffers(), *constants) for _, part in parts_of(t, "")]
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())
