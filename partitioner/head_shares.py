"""Heads that `ulysses` does not divide: ranks share a head by its query rows, so that all have the same work.

6 heads on 4 ranks: rank 0 attends head 0 and the first half of head 1's rows, rank 1 the second half and head 2, and so on. Keys and values
of a shared head go to all that share it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch.fx import Node

from seqpar.partitioner.attention_heads import HeadPlan, busiest_heads
from seqpar.partitioner.cost import Prices, node_work
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.lengths import Length, fraction

if TYPE_CHECKING:
    from seqpar.partitioner.labels import Degrees


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


def share_heads(heads: int, ranks: int) -> tuple[tuple[Piece, ...], ...]:
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


def plan_of_shares(shares: tuple[tuple[Piece, ...], ...]) -> HeadPlan:
    """What every rank receives: all heads it has a piece of."""
    spans = tuple((pieces[0].start, pieces[-1].stop) for pieces in shares)
    return HeadPlan(spans, spans, (None,) * len(shares), grouped=False)


@dataclass(frozen=True)
class Sharing:
    """Whether ranks share heads. reason: why heads that could be shared stay whole."""

    shared: bool
    reason: str = ""


def sharing(inference: Inference, degrees: Degrees, prices: Prices, node: Node) -> Sharing:
    """For an attention over the mesh; the same answer on every rank. Shared where that saves more work than the further heads a rank receives cost."""
    relation = inference.relations[node]
    spec, ranks = relation.attention, degrees.ulysses
    shapes = [[inference.table.sizes.hint(inference.table.axis_length(axis)) for axis in relation.operand_axes[i]] for i in (spec.q, spec.k, spec.v)]
    heads = shapes[0][1]
    if heads % ranks == 0:
        return Sharing(False)
    if degrees.ring > 1:
        return Sharing(False, "with a ring heads stay whole")
    if spec.is_causal:
        return Sharing(False, "causal heads stay whole")
    if shapes[1][1] != heads or shapes[2][1] != heads:
        return Sharing(False, "heads that share keys and values stay whole")
    most = max(pieces[-1].stop - pieces[0].start for pieces in share_heads(heads, ranks))
    saved = node_work(node, inference.table.sizes) / heads * (busiest_heads(heads, ranks) - heads / ranks)
    widths = sum(rows * dim for _, _, rows, dim in shapes) * shapes[0][0] * node.meta["val"].element_size()
    further = max(0, most - busiest_heads(heads, ranks)) * widths * (1 - 1 / ranks)
    if saved <= further * prices.byte + prices.call:
        return Sharing(False, "sharing heads would cost more than it saves")
    return Sharing(True)
