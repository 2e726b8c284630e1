"""Attention over the mesh in turns: a share of every rank's heads at a time, so that the heads of the next turn travel while those of this one attend.

Before: exchange 8 heads; attend them; exchange the result                               what is exchanged is waited for twice
After:  exchange 4 heads; exchange 4 others | attend the first | send their result | attend the others | send their result

The bytes are the same, the collectives as many times more as there are turns. So turns are taken only at real rates (hardware that the user named),
where a replay of this one attention on one link says that it gets clearly faster.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch.fx import Node

from seqpar.partitioner.attention_heads import HeadPlan, divide_heads
from seqpar.partitioner.candidates import heaviest_factor
from seqpar.partitioner.cost import OPERATIONS_PER_BYTE, Prices, nbytes, node_work
from seqpar.partitioner.division import Degrees, Division, division, head_counts
from seqpar.partitioner.exchange_bytes import ExchangeBytes
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.lengths import part
from seqpar.partitioner.op import outputs_of
from seqpar.partitioner.riders import riders_of

MOST = 4
CLEARLY = 0.98  # of the time of fewer turns: kernels of few heads are a little slower


@dataclass(frozen=True)
class Legs:
    """Of one attention on one rank: its work, and its transfers there and back; `call`: what every collective takes besides.

    join: what joining the results of several turns takes. All in one unit, floating-point operations or seconds.
    """

    there: float
    attend: float
    back: float
    call: float
    join: float = 0.0

    def time(self, turns: int) -> float:
        """Of all turns, on one link that carries one transfer after another: operands first, results as they come."""
        now, link = 0.0, turns * (self.there / turns + self.call)
        for turn in range(turns):
            now = max(now, (turn + 1) * (self.there / turns + self.call)) + self.attend / turns
            link = max(link, now) + self.back / turns + self.call
        return link + (self.join if turns > 1 else 0.0)


@dataclass(frozen=True)
class Turns:
    """heads: what each rank attends in every turn; saved: floating-point operations of one rank, by the replay, against one turn."""

    heads: tuple[HeadPlan, ...]
    saved: float = 0.0


def turns_of(inference: Inference, degrees: Degrees, prices: Prices, node: Node) -> Turns:
    """For an attention over the mesh; the same answer on every rank. In every turn all ranks attend as many heads."""
    first = inference.repeats.like.get(node, node)
    return inference.answer((Turns, degrees, prices, first), lambda: _find(inference, prices, first, division(inference, degrees, prices, first)))


def _find(inference: Inference, prices: Prices, node: Node, found: Division) -> Turns:
    whole = Turns((found.heads,))
    if not prices.real or found.shared or found.degrees.ulysses == 1 or found.degrees.ring > 1:  # a ring hides its own transfers, on the same link
        return whole
    heads, key_heads, _ = head_counts(inference, inference.relations[node])
    per_rank, rest = divmod(key_heads, found.degrees.ulysses)
    if rest:
        return whole
    legs, best = legs_of(inference, prices, node, found), 1
    for count in range(2, min(MOST, per_rank) + 1):
        if legs.time(count) < CLEARLY * legs.time(best):
            best = count
    if best == 1:
        return whole
    return Turns(tuple(_shares(per_rank, best, found.degrees.ulysses, heads // key_heads)), legs.time(1) - legs.time(best))


def _shares(per_rank: int, turns: int, ranks: int, group: int) -> Iterator[HeadPlan]:
    """What the ranks attend in every turn: adjacent heads, of `per_rank` K/V heads of each rank as many as of the others."""
    first = 0
    for turn in range(turns):
        keys = ranks * int(part(per_rank, turn, turns))
        yield _later(divide_heads(group * keys, keys, ranks), group * first, first)
        first += keys


def legs_of(inference: Inference, prices: Prices, node: Node, found: Division) -> Legs:
    """In floating-point operations of one rank; of an attention without a ring, with as many heads on every rank, whose sequences are all in parts."""
    relation, sizes, ranks = inference.relations[node], inference.table.sizes, found.degrees.ranks
    spec, moved = relation.attention, ExchangeBytes(inference, node, found, riders_of(inference, ranks, found.degrees.ring))
    atoms = {i: heaviest_factor(inference, relation.operand_axes[i][-2]) for i in (spec.q, spec.k, spec.v)}
    there = _busiest([moved.operand(i, a) for i, cut in atoms.items() for a in cut])
    back = _busiest([moved.result(a) for a in atoms[spec.q]])
    join = 2 * OPERATIONS_PER_BYTE * nbytes(outputs_of(node)[0], sizes) / ranks
    return Legs(there * prices.byte, node_work(node, sizes) / ranks, back * prices.byte, prices.call, join)


def _busiest(received: list[list[float]]) -> float:
    return max(map(sum, zip(*received, strict=True)), default=0.0)


def _later(plan: HeadPlan, queries: int, keys: int) -> HeadPlan:
    """The same division of later heads."""
    return replace(
        plan,
        queries=tuple((start + queries, stop + queries) for start, stop in plan.queries),
        keys=tuple((start + keys, stop + keys) for start, stop in plan.keys),
    )
