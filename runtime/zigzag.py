"""Causal ring attention that gives every rank the same work.

With contiguous parts the last rank of a causal ring attends to everything and the first to almost nothing. Here the sequence is cut into 2N chunks,
and rank r attends the queries of chunks r and 2N-1-r, one that sees little and one that sees much: balanced without masks, since
of two chunks of different ranks one is wholly visible to the other. The idea of dealing out positions so that causal ring attention is balanced is
that of Striped Attention (Brandon et al. 2023, arXiv:2311.09431); the order in pairs of chunks is the one the Llama 3 report (Dubey et al. 2024,
arXiv:2407.21783) describes for its context parallelism.

Only this attention works in that order: one exchange brings q, k and v there from whatever parts of the sequence the ranks hold, another one brings the result back.
"""

from __future__ import annotations  # inner functions are compiled: theirs must not be evaluated

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from seqpar.runtime.attention import Partial, attend, merge
from seqpar.runtime.groups import Group, rank_of, size_of
from seqpar.runtime.head_shares import Table, pieces_to_seq, seq_to_pieces
from seqpar.runtime.layout import Range, Segments, is_sharded, part_length
from seqpar.runtime.ring import refuse_gradients, rotate


def zigzag_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_segments: Segments,
    key_segments: Segments,
    scale: float | None = None,
    enable_gqa: bool = False,
    group: Group,
    comm_dtype: torch.dtype | None = None,
) -> Tensor:
    """Causal attention of the local q [B, H, S_r, D] to all keys, of which k, v [B, Hk, Sk_r, D] are here; like q. Queries and keys are the same S positions.

    Segments as in `ring_attention`; all of the queries are sharded. Parts may be uneven and empty. One dtype.

    Received by rank r, in elements, with m positions that it attends and does not hold, n that it holds and does not attend, and
    S'_j = `dealt(parts)[j]`: B m (H D + Hk D + Hk Dv) there, B n H Dv back, and B (Hk D + Hk Dv) (sum of S'_j over j != r) around the ring.
    With `comm_dtype` (see `travel.py`) what comes from other ranks is rounded to it.
    """
    size, rank = size_of(group), rank_of(group)
    if size == 1:
        return attend(q, k, v, None, scale, enable_gqa, is_causal=True)[0]
    assert all(map(is_sharded, query_segments)), f"every rank attends its own queries: {query_segments}"
    parts = [part_length(query_segments, r) for r in range(size)]
    chunks = chunk_lengths(parts)
    tables = [pieces(chunks, x.shape[1]) for x in (q, k, v)]
    moved = seq_to_pieces([q, k, v], [query_segments, key_segments, key_segments], tables, group=group, comm_dtype=comm_dtype)
    q, k, v = (torch.cat(moved[i : i + 2], 2) for i in (0, 2, 4))
    low, high = (chunks[c] for c in attended(rank, size))

    def visit(result: tuple[Partial, Partial] | None, source: int, k: Tensor, v: Tensor) -> tuple[Partial, Partial]:
        """Results of the low and of the high chunk."""
        if source == rank or result is None:
            return _cut(attend(q, k, v, None, scale, enable_gqa, is_causal=True), low, high)
        if source < rank:  # its low chunk is before both of ours, its high chunk behind both
            k, v = (x.narrow(2, 0, chunks[source]) for x in (k, v))
            new = _cut(attend(q, k, v, None, scale, enable_gqa), low, high)
            return merge(*result[0], *new[0]), merge(*result[1], *new[1])
        return result[0], merge(*result[1], *attend(q.narrow(2, low, high), k, v, None, scale, enable_gqa))

    own: list[Range] = [(0, low + high)]
    (low_out, _), (high_out, _) = rotate(k, v, own, dealt(parts), visit, group, comm_dtype)
    order = sorted((c, (r, i)) for r in range(size) for i, c in enumerate(attended(r, size)))
    results = [low_out.to(q.dtype), high_out.to(q.dtype)]
    return refuse_gradients(pieces_to_seq(results, query_segments, tables[0], [piece for _, piece in order], group=group, comm_dtype=comm_dtype))


def chunk_lengths(parts: Sequence[int]) -> list[int]:
    """2N chunks for N ranks that hold so many positions: halves of their number."""
    return [n for part in parts for n in ((part + 1) // 2, part // 2)]


def attended(rank: int, size: int) -> tuple[int, int]:
    """The chunks whose queries a rank attends."""
    return rank, 2 * size - 1 - rank


def dealt(parts: Sequence[int]) -> list[int]:
    """How many positions every rank attends."""
    chunks = chunk_lengths(parts)
    return [sum(chunks[c] for c in attended(r, len(parts))) for r in range(len(parts))]


def pieces(chunks: Sequence[int], heads: int) -> Table:
    """All heads of the chunks that every rank attends."""
    size, ends = len(chunks) // 2, list(accumulate(chunks, initial=0))
    return [[(0, heads, ends[c], ends[c + 1]) for c in attended(r, size)] for r in range(size)]


def _cut(partial: Partial, low: int, high: int) -> tuple[Partial, Partial]:
    out, lse = partial
    return (out.narrow(2, 0, low), lse.narrow(2, 0, low)), (out.narrow(2, low, high), lse.narrow(2, low, high))
