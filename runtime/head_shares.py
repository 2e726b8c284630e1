"""The exchanges of attention whose heads are shared by query rows (see `ulysses` for whole heads), and causal attention of some rows.

Shapes: B batch, H all heads, h the heads and s the rows of one piece, S global and S_r local sequence, D head dim.
Each exchange is a `start_*` and a `finish_*` of the same arguments, and rounds to `comm_dtype`, as those of `ulysses` do.
"""

from __future__ import annotations  # inner functions are compiled: theirs must not be evaluated

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from seqpar.compat import sym_max, sym_min
from seqpar.runtime.attention import attend, merge
from seqpar.runtime.groups import Group, rank_of, size_of
from seqpar.runtime.layout import Range, Segments, global_ranges, is_sharded, local_ranges, sharded_only, take, total, which_travel
from seqpar.runtime.peers import Incoming, finish_from_peers, start_to_peers
from seqpar.runtime.ring import refuse_gradients
from seqpar.runtime.travel import Form
from seqpar.runtime.wire import Block, joined

Piece = tuple[int, int, int, int]
"""Start and stop of heads, start and stop of global rows."""
Table = Sequence[Sequence[Piece]]
"""The pieces of every rank."""
Order = Sequence[tuple[int, int]]
"""Ranks, and numbers of pieces among theirs."""


