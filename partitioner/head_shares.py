"""Heads that the ranks do not divide: ranks share a head by its query rows, so that all have the same work.

6 heads on 4 ranks: rank 0 attends head 0 and the first half of head 1's rows, rank 1 the second half and head 2, and so on. Keys and values
of a shared head go to all that share it. Of causal attention, late rows are more work than early ones: parts of a head have equal work then.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import lru_cache

from seqpar.partitioner.attention_heads import HeadPlan, keys_of
from seqpar.partitioner.cost import attention_pairs
from seqpar.partitioner.lengths import Length, fraction


@dataclass(frozen=True)
class Piece:
    """Heads [start, stop) and, of `of` equal parts of the query rows, those from `first` up to `last`.

    Invariants: all rows, or one head.
    """

    start: int
    stop: int
    first: int
    last: int
    of: int

    def __post_init__(self) -> None:
        assert self.whole or self.stop == self.start + 1
        assert self.start < self.stop and self.first < self.last

    @property
    def whole(self) -> bool:
        """All rows."""
        return self.first == 0 and self.last == self.of

    def rows(self, length: Length) -> tuple[Length, Length]:
        """[start, stop) of `length` query rows."""
        return fraction(length, self.first, self.of), fraction(length, self.last, self.of)


Pieces = tuple[tuple[Piece, ...], ...]
"""What every rank attends, in the order of heads."""


@lru_cache(maxsize=1024)
def share_heads(heads: int, ranks: int) -> Pieces:
    """Per rank, in the order of heads: `heads / ranks` heads each, counted in rows."""
    shares = []
    for rank in range(ranks):
        at, end = rank * heads, (rank + 1) * heads  # in parts of a head
        pieces = []
        while at < end:
            head, first = divmod(at, ranks)
            if first or end - at < ranks:
                pieces.append(Piece(head, head + 1, first, min(ranks, first + end - at), ranks))
                at += pieces[-1].last - first
            else:
                pieces.append(Piece(head, end // ranks, 0, ranks, ranks))
                at = end // ranks * ranks
        shares.append(tuple(pieces))
    return tuple(shares)


@lru_cache(maxsize=1024)
def share_causal_heads(heads: int, ranks: int, rows: int, columns: int) -> Pieces:
    """`share_heads` for causal attention of at least `ranks` rows to `columns` keys: parts of a head have equal work, as nearly as rows allow."""
    assert rows >= ranks, f"{rows} rows for {ranks} ranks"
    work = attention_pairs(rows, columns, True)
    cuts = [0]
    for n in range(1, ranks):
        wanted = work * n / ranks
        row = bisect_left(range(rows), wanted, key=lambda r: attention_pairs(r, columns, True))
        row -= wanted - attention_pairs(row - 1, columns, True) < attention_pairs(row, columns, True) - wanted
        cuts.append(min(max(row, cuts[-1] + 1), rows - (ranks - n)))  # no part is empty
    cuts.append(rows)
    return tuple(tuple(replace(p, first=cuts[p.first], last=cuts[p.last], of=rows) for p in pieces) for pieces in share_heads(heads, ranks))


def whole_heads(plan: HeadPlan) -> Pieces:
    """The pieces of ranks that share no head."""
    return tuple((Piece(start, stop, 0, 1, 1),) for start, stop in plan.queries)


def plan_of_shares(shares: Pieces, group: int = 1) -> HeadPlan:
    """What every rank receives: all query heads it has a piece of, and the K/V heads that these read, `group` of them each."""
    spans = tuple((pieces[0].start, pieces[-1].stop) for pieces in shares)
    keys = tuple(keys_of(start, stop, group)[:2] for start, stop in spans)
    return HeadPlan(spans, keys, (None,) * len(shares), grouped=group > 1)
