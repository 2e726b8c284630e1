"""What an attention over the mesh receives: bytes of every rank, per operand and atom, for uneven lengths and heads, whole or shared by rows.

Counted in positions of one head. With R_i the rows (of all or of one head) that rank i attends, E_i its part of the sequence, S_i the part of
its ring row (the whole sequence if there is one row), rank i receives

    queries       of every head it attends, the rows R_i within S_i but not in E_i
    keys, values  of every K/V head that these read: S_i without E_i; around the ring, everything but S_i
    result        of every head, the rows E_i (all rows, if the result becomes whole) but those that it attended
    zigzag        of its heads, the chunks that it attends but does not hold (queries, keys, values), and holds but does not attend (result)

All ranks wait for the one that receives most, so that is the price.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from seqpar.partitioner.atoms import Axis
from seqpar.partitioner.cost import nbytes
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.lengths import product
from seqpar.partitioner.op import outputs_of
from seqpar.partitioner.relation import Relation
from seqpar.partitioner.riders import Riders
from seqpar.partitioner.zigzag import dealt, pieces

if TYPE_CHECKING:
    from seqpar.partitioner.division import Division

Table = tuple[tuple[tuple[int, int, int, int], ...], ...]
"""Per rank of an exchange: pieces, as heads [start, stop) and rows [start, stop)."""
Edges = tuple[int, ...]
"""Where the parts of an atom begin, and the end of the last one, in positions."""


@dataclass(frozen=True)
class ExchangeBytes:
    """Of one attention, divided in one way. Every answer has one number per rank of the mesh. riders: of the layouts of its operands."""

    inference: Inference
    node: Node
    division: Division
    riders: Riders

    def operand(self, i: int, atom: int) -> list[float]:
        """By all-to-all, of the positions of an atom of operand `i` that are sharded."""
        table, axes = self._queries if i == self._spec.q else self._keys, self._relation.operand_axes[i]
        each = self._bytes(self._relation.operands[i], axes)
        return [n * each for n in to_heads(table, self._edges(axes[-2], atom))]

    def around(self, i: int, atom: int) -> list[float]:
        """Of keys or values, around the ring."""
        axes = self._relation.operand_axes[i]
        each = self._bytes(self._relation.operands[i], axes)
        return [n * each for n in around(self._key_heads, self._edges(axes[-2], atom))]

    @cached_property
    def row_parts(self) -> list[int]:
        """How many positions of the queries every ring row holds, all of whose atoms are sharded."""
        axis = self.inference.table.expand_axis(self._relation.operand_axes[self._spec.q][-2])
        edges = [self._row_edges(axis, a) for a in axis[0]]
        return [sum(e[j + 1] - e[j] for e in edges) for j in range(self.division.degrees.ring)]

    def zigzag(self, cut: Sequence[tuple[int, Iterable[int]]]) -> list[float]:
        """By the two exchanges of a ring in zigzag order. cut: as of `total`."""
        table = pieces(self.row_parts)
        query_heads = tuple(stop - start for start, stop in self.division.heads.queries)
        moved = [0.0] * self.division.degrees.ranks

        def add(positions: Sequence[int], heads: Sequence[int], node: Node, axes: tuple[Axis, ...]) -> None:
            each = self._bytes(node, axes)
            for i, n in enumerate(n * h for n in positions for h in heads):
                moved[i] += n * each

        for i, atoms in cut:
            operand, axes = self._relation.operands[i], self._relation.operand_axes[i]
            for edges in (self._row_edges(axes[-2], a) for a in atoms):
                add(to_heads(table, edges), query_heads if i == self._spec.q else self._key_heads, operand, axes)
        axes = self._relation.out_axes[0]
        for edges in (self._row_edges(axes[-2], a) for a in self.inference.table.expand_axis(axes[-2])[0]):
            add(back(table, edges, False), query_heads, self.node, axes)
        return moved

    def around_in_zigzag(self) -> list[float]:
        """Of keys and values, around such a ring."""
        each = sum(self._bytes(self._relation.operands[i], self._relation.operand_axes[i]) for i in (self._spec.k, self._spec.v))
        lengths = dealt(self.row_parts)
        return [(sum(lengths) - n) * heads * each for n in lengths for heads in self._key_heads]

    def result(self, atom: int, whole: bool = False) -> list[float]:
        """By all-to-all, of an atom of the result, in parts or whole on every rank."""
        axes = self._relation.out_axes[0]
        each = self._bytes(self.node, axes)
        return [n * each for n in back(self._queries, self._edges(axes[-2], atom), whole)]

    def total(self, cut: Sequence[tuple[int, Iterable[int]]], results: Set[int], in_zigzag: bool = False) -> tuple[float, float]:
        """Of the rank that receives most: by all-to-all, around the ring. cut: operands (queries, keys and values) with their sharded atoms; results: of the result.

        What of the result is not sharded becomes whole on every rank. in_zigzag: the ring is causal, and deals its positions out (`balance.py`).
        """
        queries = cut[0]
        moved = [(0, self.operand(i, a)) for i, atoms in cut for a in atoms]
        if in_zigzag:
            moved += [(0, self.zigzag(cut)), (1, self.around_in_zigzag())]
        else:
            moved += [(1, self.around(i, a)) for i, atoms in cut[1:] for a in atoms]
        factors = self.inference.table.expand_axis(self._relation.out_axes[0][-2])
        held = {*queries[1], *results}
        factor = next((f for f in factors if held & set(f)), factors[0])
        moved += [(0, self.result(a, whole=a not in results)) for a in factor]
        sums = [[0.0] * self.division.degrees.ranks, [0.0] * self.division.degrees.ranks]
        for kind, per_rank in moved:
            sums[kind] = [have + new for have, new in zip(sums[kind], per_rank, strict=True)]
        return max(zip(*sums, strict=True), key=sum)

    @cached_property
    def _relation(self) -> Relation:
        return self.inference.relations[self.node]

    @property
    def _spec(self) -> Any:
        return self._relation.attention

    @cached_property
    def _queries(self) -> Table:
        rows = self._length(self._relation.out_axes[0][-2])
        return tuple(tuple((p.start, p.stop, int(p.rows(rows)[0]), int(p.rows(rows)[1])) for p in pieces) for pieces in self.division.pieces)

    @cached_property
    def _keys(self) -> Table:
        columns = self._length(self._relation.operand_axes[self._spec.k][-2])
        return tuple(((start, stop, 0, columns),) for start, stop in self.division.heads.keys)

    @cached_property
    def _key_heads(self) -> tuple[int, ...]:
        """How many K/V heads every rank of an exchange attends with."""
        plan = self.division.heads
        return tuple(stop - start if index is None else len(index) for (start, stop), index in zip(plan.keys, plan.expansion, strict=True))

    def _length(self, axis: Axis) -> int:
        return self.inference.table.sizes.hint(self.inference.table.axis_length(axis))

    def _bytes(self, node: Node, axes: tuple[Axis, ...]) -> float:
        """Of one position of one head."""
        return nbytes(outputs_of(node)[0], self.inference.table.sizes) / max(self._length(axes[1]) * self._length(axes[-2]), 1)

    def _edges(self, axis: Axis, atom: int) -> Edges:
        """With the factor that is cut outermost, as attention over the mesh has it."""
        table, ranks = self.inference.table, self.division.degrees.ranks
        axis = table.expand_axis(axis)
        place = next((i for i, f in enumerate(axis) if atom in f), None)
        if place is None:
            return (0,) * (ranks + 1)
        inner = self.inference.table.sizes.hint(product(table.factor_length(f) for i, f in enumerate(axis) if i != place))
        lengths = [table.sizes.hint(table.length(a)) for a in axis[place]]
        at = axis[place].index(atom)
        parts = [table.sizes.hint(self.riders.part(atom, table.length(atom), r, self.inference)) for r in range(ranks)]
        return tuple(inner * (sum(lengths[:at]) + n) for n in accumulate(parts, initial=0))

    def _row_edges(self, axis: Axis, atom: int) -> Edges:
        """The same of ring rows."""
        return self._edges(axis, atom)[:: self.division.degrees.ulysses]


@lru_cache(maxsize=4096)
def to_heads(table: Table, edges: Edges) -> tuple[int, ...]:
    """Positions, times heads, that every rank receives of its pieces in `table` (per rank of its ring row)."""
    found, u = [], len(table)
    for rank in range(len(edges) - 1):
        row = rank // u * u
        found.append(sum((p[1] - p[0]) * (_common(p, edges[row], edges[row + u]) - _common(p, edges[rank], edges[rank + 1])) for p in table[rank % u]))
    return tuple(found)


@lru_cache(maxsize=4096)
def around(heads: tuple[int, ...], edges: Edges) -> tuple[int, ...]:
    """Positions, times heads, of the other ring rows; heads: of every rank of a row."""
    u, whole = len(heads), edges[-1] - edges[0]
    rows = [(rank // u * u, rank % u) for rank in range(len(edges) - 1)]
    return tuple(heads[column] * (whole - (edges[row + u] - edges[row])) for row, column in rows)


@lru_cache(maxsize=4096)
def back(table: Table, edges: Edges, whole: bool) -> tuple[int, ...]:
    """Positions, times heads, of the result that every rank receives: its part, or everything; without what it attended itself."""
    found, heads = [], max(p[1] for pieces in table for p in pieces)
    for rank in range(len(edges) - 1):
        start, stop = (edges[0], edges[-1]) if whole else (edges[rank], edges[rank + 1])
        found.append(heads * (stop - start) - sum((p[1] - p[0]) * _common(p, start, stop) for p in table[rank % len(table)]))
    return tuple(found)


def _common(piece: tuple[int, int, int, int], start: int, stop: int) -> int:
    """Rows of a piece in [start, stop)."""
    return max(0, min(piece[3], stop) - max(piece[2], start))
