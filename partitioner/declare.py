"""Labels that a declared plan can express, by minimum cut.

A declared plan changes a value only at boundaries of modules: whole -> sharded at a *mark* that may split, sharded -> whole at one that may gather.
Between marks everything flows as it is, since nothing but the user's own code runs there. The prices are those of `labels`; in place of its free slices
and gathers anywhere:

    whole -> sharded   forbidden; at a mark that may split: the price of an entry
    sharded -> whole   forbidden; at a mark that may gather: the price of an entry and the bytes
    attention          queries, keys and values are exchanged as they are (`MeshRules`); one that does not use the mesh needs whole keys

With `strict=False` every forbidden change costs one and everything else nothing: the changes of the answer are the fewest that stand in the way of a plan.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass, field

from torch.fx import Node

from seqpar.partitioner.candidates import heaviest_factor, origin
from seqpar.partitioner.cost import Prices, nbytes, node_work
from seqpar.partitioner.division import Degrees
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.label_problem import INF, LabelProblem
from seqpar.partitioner.labels import Key, Labels
from seqpar.partitioner.relation import Relation
from seqpar.partitioner.riders import Riders

SHARE = 0.02  # an entry of a plan must save this share of all work


@dataclass(frozen=True)
class Mark:
    """A boundary of a module at which a value may change. split_share: part of an entry that it is (one of n equal blocks: 1/n); gather_share alike."""

    split: bool
    gather: bool
    split_share: float = 1.0
    gather_share: float = 1.0


@dataclass(frozen=True)
class MeshRules:
    """What a runtime of declared plans asks for.

    even: lengths must be multiples of the number of ranks. alike: all keys of an attention over the mesh are sharded, or all are whole; a mask is cut as
    its keys are, and has one row and no heads. partial: the last of two parts of a dim can be split alone.
    """

    even: bool = True
    alike: bool = True
    partial: bool = False


@dataclass(frozen=True)
class Violation:
    """`reader` would have to change the layout of `operand`, where no plan can: to a part ("split") or to the whole ("gather")."""

    operand: Node
    reader: Node
    change: str


@dataclass
class Declared:
    """Labels within what a plan can express. `violations`: changes that it cannot; none if there is a plan."""

    labels: Labels
    feasible: bool
    violations: list[Violation] = field(default_factory=list)


class DeclareProblem(LabelProblem):
    """The cut for one choice of marks. `mesh`: attentions that exchange what they are given; `must`: attentions whose queries have to be sharded."""

    def __init__(
        self, inference: Inference, degrees: Degrees, prices: Prices, marks: Mapping[Node, Mark], mesh: Set[Node], must: Set[Node], rules: MeshRules, strict: bool = True
    ) -> None:
        super().__init__(inference, degrees, prices, set(mesh))
        self.riders = Riders(degrees.ranks)  # hooks cut every dim by itself
        self.marks, self.must, self.rules, self.strict = marks, must, rules, strict
        self.divisible = frozenset(inference.relations)  # positions and tables too: a plan has to name them
        self.entry = SHARE * sum(node_work(n, self.sizes) for n in inference.relations)
        self.forbidden: list[tuple[int, int, Violation]] = []

    def solve_declared(self) -> Declared:
        """The least-cost labels; not feasible if some change is forbidden."""
        self.build()
        if not self.strict:
            self._forget_prices()
        cost, answers = self.problem.solve()
        broken = [v for a, b, v in self.forbidden if answers[a] and not answers[b]]
        labels = Labels({key for key, v in self.vertices.items() if answers[v]}, set(self.exchanged), cost=cost)
        return Declared(labels, not broken and not math.isinf(cost), broken)

    # -- vertices ----------------------------------------------------------------------------------
    def long_enough(self, atom: int) -> bool:
        length = self.sizes.hint(self.table.length(atom))
        return super().long_enough(atom) and not (self.rules.even and length % self.degrees.ranks)

    def _reaches(self, relation: Relation, dim: int, atom: int) -> bool:
        return not any(dim in dims for dims in (relation.pooled, relation.halo, relation.windows))

    def _add_outputs(self, node: Node, relation: Relation) -> None:
        """A mark costs nothing, and atoms may begin there."""
        if node not in self.marks:
            super()._add_outputs(node, relation)
            return
        dim = self.candidate(node)
        for atom in self.atoms(node, dim) if dim is not None else []:
            if self.long_enough(atom):
                self._vertex((node, dim, atom), yes=0.0, no=0.0)  # type: ignore[arg-type]

    def _add_attention_output(self, node: Node, dim: int, atom: int, share: float, work: float) -> None:
        """Queries and result have one layout; whole queries are attended by every rank."""
        if self.long_enough(atom):
            ranks = self.degrees.ranks
            price = nbytes(node.meta["val"], self.sizes) * share * (1 - 1 / ranks) / ranks * self.prices.byte
            self._vertex((node, dim, atom), yes=work + price, no=work * ranks)

    # -- changes ------------------------------------------------------------------------------------
    def _forbid(self, a: int, b: int, violation: Violation) -> None:
        """`a` sharded beside `b` whole is not possible."""
        self.problem.edge(a, b, INF if self.strict else 1.0)
        self.forbidden.append((a, b, violation))

    @property
    def _sharded(self) -> int:
        """A vertex that is always sharded: the other end of what may not be whole."""
        if not hasattr(self, "_yes"):
            self._yes = self.problem.vertex(no=INF)
        return self._yes

    def _known(self, operand: Node, dim: int, atom: int) -> int:
        """The vertex of an operand's atom; `whole` if it cannot be sharded there."""
        if dim != self.candidate(operand):
            return self.whole
        return self.vertices.get((origin(operand), dim, atom), self.whole)

    def _add_operands(self, node: Node, relation: Relation) -> None:
        """Everything flows as it is, but for what a mark may change."""
        out_dim = self.candidate(node)
        mark = self.marks.get(node)
        for i, operand in enumerate(relation.operands):
            if i in relation.free:
                continue
            dim = self.candidate(operand)
            if dim is not None:
                self._add_needs(node, relation, i, dim, out_dim)
            if out_dim is None:
                continue
            for atom in self.atoms(node, out_dim):
                target = self.vertices.get((node, out_dim, atom))
                places = [d for (j, d), outs in relation.flows.items() if j == i and out_dim in outs and atom in self.table.roots(relation.operand_axes[i][d])]
                if target is not None and places:
                    self._connect(node, mark, operand, places[0], atom, target)
        if mark is not None:
            self._add_beginning(node, relation, mark, out_dim)
        self._require(node, relation)

    def _add_needs(self, node: Node, relation: Relation, i: int, dim: int, out_dim: int | None) -> None:
        """Atoms of an operand that this node needs whole."""
        operand = relation.operands[i]
        for atom in self.atoms(origin(operand), dim):
            vertex = self._known(operand, dim, atom)
            if vertex == self.whole or atom not in self.table.roots(self.inference.axes[operand][0][dim]):
                continue
            if (i, dim) in relation.flows:
                places = [d for d in relation.flows[(i, dim)] if atom in self.atoms(node, d)]
                if (not places and relation.dropping) or (out_dim in places and (node, out_dim, atom) in self.vertices):
                    continue
            if self._may(node, operand, dim, self.marks.get(node), "gather"):
                self.problem.edge(vertex, self.whole, self._gather_price(node, operand, dim, atom))
            else:
                self._forbid(vertex, self.whole, Violation(operand, node, "gather"))

    def _connect(self, node: Node, mark: Mark | None, operand: Node, dim: int, atom: int, target: int) -> None:
        """Operand and result are cut alike, unless this is a mark that may change them."""
        vertex = self._known(operand, dim, atom)
        out_dim = self.candidate(node)
        assert out_dim is not None
        if self._may(node, node, out_dim, mark, "split", atom):
            self.problem.edge(target, vertex, self.entry * mark.split_share)  # type: ignore[union-attr]
        else:
            self._forbid(target, vertex, Violation(operand, node, "split"))
        if vertex == self.whole:
            return
        if self._may(node, operand, dim, mark, "gather", atom):
            self.problem.edge(vertex, target, self._gather_price(node, operand, dim, atom))
        else:
            self._forbid(vertex, target, Violation(operand, node, "gather"))

    def _add_beginning(self, node: Node, relation: Relation, mark: Mark, out_dim: int | None) -> None:
        """Atoms that begin at a mark: it reads a whole value."""
        if out_dim is None:
            return
        for atom in self.atoms(node, out_dim):
            target = self.vertices.get((node, out_dim, atom))
            if target is None or any(atom in self.table.roots(axis) for axes in relation.operand_axes for axis in axes):
                continue
            if mark.split and self._divides(node, out_dim, atom):
                self.problem.yes_cost[target] += self.entry * mark.split_share
            else:
                self._forbid(target, self.whole, Violation(relation.operands[0], node, "split"))

    def _gather_price(self, mark: Node, operand: Node, dim: int, atom: int) -> float:
        return self._moved(operand, dim, atom) * self.prices.byte + self.entry * self.marks[mark].gather_share

    def _may(self, node: Node, value: Node, dim: int, mark: Mark | None, change: str, atom: int | None = None) -> bool:
        if mark is None or not getattr(mark, change):
            return False
        atoms = self.atoms(origin(value), dim) if atom is None else [atom]
        return all(self._divides(value, dim, a, partial=self.rules.partial and change == "split") for a in atoms)

    def _divides(self, value: Node, dim: int, atom: int, partial: bool = False) -> bool:
        """Whether cutting the whole dim in even pieces cuts this atom, and nothing else."""
        axis = self.table.expand_axis(self.inference.axes[value][0][dim])
        if axis and axis[0] == (atom,):
            return len(axis) == 1 or self.sizes.hint(self.table.length(atom)) % self.degrees.ranks == 0
        return partial and len(axis) == 1 and len(axis[0]) == 2 and axis[0][1] == atom

    def _add_results(self) -> None:
        for node in self.inference.axes:
            readers = [user for user in node.users if user.op == "output"]
            dim = self.candidate(node) if readers else None
            for atom in self.atoms(node, dim) if dim is not None else []:
                vertex = self._known(node, dim, atom)  # type: ignore[arg-type]
                if vertex != self.whole:
                    self._forbid(vertex, self.whole, Violation(node, readers[0], "gather"))

    # -- attention ------------------------------------------------------------------------------------
    def _add_exchange(self, node: Node, relation: Relation) -> None:
        spec = relation.attention
        rows = len(self.inference.axes[node][0]) - 2
        for i, operand in enumerate(relation.operands):
            dim = self.candidate(operand)
            own = len(self.inference.axes[operand][0]) - 2
            if dim is not None and dim != own and i != spec.mask:
                self._need_whole(node, operand, dim)
        self._tie_queries(node, relation, rows)
        self._tie_keys(node, relation)
        self._require(node, relation)

    def _need_whole(self, node: Node, operand: Node, dim: int) -> None:
        for atom in self.atoms(origin(operand), dim):
            vertex = self._known(operand, dim, atom)
            if vertex != self.whole:
                self._forbid(vertex, self.whole, Violation(operand, node, "gather"))

    def _tie_queries(self, node: Node, relation: Relation, rows: int) -> None:
        operand = relation.operands[relation.attention.q]
        own = len(self.inference.axes[operand][0]) - 2
        for atom in set(self.atoms(node, rows)) | set(self.atoms(origin(operand), own)):
            target = self.vertices.get((node, rows, atom), self.whole)
            self._alike(node, operand, self._known(operand, own, atom), target)

    def _tie_keys(self, node: Node, relation: Relation) -> None:
        spec = relation.attention
        k, v = relation.operands[spec.k], relation.operands[spec.v]
        dim = len(self.inference.axes[k][0]) - 2
        atoms = self.atoms(origin(k), dim)
        vertices = [self._known(k, dim, atom) for atom in atoms]
        for vertex, atom in zip(vertices, atoms, strict=True):
            self._alike(node, v, self._known(v, len(self.inference.axes[v][0]) - 2, atom), vertex)
        ranks = self.degrees.ranks
        moved = (nbytes(k.meta["val"], self.sizes) + nbytes(v.meta["val"], self.sizes)) * (1 - 1 / ranks) / ranks
        for vertex in set(vertices) - {self.whole} if self.rules.alike else ():
            # Whole keys are held, sent and attended once per rank.
            self.problem.no_cost[vertex] += (node_work(node, self.sizes) + moved * ranks * self.prices.byte) * (1 - 1 / ranks) / len(vertices)
        if self.rules.alike:
            beside = self.whole if self._others(k, dim, atoms) else None
            chain = [*vertices, *([beside] if beside is not None else [])]
            for a, b in zip(chain, chain[1:], strict=False):
                self._alike(node, k, a, b)
        if spec.mask is not None:
            self._tie_mask(node, relation, vertices[0] if vertices else self.whole)

    def _others(self, k: Node, dim: int, atoms: list[int]) -> bool:
        """Keys that can never be sharded."""
        return bool(self.table.roots(self.inference.axes[k][0][dim]) - set(atoms))

    def _tie_mask(self, node: Node, relation: Relation, keys: int) -> None:
        """The mask of keys that are cut is cut like them; with `alike=False` it is whole."""
        mask = relation.operands[relation.attention.mask]
        axes = [self.table.expand_axis(axis) for axis in self.inference.axes[mask][0]]
        last = len(axes) - 1
        dim = self.candidate(mask)
        columns_only = not any(axes[max(0, last - 2) : last]) and self.degrees.ring == 1  # every step of a ring would use the same mask
        if self.rules.alike and columns_only and axes[last]:
            for atom in self.atoms(origin(mask), last):
                self._alike(node, mask, self._known(mask, last, atom), keys)
            return
        if dim is not None:
            self._need_whole(node, mask, dim)
        if self.rules.alike and axes[last] and not self._full_mask(relation, axes):
            for atom in self.atoms(node, len(self.inference.axes[node][0]) - 2):
                self._alike(node, mask, self.vertices.get((node, len(self.inference.axes[node][0]) - 2, atom), self.whole), self.whole)

    def _full_mask(self, relation: Relation, axes: list[tuple[tuple[int, ...], ...]]) -> bool:
        """A whole mask of rows and columns fits exchanged heads if exchanging restores the order of the positions: sequences of one part."""
        spec = relation.attention
        queries, keys = (self.table.expand_axis(relation.operand_axes[i][-2]) for i in (spec.q, spec.k))
        one = all(len(axis) == 1 and len(axis[0]) == 1 for axis in (queries, keys))
        return one and self.degrees.ring == 1 and not any(axes[1:-2])

    def _alike(self, node: Node, operand: Node, a: int, b: int) -> None:
        if a == b:
            return
        for x, y, change in ((a, b, "gather"), (b, a, "split")):
            if x != self.whole:
                self._forbid(x, y, Violation(operand, node, change))

    def _require(self, node: Node, relation: Relation) -> None:
        """The heaviest queries of an attention in `must` are sharded (of several parts of equal weight, the longest)."""
        if node not in self.must:
            return
        rows = len(self.inference.axes[node][0]) - 2
        atoms = heaviest_factor(self.inference, self.inference.axes[node][0][rows])
        atom = max(atoms, key=lambda a: (self.inference.sequences[a], self.sizes.hint(self.table.length(a))))
        vertex = self.vertices.get((node, rows, atom), self.whole)
        self._forbid(self._sharded, vertex, Violation(relation.operands[relation.attention.q], node, "split"))

    def _forget_prices(self) -> None:
        self.problem.yes_cost = [c if math.isinf(c) else 0.0 for c in self.problem.yes_cost]
        self.problem.no_cost = [c if math.isinf(c) else 0.0 for c in self.problem.no_cost]
        changes = {(a, b) for a, b, _ in self.forbidden}
        self.problem.edges = {edge: price if edge in changes else 0.0 for edge, price in self.problem.edges.items()}


def sharded_atoms(labels: Labels, node: Node, dim: int, atoms: list[int]) -> frozenset[int]:
    """The atoms of a dim that are sharded."""
    source = origin(node)
    found: set[Key] = {(source, dim, a) for a in atoms}
    return frozenset(a for _, _, a in found & labels.sharded)
