"""Grouped-query attention written with a dim of its own for the heads of a group: [batch, groups, heads, rows, dim] against [batch, groups, 1, keys, dim].

The shapes that `scaled_dot_product_attention(..., enable_gqa=True)` takes instead: heads and their groups in one dim.
"""

from __future__ import annotations

from seqpar.partitioner.lengths import Length

GROUPED = 3  # batch, groups, heads of a group


def shares_heads(q: tuple[Length, ...], k: tuple[Length, ...], v: tuple[Length, ...]) -> bool:
    """Whether these batch dims are those of groups whose heads share keys and values; groups and heads in numbers."""
    return len(q) == GROUPED and k == v == (*q[:2], 1) and q[2] != 1 and all(isinstance(n, int) for n in q[1:])


def merged(mask: tuple[Length, ...], lead: tuple[Length, ...]) -> tuple[Length, ...] | None:
    """The batch dims of a mask for merged heads, from those it has (`()` for none, which stay so); None if it differs between groups or heads only."""
    if not mask:
        return mask
    batch, groups, heads = (1,) * (GROUPED - len(mask)) + mask
    if groups == heads == 1:
        return batch, 1
    return (batch, lead[1] * lead[2]) if (groups, heads) == lead[1:] else None
