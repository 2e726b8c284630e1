"""Attention over heads that ranks share by query rows: one call per piece, and one exchange back.

Before: %q_h, %k_h, %v_h = seq_to_heads(…)            all heads this rank has a piece of, all rows
After:  %o_0 = sdpa(%q_h[:, :1], %k_h[:, :1], %v_h[:, :1]); %o_1 = sdpa(%q_h[:, 1:, :32], %k_h[:, 1:], %v_h[:, 1:])
        %o = pieces_to_seq([%o_0, %o_1], …, group="ulysses")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from seqpar.partitioner.head_shares import Piece
from seqpar.partitioner.op import shape_of
from seqpar.runtime.head_shares import pieces_to_seq

if TYPE_CHECKING:
    from seqpar.passes.attend import Exchange

aten = torch.ops.aten


def emit_shares(exchange: Exchange, shares: tuple[tuple[Piece, ...], ...], operands: tuple[Any, Any, Any], mask: Any) -> Any:
    """`operands` are q, k, v of this rank's heads, every row; mask: whole, or None. The result is in parts of the sequence, like heads_to_seq's."""
    emitter, spec = exchange.emitter, exchange.spec
    length = emitter.view.inference.table.axis_length(exchange.relation.operand_axes[spec.q][-2])
    table = tuple(tuple((p.start, p.stop, *map(emitter.sizes.emit, p.rows(length))) for p in pieces) for pieces in shares)
    results = []
    for piece, (_, _, first, last) in zip(shares[exchange.ulysses_rank], table[exchange.ulysses_rank], strict=True):
        own = exchange.heads.queries[exchange.ulysses_rank][0]
        q, k, v = (emitter.call(aten.slice.Tensor, (x, 1, piece.start - own, piece.stop - own)) for x in operands)
        if not piece.whole:
            q = emitter.call(aten.slice.Tensor, (q, 2, first, last))
        part = _mask_of(exchange, mask, piece, first, last)
        args = (q, k, v, part, 0.0, False)
        results.append(emitter.call(aten.scaled_dot_product_attention.default, args, {"scale": spec.scale, "enable_gqa": False}))
    return emitter.call(pieces_to_seq, (results, exchange.in_row(exchange.results, exchange.row_order), table), {"group": "ulysses"})


def _mask_of(exchange: Exchange, mask: Any, piece: Piece, first: Any, last: Any) -> Any:
    """Heads and rows of the mask that belong to a piece."""
    if mask is None:
        return None
    shape = shape_of(exchange.relation.operands[exchange.spec.mask].meta["val"])
    if len(shape) > 2 and shape[-3] != 1:
        mask = exchange.emitter.call(aten.slice.Tensor, (mask, len(shape) - 3, piece.start, piece.stop))
    if len(shape) > 1 and shape[-2] != 1 and not piece.whole:
        mask = exchange.emitter.call(aten.slice.Tensor, (mask, len(shape) - 2, first, last))
    return mask
