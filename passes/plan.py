"""The plan: what was decided, and what the emitted programs do. Plain data; `report.explain` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class AttentionPlan:
    """One attention node. strategy: "ulysses", "ring", "ulysses+ring", "local" (keys whole, rows cut) or "replicated"; a balanced causal ring adds " (zigzag)"."""

    node: str
    strategy: str
    why: str
    queries: str
    keys: str
    heads: int
    source: str


@dataclass(frozen=True)
class ReplicatedOp:
    """A contraction, or an operator without a rule, that every rank executes on whole values. flops: of one rank."""

    node: str
    op: str
    reason: str
    flops: int
    source: str


@dataclass(frozen=True)
class Plan:
    """What `ulysses * ring` ranks do with one model at one set of input sizes.

    flops are contractions only, a multiply-add counted as two, of causal attention the visible pairs; bytes are received per call of the model, by the busiest rank, per
    kind of collective. All are counted by running the emitted programs on meta tensors.

    Invariants: `flops_per_rank` has one entry per rank.
    """

    ulysses: int
    ring: int
    flops_total: int
    flops_per_rank: tuple[int, ...]
    comm_bytes_per_rank: Mapping[str, int]
    comm_calls: Mapping[str, int]
    attention: tuple[AttentionPlan, ...]
    replicated_ops: tuple[ReplicatedOp, ...]
    seconds: Mapping[str, float]
    nothing_to_shard: bool = False
    notes: tuple[str, ...] = ()  # what became of a declared plan

    def __post_init__(self) -> None:
        assert len(self.flops_per_rank) == self.world_size

    @property
    def world_size(self) -> int:
        return self.ulysses * self.ring

    @property
    def sharded_flop_fraction(self) -> float:
        """1 - replicated work: (F - f) / (F (1 - 1/N)) with F the FLOPs of one process and f the busiest rank's; 1.0 for one rank."""
        whole, busiest, ranks = self.flops_total, max(self.flops_per_rank), self.world_size
        return 1.0 if ranks == 1 or not whole else (whole - busiest) / (whole * (1 - 1 / ranks))

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "world_size": self.world_size,
            "sharded_flop_fraction": self.sharded_flop_fraction,
            **asdict(self),
            "flops_per_rank": list(self.flops_per_rank),
            "attention": [asdict(a) for a in self.attention],
            "replicated_ops": [asdict(o) for o in self.replicated_ops],
            "notes": list(self.notes),
            "comm_bytes_per_rank": dict(self.comm_bytes_per_rank),
            "comm_calls": dict(self.comm_calls),
            "seconds": dict(self.seconds),
        }

    def explain(self) -> str:
        """The plan as one page of text."""
        from seqpar.passes.report import explain

        return explain(self)
