"""Causal ring attention that gives every rank the same work.

With contiguous parts the last rank of a causal ring attends to everything and the first to almost nothing. Here the sequence is cut into 2N chunks,
and rank r attends the queries of chunks r and 2N-1-r, one that sees little and one that sees much: balanced without masks, since
of two chunks of different ranks one is wholly visible to the other. The idea of dealing out positions so that causal ring attention is balanced is
that of Striped Attention (Brandon et al. 2023, arXiv:2311.09431); the order in pairs of chunks is the one the Llama 3 report (Dubey et al. 2024,
arXiv:2407.21783) describes for its context parallelism.

Only this attention works in that order: one exchange brings q, k and v there, another one brings the result back.
"""

from __future__ import annotations  # inner functions are compiled: theirs must not be evaluated

from collections.abc import Sequence

import torch
from torch import Tensor

from seqpar.runtime.attention import Partial, attend, merge
from seqpar.runtime.groups import Group, rank_of, size_of
from seqpar.runtime.layout import Range
from seqpar.runtime.peers import Incoming, finish_from_peers, start_to_peers
from seqpar.runtime.ring import refuse_gradients, rotate
from seqpar.runtime.wire import Block


def zigzag_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    parts: Sequence[int],
    scale: float | None = None,
    enable_gqa: bool = False,
    group: Group,
    comm_dtype: torch.dtype | None = None,
) -> Tensor:
    """Causal attention of the local q [B, H, S_r, D] to k, v [B, Hk, S_r, D]; like q. All are rank r's contiguous part of one sequence.

    parts: the length of every rank's part, S_r among them; uneven and empty parts are fine. One dtype.

    Received by rank r, in elements, with m positions that it attends and does not hold, n that it holds and does not attend, and
    S'_j = `dealt(parts)[j]`: B m (H D + Hk D + Hk Dv) there, B n H Dv back, and B (Hk D + Hk Dv) (sum of S'_j over j != r) around the ring.
    With `comm_dtype` (see `travel.py`) what comes from other ranks is rounded to it.
    """
    size, rank = size_of(group), rank_of(group)
    if size == 1:
        return attend(q, k, v, None, scale, enable_gqa, is_causal=True)[0]
    chunks = chunk_lengths(parts)
    q, k, v = move([q, k, v], chunks, held(size), wanted(size), group, comm_dtype)
    low, high = chunks[rank], chunks[2 * size - 1 - rank]

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
    out = torch.cat([low_out.to(q.dtype), high_out.to(q.dtype)], 2)
    return refuse_gradients(move([out], chunks, wanted(size), held(size), group, comm_dtype)[0])


def chunk_lengths(parts: Sequence[int]) -> list[int]:
    """2N chunks for N parts: the halves of every part, so chunks 2r and 2r+1 lie on rank r."""
    return [n for part in parts for n in ((part + 1) // 2, part // 2)]


def held(size: int) -> list[tuple[int, int]]:
    """The chunks of every rank's contiguous part."""
    return [(2 * r, 2 * r + 1) for r in range(size)]


def wanted(size: int) -> list[tuple[int, int]]:
    """The chunks whose queries every rank attends."""
    return [(r, 2 * size - 1 - r) for r in range(size)]


def dealt(parts: Sequence[int]) -> list[int]:
    """How many positions every rank attends."""
    chunks = chunk_lengths(parts)
    return [chunks[a] + chunks[b] for a, b in wanted(len(parts))]


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
