"""Ulysses exchanges: sequence-sharded <-> head-sharded, text and image, q, k and v in one all-to-all.

Shapes: B batch, H all heads, h the heads of one rank, S global and S_r local sequence, D head dim.
Everything travels and is returned in [B, S, H, D] memory order (seen as [B, H, S, D]), which is what the
projections around an attention produce and consume: packing then copies long runs, and the model's
`transpose(1, 2)` + `view` after the attention stays free.

Each exchange is a `start_*`, which packs and returns the buffer that is on its way, and a `finish_*` of the same arguments, which waits and
takes the rank's own part from them. `comm_dtype`: what floating point is rounded to on the way (`travel.py`).
"""

from __future__ import annotations  # inner functions are compiled: theirs must not be evaluated

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from seqpar.runtime.groups import Group, rank_of, size_of
from seqpar.runtime.layout import (
    Segments,
    assemble,
    global_ranges,
    is_sharded,
    local_ranges,
    part_length,
    sharded_only,
    take,
    total,
    which_travel,
)
from seqpar.runtime.peers import Incoming, finish_from_peers, start_to_peers
from seqpar.runtime.travel import Form
from seqpar.runtime.wire import Block, joined

HeadRange = tuple[int, int]
Heads = Sequence[HeadRange]
"""Per rank of the group: (start, stop) of its heads."""


