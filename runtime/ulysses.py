"""Ulysses exchanges: sequence-sharded <-> head-sharded, text and image, q, k and v in one all-to-all.

Shapes: B batch, H all heads, h the heads of one rank, S global and S_r local sequence, D head dim.
Everything travels and is returned in [B, S, H, D] memory order (seen as [B, H, S, D]), which is what the
projections around an attention produce and consume: packing then copies long runs, and the model's
`transpose(1, 2)` + `view` after the attention stays free.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqpar.runtime.groups import Group, rank_of, size_of, start_all_to_all, wait
from seqpar.runtime.layout import (
    Segments,
    any_sharded,
    assemble,
    global_ranges,
    local_ranges,
    sharded_only,
    take,
    total,
)
from seqpar.runtime.wire import Block, pack, unpack

HeadRange = tuple[int, int]
Heads = Sequence[HeadRange]
"""Per rank of the group: (start, stop) of its heads."""


def seq_to_heads(
    tensors: Sequence[Tensor], segments: Sequence[Segments], heads: Sequence[Heads], *, group: Group
) -> list[Tensor]:
    """Each local [B, H, S_r, D] -> [B, h, S, D]: the whole sequence, in global order, for this rank's heads.

    Int segments are already whole and only head-sliced; tuple segments are exchanged, all tensors in one
    all-to-all (none when no segment is sharded). `heads[i]` may be uneven, and may overlap (GQA).
    Tensors may differ in H, S and D, not in dtype.
    """
    size, rank = size_of(group), rank_of(group)
    if size == 1 or not any(any_sharded(s) for s in segments):
        return [_pick(x, h[rank], 1) for x, h in zip(tensors, heads, strict=True)]
    assert len({x.dtype for x in tensors}) == 1, f"one dtype per exchange, got {[x.dtype for x in tensors]}"
    cases = [(x.transpose(1, 2), s, h) for x, s, h in zip(tensors, segments, heads, strict=True)]
    blocks: list[Block] = []
    shapes: list[list[int]] = []
    in_sizes, out_sizes = [0] * size, [0] * size
    for peer in range(size):
        if peer == rank:  # the own part never travels
            continue
        for x, s, h in cases:
            if not any_sharded(s):
                continue
            mine, theirs = (sharded_only(s, local_ranges(s, r)) for r in (rank, peer))
            blocks.append((take(_pick(x, h[peer], 2), 1, mine), 1))
            shapes.append([x.shape[0], total(theirs), h[rank][1] - h[rank][0], x.shape[3]])
            row = x.shape[0] * x.shape[3]
            in_sizes[peer] = in_sizes[peer] + row * total(mine) * (h[peer][1] - h[peer][0])
            out_sizes[peer] = out_sizes[peer] + row * total(theirs) * (h[rank][1] - h[rank][0])
    wire = wait(start_all_to_all(pack(blocks, tensors[0]), out_sizes, in_sizes, group))
    received = iter(unpack(wire, shapes))
    parts: list[list[Tensor]] = [[] for _ in cases]
    for peer in range(size):
        for i, (x, s, _) in enumerate(cases):
            parts[i].append(next(received) if peer != rank and any_sharded(s) else x)
    results = []
    for (x, s, h), row_parts in zip(cases, parts, strict=True):
        own = _pick(x, h[rank], 2)
        results.append((assemble(own, 1, s, row_parts, rank) if any_sharded(s) else own).transpose(1, 2))
    return results


def heads_to_seq(x: Tensor, segments: Segments, heads: Heads, *, group: Group) -> Tensor:
    """[B, h, S, D] -> [B, H, S_r, D]: this rank's part of the sequence for all heads; inverse of `seq_to_heads`.

    Tuple segments: the rank's part. Int segments: the whole segment on every rank, with the same bits.
    `heads` are disjoint and ascend with the rank. One all-to-all.
    """
    size, rank = size_of(group), rank_of(group)
    if size == 1:
        return x
    assert all(a[1] == b[0] for a, b in zip(heads, heads[1:], strict=False)), f"heads must be adjacent: {heads}"
    x = x.transpose(1, 2)
    batch, _, own_heads, dim = x.shape
    rows = [global_ranges(segments, r) for r in range(size)]
    blocks: list[Block] = [(take(x, 1, rows[r]), 1) for r in range(size) if r != rank]
    in_sizes = [0 if r == rank else batch * total(rows[r]) * own_heads * dim for r in range(size)]
    shapes = [[batch, total(rows[rank]), h[1] - h[0], dim] for r, h in enumerate(heads) if r != rank]
    out_sizes = [0 if r == rank else batch * total(rows[rank]) * (h[1] - h[0]) * dim for r, h in enumerate(heads)]
    wire = wait(start_all_to_all(pack(blocks, x), out_sizes, in_sizes, group))
    parts = unpack(wire, shapes)
    own = take(x, 1, rows[rank])
    parts.insert(rank, own[0] if len(own) == 1 else torch.cat(own, 1))
    return torch.cat(parts, 2).transpose(1, 2)


def _pick(x: Tensor, heads: HeadRange, dim: int) -> Tensor:
    return x.narrow(dim, heads[0], heads[1] - heads[0])
