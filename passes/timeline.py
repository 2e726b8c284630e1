"""Predicted seconds of one call: a rank's program replayed in its emitted order, at the rates of a machine.

Computing advances a clock: contractions at `flops_per_s`. A transfer takes `latency_s` per call and its bytes at `bytes_per_s`, and has the rank's one
link to itself from its start, or from the end of what was started before it. A call that was not taken apart waits for it at once; the second half of
one that was (`schedule.py`) waits where it stands, for what is left. Of the R blocks of a ring, R - 1 are attended while the next one is on its way.
Pointwise operators, norms and launches are left out: they divide by the ranks like the rest, and hide no less than is said here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from seqpar.partitioner.cost import Machine
from seqpar.passes.count import Counts
from seqpar.passes.estimate import transfer_seconds
from seqpar.passes.schedule import HALVES
from seqpar.runtime.counting import KINDS, Traffic

RING = "ring"
STARTS = frozenset(start for start, _ in HALVES.values())
FINISHES = frozenset(finish for _, finish in HALVES.values())


@dataclass(frozen=True)
class Timeline:
    """Seconds of one call on one rank.

    wire: per kind of collective, on the link; exposed: of that, waited for; hidden: while the rank computes. spent: name of a node -> its computing and waiting.

    Invariants: `total` is `compute` and all that is exposed; what is on the wire is exposed or hidden.
    """

    total: float
    compute: float
    wire: Mapping[str, float]
    exposed: Mapping[str, float]
    hidden: Mapping[str, float]
    spent: Mapping[str, float]

    def to_dict(self) -> dict[str, float]:
        """By "compute", kind of collective (on the wire), "hidden" (all kinds, behind work) and "total"."""
        return {"compute": self.compute, **self.wire, "hidden": sum(self.hidden.values()), "total": self.total}


def timeline(nodes: Iterable[Node], counts: Counts, machine: Machine) -> Timeline:
    """Replay nodes of a program in this order: all of its graph, or some. counts: of that rank, by the names of the program."""
    clock = _Clock(counts, machine)
    for node in nodes:
        clock.run(node)
    return Timeline(clock.now, clock.compute, clock.wire, clock.exposed, clock.hidden, clock.spent)


@dataclass
class _Clock:
    counts: Counts
    machine: Machine
    now: float = 0.0
    compute: float = 0.0
    transfers: list[tuple[float, float, str]] = field(default_factory=list)  # begin, end and kind of what is under way, one behind the other
    free: float = 0.0  # when the link is
    flying: dict[Node, float] = field(default_factory=dict)  # first half -> when it will have arrived
    wire: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    exposed: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    hidden: dict[str, float] = field(default_factory=lambda: dict.fromkeys(KINDS, 0.0))
    spent: dict[str, float] = field(default_factory=dict)

    def run(self, node: Node) -> None:
        """One line of the program."""
        before, work = self.now, self.counts.flops.get(node.name, 0) / self.machine.flops_per_s
        if node.target in STARTS:
            whole = next(user for user in node.users if user.target in FINISHES)
            self.flying[node] = self.send(self.counts.received.get(whole.name, Traffic()))
        elif node.target in FINISHES and node.args[0] in self.flying:
            self.wait(self.flying.pop(node.args[0]))  # type: ignore[arg-type]
            self.work(work)
        else:
            traffic = self.counts.received.get(node.name, Traffic())
            self.wait(self.send(traffic))
            self.work_around_the_ring(work, traffic)
        if self.now > before:
            self.spent[node.name] = self.now - before

    def send(self, traffic: Traffic) -> float:
        """Start what does not go around a ring; when it will have arrived."""
        arrived = self.now
        for kind in KINDS:
            if kind != RING and traffic.calls[kind]:
                arrived = self.transfer(kind, transfer_seconds(traffic.bytes[kind], traffic.calls[kind], self.machine))
        return arrived

    def work_around_the_ring(self, seconds: float, traffic: Traffic) -> None:
        """Attend one block after another, the next one on its way; without a ring, one block."""
        journeys = traffic.calls[RING]
        each = transfer_seconds(traffic.bytes[RING], journeys, self.machine) / journeys if journeys else 0.0
        for _ in range(journeys):
            arrived = self.transfer(RING, each)
            self.work(seconds / (journeys + 1))
            self.wait(arrived)
        self.work(seconds / (journeys + 1))

    def transfer(self, kind: str, seconds: float) -> float:
        """Occupy the link as soon as it is free; until when."""
        begin = max(self.free, self.now)
        self.free = begin + seconds
        self.transfers.append((begin, self.free, kind))
        self.wire[kind] += seconds
        return self.free

    def work(self, seconds: float) -> None:
        self.compute += seconds
        self.advance(self.now + seconds, self.hidden)

    def wait(self, until: float) -> None:
        """The link is busy all that time: what is waited for stands in line behind the others, and each is charged its turn."""
        self.advance(max(self.now, until), self.exposed)

    def advance(self, until: float, charged: dict[str, float]) -> None:
        for begin, end, kind in self.transfers:
            charged[kind] += max(0.0, min(end, until) - max(begin, self.now))
        self.now = until
        self.transfers = [one for one in self.transfers if one[1] > until]