def seq_to_heads(
    tensors: Sequence[Tensor], segments: Sequence[Segments], heads: Sequence[Heads], *, group: Group, comm_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Each local [B, H, S_r, D] -> [B, h, S, D]: the whole sequence, in global order, for this rank's heads.

    Int segments are already whole and only head-sliced; tuple segments are exchanged, all tensors in one
    all-to-all (none when no segment is sharded). `heads[i]` may be uneven, and may overlap (GQA).
    Tensors may differ in H, S and D, not in dtype. With `comm_dtype`, positions of other ranks are rounded to it.
    """
    wire = start_seq_to_heads(tensors, segments, heads, group=group, comm_dtype=comm_dtype)
    return finish_seq_to_heads(wire, tensors, segments, heads, group=group, comm_dtype=comm_dtype)


def start_seq_to_heads(
    tensors: Sequence[Tensor], segments: Sequence[Segments], heads: Sequence[Heads], *, group: Group, comm_dtype: torch.dtype | None = None
) -> Tensor:
    """The 1-D buffer of all positions that come from other ranks, on its way; `finish_seq_to_heads` reads it. Empty if nothing is exchanged."""
    size, rank = size_of(group), rank_of(group)
    sent = which_travel(segments, size)
    if not sent:
        return tensors[0].new_empty(0)
    held = [sharded_only(segments[i], local_ranges(segments[i], rank)) for i in sent]

    def outgoing(peer: int, encoded: Sequence[Tensor]) -> list[Block]:
        """Its heads of what this rank holds."""
        return [(take(_heads(x, heads[i], peer), 1, ranges), 1) for i, x, ranges in zip(sent, encoded, held, strict=True)]

    incoming = _parts_of_heads(tensors, segments, heads, sent, rank)
    return start_to_peers([tensors[i].transpose(1, 2) for i in sent], outgoing, incoming, group=group, comm_dtype=comm_dtype)


def finish_seq_to_heads(
    wire: Tensor, tensors: Sequence[Tensor], segments: Sequence[Segments], heads: Sequence[Heads], *, group: Group, comm_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Wait for what `start_seq_to_heads` of the same arguments began: the result of `seq_to_heads`. Received parts are views, joined by one copy."""
    size, rank = size_of(group), rank_of(group)
    sent = which_travel(segments, size)
    own = [_heads(x.transpose(1, 2), h, rank) for x, h in zip(tensors, heads, strict=True)]
    if sent:
        parts = finish_from_peers(wire, tensors[0].dtype, _parts_of_heads(tensors, segments, heads, sent, rank), group=group, comm_dtype=comm_dtype)
        parts[rank] = [own[i] for i in sent]
        for at, i in enumerate(sent):
            own[i] = assemble(own[i], 1, segments[i], [parts[r][at] for r in range(size)], rank)
    return [x.transpose(1, 2) for x in own]


def heads_to_seq(x: Tensor, segments: Segments, heads: Heads, *, group: Group, comm_dtype: torch.dtype | None = None) -> Tensor:
    """[B, h, S, D] -> [B, H, S_r, D]: this rank's part of the sequence for all heads; inverse of `seq_to_heads`.

    Tuple segments: the rank's part. Int segments: the whole segment on every rank, with the same bits.
    `heads` are disjoint and ascend with the rank. One all-to-all. With `comm_dtype`, heads of other ranks are rounded to it, and the rank's own
    as well where a segment is whole on all ranks.
    """
    wire = start_heads_to_seq(x, segments, heads, group=group, comm_dtype=comm_dtype)
    return finish_heads_to_seq(wire, x, segments, heads, group=group, comm_dtype=comm_dtype)


def start_heads_to_seq(x: Tensor, segments: Segments, heads: Heads, *, group: Group, comm_dtype: torch.dtype | None = None) -> Tensor:
    """The 1-D buffer of the other ranks' heads, on its way; `finish_heads_to_seq` reads it."""
    size, rank = size_of(group), rank_of(group)
    if size == 1:
        return x.new_empty(0)
    assert all(a[1] == b[0] for a, b in zip(heads, heads[1:], strict=False)), f"heads must be adjacent: {heads}"

    def outgoing(peer: int, encoded: Sequence[Tensor]) -> list[Block]:
        """Its rows of this rank's heads."""
        return [(take(encoded[0], 1, global_ranges(segments, peer)), 1)]

    return start_to_peers([x.transpose(1, 2)], outgoing, _parts_of_rows(x, segments, heads, rank), group=group, comm_dtype=comm_dtype)


def finish_heads_to_seq(wire: Tensor, x: Tensor, segments: Segments, heads: Heads, *, group: Group, comm_dtype: torch.dtype | None = None) -> Tensor:
    """Wait for what `start_heads_to_seq` of the same arguments began: the result of `heads_to_seq`."""
    size, rank = size_of(group), rank_of(group)
    if size == 1:
        return x
    parts = finish_from_peers(wire, x.dtype, _parts_of_rows(x, segments, heads, rank), group=group, comm_dtype=comm_dtype)
    x, form = x.transpose(1, 2), Form.of(x.dtype, 1, comm_dtype)
    own = take(x if all(map(is_sharded, segments)) else form.rounded(x), 1, global_ranges(segments, rank))
    parts[rank] = [joined(own, 1)]
    return joined([parts[r][0] for r in range(size)], 2).transpose(1, 2)


def _heads(x: Tensor, heads: Heads, rank: int) -> Tensor:
    """A rank's heads of [B, S, H, D]."""
    start, stop = heads[rank]
    return x.narrow(2, start, stop - start)


def _parts_of_heads(
    tensors: Sequence[Tensor], segments: Sequence[Segments], heads: Sequence[Heads], sent: Sequence[int], rank: int
) -> Callable[[int], Incoming]:
    """What a peer holds of the positions of this rank's heads, one part per tensor in `sent`."""

    def incoming(peer: int) -> Incoming:
        shapes = [[tensors[i].shape[0], part_length(segments[i], peer), heads[i][rank][1] - heads[i][rank][0], tensors[i].shape[3]] for i in sent]
        return Incoming(len(sent), list(enumerate(shapes)))

    return incoming


def _parts_of_rows(x: Tensor, segments: Segments, heads: Heads, rank: int) -> Callable[[int], Incoming]:
    """This rank's positions of a peer's heads."""

    def incoming(peer: int) -> Incoming:
        return Incoming(1, [(0, [x.shape[0], total(global_ranges(segments, rank)), heads[peer][1] - heads[peer][0], x.shape[3]])])

    return incoming
