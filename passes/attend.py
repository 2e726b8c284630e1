"""Lower one attention node to the mesh: Ulysses exchange, ring, or both; and local attention whose rows are cut.

Before: %o = aten.scaled_dot_product_attention(%q, %k, %v)                                    all [B, H, S, D]
After:  %q_h, %k_h, %v_h = seq_to_heads([%q, %k, %v], …, group="ulysses")                     [B, H/U, S_ring_row, D]
        %o_h = ring_attention(%q_h, %k_h, %v_h, query_segments=…, key_segments=…, group="ring")
        %o = heads_to_seq(%o_h, …, group="ulysses")                                           [B, H, S/N, D]

Where it pays (`partitioner/turns.py`) heads are exchanged and attended in turns, and the results joined:
        %q_0, … = seq_to_heads(…); %q_1, … = seq_to_heads(…); %o_0 = heads_to_seq(sdpa(%q_0, …)); %o_1 = heads_to_seq(sdpa(%q_1, …)); %o = cat(…)

A causal ring over one sequence is `zigzag_attention(%q_h, %k_h, %v_h, query_segments=…, key_segments=…, group="ring")` where that pays
(`partitioner/balance.py`). Heads that ranks share by query rows: `attend_shares.py`.
"""

from __future__ import annotations

import itertools
import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from seqpar.errors import UnsupportedError
from seqpar.partitioner.atoms import Axis
from seqpar.partitioner.attention_heads import HeadPlan
from seqpar.partitioner.execution import execution_of
from seqpar.partitioner.labels import KEYS, QUERY
from seqpar.partitioner.layout import LayoutView
from seqpar.partitioner.lengths import Length, product, total
from seqpar.partitioner.op import shape_of
from seqpar.partitioner.relation import Relation
from seqpar.passes.attend_shares import emit_shares
from seqpar.runtime.attention import causal_mask, select_heads
from seqpar.runtime.head_shares import causal_rows
from seqpar.runtime.ring import ring_attention, split_kv_attention
from seqpar.runtime.ulysses import heads_to_seq, seq_to_heads
from seqpar.runtime.zigzag import zigzag_attention

if TYPE_CHECKING:
    from seqpar.passes.emit import Emitter

aten = torch.ops.aten


@dataclass(frozen=True)
class Order:
    """A sequence that is a product of factors, of which `axis[place]` is cut."""

    axis: Axis
    place: int


