"""Attention over one of several axes: which axis is sharded where (dynamic sequence parallelism, arXiv 2403.10266).

A spatial attention sees frames as its batch, a temporal one sees pixels. Each works without exchanging anything while its *batch* is
sharded; between the two, one all-to-all moves the cut from one axis to the other (`runtime.switch`). A phase is the set of atoms that
may be sharded around a node. Phases are a first, coarse minimum cut over nodes; `LabelProblem` then labels values within their phases,
and the solver keeps them only if the exact price is lower.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from seqpar.partitioner.candidates import origin
from seqpar.partitioner.cost import Prices, nbytes, node_work
from seqpar.partitioner.division import Degrees
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.mincut import CutProblem
from seqpar.partitioner.op import outputs_of
from seqpar.partitioner.relation import Relation

Group = frozenset[int]


@dataclass(frozen=True)
class Phases:
    """`prefer`: node -> the atoms that may be sharded there. `along_batch`: attentions whose batch is sharded, so that nothing is exchanged."""

    prefer: Mapping[Node, Group]
    along_batch: frozenset[Node]


def choose_phases(inference: Inference, degrees: Degrees, prices: Prices, exchangeable: set[Node]) -> Phases | None:
    """Phases that switch between the two heaviest axes, or None if no attention has one in its batch and the other in its rows."""
    pair = _heaviest_pair(inference)
    if pair is None:
        return None
    return _PhaseCut(inference, degrees, prices, exchangeable, *pair).solve()


def batch_atoms(inference: Inference, relation: Relation) -> Group:
    """Sequence atoms in the dims of an attention that precede its rows."""
    axes = relation.out_axes[0][:-2]
    return frozenset(a for axis in axes for a in inference.table.roots(axis) if a in inference.sequences)


def row_atoms(inference: Inference, relation: Relation) -> Group:
    """Sequence atoms of an attention's queries."""
    return frozenset(inference.table.roots(relation.operand_axes[relation.attention.q][-2]) & inference.sequences.keys())


def _heaviest_pair(inference: Inference) -> tuple[Group, Group] | None:
    """The (rows, batch) that most attention work lies between; atoms that are rows of one attention stay together."""
    attentions = [(n, r) for n, r in inference.relations.items() if r.attention is not None]
    joined: list[set[int]] = []
    for _, relation in attentions:
        together = set(row_atoms(inference, relation))
        together.update(*(g for g in joined if g & together))
        joined = [*(g for g in joined if not g & together), together]
    work: dict[tuple[Group, Group], int] = {}
    for node, relation in attentions:
        rows, batch = row_atoms(inference, relation), batch_atoms(inference, relation)
        if not rows or not batch or rows & batch:
            continue
        whole = [frozenset(g) for g in joined if g & (rows | batch)]
        if len(whole) == 2:
            pair = (whole[0], whole[1])
            work[pair] = work.get(pair, 0) + node_work(node, inference.table.sizes)
    return max(work, key=lambda p: work[p]) if work else None


@dataclass
class _PhaseCut:
    """A vertex per node says "yes" for `second`, "no" for `first`."""

    inference: Inference
    degrees: Degrees
    prices: Prices
    exchangeable: set[Node]
    first: Group
    second: Group
    problem: CutProblem = field(default_factory=CutProblem)
    vertices: dict[Node, int] = field(default_factory=dict)
    free: set[Node] = field(default_factory=set)  # nodes that may be in either phase

    def solve(self) -> Phases | None:
        for node, relation in self.inference.relations.items():
            self._add_node(node, relation)
        for node in self.vertices:
            self._add_reads(node)
        if not self.free:
            return None
        _, answers = self.problem.solve()
        prefer = {n: self.second if answers[self.vertices[n]] else self.first for n in self.free}
        along = frozenset(n for n, r in self.inference.relations.items() if r.attention is not None and prefer.get(n, frozenset()) & batch_atoms(self.inference, r))
        return Phases(prefer, along) if along else None

    def _add_node(self, node: Node, relation: Relation) -> None:
        holds = [self._holds(node, g) for g in (self.first, self.second)]
        if not any(holds) or node not in self.inference.input_dependent:
            return
        work = node_work(node, self.inference.table.sizes)
        no, yes = (self._share(relation, g) * work + self._exchange(node, relation, g) for g in (self.first, self.second))
        if all(holds):
            self.free.add(node)
            self.vertices[node] = self.problem.vertex(yes=yes, no=no)
        else:
            self.vertices[node] = self.problem.vertex(yes=math.inf if holds[0] else 0.0, no=math.inf if holds[1] else 0.0)

    def _holds(self, node: Node, group: Group) -> bool:
        return any(self.inference.table.roots(axis) & group for axis in self.inference.axes[node][0])

    def _share(self, relation: Relation, group: Group) -> float:
        """Share of a node's work on the busiest rank while `group` is sharded."""
        table = self.inference.table
        dims = [d for d, axis in enumerate(relation.out_axes[0]) if table.roots(axis) & group]
        lengths = [n for a in group if (n := table.sizes.hint(table.length(a))) >= self.degrees.ranks]
        if not lengths or all(d in relation.whole for d in dims):
            return 1.0
        return sum(-(-n // self.degrees.ranks) for n in lengths) / sum(lengths)

    def _exchange(self, node: Node, relation: Relation, group: Group) -> float:
        """Price of an attention's exchange while its rows are sharded; keys travel like queries."""
        if node not in self.exchangeable or not row_atoms(self.inference, relation) & group:
            return 0.0
        sizes, ranks = self.inference.table.sizes, self.degrees.ranks
        spec = relation.attention
        moved = sum(nbytes(relation.operands[i].meta["val"], sizes) for i in (spec.q, spec.k, spec.v)) + nbytes(outputs_of(node)[0], sizes)
        return moved * (1 - 1 / ranks) / ranks * self.prices.byte + 2 * self.prices.call

    def _add_reads(self, node: Node) -> None:
        """A value read in the other phase is switched (or gathered, if it has but one of the axes) once for all its readers."""
        readers = [self.vertices[user] for user in _readers(node) if user in self.vertices]
        if not readers:
            return
        ranks = self.degrees.ranks
        moved = sum(nbytes(value, self.inference.table.sizes) for value in outputs_of(node)) * (1 - 1 / ranks)
        price = (moved / ranks if node in self.free else moved) * self.prices.byte + self.prices.call
        own = self.vertices[node]
        to_first, to_second = self.problem.vertex(), self.problem.vertex()
        self.problem.edge(own, to_first, price)
        self.problem.edge(to_second, own, price)
        for reader in readers:
            self.problem.edge(to_first, reader, math.inf)
            self.problem.edge(reader, to_second, math.inf)


def _readers(node: Node) -> Iterator[Node]:
    for user in node.users:
        if origin(user) is node and user is not node:
            yield from _readers(user)
        else:
            yield user
