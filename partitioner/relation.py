"""What one operator does to the dims of its operands: the answer every rule gives.

A relation says, for each dim of each operand, where its positions go:

    flows     (operand, dim) -> output dims         position p of the operand only influences position p of those
    reduces   (operand, dim) -> "sum" | "max" | …   positions are combined: local result + all-reduce ("within": the emitted call does both)
    (neither) the operator needs the dim whole

Only atoms found in the target dim flow. Atoms of a flowing dim that are found in no output dim were dropped (`x[:, 5:]`): they
ask for nothing if the relation is `dropping`, and for a whole operand otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Node

from seqpar.partitioner.atoms import Axis


@dataclass(frozen=True)
class Rewrite:
    """How the literals in a call follow the local shapes, executed by `passes.localise`.

    kind: "sizes" (argument `arg` lists output sizes), "slice", "split", "pad", "mean", "constant_pad", … ; `dim` where it applies.
    """

    kind: str
    arg: int = 0
    dim: int = 0
    data: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Halo:
    """Neighbouring positions of the operand that are read `before` and `after` a part."""

    before: int
    after: int


@dataclass(frozen=True)
class Window:
    """Position p of an output dim is made of the operand's `reach` positions from `stride * p + first` on; beyond its ends are zeros."""

    stride: int
    first: int
    reach: int


@dataclass(frozen=True)
class Relation:
    """The relation of one node.

    Invariants: keys of `flows` and `reduces` are disjoint; output axes have one entry per dim of each output.
    """

    operands: tuple[Node, ...]
    operand_axes: tuple[tuple[Axis, ...], ...]
    out_axes: tuple[tuple[Axis, ...], ...]
    flows: Mapping[tuple[int, int], tuple[int, ...]] = field(default_factory=dict)
    reduces: Mapping[tuple[int, int], str] = field(default_factory=dict)
    dropping: bool = False
    free: frozenset[int] = frozenset()  # operands read for their dtype or device only
    whole: frozenset[int] = frozenset()  # output dims that can only be produced whole
    halo: Mapping[int, Halo] = field(default_factory=dict)  # output dim -> neighbouring positions that are read
    windows: Mapping[int, Window] = field(default_factory=dict)  # output dim -> what its positions are made of; can be made in parts of a whole operand
    pooled: frozenset[int] = frozenset()  # output dims that also share statistics, which the emitted call reduces over the ranks
    rewrite: Rewrite | None = None
    reason: str = ""  # why dims must be whole, for `explain`
    attention: Any = None  # AttentionSpec of an attention node
    seen: bool = True  # False: the operator has no rule

    def __post_init__(self) -> None:
        if set(self.flows) & set(self.reduces):
            raise AssertionError(f"a dim cannot both flow and be reduced: {sorted(set(self.flows) & set(self.reduces))}")

    @property
    def makes(self) -> bool:
        """Results that no operand determines can be made in parts (constants, padding)."""
        kind = self.rewrite.kind if self.rewrite else ""
        return kind == "pad" or (kind == "sizes" and len(self.free) == len(self.operands))
