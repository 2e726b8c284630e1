"""What is known about a plan beyond its numbers: worked out when somebody asks, and kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from seqpar.partitioner.alternatives import Alternative, alternatives, attention_seconds
from seqpar.partitioner.cost import node_work
from seqpar.partitioner.key_sources import KeySources
from seqpar.partitioner.layout import LayoutView
from seqpar.partitioner.solve import classes
from seqpar.passes.drawing import Drawing, drawing
from seqpar.passes.memory import Memory, peak_bytes, weight_bytes
from seqpar.passes.plan_of import example_of, whole_flops
from seqpar.passes.stages import Stage, stages_of

if TYPE_CHECKING:
    from seqpar.passes.pipeline import Partitioned
    from seqpar.passes.why import Reader, Why

MAX_CLASSES = 6  # of equal attentions that are priced otherwise, the heaviest first


@dataclass(frozen=True)
class Details:
    """What `explain` shows beside the plan's own fields. rank: the busiest, whose stages and memory these are.

    cost: of the program as the solver prices it, in floating-point operations of one rank. attention_seconds: attention node -> its predicted time;
    runners_up: attention node -> what else was possible, fastest first.
    """

    rank: int
    stages: tuple[Stage, ...]
    memory: Memory
    cost: float
    attention_seconds: Mapping[str, float]
    runners_up: Mapping[str, tuple[Alternative, ...]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "rank": self.rank,
            "stages": [asdict(s) | {"results": list(s.results)} for s in self.stages],
            "memory": asdict(self.memory),
            "cost": self.cost,
            "attention_seconds": dict(self.attention_seconds),
            "runners_up": {node: [asdict(a) for a in found] for node, found in self.runners_up.items()},
        }


@dataclass(frozen=True)
class Kept:
    """Answers as plain data, for a plan without its graph."""

    details: Details
    drawing: Drawing

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; `from_dict.read_dataclass` is the inverse."""
        return {"details": self.details.to_dict(), "drawing": asdict(self.drawing)}


class Inspector:
    """Answers questions about one partitioned model. It keeps the traced graph, and with it the model's weights, but no inputs."""

    def __init__(self, partitioned: Partitioned) -> None:
        self.partitioned = partitioned

    @cached_property
    def rank(self) -> int:
        """The busiest rank."""
        totals = [c.total_flops for c in self.partitioned.counts]
        return totals.index(max(totals))

    @cached_property
    def memory(self) -> Memory:
        """Bytes of the busiest rank, and of one process."""
        found = self.partitioned
        gm, example, degrees = found.traced.gm, example_of(found), found.solution.degrees
        program = found.program(self.rank)
        alone = peak_bytes(gm, example)
        peak = alone if program is gm else peak_bytes(program, example, ulysses=degrees.ulysses, ring=degrees.ring, rank=self.rank)
        return Memory(weight_bytes(gm), sum(x.numel() * x.element_size() for x in example), alone, peak)

    @cached_property
    def details(self) -> Details:
        """Stages, memory and what else the solver could have chosen."""
        found = self.partitioned
        stages = stages_of(found, self.rank, whole_flops(found), found.machine)
        return Details(self.rank, stages, self.memory, found.solution.labels.cost, self._seconds(), self._runners_up())

    @cached_property
    def drawing(self) -> Drawing:
        """What a picture shows."""
        return drawing(self.partitioned)

    @cached_property
    def reader(self) -> Reader:
        """What answers `why`."""
        from seqpar.passes.why import Reader

        return Reader(self.partitioned)

    def _runners_up(self) -> dict[str, tuple[Alternative, ...]]:
        found, machine = self.partitioned, self.partitioned.machine
        inference, solution = found.inference, found.solution
        if solution.degrees.ranks == 1 or found.nothing_to_shard:
            return {}
        groups: list[set[Node]] = []
        for members in classes({n: r for n, r in inference.relations.items() if r.attention is not None}, inference):
            here = members & solution.labels.exchanged
            groups += [group for group in (here, members - here) if group]
        heaviest = sorted(groups, key=lambda g: -sum(node_work(n, inference.table.sizes) for n in g))[:MAX_CLASSES]
        return {node.name: tuple(others) for g in heaviest for others in (alternatives(inference, solution, g, machine),) for node in g}

    def _seconds(self) -> dict[str, float]:
        found = self.partitioned
        if found.solution.degrees.ranks == 1 or found.nothing_to_shard:
            return {}
        over = found.solution.labels.exchanged
        sources = KeySources(LayoutView(found.inference, found.solution, 0))
        return {
            n.name: attention_seconds(found.inference, found.solution, n, found.solution.degrees if n in over else None, found.machine, sources)
            for n, r in found.inference.relations.items()
            if r.attention is not None
        }

    def why(self, query: str) -> Why:
        """See `Plan.why`."""
        from seqpar.passes.why import why

        return why(self.reader, query)
