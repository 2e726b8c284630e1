"""What every program of the benchmark is made from, and what it offers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from torch import nn

from seqpar.runtime.mesh import SequenceMesh

Call = Callable[..., Any]
MANY = 256  # programs that torch.compile may make of one function: peers share hooks, and must not push each other out of the compiler


@dataclass(frozen=True)
class Setting:
    """What a contender gets: the model as it is, keyword inputs (whole), the place of this rank, and a Dynamo backend or None.

    slow_link: bits per second and seconds of delay of a simulated link. Invariants: `place` has at least two ranks.
    """

    model: nn.Module
    inputs: dict[str, Any]
    place: SequenceMesh
    backend: str | None = None
    slow_link: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        assert self.place.size > 1 and self.place.device_mesh is not None


@dataclass(frozen=True)
class Contender:
    """A way to run a model on the ranks of a mesh.

    suits: whether it has a meaning on (ulysses, ring). prepare: a callable with the model's keyword inputs (whole on every rank) that returns the
    model's outputs, whole on every rank; collective; raises whatever it likes, on every rank alike, where it cannot run.
    alone: rank 0 runs it, the others wait. option: what the command line calls it. about: for readers of the page.
    """

    option: str
    name: str
    suits: Callable[[int, int], bool]
    prepare: Callable[[Setting], Call]
    about: str
    alone: bool = False


def copied(model: nn.Module) -> nn.Module:
    """The same modules once more with the very same parameters and buffers: for peers that change a model in place."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def compiled(call: Call, backend: str | None) -> Call:
    """`call` through `torch.compile`, for sizes that do not change."""
    return call if backend is None else torch.compile(call, backend=backend, dynamic=False)


def many_programs() -> Any:
    """A context in which the compiler's limit is `MANY`."""
    return torch._dynamo.config.patch(recompile_limit=MANY)