def seq_to_pieces(
    tensors: Sequence[Tensor], segments: Sequence[Segments], tables: Sequence[Table], *, group: Group, comm_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Each local [B, H, S_r, D] -> this rank's pieces of it, each [B, h, s, D] in global order; the pieces of all tensors in a row.

    tables: per tensor, the pieces of every rank; they may overlap and leave out what nobody needs. Int segments are only sliced, tuple segments
    exchanged, all tensors in one all-to-all (none when no segment is sharded). One dtype; H, S and D may differ.
    """
    wire = start_seq_to_pieces(tensors, segments, tables, group=group, comm_dtype=comm_dtype)
    return finish_seq_to_pieces(wire, tensors, segments, tables, group=group, comm_dtype=comm_dtype)


def start_seq_to_pieces(
    tensors: Sequence[Tensor], segments: Sequence[Segments], tables: Sequence[Table], *, group: Group, comm_dtype: torch.dtype | None = None
) -> Tensor:
    """The 1-D buffer of all positions that come from other ranks, on its way; `finish_seq_to_pieces` reads it. Empty if nothing is exchanged."""
    size, rank = size_of(group), rank_of(group)
    sent = which_travel(segments, size)
    if not sent:
        return tensors[0].new_empty(0)

    def outgoing(peer: int, encoded: Sequence[Tensor]) -> list[Block]:
        """What this rank holds of its pieces."""
        return [(take(_heads(x, piece), 1, _exchanged(segments[i], rank, piece)), 1) for i, x in zip(sent, encoded, strict=True) for piece in tables[i][peer]]

    incoming = _parts_of_pieces(tensors, segments, tables, sent, rank)
    return start_to_peers([tensors[i].transpose(1, 2) for i in sent], outgoing, incoming, group=group, comm_dtype=comm_dtype)


def finish_seq_to_pieces(
    wire: Tensor, tensors: Sequence[Tensor], segments: Sequence[Segments], tables: Sequence[Table], *, group: Group, comm_dtype: torch.dtype | None = None
) -> list[Tensor]:
    """Wait for what `start_seq_to_pieces` of the same arguments began: the result of `seq_to_pieces`."""
    size, rank = size_of(group), rank_of(group)
    sent = which_travel(segments, size)
    wanted = [(i, piece) for i in range(len(tensors)) for piece in tables[i][rank]]
    arrived: dict[tuple[int, int], Iterator[Tensor]] = {}  # number of the piece, peer -> its part of every exchanged segment
    if sent:
        exchanged = [(n, i, piece) for n, (i, piece) in enumerate(wanted) if i in sent]
        received = finish_from_peers(wire, tensors[0].dtype, _parts_of_pieces(tensors, segments, tables, sent, rank), group=group, comm_dtype=comm_dtype)
        for peer, parts in received.items():
            for (n, i, piece), part in zip(exchanged, parts, strict=True):
                arrived[n, peer] = iter(part.split([m for _, m in _exchanged(segments[i], peer, piece)], 1))
    return [_assembled(tensors[i].transpose(1, 2), segments[i], piece, rank, {p: arrived[m, p] for m, p in arrived if m == n}) for n, (i, piece) in enumerate(wanted)]


def pieces_to_seq(
    pieces: Sequence[Tensor], segments: Segments, table: Table, order: Order | None = None, *, group: Group, comm_dtype: torch.dtype | None = None
) -> Tensor:
    """This rank's pieces [B, h, s, D] -> [B, H, S_r, D]: its part of the sequence for all heads. One all-to-all.

    table: the pieces of every rank, in the order of `pieces`; together they hold every row of every head once, and pieces with the same heads
    are all of their rows. order: (rank, number) of all pieces, such that rows ascend; that of the table if None.
    Tuple segments: the rank's part. Int segments: the whole segment on every rank, with the same bits.
    """
    wire = start_pieces_to_seq(pieces, segments, table, order, group=group, comm_dtype=comm_dtype)
    return finish_pieces_to_seq(wire, pieces, segments, table, order, group=group, comm_dtype=comm_dtype)


def start_pieces_to_seq(
    pieces: Sequence[Tensor], segments: Segments, table: Table, order: Order | None = None, *, group: Group, comm_dtype: torch.dtype | None = None
) -> Tensor:
    """The 1-D buffer of the other ranks' pieces, on its way; `finish_pieces_to_seq` reads it."""
    rank = rank_of(group)

    def outgoing(peer: int, encoded: Sequence[Tensor]) -> list[Block]:
        """Its rows of this rank's pieces."""
        rows = global_ranges(segments, peer)
        return [(take(x, 1, [(start - piece[2], n) for start, n in _common(rows, piece)]), 1) for x, piece in zip(encoded, table[rank], strict=True)]

    return start_to_peers([x.transpose(1, 2) for x in pieces], outgoing, _parts_of_rows(pieces[0], segments, table, rank), group=group, comm_dtype=comm_dtype)


def finish_pieces_to_seq(
    wire: Tensor,
    pieces: Sequence[Tensor],
    segments: Segments,
    table: Table,
    order: Order | None = None,
    *,
    group: Group,
    comm_dtype: torch.dtype | None = None,
) -> Tensor:
    """Wait for what `start_pieces_to_seq` of the same arguments began: the result of `pieces_to_seq`."""
    rank, mine = rank_of(group), global_ranges(segments, rank_of(group))
    one = Form.of(pieces[0].dtype, 1, comm_dtype)
    xs = [(x if all(map(is_sharded, segments)) else one.rounded(x)).transpose(1, 2) for x in pieces]  # whole: others see it rounded
    received = finish_from_peers(wire, one.dtype, _parts_of_rows(pieces[0], segments, table, rank), group=group, comm_dtype=comm_dtype)
    parts: dict[tuple[int, int], list[list[Tensor]]] = {}  # heads -> per owner, in the order of rows: one part per range of this rank
    for peer, i in order or [(r, i) for r, owned in enumerate(table) for i in range(len(owned))]:
        piece = table[peer][i]
        common = _common(mine, piece)
        if peer == rank:
            found = take(xs[i], 1, [(start - piece[2], n) for start, n in common])
        else:
            found = list(received[peer][i].split([n for _, n in common], 1))
        parts.setdefault((piece[0], piece[1]), []).append(found)
    columns = [joined([owner[i] for i in range(len(mine)) for owner in parts[heads]], 1) for heads in sorted(parts)]
    return joined(columns, 2).transpose(1, 2).to(one.dtype)


def causal_rows(q: Tensor, k: Tensor, v: Tensor, *, first: int, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """Causal attention of the query rows first, first + 1, … q [B, h, s, D] to all keys k, v [B, Hk, S, D]: key position <= row; like q.

    No mask: all rows see the keys before `first`, then comes a square with a triangle. Rows behind the last key see all keys.
    """
    rows, keys = q.shape[2], k.shape[2]
    before = sym_min(first, keys)
    square = sym_min(rows, keys - before)

    def seen(start: int, count: int, at: int, length: int, is_causal: bool = False) -> tuple[Tensor, Tensor]:
        return attend(q.narrow(2, start, count), k.narrow(2, at, length), v.narrow(2, at, length), None, scale, enable_gqa, is_causal=is_causal)

    results = []
    if square > 0:
        partial = seen(0, square, before, square, is_causal=True)
        results.append(merge(*seen(0, square, 0, before), *partial) if before > 0 else partial)
    if rows > square:
        results.append(seen(square, rows - square, 0, keys))
    return refuse_gradients(joined([out.to(q.dtype) for out, _ in results], 2) if results else q.new_zeros((*q.shape[:3], v.shape[3])))


def _parts_of_pieces(
    tensors: Sequence[Tensor], segments: Sequence[Segments], tables: Sequence[Table], sent: Sequence[int], rank: int
) -> Callable[[int], Incoming]:
    """What a peer holds of this rank's pieces, one part per piece of a tensor in `sent`."""

    def incoming(peer: int) -> Incoming:
        shapes = [
            (at, [tensors[i].shape[0], total(_exchanged(segments[i], peer, piece)), piece[1] - piece[0], tensors[i].shape[3]])
            for at, i in enumerate(sent)
            for piece in tables[i][rank]
        ]
        return Incoming(len(sent), shapes)

    return incoming


def _parts_of_rows(x: Tensor, segments: Segments, table: Table, rank: int) -> Callable[[int], Incoming]:
    """This rank's positions of a peer's pieces; x: a piece of its own."""
    mine = global_ranges(segments, rank)

    def incoming(peer: int) -> Incoming:
        shapes = [[x.shape[0], total(_common(mine, p)), p[1] - p[0], x.shape[3]] for p in table[peer]]
        return Incoming(len(shapes), list(enumerate(shapes)))

    return incoming


def _heads(x: Tensor, piece: Piece) -> Tensor:
    """A piece's heads of [B, S, H, D]."""
    return x.narrow(2, piece[0], piece[1] - piece[0])


def _held(segments: Segments, rank: int, piece: Piece) -> list[Range]:
    """Of each segment, what a rank holds of the piece's rows, as a range of its local dim; nothing is a range of length 0 inside the segment."""
    found = []
    for (start, length), (local, _) in zip(global_ranges(segments, rank), local_ranges(segments, rank), strict=True):
        low, high = (sym_min(sym_max(row, start), start + length) for row in piece[2:])
        found.append((local + low - start, high - low))
    return found


def _exchanged(segments: Segments, rank: int, piece: Piece) -> list[Range]:
    return sharded_only(segments, _held(segments, rank, piece))


def _assembled(x: Tensor, segments: Segments, piece: Piece, rank: int, arrived: dict[int, Iterator[Tensor]]) -> Tensor:
    """One piece [B, h, s, D] from the local x [B, S_r, H, D] and, per peer, its parts of the exchanged segments."""
    columns = []
    for segment, found in zip(segments, take(_heads(x, piece), 1, _held(segments, rank, piece)), strict=True):
        if isinstance(segment, tuple | list):
            columns += [found if r == rank else next(arrived[r]) for r in range(len(segment))] if arrived else [found]
        else:
            columns.append(found)
    return joined(columns, 1).transpose(1, 2).to(x.dtype)


def _common(ranges: Sequence[Range], piece: Piece) -> list[Range]:
    """What of each range of global rows lies in the piece; nothing is a range of length 0 inside it."""
    found = []
    for start, length in ranges:
        low = sym_min(sym_max(start, piece[2]), piece[3])
        found.append((low, sym_max(sym_min(start + length, piece[3]) - low, 0)))
    return found
