"""The sharded dim of a value changes: sharded along one dim before, along another after, by one all-to-all.

The exchange of dynamic sequence parallelism (DSP, arXiv 2403.10266, section 3): a rank keeps its part of the old dim and sends every other
rank that rank's part of the new dim. It moves 1/N of what a gather moves.
"""

import math

from torch import Tensor

from seqpar.runtime.groups import Group, rank_of, size_of, start_all_to_all, wait
from seqpar.runtime.layout import Segments, assemble, global_ranges, local_ranges, part_length, sharded_only, take, total
from seqpar.runtime.wire import Block, from_wire, joined, pack, to_wire, unpack, with_dim


def switch(x: Tensor, dim: int, segments: Segments, to_dim: int, to_segments: Segments, *, group: Group) -> Tensor:
    """Local [.., A_r, .., B, ..] -> [.., A, .., B_r, ..]: `dim` becomes whole, `to_dim` sharded; same dtype.

    `segments` and `to_segments` describe the two dims as `layout.Segments`; parts may be uneven and empty. Received bytes per rank:
    its part of B times the other ranks' parts of A. One all-to-all.
    """
    return finish_switch(start_switch(x, dim, segments, to_dim, to_segments, group=group), x, dim, segments, to_dim, to_segments, group=group)


def start_switch(x: Tensor, dim: int, segments: Segments, to_dim: int, to_segments: Segments, *, group: Group) -> Tensor:
    """The 1-D buffer of the other ranks' parts, on its way; `finish_switch` reads it."""
    size, rank = size_of(group), rank_of(group)
    x = to_wire(x)
    rows = sharded_only(segments, local_ranges(segments, rank))
    mine = joined(take(x, dim, rows), dim)
    blocks: list[Block] = []
    in_sizes, out_sizes = [0] * size, [0] * size
    width = total(global_ranges(to_segments, rank))
    other = math.prod([n for d, n in enumerate(x.shape) if d not in (dim, to_dim)])
    for peer in range(size):
        if peer == rank:  # the own part never travels
            continue
        columns = global_ranges(to_segments, peer)
        blocks.append((take(mine, to_dim, columns), to_dim))
        in_sizes[peer] = other * total(rows) * total(columns)
        out_sizes[peer] = other * part_length(segments, peer) * width
    return start_all_to_all(pack(blocks, x), out_sizes, in_sizes, group)


def finish_switch(wire: Tensor, x: Tensor, dim: int, segments: Segments, to_dim: int, to_segments: Segments, *, group: Group) -> Tensor:
    """Wait for what `start_switch` of the same arguments began: the result of `switch`."""
    size, rank = size_of(group), rank_of(group)
    x, dtype = to_wire(x), x.dtype
    columns = global_ranges(to_segments, rank)
    width = total(columns)
    shapes = [with_dim(with_dim(x.shape, dim, part_length(segments, peer)), to_dim, width) for peer in range(size) if peer != rank]
    parts = unpack(wait(wire), shapes)
    kept = joined(take(x, to_dim, columns), to_dim)
    parts.insert(rank, kept)
    return from_wire(assemble(kept, dim, segments, parts, rank), dtype)
