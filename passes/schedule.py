"""Exchanges start as early as their inputs allow and are waited for as late as possible; independent work goes in between.

Before: %up = linear(%x, %w_up); %q = …; %h = seq_to_heads(%q, …, group="ulysses"); %o = attention(%h)
After:  %q = …; %h_wire = start_seq_to_heads(%q, …); %up = linear(%x, %w_up); %h = finish_seq_to_heads(%h_wire, %q, …); %o = attention(%h)

Collectives keep the order in which they were emitted, which is that of the traced graph on every rank: whatever is moved between them, and
though ranks may move different things (their parts differ in size), no rank waits for a collective that another one calls later.
An order is taken only if its peak of live bytes (wire buffers of what is in flight included) is at most MEMORY_BOUND times that of the
program as it was emitted; else one with a shorter reach, at last the program as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx
from torch.fx import Node

from seqpar.partitioner.cost import Machine
from seqpar.passes.count import Counts
from seqpar.passes.estimate import node_seconds, transfer_seconds
from seqpar.passes.share import with_graph
from seqpar.runtime.head_shares import (
    finish_pieces_to_seq,
    finish_seq_to_pieces,
    pieces_to_seq,
    seq_to_pieces,
    start_pieces_to_seq,
    start_seq_to_pieces,
)
from seqpar.runtime.layout import (
    finish_first_rank,
    finish_gather,
    finish_gather_many,
    first_rank,
    gather,
    gather_many,
    start_first_rank,
    start_gather,
    start_gather_many,
)
from seqpar.runtime.switch import finish_switch, start_switch, switch
from seqpar.runtime.ulysses import (
    finish_heads_to_seq,
    finish_seq_to_heads,
    heads_to_seq,
    seq_to_heads,
    start_heads_to_seq,
    start_seq_to_heads,
)

HALVES: Mapping[Any, tuple[Any, Any]] = {
    seq_to_heads: (start_seq_to_heads, finish_seq_to_heads),
    heads_to_seq: (start_heads_to_seq, finish_heads_to_seq),
    pieces_to_seq: (start_pieces_to_seq, finish_pieces_to_seq),
    seq_to_pieces: (start_seq_to_pieces, finish_seq_to_pieces),
    gather: (start_gather, finish_gather),
    gather_many: (start_gather_many, finish_gather_many),
    first_rank: (start_first_rank, finish_first_rank),
    switch: (start_switch, finish_switch),
}
"""What is called whole, and its two halves: start(*args) -> wire, finish(wire, *args) -> result."""
WHOLES: Mapping[Any, Any] = {start: whole for whole, (start, _) in HALVES.items()}
FINISHES = frozenset(finish for _, finish in HALVES.values())
ORIGIN = ("stack_trace", "nn_module_stack", "seqpar_source")
MEMORY_BOUND = 1.1
REACH = 2  # collectives that a node may be moved across


@dataclass(frozen=True)
class Step:
    """One line of the new program: a node, or one half of it."""

    node: Node
    half: int | None = None  # 0 starts, 1 finishes


def schedule(gm: fx.GraphModule, counts: Counts, machine: Machine = Machine()) -> fx.GraphModule:  # noqa: B008
    """The same program in an order in which communication is behind work; `gm` itself if nothing can be put there.

    gm: an emitted program, groups by axis; every node but its outputs is without side effects.
    counts: of this program, or of another rank's with parts of the same sizes, by node name.
    machine: what decides how much work hides an exchange.
    """
    program = _Program(gm.graph, counts, machine)
    if not any(node.target in HALVES for node in program.collectives):
        return gm
    limit = MEMORY_BOUND * program.peak(_as_emitted(program.nodes))
    for reach in range(REACH, 0, -1):
        steps = _joined(_Order(program, reach).run(), program.seconds)
        if not any(step.half == 0 for step in steps):
            return gm
        if program.peak(steps) <= limit:
            return with_graph(gm, _written(steps))
    return gm


def collectives_of(graph: fx.Graph) -> list[str]:
    """What an unbound program calls over which ranks, in order of starting: "seq_to_heads ulysses". Equal on all ranks, or they would wait forever."""
    return [f"{WHOLES.get(node.target, node.target).__name__} {node.kwargs['group']}" for node in graph.nodes if communicates(node)]


def communicates(node: Node) -> bool:
    """Whether a collective begins here: a call that is whole, or its first half."""
    return node.op == "call_function" and "group" in node.kwargs and node.target not in FINISHES


class _Program:
    """A graph with what its nodes cost: seconds, bytes of new storages, bytes on the wire."""

    def __init__(self, graph: fx.Graph, counts: Counts, machine: Machine) -> None:
        self.nodes = list(graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self.collectives = [node for node in self.nodes if node.op == "call_function" and "group" in node.kwargs]
        self.seconds = {node: node_seconds(counts, node.name, machine) for node in self.nodes}
        self.made = {node: counts.made.get(node.name, 0) for node in self.nodes}
        self.wire: dict[Node, int] = {}
        self.transfer: dict[Node, float] = {}
        for node in self.collectives:
            traffic = counts.received.get(node.name)
            calls, received = (sum(traffic.calls.values()), sum(traffic.bytes.values())) if traffic else (0, 0)
            self.wire[node] = 2 * received  # what is sent is alive as long
            self.transfer[node] = transfer_seconds(received, calls, machine)
        self.storages = self._storages()
        self.of_weights = self._of_weights()

    def _of_weights(self) -> frozenset[Node]:
        """What is made of weights alone: whole weights out of quantised ones, of which not many should be alive at once."""
        alone: set[Node] = set()
        found: set[Node] = set()
        for node in self.nodes:
            inputs = node.all_input_nodes
            if node.op == "get_attr" or (node.op == "call_function" and inputs and node not in self.wire and alone.issuperset(inputs)):
                alone.add(node)
                if self.made[node] or not found.isdisjoint(inputs):
                    found.add(node)
        return frozenset(found)

    def _storages(self) -> dict[Node, frozenset[Node]]:
        """The nodes whose storages a node's value may be a view of; weights and inputs are nobody's."""
        found: dict[Node, frozenset[Node]] = {}
        for node in self.nodes:
            if node.op in ("placeholder", "get_attr"):
                found[node] = frozenset()
            elif self.made[node]:
                found[node] = frozenset((node,))
            else:
                found[node] = frozenset().union(*(found[n] for n in node.all_input_nodes))
        return found

    def peak(self, steps: Sequence[Step]) -> int:
        """Most bytes alive at once between a value's operator and its last reader."""
        reads = [frozenset().union(*(self.storages[n] for n in step.node.all_input_nodes)) for step in steps]
        last: dict[Node, int] = {}
        for i, (step, read) in enumerate(zip(steps, reads, strict=True)):
            last.update(dict.fromkeys((*read, *((step.node,) if step.half != 0 else ())), i))
        dying: dict[int, int] = {}
        for node, i in last.items():
            dying[i] = dying.get(i, 0) + self.made[node]
        now = best = 0
        for i, step in enumerate(steps):
            wire = self.wire.get(step.node, 0)
            now += (self.made[step.node] if step.half != 0 else 0) + (wire if step.half != 1 else 0)
            best = max(best, now)
            now -= dying.get(i, 0) + (wire if step.half != 0 else 0)
        return best