class Exchange:
    """One attention over the mesh, for one rank. Segments are described atom by atom, in global order."""

    def __init__(self, emitter: Emitter, node: Node, relation: Relation) -> None:
        self.emitter, self.node, self.relation = emitter, node, relation
        self.spec = relation.attention
        self.execution = execution_of(emitter.view.inference, emitter.view.solution, node)
        self.division = self.execution.division
        self.heads, degrees = self.division.heads, self.division.degrees
        self.ulysses, self.ring = degrees.ulysses, degrees.ring
        self.ring_rank, self.ulysses_rank = divmod(emitter.view.rank, degrees.ulysses)
        result = len(relation.out_axes[0]) - 2
        self.row_order = self._order(self.spec.q, (QUERY, result))
        self.column_order = self._order(self.spec.k, (KEYS,))
        self.rows = self._atoms(self.row_order, QUERY)
        self.columns = self._atoms(self.column_order, KEYS)
        self.results = self._atoms(self.row_order, result)

    def _order(self, operand: int, roles: tuple[int, ...]) -> Order:
        """The factors of an operand's sequence, and which of them is cut (the first if none is)."""
        view = self.emitter.view
        axis = view.inference.table.expand_axis(self.relation.operand_axes[operand][-2])
        cut = [i for i, f in enumerate(axis) if any((self.node, role, a) in view.labels.sharded for role in roles for a in f)]
        return Order(axis, cut[0] if cut else 0)

    def _atoms(self, order: Order, role: int) -> list[tuple[int, bool]]:
        """Atoms of the factor that is cut, and whether each is sharded."""
        return [(a, (self.node, role, a) in self.emitter.view.labels.sharded) for a in order.axis[order.place]]

    def _inner(self, order: Order) -> Length:
        """Positions per position of the cut factor (1 unless the sequence is a product)."""
        table = self.emitter.view.inference.table
        return product(table.factor_length(f) for i, f in enumerate(order.axis) if i != order.place)

    # -- order ----------------------------------------------------------------------------------------
    def _reordered(self, x: Any, like: Node, dim: int, order: Order, atoms: list[tuple[int, bool]], back: bool = False) -> Any:
        """[.., before * cut * after, ..] -> [.., cut * before * after, ..], or back; nothing if the cut factor is the outermost."""
        if order.place == 0:
            return x
        view, emit = self.emitter.view, self.emitter.sizes.emit
        factor_length = view.inference.table.factor_length
        before, after = (product(map(factor_length, run)) for run in (order.axis[: order.place], order.axis[order.place + 1 :]))
        cut = total(view.atom_length(a, sharded) for a, sharded in atoms)
        shape = [emit(n) for n in shape_of(like.meta["val"])]
        head, tail = shape[:dim], shape[dim + 1 :]
        opened = (cut, before, after) if back else (before, cut, after)
        places = list(range(len(shape) + 2))
        places[dim], places[dim + 1] = dim + 1, dim
        x = self.emitter.call(aten.reshape.default, (x, [*head, *map(emit, opened), *tail]))
        x = self.emitter.call(aten.permute.default, (x, places))
        return self.emitter.call(aten.reshape.default, (x, [*head, emit(product((before, cut, after))), *tail]))

    def _mask_reordered(self, mask: Any) -> Any:
        """A whole mask's rows and columns in the order of queries and keys."""
        if mask is None:
            return None
        operand = self.relation.operands[self.spec.mask]
        shape = shape_of(operand.meta["val"])
        for dim, order in ((len(shape) - 2, self.row_order), (len(shape) - 1, self.column_order)):
            if dim >= 0 and shape[dim] != 1:
                mask = self._reordered(mask, operand, dim, order, [(a, False) for a in order.axis[order.place]])
        return mask

    # -- segments -------------------------------------------------------------------------------------
    def _part(self, atom: int, rank: int) -> Length:
        return self.emitter.view.atom_length(atom, True, rank)

    def in_row(self, atoms: list[tuple[int, bool]], order: Order) -> tuple[Any, ...]:
        """Segments over the Ulysses group of this ring row."""
        first = self.ring_rank * self.ulysses
        return self._segments(atoms, self._inner(order), [(first + u, first + u + 1) for u in range(self.ulysses)])

    def over_ring(self, atoms: list[tuple[int, bool]], order: Order) -> tuple[Any, ...]:
        """Segments over the ring: what each ring row holds after its Ulysses exchange."""
        return self._segments(atoms, self._inner(order), [(j * self.ulysses, (j + 1) * self.ulysses) for j in range(self.ring)])

    def _segments(self, atoms: list[tuple[int, bool]], inner: Length, holders: list[tuple[int, int]]) -> tuple[Any, ...]:
        table, emit = self.emitter.view.inference.table, self.emitter.sizes.emit
        return tuple(
            tuple(emit(product((inner, total(self._part(a, r) for r in range(lo, hi))))) for lo, hi in holders)
            if sharded
            else emit(product((inner, table.length(a))))
            for a, sharded in atoms
        )

    def _stretch(self) -> tuple[Any, ...]:
        """What each ring row holds of a sequence whose atoms lie together in every part."""
        rows, inner = (range(j * self.ulysses, (j + 1) * self.ulysses) for j in range(self.ring)), self._inner(self.row_order)
        return tuple(self.emitter.sizes.emit(product((inner, total(self._part(a, r) for a, _ in self.rows for r in row)))) for row in rows)

    # -- emission ------------------------------------------------------------------------------------
    def emit(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        """With the cut factor outermost, parts are contiguous; attention does not care about the order of rows and keys."""
        spec, dim = self.spec, len(self.relation.out_axes[0]) - 2
        like = [self.relation.operands[i] for i in (spec.q, spec.k, spec.v)]
        orders = ((self.row_order, self.rows), (self.column_order, self.columns), (self.column_order, self.columns))
        q, k, v = (self._reordered(x, n, dim, *order) for x, n, order in zip((q, k, v), like, orders, strict=True))
        mask = self._mask_reordered(mask)
        out = self._exchanged(q, k, v, mask)
        return self._reordered(out, self.node, dim, self.row_order, self.results, back=True)

    def _exchanged(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        if self.division.shared:
            return emit_shares(self, (q, k, v), mask)
        if self.ulysses == 1:
            return self._attend(q, k, v, mask)
        turns = self.execution.turns.heads
        moved = [self._to_heads(q, k, v, heads) for heads in turns]  # next to one another: all are on their way before the first attends
        results = [self._from_heads(self._attend(*self._received(x, heads), self._mask_heads(mask, heads)), heads) for x, heads in zip(moved, turns, strict=True)]
        return results[0] if len(results) == 1 else self._joined(results)

    def _to_heads(self, q: Any, k: Any, v: Any, heads: HeadPlan) -> Any:
        rows, columns = self.in_row(self.rows, self.row_order), self.in_row(self.columns, self.column_order)
        return self.emitter.exchange(seq_to_heads, ([q, k, v], [rows, columns, columns], [heads.queries, heads.keys, heads.keys]), {"group": "ulysses"})

    def _received(self, moved: Any, heads: HeadPlan) -> tuple[Any, Any, Any]:
        q, k, v = (self.emitter.call(operator.getitem, (moved, i)) for i in range(3))
        index = heads.expansion[self.ulysses_rank]
        if index is not None:
            k, v = (self.emitter.call(select_heads, (x, index)) for x in (k, v))
        return q, k, v

    def _from_heads(self, out: Any, heads: HeadPlan) -> Any:
        first = heads.queries[0][0]
        back = tuple((start - first, stop - first) for start, stop in heads.queries)
        return self.emitter.exchange(heads_to_seq, (out, self.in_row(self.results, self.row_order), back), {"group": "ulysses"})

    def _joined(self, results: list[Any]) -> Any:
        """The heads of all turns, in [B, S, H, D] memory order like those of one exchange."""
        call = self.emitter.call
        parts = [call(aten.transpose.int, (x, 1, 2)) for x in results]
        return call(aten.transpose.int, (call(aten.cat.default, (parts, 2)), 1, 2))

    def _mask_heads(self, mask: Any, heads: HeadPlan) -> Any:
        if mask is None:
            return None
        shape = self.relation.operands[self.spec.mask].meta["val"].shape
        if len(shape) < 3 or shape[-3] == 1:
            return mask
        start, stop = heads.queries[self.ulysses_rank]
        return self.emitter.call(aten.slice.Tensor, (mask, len(shape) - 3, start, stop))

    def _attend(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        spec = self.spec
        gqa = self.heads.grouped if self.ulysses > 1 else spec.enable_gqa
        common: dict[str, Any] = {"scale": spec.scale, "enable_gqa": gqa}
        if self.ring == 1:
            args = (q, k, v, mask, 0.0, spec.is_causal)
            return self.emitter.call(aten.scaled_dot_product_attention.default, args, common)
        segments = {"query_segments": self.over_ring(self.rows, self.row_order), "key_segments": self.over_ring(self.columns, self.column_order)}
        if self.execution.zigzag:
            together = self.emitter.view.riders.is_one_stretch(tuple(a for a, _ in self.rows))
            if together and self.columns == self.rows and all(sharded for _, sharded in self.rows):  # one segment, then
                segments = dict.fromkeys(segments, (self._stretch(),))
            return self.emitter.exchange(zigzag_attention, (q, k, v), {**segments, **common, "group": "ring"})
        return self.emitter.exchange(ring_attention, (q, k, v, mask), {**segments, **common, "is_causal": spec.is_causal, "group": "ring"})


def emit_exchange(emitter: Emitter, node: Node, relation: Relation, operands: dict[Node, Node]) -> Node:
    """Emit the attention of an exchanged node; the result is in the node's produced layout."""
    spec = relation.attention
    q, k, v = (operands[relation.operands[i]] for i in (spec.q, spec.k, spec.v))
    mask = None if spec.mask is None else operands[relation.operands[spec.mask]]
    return Exchange(emitter, node, relation).emit(q, k, v, mask)


def _held_ranges(view: LayoutView, axis: Axis, sharded: frozenset[int]) -> list[tuple[Length, Length]]:
    """(start, length) of the global positions that a rank holds, in order; one set for each position of the factors outside the cut one."""
    table = view.inference.table
    axis = table.expand_axis(axis)
    if not sharded:  # another dim is cut
        return [(0, table.axis_length(axis))]
    place = next(i for i, f in enumerate(axis) if sharded & set(f))
    outer, inner = (product(map(table.factor_length, run)) for run in (axis[:place], axis[place + 1 :]))
    if not isinstance(outer, int):
        raise UnsupportedError("Causal attention over a product of dims, cut in an inner one, needs the number of outer positions fixed. Trace with dynamic=False.")
    ranges: list[tuple[Length, Length]] = []
    start: Length = 0
    for _, atom in itertools.product(range(outer), axis[place]):
        length = table.length(atom)
        before = total(view.parts(atom)[: view.rank]) if atom in sharded else 0
        held = view.parts(atom)[view.rank] if atom in sharded else length
        ranges.append((product((inner, total((start, before)))), product((inner, held))))
        start = total((start, length))
    return ranges


def emit_local_causal(emitter: Emitter, node: Node, relation: Relation, operands: dict[Node, Node]) -> Node:
    """Causal attention with cut rows and whole keys: one stretch of rows is attended to the keys up to its last one, of several the triangle becomes a mask of global positions."""
    spec = relation.attention
    q, k, v = (operands[relation.operands[i]] for i in (spec.q, spec.k, spec.v))
    view, common = emitter.view, {"scale": spec.scale, "enable_gqa": spec.enable_gqa}
    ranges = [tuple(emitter.sizes.emit(n) for n in held) for held in _held_ranges(view, relation.operand_axes[spec.q][-2], view.required(node, relation, spec.q)[-2])]
    if len(ranges) == 1 and spec.plain and not spec.dropout:
        return emitter.call(causal_rows, (q, k, v), {"first": ranges[0][0], **common})
    columns = emitter.sizes.emit(view.inference.table.axis_length(relation.operand_axes[spec.k][-2]))
    device = node.meta["val"].device
    mask = emitter.call(causal_mask, (tuple(ranges), ((0, columns),)), {"device": device})
    return emitter.call(aten.scaled_dot_product_attention.default, (q, k, v, mask, spec.dropout, False), common)


def emit_split(emitter: Emitter, relation: Relation, operands: dict[Node, Node], cut: frozenset[int]) -> Node:
    """Attention of all queries to the keys that the rank holds, merged over the ranks. cut: the atoms of the keys that are in parts."""
    spec = relation.attention
    q, k, v = (operands[relation.operands[i]] for i in (spec.q, spec.k, spec.v))
    mask = None if spec.mask is None else operands[relation.operands[spec.mask]]
    table = emitter.view.inference.table
    (keys,) = table.expand_axis(relation.operand_axes[spec.k][-2])
    rows = emitter.sizes.emit(table.axis_length(relation.operand_axes[spec.q][-2]))
    segments = {"query_segments": (rows,), "key_segments": emitter.segments(keys, cut)}
    common = {"scale": spec.scale, "is_causal": spec.is_causal, "enable_gqa": spec.enable_gqa}
    return emitter.call(split_kv_attention, (q, k, v, mask), {**segments, **common, "group": "sp"})
