"""Lower one attention node to the mesh: Ulysses exchange, ring, or both; and local attention whose rows are cut.

Before: %o = aten.scaled_dot_product_attention(%q, %k, %v)                                    all [B, H, S, D]
After:  %q_h, %k_h, %v_h = seq_to_heads([%q, %k, %v], …, group="ulysses")                     [B, H/U, S_ring_row, D]
        %o_h = ring_attention(%q_h, %k_h, %v_h, query_segments=…, key_segments=…, group="ring")
        %o = heads_to_seq(%o_h, …, group="ulysses")                                           [B, H, S/N, D]

A causal ring over one sequence is `zigzag_attention(%q_h, %k_h, %v_h, parts=…, group="ring")` where that pays (`balance.py`).
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from seqpar.partitioner.attention_heads import HeadPlan, divide_heads
from seqpar.partitioner.labels import KEYS, QUERY
from seqpar.partitioner.lengths import Length, part, product, total
from seqpar.partitioner.relation import Relation
from seqpar.passes.balance import in_zigzag
from seqpar.runtime.attention import causal_mask, select_heads
from seqpar.runtime.ring import ring_attention
from seqpar.runtime.ulysses import heads_to_seq, seq_to_heads
from seqpar.runtime.zigzag import zigzag_attention

if TYPE_CHECKING:
    from seqpar.passes.emit import Emitter

aten = torch.ops.aten


class Exchange:
    """One attention over the mesh, for one rank. Segments are described atom by atom, in global order."""

    def __init__(self, emitter: Emitter, node: Node, relation: Relation) -> None:
        self.emitter, self.node, self.relation = emitter, node, relation
        self.spec = relation.attention
        degrees = emitter.view.solution.degrees
        self.ulysses, self.ring = degrees.ulysses, degrees.ring
        self.ring_rank, self.ulysses_rank = divmod(emitter.view.rank, degrees.ulysses)
        self.rows = self._atoms(self.spec.q, QUERY)
        self.columns = self._atoms(self.spec.k, KEYS)
        self.results = self._atoms(self.spec.q, len(relation.out_axes[0]) - 2)
        q_heads, kv_heads = (emitter.view.inference.table.example_length(relation.operand_axes[i][1]) for i in (self.spec.q, self.spec.k))
        self.heads: HeadPlan = divide_heads(q_heads, kv_heads, self.ulysses)

    def _atoms(self, operand: int, role: int) -> list[tuple[int, bool]]:
        """Atoms of the factor that is cut, and whether each is sharded."""
        view = self.emitter.view
        factor = view.inference.table.expand_axis(self.relation.operand_axes[operand][-2])[0]
        return [(a, (self.node, role, a) in view.labels.sharded) for a in factor]

    def _inner(self, operand: int) -> Length:
        """Positions per row of the cut factor (1 unless the sequence is a product)."""
        table = self.emitter.view.inference.table
        return product(table.factor_length(f) for f in table.expand_axis(self.relation.operand_axes[operand][-2])[1:])

    # -- segments -------------------------------------------------------------------------------------
    def _part(self, atom: int, rank: int) -> Length:
        return part(self.emitter.view.inference.table.length(atom), rank, self.ulysses * self.ring)

    def in_row(self, atoms: list[tuple[int, bool]], operand: int) -> tuple[Any, ...]:
        """Segments over the Ulysses group of this ring row."""
        first = self.ring_rank * self.ulysses
        return self._segments(atoms, self._inner(operand), [(first + u, first + u + 1) for u in range(self.ulysses)])

    def over_ring(self, atoms: list[tuple[int, bool]], operand: int) -> tuple[Any, ...]:
        """Segments over the ring: what each ring row holds after its Ulysses exchange."""
        return self._segments(atoms, self._inner(operand), [(j * self.ulysses, (j + 1) * self.ulysses) for j in range(self.ring)])

    def _segments(self, atoms: list[tuple[int, bool]], inner: Length, holders: list[tuple[int, int]]) -> tuple[Any, ...]:
        table, emit = self.emitter.view.inference.table, self.emitter.sizes.emit
        return tuple(
            tuple(emit(product((inner, total(self._part(a, r) for r in range(lo, hi))))) for lo, hi in holders)
            if sharded
            else emit(product((inner, table.length(a))))
            for a, sharded in atoms
        )

    # -- emission ------------------------------------------------------------------------------------
    def emit(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        if self.ulysses > 1:
            q, k, v = self._to_heads(q, k, v)
            mask = self._mask_heads(mask)
        out = self._attend(q, k, v, mask)
        if self.ulysses > 1:
            heads = tuple(self.heads.queries)
            out = self.emitter.call(heads_to_seq, (out, self.in_row(self.results, self.spec.q), heads), {"group": "ulysses"})
        return out

    def _to_heads(self, q: Any, k: Any, v: Any) -> tuple[Any, Any, Any]:
        rows, columns = self.in_row(self.rows, self.spec.q), self.in_row(self.columns, self.spec.k)
        heads = [tuple(self.heads.queries), tuple(self.heads.keys), tuple(self.heads.keys)]
        moved = self.emitter.call(seq_to_heads, ([q, k, v], [rows, columns, columns], heads), {"group": "ulysses"})
        q, k, v = (self.emitter.call(operator.getitem, (moved, i)) for i in range(3))
        index = self.heads.expansion[self.ulysses_rank]
        if index is not None:
            k, v = (self.emitter.call(select_heads, (x, index)) for x in (k, v))
        return q, k, v

    def _mask_heads(self, mask: Any) -> Any:
        if mask is None:
            return None
        operand = self.relation.operands[self.spec.mask]
        if len(operand.meta["val"].shape) < 4 or operand.meta["val"].shape[1] == 1:
            return mask
        start, stop = self.heads.queries[self.ulysses_rank]
        return self.emitter.call(aten.slice.Tensor, (mask, 1, start, stop))

    def _attend(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        spec = self.spec
        gqa = self.heads.grouped if self.ulysses > 1 else spec.enable_gqa
        common: dict[str, Any] = {"scale": spec.scale, "enable_gqa": gqa}
        if self.ring == 1:
            args = (q, k, v, mask, 0.0, spec.is_causal)
            return self.emitter.call(aten.scaled_dot_product_attention.default, args, common)
        if in_zigzag(self.emitter.view.inference, self.emitter.view.solution, self.node):
            (parts,) = self.over_ring(self.rows, spec.q)
            return self.emitter.call(zigzag_attention, (q, k, v), {"parts": parts, **common, "group": "ring"})
        segments = {"query_segments": self.over_ring(self.rows, spec.q), "key_segments": self.over_ring(self.columns, spec.k)}
        return self.emitter.call(ring_attention, (q, k, v, mask), {**segments, **common, "is_causal": spec.is_causal, "group": "ring"})


def emit_exchange(emitter: Emitter, node: Node, relation: Relation, operands: dict[Node, Node]) -> Node:
    """Emit the attention of an exchanged node; the result is in the node's produced layout."""
    spec = relation.attention
    q, k, v = (operands[relation.operands[i]] for i in (spec.q, spec.k, spec.v))
    mask = None if spec.mask is None else operands[relation.operands[spec.mask]]
    return Exchange(emitter, node, relation).emit(q, k, v, mask)


