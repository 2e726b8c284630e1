"""Layouts: what a rank holds of a value, read off the solver's labels.

A layout has one entry per dim: the atoms of that dim that are sharded. A sharded atom of length L is held as the contiguous part
`part(L, rank, N)`, or what is left of it beside atoms that ride with it (`riders.py`); all other atoms are whole. The local dim is the concatenation of the local parts.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

from torch.fx import Node

from seqpar.partitioner.atoms import Axis, Factor
from seqpar.partitioner.candidates import origin
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.labels import KEYS, QUERY, REDUCED, Labels
from seqpar.partitioner.lengths import Length, product, total
from seqpar.partitioner.relation import Relation
from seqpar.partitioner.riders import Riders, riders_of
from seqpar.partitioner.solve import Solution

Layout = tuple[frozenset[int], ...]


@dataclass(frozen=True)
class LayoutView:
    """Reads layouts and local lengths for one rank.

    Invariants: inference and solution do not change any more. Layouts are the same on every rank; views made with `for_rank` find them once.
    """

    inference: Inference
    solution: Solution
    rank: int
    _produced: dict[Node, Layout] = field(default_factory=dict, repr=False, compare=False)
    _required: dict[tuple[Node, int], Layout] = field(default_factory=dict, repr=False, compare=False)
    _atoms: dict[Axis, frozenset[int]] = field(default_factory=dict, repr=False, compare=False)

    def for_rank(self, rank: int) -> LayoutView:
        """The same layouts, seen by another rank."""
        return replace(self, rank=rank)

    @property
    def ranks(self) -> int:
        return self.solution.degrees.ranks

    @cached_property
    def riders(self) -> Riders:
        """What decides the parts of sharded atoms beside their lengths."""
        return riders_of(self.inference, self.ranks, self.solution.degrees.ring)

    @property
    def labels(self) -> Labels:
        return self.solution.labels

    # -- layouts ----------------------------------------------------------------------------------
    def produced(self, node: Node) -> Layout:
        """The layout in which a node's result comes out."""
        known = self._produced.get(node)
        if known is None:
            source = origin(node)
            axes = self.inference.axes[node][0]
            known = tuple(frozenset(a for a in self._roots(axis) if (source, d, a) in self.labels.sharded) for d, axis in enumerate(axes))
            self._produced[node] = known
        return known

    def required(self, node: Node, relation: Relation, i: int) -> Layout:
        """The layout in which a node reads its operand `i`."""
        known = self._required.get((node, i))
        if known is None:
            known = self._required[node, i] = self._find_required(node, relation, i)
        return known

    def _find_required(self, node: Node, relation: Relation, i: int) -> Layout:
        operand = relation.operands[i]
        have = self.produced(operand)
        if i in relation.free:
            return have
        return tuple(
            frozenset(a for a in self._roots(axis) if self._needs_part(node, relation, i, d, a, a in have[d]))
            for d, axis in enumerate(relation.operand_axes[i])
        )

    def _needs_part(self, node: Node, relation: Relation, i: int, dim: int, atom: int, has_part: bool) -> bool:
        sharded = self.labels.sharded
        if node in self.labels.exchanged or node in self.labels.split:
            spec = relation.attention
            if i == spec.mask or dim != len(relation.operand_axes[i]) - 2:
                return False
            return (node, QUERY if i == spec.q else KEYS, atom) in sharded
        if (i, dim) in relation.flows:
            places = [d for d in relation.flows[(i, dim)] if any(d < len(out) and atom in self._roots(out[d]) for out in relation.out_axes)]
            if not places and relation.dropping:
                return has_part
            return any((node, d, atom) in sharded for d in places)
        return (i, dim) in relation.reduces and (node, REDUCED, atom) in sharded

    def reduced(self, node: Node, relation: Relation) -> str | None:
        """The kind of all-reduce that completes a node's partial result, or None."""
        for (i, dim), kind in relation.reduces.items():
            if any((node, REDUCED, a) in self.labels.sharded for a in self._roots(relation.operand_axes[i][dim])):
                return kind
        return None

    def _roots(self, axis: Axis) -> frozenset[int]:
        known = self._atoms.get(axis)
        if known is None:
            known = self._atoms[axis] = frozenset(self.inference.table.roots(axis))
        return known

    # -- lengths -----------------------------------------------------------------------------------
    def atom_length(self, atom: int, sharded: bool, rank: int | None = None) -> Length:
        length = self.inference.table.length(atom)
        return self.riders.part(atom, length, self.rank if rank is None else rank, self.inference) if sharded else length

    def factor_length(self, factor: Factor, sharded: frozenset[int]) -> Length:
        return total(self.atom_length(a, a in sharded) for a in self.inference.table.expand(factor))

    def axis_length(self, axis: Axis, sharded: frozenset[int]) -> Length:
        return product(self.factor_length(f, sharded) for f in axis)

    def parts(self, atom: int) -> tuple[Length, ...]:
        """Lengths of a sharded atom's parts, for all ranks."""
        return tuple(self.atom_length(atom, True, r) for r in range(self.ranks))

    # -- text form ---------------------------------------------------------------------------------
    def text(self, node: Node, layout: Layout) -> str:
        """`(12 + 30/4) 2 16`: dims, with sharded atoms divided by the number of ranks."""
        return " ".join(self.axis_text(axis, s) for axis, s in zip(self.inference.axes[node][0], layout, strict=True))

    def axis_text(self, axis: Axis, sharded: frozenset[int]) -> str:
        table = self.inference.table
        if not sharded:
            return str(table.axis_length(axis))
        factors = []
        for factor in table.expand_axis(axis):
            atoms = [f"{table.length(a)}/{self.ranks}" if a in sharded else str(table.length(a)) for a in factor]
            factors.append(atoms[0] if len(atoms) == 1 else "(" + " + ".join(atoms) + ")")
        return "*".join(factors)
