"""Ulysses exchanges: sequence-sharded <-> head-sharded, text and image, q, k and v in one all-to-all.

Shapes: B batch, H all heads, h the heads of one rank, S global and S_r local sequence, D head dim.
Everything travels and is returned in [B, S, H, D] memory order (seen as [B, H, S, D]), which is what the
projections around an attention produce and consume: packing then copies long runs, and the model's
`transpose(1, 2)` + `view` after the attention stays free.

Each exchange is a `start_*`, which packs and returns the buffer that is on its way, and a `finish_*` of the same arguments, which waits and
takes the rank's own part from them. `comm_dtype`: what floating point is rounded to on the way (`travel.py`).
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqpar.runtime.groups import Group, rank_of, size_of, start_all_to_all, wait
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
from seqpar.runtime.travel import Form
from seqpar.runtime.wire import Block, pack, unpack

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
    assert len({x.dtype for x in tensors}) == 1, f"one dtype per exchange, got {[x.dtype for x in tensors]}"
    form = Form.of(tensors[0].dtype, len(sent), comm_dtype)
    encoded, header = form.encode([tensors[i].transpose(1, 2) for i in sent])
    pieces = [take(x, 1, sharded_only(segments[i], local_ranges(segments[i], rank))) for i, x in zip(sent, encoded, strict=True)]
    rows = [x.shape[0] * x.shape[3] for x in encoded]  # elements per position and head
    lengths = [part_length(segments[i], rank) for i in sent]
    own = [heads[i][rank][1] - heads[i][rank][0] for i in sent]
    blocks: list[Block] = []
    in_sizes, out_sizes = [0] * size, [0] * size
    for peer in range(size):
        if peer == rank:  # the own part never travels
            continue
        blocks += [(header, 0)] if header else []
        in_sizes[peer] = out_sizes[peer] = form.header
        for i, x, row, length, width in zip(sent, pieces, rows, lengths, own, strict=True):
            first, stop = heads[i][peer]
            blocks.append(([p.narrow(2, first, stop - first) for p in x], 1))
            in_sizes[peer] = in_sizes[peer] + row * length * (stop - first)
            out_sizes[peer] = out_sizes[peer] + row * part_length(segments[i], peer) * width
    return start_all_to_all(pack(blocks, encoded[0], dtype=form.wire), out_sizes, in_sizes, group)


def finish_seq_to_heads(
    wire: Tensor, tensors: Sequence[Tensor], segments: Sequence[Segments], heads: Sequence[Heads], *, group: Group, comm_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Wait for what `start_seq_to_heads` of the same arguments began: the result of `seq_to_heads`. Received parts are views, joined by one copy."""
    size, rank = size_of(group), rank_of(group)
    sent = which_travel(segments, size)
    own = [x.transpose(1, 2).narrow(2, h[rank][0], h[rank][1] - h[rank][0]) for x, h in zip(tensors, heads, strict=True)]
    if sent:
        form = Form.of(tensors[0].dtype, len(sent), comm_dtype)
        shapes = [
            shape
            for peer in range(size)
            if peer != rank
            for shape in [*([[form.header]] if form.header else []), *([own[i].shape[0], part_length(segments[i], peer), *own[i].shape[2:]] for i in sent)]
        ]
        received = unpack(wait(wire), shapes)
        parts = [_decoded(form, received, at, len(sent)) for at in range(0, len(received), len(received) // (size - 1))]
        parts.insert(rank, [own[i] for i in sent])
        for at, i in enumerate(sent):
            own[i] = assemble(own[i], 1, segments[i], [row[at] for row in parts], rank)
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
    form = Form.of(x.dtype, 1, comm_dtype)
    (sent,), header = form.encode([x.transpose(1, 2)])
    batch, _, own_heads, dim = sent.shape
    blocks: list[Block] = []
    in_sizes, out_sizes = [0] * size, [0] * size
    mine = batch * dim * total(global_ranges(segments, rank))
    for peer in range(size):
        if peer == rank:
            continue
        rows = global_ranges(segments, peer)
        blocks += [(header, 0)] if header else []
        blocks.append((take(sent, 1, rows), 1))
        in_sizes[peer] = form.header + batch * dim * own_heads * total(rows)
        out_sizes[peer] = form.header + mine * (heads[peer][1] - heads[peer][0])
    return start_all_to_all(pack(blocks, sent, dtype=form.wire), out_sizes, in_sizes, group)


def finish_heads_to_seq(wire: Tensor, x: Tensor, segments: Segments, heads: Heads, *, group: Group, comm_dtype: torch.dtype | None = None) -> Tensor:
    """Wait for what `start_heads_to_seq` of the same arguments began: the result of `heads_to_seq`."""
    size, rank = size_of(group), rank_of(group)
    if size == 1:
        return x
    x = x.transpose(1, 2)
    form, rows = Form.of(x.dtype, 1, comm_dtype), global_ranges(segments, rank)
    length = total(rows)
    shapes = [
        shape
        for peer in range(size)
        if peer != rank
        for shape in [*([[form.header]] if form.header else []), [x.shape[0], length, heads[peer][1] - heads[peer][0], x.shape[3]]]
    ]
    received = unpack(wait(wire), shapes)
    parts = [_decoded(form, received, at, 1)[0] for at in range(0, len(received), len(received) // (size - 1))]
    own = take(x if all(map(is_sharded, segments)) else form.rounded(x), 1, rows)
    parts.insert(rank, own[0] if len(own) == 1 else torch.cat(own, 1))
    return torch.cat(parts, 2).transpose(1, 2)


def _decoded(form: Form, received: Sequence[Tensor], at: int, count: int) -> list[Tensor]:
    """The `count` parts of one peer, whose header or first part is `received[at]`."""
    if not form.header:
        return list(received[at : at + count])
    return form.decode(received[at + 1 : at + 1 + count], received[at])
