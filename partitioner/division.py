"""How one attention over the mesh is divided: whole heads over the mesh that was asked for, or heads shared by query rows over all its ranks.

Whole heads leave the busiest rank with more than its share where `ulysses` does not divide them, and where a causal ring is not in zigzag order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch.fx import Node

from seqpar.partitioner.attention_heads import HeadPlan, busiest_heads, divide_heads
from seqpar.partitioner.candidates import heaviest_factor
from seqpar.partitioner.cost import Prices, node_work
from seqpar.partitioner.exchange_bytes import ExchangeBytes
from seqpar.partitioner.head_shares import Pieces, plan_of_shares, share_causal_heads, share_heads, whole_heads
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.relation import Relation
from seqpar.partitioner.riders import riders_of


@dataclass(frozen=True)
class Degrees:
    """The mesh as the solver sees it."""

    ulysses: int
    ring: int

    @property
    def ranks(self) -> int:
        return self.ulysses * self.ring


@dataclass(frozen=True)
class Division:
    """degrees: the mesh of this attention; pieces: what each rank of an exchange attends; heads: what it receives for that.

    readers: query heads per K/V head; uneven: about how much more work than the average the busiest rank has; shared: heads are shared by rows;
    reason: why heads that could be shared stay whole. Invariants: shared heads have no ring, and are even.
    """

    degrees: Degrees
    pieces: Pieces
    heads: HeadPlan
    readers: int
    uneven: float = 1.0
    shared: bool = False
    reason: str = ""

    @property
    def axis(self) -> str:
        """The axis over which heads are exchanged."""
        return "sp" if self.shared else "ulysses"


def division(inference: Inference, degrees: Degrees, prices: Prices, node: Node) -> Division:
    """For an attention over the mesh; the same answer on every rank. Worked out once: the solver, the emitter and the plan all ask.

    Fewer heads than `ulysses` are shared. Others are where whole ones leave the work uneven (`ulysses` does not divide them, or a ring is causal and has no
    zigzag order) and evening it out saves more than what the busiest rank receives in addition costs. Shared heads are exchanged over all ranks, instead of a ring.
    """
    first = inference.repeats.like.get(node, node)
    return inference.answer((Division, degrees, prices, first), lambda: _divide(inference, degrees, prices, first))


def _divide(inference: Inference, degrees: Degrees, prices: Prices, node: Node) -> Division:
    relation, sizes = inference.relations[node], inference.table.sizes
    spec = relation.attention
    lengths = [[sizes.hint(inference.table.axis_length(axis)) for axis in relation.operand_axes[i]] for i in (spec.q, spec.k)]
    (_, heads, rows, _), (_, key_heads, columns, _) = lengths
    whole = None
    if heads >= degrees.ulysses:
        plan = divide_heads(heads, key_heads, degrees.ulysses)
        uneven = busiest_heads(heads, degrees.ulysses) * degrees.ulysses / heads
        if spec.is_causal and not same_positions(inference, relation):
            uneven *= 2 - 1 / degrees.ring  # the last row of a ring sees all keys, the first its own
        whole = Division(degrees, whole_heads(plan), plan, heads // key_heads, uneven)
        if uneven == 1:
            return whole
    every = replace(degrees, ulysses=degrees.ranks, ring=1)
    pieces = share_causal_heads(heads, degrees.ranks, rows, columns) if spec.is_causal else share_heads(heads, degrees.ranks)
    shared = Division(every, pieces, plan_of_shares(pieces, heads // key_heads), heads // key_heads, shared=True)
    if whole is None:
        return shared
    saved = node_work(node, sizes) / degrees.ranks * (whole.uneven - 1)
    further = mesh_bytes(inference, degrees, node, shared) - mesh_bytes(inference, degrees, node, whole)
    if saved <= max(0.0, further) * prices.byte + prices.call:
        return replace(whole, reason="sharing heads would cost more than it saves")
    return shared


def same_positions(inference: Inference, relation: Relation) -> bool:
    """Queries and keys are the same positions: a causal ring can deal them out (`balance.py`)."""
    queries, keys = (inference.table.expand_axis(relation.operand_axes[i][-2]) for i in (relation.attention.q, relation.attention.k))
    return queries == keys


def head_counts(inference: Inference, relation: Relation) -> tuple[int, int, int]:
    """Heads of queries, keys and values of a plain attention, for the example."""
    spec = relation.attention
    heads, key_heads, value_heads = (inference.table.example_length(relation.operand_axes[i][1]) for i in (spec.q, spec.k, spec.v))
    return heads, key_heads, value_heads


def are_groups(heads: int, key_heads: int, value_heads: int) -> bool:
    """Every K/V head serves as many query heads."""
    return key_heads == value_heads and heads % key_heads == 0


def mesh_bytes(inference: Inference, degrees: Degrees, node: Node, found: Division) -> float:
    """What the busiest rank receives for one attention whose sequences are all in parts. degrees: the mesh that was asked for."""
    relation = inference.relations[node]
    spec = relation.attention
    atoms = {i: heaviest_factor(inference, relation.operand_axes[i][-2]) for i in (spec.q, spec.k, spec.v)}
    counted = ExchangeBytes(inference, node, found, riders_of(inference, degrees.ranks, degrees.ring))
    return sum(counted.total([(i, atoms[i]) for i in (spec.q, spec.k, spec.v)], set(atoms[spec.q])))
