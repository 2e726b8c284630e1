"""`scaled_dot_product_attention`: the operator that gives dims their meaning."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from seqpar.partitioner.lengths import same
from seqpar.partitioner.op import Op
from seqpar.partitioner.registry import rule

aten = torch.ops.aten


@dataclass(frozen=True)
class AttentionSpec:
    """Where an attention node's operands are among the relation's operands. q_BHSD, k_BHTD, v_BHTE -> out_BHSE (heads may be missing)."""

    q: int
    k: int
    v: int
    mask: int | None
    is_causal: bool
    scale: float | None
    enable_gqa: bool
    dropout: float
    plain: bool  # four dims, equal batch: heads can be exchanged


@rule(aten.scaled_dot_product_attention.default)
def sdpa(op: Op) -> None:
    """Batch, heads and query positions keep their place; keys and values are whole (or exchanged, or rotated: the solver decides)."""
    a = op.args
    q, k, v = (op.index(a[n]) for n in ("query", "key", "value"))
    mask = op.index(a["attn_mask"]) if a["attn_mask"] is not None else None
    rank = len(op.out_shape)
    seq = rank - 2
    op.carry(q, op.rank(q) - 2, seq)
    tied = k == v or op.tie(k, op.rank(k) - 2, v, op.rank(v) - 2)
    heads = rank - 3 if rank > 3 else None
    grouped = heads is not None and any(op.rank(i) > 2 and not op.is_one(i, op.rank(i) - 3) and not same(op.shapes[i][-3], op.out_shape[heads]) for i in (q, k, v))
    distinct = len({q, k, v}) == 3
    op.alike = q not in (k, v)
    for operand in dict.fromkeys((q, k, v)):
        for d in range(op.rank(operand) - 2):
            out_dim = d + rank - op.rank(operand)
            if out_dim != heads or not grouped:
                op.carry(operand, d, out_dim)
    if mask is not None:
        _carry_mask(op, mask, k, rank)
    same_batch = rank == 4 and all(op.rank(i) == 4 and same(op.shapes[i][0], op.out_shape[0]) for i in (q, k, v))
    op.attention = AttentionSpec(q, k, v, mask, bool(a["is_causal"]), a["scale"], bool(a["enable_gqa"]), float(a["dropout_p"] or 0.0), plain=tied and same_batch and distinct)
    op.reason = "keys and values of an attention"


def _carry_mask(op: Op, mask: int, k: int, rank: int) -> None:
    """Rows of the mask follow the queries; its columns are cut like the keys (they are whole unless keys are)."""
    offset = rank - op.rank(mask)
    for d in range(op.rank(mask) - 1):
        op.carry(mask, d, d + offset)
    last = op.rank(mask) - 1
    if not op.is_one(mask, last):
        op.tie(mask, last, k, op.rank(k) - 2)


