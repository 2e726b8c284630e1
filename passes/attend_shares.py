"""Attention over heads that ranks share by query rows: every rank gets its pieces, attends each in one call, and one exchange brings them back.

Before: %o = aten.scaled_dot_product_attention(%q, %k, %v)                                    all [B, H, S, D]
After:  %q_0, %q_1, %k_h, %v_h = seq_to_pieces([%q, %k, %v], …, group="sp")                   [B, h, s, D], keys and values of all rows
        %o_0 = sdpa(%q_0, %k_h[:, :1], %v_h[:, :1]); %o_1 = sdpa(%q_1, %k_h[:, 1:], %v_h[:, 1:])
        %o = pieces_to_seq([%o_0, %o_1], …, group="sp")                                       [B, H, S/N, D]

Some rows of causal attention are `causal_rows(%q_1, …, first=32)`.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from seqpar.partitioner.attention_heads import keys_of
from seqpar.partitioner.head_shares import Piece
from seqpar.partitioner.op import shape_of
from seqpar.runtime.attention import select_heads
from seqpar.runtime.head_shares import causal_rows, pieces_to_seq, seq_to_pieces

if TYPE_CHECKING:
    from seqpar.passes.attend import Exchange

aten = torch.ops.aten
Rows = tuple[Any, Any]


def emit_shares(exchange: Exchange, operands: tuple[Any, Any, Any], mask: Any) -> Any:
    """`operands` are q, k, v in parts of the sequence, mask: whole, or None. The result is in parts of the sequence, like heads_to_seq's."""
    emitter, spec, found = exchange.emitter, exchange.spec, exchange.division
    lengths = [emitter.view.inference.table.axis_length(exchange.relation.operand_axes[i][-2]) for i in (spec.q, spec.k)]
    emit, rank, group = emitter.sizes.emit, exchange.ulysses_rank, {"group": found.axis}
    table = tuple(tuple((p.start, p.stop, *map(emit, p.rows(lengths[0]))) for p in pieces) for pieces in found.pieces)
    keys = tuple(((start, stop, 0, emit(lengths[1])),) for start, stop in found.heads.keys)
    rows, columns = exchange.in_row(exchange.rows, exchange.row_order), exchange.in_row(exchange.columns, exchange.column_order)
    moved = emitter.exchange(seq_to_pieces, (list(operands), [rows, columns, columns], [table, keys, keys]), group)
    *queries, k, v = (emitter.call(operator.getitem, (moved, i)) for i in range(len(table[rank]) + 2))
    pieces = zip(queries, found.pieces[rank], table[rank], strict=True)
    results = [_attend(exchange, (q, k, v), mask, piece, (first, last)) for q, piece, (_, _, first, last) in pieces]
    return emitter.exchange(pieces_to_seq, (results, exchange.in_row(exchange.results, exchange.row_order), table), group)


def _attend(exchange: Exchange, operands: tuple[Any, Any, Any], mask: Any, piece: Piece, rows: Rows) -> Any:
    """One piece; `operands`: its queries, and the keys and values of the rank's heads."""
    emitter, spec, heads = exchange.emitter, exchange.spec, exchange.heads
    q, k, v = operands
    first, last, index = keys_of(piece.start, piece.stop, exchange.division.readers)
    held, end = heads.keys[exchange.ulysses_rank]
    if (first, last) != (held, end):
        k, v = (emitter.call(aten.slice.Tensor, (x, 1, first - held, last - held)) for x in (k, v))
    if index is not None:
        k, v = (emitter.call(select_heads, (x, index)) for x in (k, v))
    common = {"scale": spec.scale, "enable_gqa": heads.grouped}
    if spec.is_causal and not piece.whole:
        return emitter.call(causal_rows, (q, k, v), {"first": rows[0], **common})
    args = (q, k, v, _mask_of(exchange, mask, piece, rows), 0.0, spec.is_causal)
    return emitter.call(aten.scaled_dot_product_attention.default, args, common)


def _mask_of(exchange: Exchange, mask: Any, piece: Piece, rows: Rows) -> Any:
    """Heads and rows of the mask that belong to a piece."""
    if mask is None:
        return None
    shape = shape_of(exchange.relation.operands[exchange.spec.mask].meta["val"])
    if len(shape) > 2 and shape[-3] != 1:
        mask = exchange.emitter.call(aten.slice.Tensor, (mask, len(shape) - 3, piece.start, piece.stop))
    if len(shape) > 1 and shape[-2] != 1 and not piece.whole:
        mask = exchange.emitter.call(aten.slice.Tensor, (mask, len(shape) - 2, *rows))
    return mask
