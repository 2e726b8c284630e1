"""The plan: what was decided, and what the emitted programs do. Plain data; `report.explain` prints it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from seqpar.errors import UnsupportedError

if TYPE_CHECKING:
    from seqpar.passes.compare import Comparison
    from seqpar.passes.drawing import Drawing
    from seqpar.passes.inspector import Details, Inspector, Kept
    from seqpar.passes.why import Why


NO_RULE = "no rule for this operator"  # the reason of a `ReplicatedOp`


@dataclass(frozen=True)
class AttentionPlan:
    """One attention node. strategy: "ulysses", "ring", "ulysses+ring", "local" (keys whole, rows cut), "gather K/V",
    "gather input" (of the keys and values), "split K/V" (rows whole, keys cut) or "replicated"; a balanced causal ring adds " (zigzag)", heads divided
    by rows " (shared heads)", heads exchanged by turns " (in 4 turns)"."""

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

    FLOPs, bytes and calls are counted by running the emitted programs on meta tensors.

    Attributes:
        flops_total: of one process; contractions only, a multiply-add counted as two, of causal attention the visible pairs.
        flops_per_rank: one entry per rank.
        comm_bytes_per_rank: received per call of the model by the busiest rank, per kind of collective.
        comm_calls: collectives per call of the model, per kind.
        attention: strategy, layouts and reason of every attention.
        replicated_ops: what every rank computes whole, and why.
        seconds: what tracing and each stage of the compiler took.
        notes: what became of a declared plan.
        machine: whose rates the predictions use.
        predicted_seconds: of one call, by "compute", kind of collective (on the wire), "hidden" (behind work) and "total"; see `passes/timeline.py`.
        predicted_hidden: the hidden ones by kind.
        predicted_alone: seconds of one call in one process.
        inspector: answers what takes more work (`details`, `why`); not compared, copied, pickled or saved: without it a plan is plain data.
        kept: what a file of programs keeps of those answers.
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
    machine: str = ""
    comm_dtype: str = ""  # what exchanges of attention are rounded to; "" for nothing
    predicted_seconds: Mapping[str, float] = field(default_factory=dict)
    predicted_hidden: Mapping[str, float] = field(default_factory=dict)
    predicted_alone: float = 0.0
    inspector: Inspector | None = field(default=None, compare=False, repr=False)
    kept: Kept | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        assert len(self.flops_per_rank) == self.world_size

    @property
    def world_size(self) -> int:
        """Ranks that share the sequence."""
        return self.ulysses * self.ring

    @property
    def sharded_flop_fraction(self) -> float:
        """1 - replicated work: (F - f) / (F (1 - 1/N)) with F the FLOPs of one process and f the busiest rank's; 1.0 for one rank."""
        whole, busiest, ranks = self.flops_total, max(self.flops_per_rank), self.world_size
        return 1.0 if ranks == 1 or not whole else (whole - busiest) / (whole * (1 - 1 / ranks))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "inspector": None}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; without what the inspector knows (`details.to_dict()`)."""
        plain = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("inspector", "kept")}
        return {
            "world_size": self.world_size,
            "sharded_flop_fraction": self.sharded_flop_fraction,
            **plain,
            "flops_per_rank": list(self.flops_per_rank),
            "attention": [asdict(a) for a in self.attention],
            "replicated_ops": [asdict(o) for o in self.replicated_ops],
            "notes": list(self.notes),
            "comm_bytes_per_rank": dict(self.comm_bytes_per_rank),
            "comm_calls": dict(self.comm_calls),
            "seconds": dict(self.seconds),
            "predicted_seconds": dict(self.predicted_seconds),
            "predicted_hidden": dict(self.predicted_hidden),
        }

    @property
    def details(self) -> Details | None:
        """Stages, memory, runners-up: made on first use and kept; None for a plan that was made from a dict or sent from elsewhere."""
        known = self.inspector or self.kept
        return None if known is None else known.details

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Plan:
        """The inverse of `to_dict`.

        Raises:
            ValueError: it is not what `to_dict` returned; names the field.
        """
        from seqpar.passes.from_dict import read_dataclass

        return read_dataclass(Plan, data)

    def explain(self) -> str:
        """The plan as one page of text."""
        from seqpar.passes.report import explain

        return explain(self)

    def why(self, query: str) -> Why:
        """Why values have the layouts they have, and what the opposite would cost.

        Args:
            query: the name of a value (`linear_8`), a source line (`attention.py:120`) or a part of a name, module path or operator.

        Raises:
            UnsupportedError: nothing matches (the message lists what is near), or the plan was loaded or sent from elsewhere.
        """
        if self.inspector is None:
            raise UnsupportedError("this plan was loaded or sent from another process and has no graph to ask; make it with seqpar.plan or sp_compile, and ask that")
        return self.inspector.why(query)

    def compare(self, other: Plan) -> Comparison:
        """This plan and another (another mesh, another model), number by number."""
        from seqpar.passes.compare import compare

        return compare(self, other)

    def to_dot(self) -> str:
        """The program of one rank in the language of graphviz, blocks folded where they repeat.

        Raises:
            UnsupportedError: the plan was made from a dict or sent from another process.
        """
        from seqpar.passes.draw_dot import to_dot

        return to_dot(self._drawing())

    def to_html(self, path: Any, title: str = "") -> None:
        """Write one page with the same picture, bars per rank, details and a search; it needs nothing else, and no network.

        Raises:
            UnsupportedError: the plan was made from a dict or sent from another process.
        """
        from seqpar.passes.draw_html import to_html

        page = to_html(self._drawing(), title or f"seqpar plan, ulysses {self.ulysses} x ring {self.ring}")
        Path(path).write_text(page, encoding="utf-8")

    def to_svg(self, path: Any, title: str = "", only: str = "") -> None:
        """Write the pictures of that page alone; of the stages with `only` in their name (a module path).

        Raises:
            UnsupportedError: the plan was made from a dict or sent from another process.
        """
        from seqpar.passes.draw_html import to_svg

        Path(path).write_text(to_svg(self._drawing(), title or f"ulysses {self.ulysses} x ring {self.ring}", only=only), encoding="utf-8")

    def _drawing(self) -> Drawing:
        known = self.inspector or self.kept
        if known is None:
            raise UnsupportedError("this plan was made from a dict or sent from another process and has no graph to draw; make it with seqpar.plan or sp_compile, and draw that")
        return known.drawing
