"""Labels by minimum cut: for every (value, dim, atom of a sequence), is it sharded over the ranks or whole on each?

A vertex says "yes" for sharded. Prices (in operations, `cost.Prices`):

    whole             the work of this atom's positions on every rank
    sharded           1/N of it
    sharded -> whole  the bytes of the all-gather, paid once for all readers of a value
    sharded -> other  a switch to another dim in the readers' phase: 1/N of a gather
    whole -> sharded  nothing: a local slice
    pinned            what a marker says, at any price
    rows of an attention at real rates (`Prices.real`): sharded at any price

With the strategy of every attention fixed these are all the prices there are, so the cut is the optimum.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence, Set

from torch.fx import Node

from seqpar.partitioner.candidates import flowing, heaviest_factor, key_side, origin, reaches, share_of, weight
from seqpar.partitioner.cost import Prices, nbytes, node_work
from seqpar.partitioner.division import Degrees, Division, division
from seqpar.partitioner.exchange_bytes import ExchangeBytes
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.labels import KEYS, QUERY, REDUCED, Key, Labels
from seqpar.partitioner.marker import pin_of
from seqpar.partitioner.mincut import CutProblem
from seqpar.partitioner.op import as_length, outputs_of
from seqpar.partitioner.pins import is_pin, pinned_atoms
from seqpar.partitioner.real_rates import RealRates
from seqpar.partitioner.relation import Relation
from seqpar.partitioner.repeats import Repeats
from seqpar.partitioner.riders import riders_of
from seqpar.partitioner.split_keys import received_bytes

INF = math.inf
POOLING = 2  # all-reduces of a mean and of the squares around it


class LabelProblem:
    """Builds and solves the cut for one choice of attention strategies.

    exchanged: attentions over the mesh. local: cross-attentions that attend where their queries are; a gather that serves only their keys costs `Prices.keys`.
    prefer: node -> atoms to shard there rather than the heaviest (see `phases`). split: attentions that may be divided along their keys (`split_keys`).
    apart: whether every block has labels of its own; else those that are alike (`repeats`) have the same, and one of them is priced for all.
    """

    def __init__(
        self,
        inference: Inference,
        degrees: Degrees,
        prices: Prices,
        exchanged: set[Node],
        local: Set[Node] = frozenset(),
        prefer: Mapping[Node, Set[int]] | None = None,
        split: Set[Node] = frozenset(),
        apart: bool = False,
    ) -> None:
        self.inference = inference
        self.table = inference.table
        self.sizes = inference.table.sizes
        self.degrees = degrees
        self.prices = prices
        self.exchanged = exchanged
        self.split = split
        self.prefer = prefer or {}
        self.problem, self.vertices = CutProblem(), dict[Key, int]()
        self.gathers: dict[Key, int] = {}
        self.switches: dict[tuple[Node, frozenset[int]], int] = {}
        self.whole = self.problem.vertex(yes=INF)
        self.work = 0.0
        self.exchanges: list[tuple[int, float, float]] = []  # vertex, and what attentions move if it says yes, no
        self.divisible, self.beside = inference.input_dependent, key_side(inference, local)
        self.rates = RealRates(inference, degrees, prices)
        self.riders = riders_of(inference, degrees.ranks, degrees.ring)
        self.repeats = Repeats() if apart or self.prefer or not self._chosen_alike() else inference.repeats
        self.current: Node | None = None  # that is priced
        self.handed, self.last_gathers = set(self.repeats.handed_on.values()), dict[Key, int]()
        self.handed_on: list[tuple[Node, int, int, int, int | None, bool]] = []  # what blocks that stand for others read of one another: arguments of `_read`
        self._atoms: dict[tuple[Node, int], list[int]] = {}
        self._candidates: dict[Node, int | None] = {}

    def _chosen_alike(self) -> bool:
        """Whether attentions of blocks that are alike are to do the same."""
        return all((node in chosen) == (first in chosen) for node, first in self.inference.repeats.like.items() if node in self.inference.relations for chosen in (self.exchanged, self.split))

    # -- which dims may be sharded ---------------------------------------------------------------
    def atoms(self, node: Node, dim: int) -> list[int]:
        """Sequence atoms of a dim, in order, of all outputs of a node."""
        known = self._atoms.get((node, dim))
        if known is None:
            axes = [a[dim] for a in self.inference.axes[node] if dim < len(a)]
            prefer = self.prefer.get(origin(node), frozenset())
            known = self._atoms[(node, dim)] = pinned_atoms(self.inference, node) if is_pin(node) else list(dict.fromkeys(a for axis in axes for a in heaviest_factor(self.inference, axis, prefer)))
        return known

    def candidate(self, node: Node) -> int | None:
        """The one dim of a value that may be sharded: the one with the heaviest sequence."""
        node = origin(node)
        if node not in self._candidates:
            self._candidates[node] = self._find_candidate(node)
        return self._candidates[node]

    def _find_candidate(self, node: Node) -> int | None:
        if is_pin(node):
            return pin_of(node).split
        if node in self.exchanged:
            return len(self.inference.axes[node][0]) - 2
        if node in self.split:
            return None
        best: tuple[tuple[bool, float], int] | None = None
        for dim in range(max((len(a) for a in self.inference.axes[node]), default=0)):
            weights = [weight(self.inference, a, self.prefer.get(origin(node), frozenset())) for a in self.atoms(node, dim)]
            if weights and (best is None or max(weights) > best[0]):
                best = (max(weights), dim)
        return None if best is None else best[1]

    def long_enough(self, atom: int) -> bool:
        return self.sizes.hint(self.table.length(atom)) >= self.degrees.ranks

    # -- building ----------------------------------------------------------------------------------
    def solve(self) -> Labels:
        self.build()
        cost, answers = self.problem.solve()
        sharded = self.repeats.for_all({key for key, v in self.vertices.items() if answers[v]})
        floor = self.work / self.degrees.ranks + sum(yes if answers[v] else no for v, yes, no in self.exchanges)
        split = {node for node, dim, _ in sharded if dim == KEYS and node in self.split}
        return Labels(sharded, set(self.exchanged), split, cost, floor)

    def build(self) -> None:
        """All vertices and prices."""
        for node, relation in self.inference.relations.items():
            if node in self.repeats.like:
                continue
            self.current, self.problem.times = node, self.repeats.times.get(node, 1)
            self._add_outputs(node, relation)
            if node in self.exchanged:
                self._add_exchange(node, relation)
            elif node in self.split:
                self._add_split(node, relation)
            else:
                self._add_operands(node, relation)
        self.current, self.problem.times = None, 1
        for read in self.handed_on:
            self._read(*read)
        self._add_results()

    def _add_outputs(self, node: Node, relation: Relation) -> None:
        """Vertices of a node's results, with the price of computing them."""
        dim = self.candidate(node)
        work = node_work(node, self.sizes)
        self.work += work * self.problem.times
        if dim is None:
            self.problem.pay(work)
            return
        axes, divided = self.inference.axes[node], work * self.rates.local_causal(relation, dim)
        made, reaching, covered = relation.makes or dim in relation.windows, flowing(self.table, relation, dim), 0.0
        for atom in self.atoms(node, dim):
            share = share_of(self.table, axes[0][dim], atom) if len(axes) == 1 else 1 / max(len(self.atoms(node, dim)), 1)
            if node in self.exchanged:
                self._add_attention_output(node, dim, atom, share, work * share / self.degrees.ranks)
            elif is_pin(node):
                if self.long_enough(atom):
                    self._vertex((node, dim, atom), yes=0.0, no=INF)
            elif node in self.divisible and dim not in relation.whole and (made or atom in reaching) and (self.long_enough(atom) or self.riders.rides_in_all(self.inference, node, dim, atom)) and reaches(self.table, self.degrees.ranks, relation, dim, atom):
                price = self._call_price(node, relation, dim)
                whole = INF if self.rates.main.get(node) == atom else work * share
                self._vertex((node, dim, atom), yes=divided * share * self.busiest(atom) + price, no=whole)
                covered += share
        self.problem.pay(work * (1 - covered) if node not in self.exchanged else 0.0)

    def _call_price(self, node: Node, relation: Relation, dim: int) -> float:
        if dim in relation.pooled:
            return POOLING * self.prices.call
        if dim not in relation.halo:
            return 0.0
        value = relation.operands[0].meta["val"]
        rows = nbytes(value, self.sizes) / max(self.sizes.hint(as_length(value.shape[dim])), 1)
        return (relation.halo[dim].before + relation.halo[dim].after) * rows * self.prices.byte

    def busiest(self, atom: int) -> float:
        """Share of an atom's positions on the rank that has most of them; a rider's are in the place of some of its host's."""
        length = self.sizes.hint(self.table.length(atom))
        return 1 / self.degrees.ranks if atom in self.riders.hosts else -(-length // self.degrees.ranks) / max(length, 1)

    def _vertex(self, key: Key, yes: float, no: float) -> int:
        vertex = self.problem.vertex(yes, no)
        self.vertices[key] = vertex
        return vertex

    def _add_operands(self, node: Node, relation: Relation) -> None:
        reduced: list[int] = []
        out_dim = self.candidate(node)
        packed = self._packed(relation)
        for i, operand in enumerate(relation.operands):
            if i in relation.free:
                continue
            dim = self.candidate(operand)
            if dim is None:
                continue
            atoms = [a for a in self.atoms(origin(operand), dim) if a in self.table.roots(self.inference.axes[operand][0][dim])]
            turned = self._turned(node, relation, i, atoms, out_dim) if self.prefer else []
            if turned:
                self._read_turned(operand, dim, atoms, turned, node)
                continue
            for atom in atoms:
                target = self._target(node, relation, i, dim, atom, out_dim)
                if target is not None:
                    self._read(operand, dim, atom, target, packed.get(operand))
                    if self.vertices.get((node, REDUCED, atom)) == target and target not in reduced:
                        reduced.append(target)
        for a, b in zip(reduced, reduced[1:], strict=False):
            self.problem.tie(a, b)

    def _packed(self, relation: Relation) -> dict[Node, int]:
        """Operands that one collective gathers -> the vertex that pays for it once any of them is gathered."""
        if not (operands := self.rates.packable(relation)):
            return {}
        once = self.problem.vertex()
        self.problem.edge(once, self.whole, self.prices.call)
        return dict.fromkeys(operands, once)

    def _turned(self, node: Node, relation: Relation, i: int, atoms: list[int], out_dim: int | None) -> list[int]:
        """The node's atoms if it is in another phase than its operand, which has them in another place."""
        if out_dim is None or set(atoms) & set(self.atoms(node, out_dim)):
            return []
        axes = [axis for d, axis in enumerate(relation.operand_axes[i]) if out_dim in relation.flows.get((i, d), ())]
        found = [a for a in self.atoms(node, out_dim) if any(a in self.table.roots(axis) for axis in axes)]
        return found if all((node, out_dim, a) in self.vertices for a in found) else []

    def _read_turned(self, operand: Node, dim: int, atoms: list[int], turned: list[int], node: Node) -> None:
        """A sharded operand is switched if the node is sharded, else gathered."""
        copy = self.switches.get((operand, frozenset(turned)))
        if copy is None:
            copy = self.switches[operand, frozenset(turned)] = self.problem.vertex()
            for atom in atoms:
                vertex = self.vertices.get((origin(operand), dim, atom))
                if vertex is not None:
                    moved = self._moved(operand, dim, atom) * self.prices.byte
                    self.problem.add(vertex, moved / self.degrees.ranks + self.prices.call)
                    self.problem.edge(vertex, copy, moved * (1 - 1 / self.degrees.ranks))
        out_dim = self.candidate(node)
        for atom in turned:
            self.problem.edge(copy, self.vertices[node, out_dim, atom], INF)  # type: ignore[index]

    def _moved(self, operand: Node, dim: int, atom: int) -> float:
        """Bytes that a gather of one atom brings to every rank."""
        share = share_of(self.table, self.inference.axes[operand][0][dim], atom)
        return nbytes(operand.meta["val"], self.sizes) * share * (1 - 1 / self.degrees.ranks)

    def _target(self, node: Node, relation: Relation, i: int, dim: int, atom: int, out_dim: int | None) -> int | None:
        """The vertex that must say the same as the operand's atom; `whole` if it has to be gathered; None if it is not needed."""
        if (i, dim) in relation.flows:
            places = [d for d in relation.flows[(i, dim)] if atom in self.atoms(node, d)]
            if not places:
                return None if relation.dropping else self.whole
            if out_dim in places:
                return self.vertices.get((node, out_dim, atom), self.whole)
            return self.whole
        if (i, dim) in relation.reduces and out_dim is None and self._reducible(relation, i, dim):
            key = (node, REDUCED, atom)
            if key not in self.vertices:
                work = node_work(node, self.sizes)
                moved = 2 * nbytes(outputs_of(node)[0], self.sizes) * (1 - 1 / self.degrees.ranks)
                share = share_of(self.table, relation.operand_axes[i][dim], atom)
                price = share * moved * self.prices.byte + share * self.prices.call
                self._vertex(key, yes=share * work * self.busiest(atom) + price, no=share * work)
                self.problem.pay(-share * work)
            return self.vertices[key]
        return self.whole

    def _reducible(self, relation: Relation, i: int, dim: int) -> bool:
        """Partial results add up only if one whole factor of the dim is sharded: no short atom (but riders), nothing but sequences, and no other dim with it."""
        axis = self.table.expand_axis(relation.operand_axes[i][dim])
        reduced = [(j, self.table.expand_axis(relation.operand_axes[j][d])) for j, d in relation.reduces]
        first = next(a for _, a in reduced if self.table.roots(a) & self.inference.sequences.keys())
        alone = sum(j == i and bool(self.table.roots(a) & self.table.roots(axis)) for j, a in reduced) == 1
        cut = heaviest_factor(self.inference, axis)
        return axis == first and alone and tuple(cut) in axis and all(self.long_enough(a) or self.riders.rides(a, cut) for a in cut)

    def _read(self, operand: Node, dim: int, atom: int, target: int, packed: int | None = None, by_next: bool = False) -> None:
        """`target` reads the operand's atom: paid once per value if the operand is sharded and any reader wants it whole. packed: who pays for the call.

        by_next: the reader stands for the blocks after those that the operand stands for, but for the last one: that block is no copy, and reads for itself.
        """
        if self.current is not None and (self.current, operand) in self.repeats.handed_on:
            self.handed_on.append((self.repeats.handed_on[self.current, operand], dim, atom, target, packed, True))
        value = self.repeats.like.get(operand, operand)
        times, within = self.repeats.times.get(value, 1), self.current in self.repeats.times
        if value not in self.handed:
            self._gather(self.gathers, value, dim, atom, target, packed, times)
        elif within or by_next:
            self._gather(self.gathers, value, dim, atom, target, packed, times - 1)
        if value in self.handed and not by_next:
            self._gather(self.last_gathers, value, dim, atom, target, packed, 1)

    def _gather(self, gathers: dict[Key, int], value: Node, dim: int, atom: int, target: int, packed: int | None, times: int) -> None:
        """One collective for all readers of this kind, of as many values as this one stands for."""
        vertex, key = self.vertices.get((origin(value), dim, atom)), (value, dim, atom)
        if vertex is None:
            return
        if key not in gathers:
            gathers[key] = self.problem.vertex()
            call = 0.0 if packed is not None else self.prices.serving(self.inference.sequences.get(atom, 0)) if value in self.beside else self.prices.call
            self.problem.edge(vertex, gathers[key], (self._moved(value, dim, atom) * self.prices.byte + call) * times, times=1)
            if packed is not None:
                self.problem.edge(vertex, packed, INF)
        self.problem.edge(gathers[key], target, INF)

    def _add_results(self) -> None:
        for node in self.inference.axes:
            if any(user.op == "output" for user in node.users):
                dim = self.candidate(node)
                for atom in self.atoms(node, dim) if dim is not None else []:
                    self._read(node, dim, atom, self.whole)  # type: ignore[arg-type]

    # -- attention over the mesh ----------------------------------------------------------------------
    def divided(self, node: Node) -> Division:
        """How an exchanged attention is divided."""
        return division(self.inference, self.degrees, self.prices, node)

    def _add_attention_output(self, node: Node, dim: int, atom: int, share: float, work: float) -> None:
        """Ulysses: back by all-to-all, or gathered over heads. With a ring the rows are always divided. Bytes: of the rank that receives most."""
        found = self.divided(node)
        work *= self.rates.uneven(found, atom)
        counted, ring = ExchangeBytes(self.inference, node, found, self.riders), found.degrees.ring > 1
        back = max(counted.result(atom)) * self.prices.byte
        gathered = 0.0 if ring else max(counted.result(atom, whole=True)) * self.prices.byte
        only = ring or (self.rates.main.get(node) == atom and self.long_enough(atom))
        if only or self.long_enough(atom):
            self._note_exchange(self._vertex((node, dim, atom), yes=work + back, no=INF if only else work + gathered), back, gathered)

    def _note_exchange(self, vertex: int, yes: float, no: float) -> None:
        self.exchanges.append((vertex, yes * self.problem.times, no * self.problem.times))

    def _add_exchange(self, node: Node, relation: Relation) -> None:
        spec = relation.attention
        for i, operand in enumerate(relation.operands):
            dim = self.candidate(operand)
            rows = len(self.inference.axes[operand][0]) - 2
            targets = {} if i == spec.mask else self._exchange_targets(node, relation, i, rows)
            if dim is not None:
                for atom in self.atoms(operand, dim):
                    self._read(operand, dim, atom, targets.get(atom, self.whole) if dim == rows else self.whole)

    def _exchange_targets(self, node: Node, relation: Relation, i: int, rows: int) -> dict[int, int]:
        """The vertex of each atom of an exchanged operand, priced with the bytes that the busiest rank receives of it."""
        found, is_query = self.divided(node), i == relation.attention.q
        counted, ring, together = ExchangeBytes(self.inference, node, found, self.riders), found.degrees.ring > 1, self.atoms(relation.operands[i], rows)
        exposed, targets = self.rates.exposed(node, relation, found) if ring else 0.0, {}
        for atom in together:
            moved = max(counted.operand(i, atom))
            if is_query:
                targets[atom] = self._operand_vertex((node, QUERY, atom), moved, together, forced=ring)
            else:
                around = exposed * max(counted.around(i, atom)) if ring else 0.0
                targets[atom] = self._operand_vertex((node, KEYS, atom), moved + around, together, forced=False)
        return targets

    def _operand_vertex(self, key: Key, moved: float, together: Sequence[int], forced: bool) -> int:
        """Queries under a ring are always divided; short keys are whole and attended once."""
        vertex = self.vertices.get(key)
        if vertex is None:
            if forced:
                return self._vertex(key, yes=0.0, no=INF)
            if not self.long_enough(key[2]) and not self.riders.rides(key[2], together):
                return self.whole
            vertex = self._vertex(key, yes=0.0, no=0.0)
        self.problem.add(vertex, moved * self.prices.byte)
        self._note_exchange(vertex, moved * self.prices.byte, 0.0)
        return vertex

    # -- attention divided along its keys ------------------------------------------------------------------
    def _add_split(self, node: Node, relation: Relation) -> None:
        """Work is divided with the keys; as soon as any are, the results of all ranks travel."""
        spec, work = relation.attention, node_work(node, self.sizes)
        keys, merged, targets = relation.operand_axes[spec.k][-2], self.problem.vertex(), dict[int, int]()
        self.problem.edge(merged, self.whole, received_bytes(self.inference, relation, self.degrees.ranks) * self.prices.byte + self.prices.call)
        for atom in filter(self.long_enough, heaviest_factor(self.inference, keys)):
            share = work * share_of(self.table, keys, atom)
            targets[atom] = self._vertex((node, KEYS, atom), yes=share * self.busiest(atom), no=share)
            self.problem.edge(targets[atom], merged, INF)
            self.problem.pay(-share)
        for i, operand in enumerate(relation.operands):
            dim = self.candidate(operand)
            parts = targets if i in (spec.k, spec.v) and dim == len(self.inference.axes[operand][0]) - 2 else {}
            for atom in self.atoms(operand, dim) if dim is not None else []:
                self._read(operand, dim, atom, parts.get(atom, self.whole))  # type: ignore[arg-type]
