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
from seqpar.runtime.peers import Incoming, finish_from_peers, start_to_peers
from seqpar.runtime.ring import refuse_gradients, rotate
from seqpar.runtime.wire import Block


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

    Segments as in `ring_attention`; all of the queries are sharded. Parts may be uneven and empty. One dtype. One segment (a stretch without
    seams) moves in whole chunks; others are compared with the chunks, which torch.compile must not see done with symbols (`sealed.py`).

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
    one_stretch = len(query_segments) == len(key_segments) == 1 and is_sharded(key_segments[0])
    tables = [pieces(chunks, x.shape[1]) for x in (q, k, v)]
    if one_stretch:  # whole chunks move: nothing to compare, which matters where lengths are symbolic
        q, k, v = move([q, k, v], chunks, held(size), wanted(size), group, comm_dtype)
    else:
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
    results = [low_out.to(q.dtype), high_out.to(q.dtype)]
    if one_stretch:
        return refuse_gradients(move([torch.cat(results, 2)], chunks, wanted(size), held(size), group, comm_dtype)[0])
    order = sorted((c, (r, i)) for r in range(size) for i, c in enumerate(attended(r, size)))
    return refuse_gradients(pieces_to_seq(results, query_segments, tables[0], [piece for _, piece in order], group=group, comm_dtype=comm_dtype))


def chunk_lengths(parts: Sequence[int]) -> list[int]:
    """2N chunks for N ranks that hold so many positions: halves of their number."""
    return [n for part in parts for n in ((part + 1) // 2, part // 2)]


def attended(rank: int, size: int) -> tuple[int, int]:
    """The chunks whose queries a rank attends."""
    return rank, 2 * size - 1 - rank


def held(size: int) -> list[tuple[int, int]]:
    """The chunks of every rank's part of one stretch."""
    return [(2 * r, 2 * r + 1) for r in range(size)]


def wanted(size: int) -> list[tuple[int, int]]:
    """The chunks that every rank attends."""
    return [attended(r, size) for r in range(size)]


def dealt(parts: Sequence[int]) -> list[int]:
    """How many positions every rank attends."""
    chunks = chunk_lengths(parts)
    return [sum(chunks[c] for c in attended(r, len(parts))) for r in range(len(parts))]


def pieces(chunks: Sequence[int], heads: int) -> Table:
    """All heads of the chunks that every rank attends."""
    size, ends = len(chunks) // 2, list(accumulate(chunks, initial=0))
    return [[(0, heads, ends[c], ends[c + 1]) for c in attended(r, size)] for r in range(size)]


def move(
    tensors: Sequence[Tensor],
    chunks: Sequence[int],
    before: Sequence[tuple[int, int]],
    after: Sequence[tuple[int, int]],
    group: Group,
    comm_dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Each local [B, H, S_r, D], the chunks `before[r]`, becomes [B, H, S'_r, D], the chunks `after[r]`; one all-to-all."""
    rank = rank_of(group)
    local = [_chunk(x.transpose(1, 2), chunks, before[rank]) for x in tensors]

    def outgoing(peer: int, encoded: Sequence[Tensor]) -> list[Block]:
        """Chunk after chunk, of every tensor."""
        sent = [_chunk(x, chunks, before[rank]) for x in encoded]
        return [([mine[c]], 1) for c in before[rank] if c in after[peer] for mine in sent]

    def incoming(peer: int) -> Incoming:
        numbers = [c for c in before[peer] if c in after[rank]]
        return Incoming(len(tensors), [(i, [x.shape[0], chunks[c], x.shape[1], x.shape[3]]) for c in numbers for i, x in enumerate(tensors)])

    wire = start_to_peers([x.transpose(1, 2) for x in tensors], outgoing, incoming, group=group, comm_dtype=comm_dtype)
    dtype = tensors[0].dtype
    for peer, parts in finish_from_peers(wire, dtype, incoming, group=group, comm_dtype=comm_dtype).items():
        arrived = iter(parts)
        for c in (c for c in before[peer] if c in after[rank]):
            for mine in local:
                mine[c] = next(arrived).to(dtype)
    return [torch.cat([mine[c] for c in after[rank]], 1).transpose(1, 2) for mine in local]


def _chunk(x: Tensor, chunks: Sequence[int], numbers: tuple[int, int]) -> dict[int, Tensor]:
    """The two chunks of x [B, S, H, D] by number."""
    first, second = numbers
    return {first: x.narrow(1, 0, chunks[first]), second: x.narrow(1, chunks[first], chunks[second])}


def _cut(partial: Partial, low: int, high: int) -> tuple[Partial, Partial]:
    out, lse = partial
    return (out.narrow(2, 0, low), lse.narrow(2, 0, low)), (out.narrow(2, low, high), lse.narrow(2, low, high))