def emit_local_causal(emitter: Emitter, node: Node, relation: Relation, operands: dict[Node, Node]) -> Node:
    """Causal attention with cut rows and whole keys: the triangle becomes a mask of global positions."""
    spec = relation.attention
    q, k, v = (operands[relation.operands[i]] for i in (spec.q, spec.k, spec.v))
    view = emitter.view
    sharded = view.required(node, relation, spec.q)[-2]
    ranges = []
    start: Length = 0
    axis = view.inference.table.expand_axis(relation.operand_axes[spec.q][-2])
    inner = product(view.inference.table.factor_length(f) for f in axis[1:])
    for atom in axis[0]:
        length = view.inference.table.length(atom)
        before = total(view.parts(atom)[: view.rank]) if atom in sharded else 0
        held = view.parts(atom)[view.rank] if atom in sharded else length
        ranges.append(tuple(emitter.sizes.emit(product((inner, n))) for n in (total((start, before)), held)))
        start = total((start, length))
    columns = emitter.sizes.emit(view.inference.table.axis_length(relation.operand_axes[spec.k][-2]))
    device = node.meta["val"].device
    mask = emitter.call(causal_mask, (tuple(ranges), ((0, columns),)), {"device": device})
    args = (q, k, v, mask, spec.dropout, False)
    return emitter.call(aten.scaled_dot_product_attention.default, args, {"scale": spec.scale, "enable_gqa": spec.enable_gqa})