@dataclass
class _Order:
    """List scheduling: what the next collective needs comes first, then the collective; while one is in flight, what neither needs it nor
    is needed for it fills the time that it takes."""

    program: _Program
    reach: int
    steps: list[Step] = field(default_factory=list)
    done: set[Node] = field(default_factory=set)
    flying: dict[Node, float] = field(default_factory=dict)  # when it will have arrived
    clock: float = 0.0
    link: float = 0.0  # when the last transfer ends
    first: int = 0  # where the nodes that are not done begin

    def run(self) -> list[Step]:
        nodes, collectives = self.program.nodes, self.program.collectives
        self.emit(node for node in nodes if node.op == "placeholder")
        for i, node in enumerate(collectives):
            if i > self.reach:
                behind = self.program.place[collectives[i - self.reach]]
                self.need([n for n in nodes[self.first : behind] if n not in self.done], i)
                self.first = behind
            self.need(self.ancestors(node), i)
            self.start(node)
        self.need([n for n in nodes[self.first :] if n not in self.done and n.op != "output"], len(collectives))
        self.emit(node for node in nodes if node.op == "output")
        assert sum(step.half != 0 for step in self.steps) == len(nodes), "every node comes once"
        return self.steps

    def emit(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            self.emit_weights(node)
            self.steps.append(Step(node))
            self.done.add(node)
            self.clock += self.program.seconds[node]

    def emit_weights(self, node: Node) -> None:
        """What a node needs that is made of weights alone, just before it."""
        for n in node.all_input_nodes:
            if n in self.program.of_weights and n not in self.done:  # one may need another
                self.emit((n,))

    def start(self, node: Node) -> None:
        self.emit_weights(node)
        self.link = max(self.link, self.clock) + self.program.transfer[node]
        if node.target in HALVES:
            self.steps.append(Step(node, 0))
            self.flying[node] = self.link
        else:
            self.emit((node,))
            self.clock = max(self.clock, self.link)

    def ancestors(self, node: Node) -> list[Node]:
        """All that is not done and that `node` needs, in the order of the program; what is in flight among it."""
        found: set[Node] = set()
        stack = list(node.all_input_nodes)
        while stack:
            n = stack.pop()
            if n not in self.done and n not in found:
                found.add(n)
                stack.extend(n.all_input_nodes)
        return sorted(found, key=self.program.place.__getitem__)

    def need(self, nodes: Sequence[Node], upcoming: int) -> None:
        """Do all these (closed under ancestors, in order): first what waits for nothing, then the exchanges, each as late as it can be."""
        waiting = set(self.flying)
        late = []
        for node in nodes:
            if node in self.program.of_weights:
                continue
            if node in waiting or any(n in waiting for n in node.all_input_nodes):
                waiting.add(node)
                late.append(node)
            else:
                self.emit((node,))
        for node in late:
            if node in self.done:  # filled the time of another exchange
                continue
            if node in self.flying:
                self.fill(node, upcoming)
                self.finish(node)
            else:
                self.emit((node,))

    def finish(self, node: Node) -> None:
        self.steps.append(Step(node, 1))
        self.done.add(node)
        self.clock = max(self.clock, self.flying.pop(node)) + self.program.seconds[node]

    def fill(self, node: Node, upcoming: int) -> None:
        """Work that needs nothing in flight, until `node` has arrived."""
        nodes, collectives = self.program.nodes, self.program.collectives
        ahead = upcoming + self.reach - 1
        stop = self.program.place[collectives[ahead]] if ahead < len(collectives) else len(nodes)
        blocked = set(self.flying)
        for candidate in nodes[self.first : stop]:
            if self.clock >= self.flying[node]:
                return
            if candidate in self.done or candidate in blocked or candidate in self.program.of_weights:
                continue
            if candidate.op == "output" or candidate in self.program.transfer or any(n in blocked for n in candidate.all_input_nodes):
                blocked.add(candidate)
            elif self.program.seconds[candidate] > 0:
                self.emit([*(n for n in self.ancestors(candidate) if n not in self.program.of_weights), candidate])


def _as_emitted(nodes: Iterable[Node]) -> list[Step]:
    """The order of the program; of exchanges next to one another, the turns of an attention, the memory counts as if they were the one they came from."""
    steps: list[Step] = []
    for target, same in itertools.groupby(nodes, lambda node: node.target):
        run = list(same)
        steps += [Step(n, half) for half in (0, 1) for n in run] if target in HALVES and len(run) > 1 else map(Step, run)
    return steps


def _joined(steps: Sequence[Step], seconds: Mapping[Node, float]) -> list[Step]:
    """A collective during which nothing happens is one call again, where it finishes."""
    idle: set[Node] = set()  # in flight, and nothing has been done since
    together: set[Node] = set()
    for step in steps:
        if step.half == 1 and step.node in idle:
            together.add(step.node)
        elif step.half is not None or seconds[step.node] > 0 or "group" in step.node.kwargs:
            idle.clear()
        if step.half == 0:
            idle.add(step.node)
    joined = [step for step in steps if step.half != 0 or step.node not in together]
    return [Step(step.node) if step.node in together else step for step in joined]


def _written(steps: Sequence[Step]) -> fx.Graph:
    """The graph of these steps. A second half keeps the name and the notes of the whole call."""
    graph = fx.Graph()
    new: dict[Node, Node] = {}
    wires: dict[Node, Node] = {}
    for step in steps:
        node = step.node
        if node.op == "output":
            graph.output(fx.map_arg(node.args[0], new.__getitem__))
        elif step.half is None:
            new[node] = graph.node_copy(node, new.__getitem__)
        else:
            args, kwargs = fx.map_arg(node.args, new.__getitem__), fx.map_arg(node.kwargs, new.__getitem__)
            if step.half == 0:
                wires[node] = graph.create_node("call_function", HALVES[node.target][0], args, kwargs, name=f"{node.name}_wire")
                wires[node].meta = {key: node.meta[key] for key in ORIGIN if key in node.meta}
            else:
                new[node] = graph.create_node("call_function", HALVES[node.target][1], (wires[node], *args), kwargs, name=node.name)
                new[node].meta = dict(node.meta)
    graph.lint()
    return graph
