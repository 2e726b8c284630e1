"""`seqpar.suggest`: which split of the ranks suits a model, a call and a machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from seqpar import logs
from seqpar.compile import split_inputs
from seqpar.errors import SeqparError, TraceError
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.machines import find_machine
from seqpar.passes.memory import Memory
from seqpar.passes.pipeline import partition
from seqpar.passes.report import exposed_seconds
from seqpar.passes.text import amount, duration, table
from seqpar.passes.trace import Traced, trace
from seqpar.runtime.mesh import check_degrees
from seqpar.runtime.travel import check_comm_dtype

CLOSE = 1.02  # splits within 2 % of the fastest: the one with the fewest ranks, then bytes, is taken


@dataclass(frozen=True)
class Split:
    """One split of the ranks.

    Attributes:
        ulysses: ranks that exchange attention heads.
        ring: ranks keys and values travel around.
        seconds: predicted, of one call on the slowest rank.
        exposed: those of them in which it waits for collectives.
        hidden: seconds of collectives behind work.
        received: bytes per rank and call.
        calls: collectives per call.
        memory: bytes per rank.
        sharded: share of the work that is divided.
        fits: whether the memory of the machine holds it.
        refused: why this split is impossible (the numbers are None then).
    """

    ulysses: int
    ring: int
    seconds: float | None = None
    received: int | None = None
    calls: int | None = None
    memory: int | None = None
    sharded: float | None = None
    fits: bool = True
    refused: str = ""
    exposed: float | None = None
    hidden: float | None = None

    @property
    def ranks(self) -> int:
        """Devices that it takes."""
        return self.ulysses * self.ring

    @property
    def name(self) -> str:
        """`ulysses 4 x ring 2`."""
        return "stay on one device" if self.ranks == 1 else f"ulysses {self.ulysses} x ring {self.ring}"


@dataclass(frozen=True)
class Suggestion:
    """`print` it, or take `best.ulysses` and `best.ring`.

    Attributes:
        machine: whose rates were used.
        world_size: devices at hand.
        rows: every split, impossible ones too.
        best: the recommended one of `rows`, never a refused one.
    """

    machine: Machine
    world_size: int
    rows: tuple[Split, ...]
    best: Split

    def __post_init__(self) -> None:
        assert self.best in self.rows and not self.best.refused

    def __str__(self) -> str:
        alone = next(row.seconds for row in self.rows if row.ranks == 1)
        rows = [_cells(row, alone, row == self.best) for row in self.rows]
        header = ("", "ranks", "time", "speed", "exposed", "hidden", "received", "calls", "memory per rank", "")
        advice = f"recommended: {self.best.name}" + ("" if self.best.fits else "; it does not fit into the memory either, it needs the least")
        return "\n".join([f"{self.world_size} ranks, {self.machine.name}", *table(header, rows), advice])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        machine = {k: v for k, v in asdict(self.machine).items() if v != float("inf")}
        return {"machine": machine, "world_size": self.world_size, "best": asdict(self.best), "rows": [asdict(row) for row in self.rows]}


def suggest(
    model: torch.nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    world_size: int,
    *,
    hardware: str | Machine = "H100",
    comm_dtype: torch.dtype | None = None,
) -> Suggestion:
    """Predict one call of `model` for every split of up to `world_size` ranks, and recommend one.

    The model is traced once, on the meta device if it lives there. Times are of contractions, and of waiting for collectives where no such work
    hides them, at the rates of `hardware`, for 16-bit values: give the model and the inputs in the dtype they will run in. Memory is weights, inputs
    and activations at their peak.

    Args:
        example_inputs: tuple of positional or dict of keyword inputs, full (global) tensors.
        world_size: devices at hand; splits that divide it are tried, "stay on one device" among them.
        hardware: a name of `seqpar.partitioner.machines.MACHINES` ("H100", "A100", "L40", "4090", …), a profile `NAME.json` of `seqpar.tools.calibrate`, or a `Machine`.
        comm_dtype: what attention's exchanges are rounded to, as in `sp_compile`.

    Raises:
        UnsupportedError: nothing travels as `comm_dtype`.
        MeshError: no such hardware, or `world_size` is not a positive integer.
        SeqparError: the model cannot be traced.
    """
    logs.configure()
    check_degrees(world_size=world_size)
    check_comm_dtype(comm_dtype)
    machine = find_machine(hardware).at_real_rates()
    args, kwargs = split_inputs(example_inputs)
    traced = trace(model, args, kwargs, dynamic=False)
    rows = tuple(_try(traced, ulysses, ring, machine, comm_dtype) for ulysses, ring in splits(world_size))
    return Suggestion(machine, world_size, rows, _best(rows))


def splits(world_size: int) -> Iterator[tuple[int, int]]:
    """(ulysses, ring) of every product that divides `world_size`; fewest ranks first, then most Ulysses."""
    for ranks in (n for n in range(1, world_size + 1) if world_size % n == 0):
        yield from ((u, ranks // u) for u in range(ranks, 0, -1) if ranks % u == 0)


def _try(traced: Traced, ulysses: int, ring: int, machine: Machine, comm_dtype: torch.dtype | None) -> Split:
    try:
        plan = partition(traced, ulysses=ulysses, ring=ring, machine=machine, comm_dtype=comm_dtype).plan
        assert plan.inspector is not None
        memory: Memory = plan.inspector.memory
    except TraceError:
        raise
    except SeqparError as error:
        return Split(ulysses, ring, refused=str(error).partition(". ")[0])
    received, calls = sum(plan.comm_bytes_per_rank.values()), sum(plan.comm_calls.values())
    fits = memory.total <= machine.memory_bytes
    seconds = plan.predicted_seconds
    return Split(ulysses, ring, seconds["total"], received, calls, memory.total, plan.sharded_flop_fraction, fits, exposed=exposed_seconds(seconds), hidden=seconds["hidden"])


def _best(rows: Sequence[Split]) -> Split:
    possible = [row for row in rows if not row.refused]
    fitting = [row for row in possible if row.fits]
    if not fitting:
        return min(possible, key=lambda row: row.memory or 0)
    fastest = min(row.seconds or 0.0 for row in fitting)
    return min((row for row in fitting if (row.seconds or 0.0) <= CLOSE * fastest), key=lambda row: (row.ranks, row.received))


def _cells(row: Split, alone: float | None, best: bool) -> tuple[str, ...]:
    if row.refused:
        return (row.name, str(row.ranks), *("-" for _ in range(7)), f"refused: {row.refused}")
    assert row.seconds is not None and row.received is not None and row.memory is not None
    speed = f"{(alone or 0.0) / row.seconds:.2f} x" if row.seconds else "-"
    notes = [text for text, said in (("recommended", best), ("does not fit", not row.fits)) if said]
    return (row.name, str(row.ranks), duration(row.seconds), speed, duration(row.exposed or 0.0), duration(row.hidden or 0.0), f"{amount(row.received)}B", str(row.calls), f"{amount(row.memory)}B", ", ".join(notes))
