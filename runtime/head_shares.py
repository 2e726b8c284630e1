"""The exchange back when ranks share heads by query rows (see `ulysses.heads_to_seq` for whole heads).

Shapes: B batch, H all heads, h the heads and s the rows of one piece, S global and S_r local sequence, D head dim.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from seqpar.runtime.groups import Group, rank_of, size_of, start_all_to_all, wait
from seqpar.runtime.layout import Range, Segments, global_ranges, take, total
from seqpar.runtime.wire import Block, pack, unpack

Piece = tuple[int, int, int, int]
"""Start and stop of heads, start and stop of global rows."""


def pieces_to_seq(pieces: Sequence[Tensor], segments: Segments, table: Sequence[Sequence[Piece]], *, group: Group) -> Tensor:
    """This rank's pieces [B, h, s, D] -> [B, H, S_r, D]: its part of the sequence for all heads. One all-to-all.

    table: the pieces of every rank, in the order of `pieces`; together they hold every row of every head once, and pieces of one head's
    rows have that head alone. Tuple segments: the rank's part. Int segments: the whole segment on every rank, with the same bits.
    """
    return finish_pieces_to_seq(start_pieces_to_seq(pieces, segments, table, group=group), pieces, segments, table, group=group)


def start_pieces_to_seq(pieces: Sequence[Tensor], segments: Segments, table: Sequence[Sequence[Piece]], *, group: Group) -> Tensor:
    """The 1-D buffer of the other ranks' pieces, on its way; `finish_pieces_to_seq` reads it."""
    size, rank = size_of(group), rank_of(group)
    xs = [x.transpose(1, 2) for x in pieces]
    row = xs[0].shape[0] * xs[0].shape[3]  # elements per position and head
    mine = global_ranges(segments, rank)
    blocks: list[Block] = []
    in_sizes, out_sizes = [0] * size, [0] * size
    for peer in (r for r in range(size) if r != rank):
        rows = global_ranges(segments, peer)
        for x, piece in zip(xs, table[rank], strict=True):
            sent = _common(rows, piece)
            blocks.append((take(x, 1, [(start - piece[2], n) for start, n in sent]), 1))
            in_sizes[peer] = in_sizes[peer] + row * total(sent) * (piece[1] - piece[0])
        for piece in table[peer]:
            out_sizes[peer] = out_sizes[peer] + row * total(_common(mine, piece)) * (piece[1] - piece[0])
    return start_all_to_all(pack(blocks, xs[0]), out_sizes, in_sizes, group)


def finish_pieces_to_seq(wire: Tensor, pieces: Sequence[Tensor], segments: Segments, table: Sequence[Sequence[Piece]], *, group: Group) -> Tensor:
    """Wait for what `start_pieces_to_seq` of the same arguments began: the result of `pieces_to_seq`."""
    size, rank = size_of(group), rank_of(group)
    xs = [x.transpose(1, 2) for x in pieces]
    batch, dim = xs[0].shape[0], xs[0].shape[3]
    mine = global_ranges(segments, rank)
    shapes = [[batch, total(_common(mine, p)), p[1] - p[0], dim] for peer in range(size) if peer != rank for p in table[peer]]
    received = iter(unpack(wait(wire), shapes))
    parts: dict[tuple[int, int], list[list[Tensor]]] = {}  # heads -> per owner, in the order of rows: one part per range of this rank
    for peer in range(size):
        for i, piece in enumerate(table[peer]):
            common = _common(mine, piece)
            if peer == rank:
                found = take(xs[i], 1, [(start - piece[2], n) for start, n in common])
            else:
                found = list(next(received).split([n for _, n in common], 1))
            parts.setdefault((piece[0], piece[1]), []).append(found)
    columns = [_cat([owner[i] for i in range(len(mine)) for owner in parts[heads]], 1) for heads in sorted(parts)]
    return _cat(columns, 2).transpose(1, 2)


def _common(ranges: Sequence[Range], piece: Piece) -> list[Range]:
    """What of each range of global rows lies in the piece; nothing is a range of length 0 inside it."""
    found = []
    for start, length in ranges:
        low = torch.sym_min(torch.sym_max(start, piece[2]), piece[3])
        found.append((low, torch.sym_max(torch.sym_min(start + length, piece[3]) - low, 0)))
    return found


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)
