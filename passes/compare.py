"""Two plans side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from seqpar.passes.plan import Plan
from seqpar.passes.text import amount, duration, percent, table
from seqpar.runtime.counting import KINDS


@dataclass(frozen=True)
class Row:
    """One number of both plans. left, right: floating-point operations, bytes, calls, seconds or a share, None where a plan does not know it."""

    name: str
    unit: str
    left: float | None
    right: float | None


@dataclass(frozen=True)
class Comparison:
    """`print` it; or read `rows`. differences: what cannot be put into one number."""

    left: str
    right: str
    rows: tuple[Row, ...]
    differences: tuple[str, ...]

    def __str__(self) -> str:
        cells = [(row.name, _cell(row.left, row.unit), _cell(row.right, row.unit), _change(row)) for row in self.rows]
        return "\n".join([*table(("", self.left, self.right, ""), cells), *(f"  {line}" for line in self.differences)])

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return asdict(self) | {"rows": [asdict(row) for row in self.rows], "differences": list(self.differences)}


def compare(left: Plan, right: Plan) -> Comparison:
    """All numbers of two plans; memory where it is known."""
    rows = [Row(name, unit, read(left), read(right)) for name, unit, read in _numbers()]
    rows = [r for r in rows if r.left or r.right]
    return Comparison(_name(left), _name(right), tuple(rows), tuple(_differences(left, right)))


def _numbers() -> list[tuple[str, str, Callable[[Plan], float | None]]]:
    def memory(plan: Plan) -> float | None:
        return plan.inspector.memory.peak if plan.inspector is not None else plan.kept.details.memory.peak if plan.kept is not None else None

    def received(kind: str) -> Callable[[Plan], float]:
        return lambda plan: plan.comm_bytes_per_rank[kind]

    return [
        ("work of one process", "FLOP", lambda plan: plan.flops_total),
        ("work of the busiest rank", "FLOP", lambda plan: max(plan.flops_per_rank)),
        ("sharded share of the work", "", lambda plan: plan.sharded_flop_fraction),
        ("received per rank", "B", lambda plan: sum(plan.comm_bytes_per_rank.values())),
        *((f"  {kind}", "B", received(kind)) for kind in KINDS),
        ("collective calls", "calls", lambda plan: sum(plan.comm_calls.values())),
        ("predicted time", "s", lambda plan: plan.predicted_seconds.get("total")),
        ("activations at their peak", "B", memory),
        ("replicated operators", "operators", lambda plan: len(plan.replicated_ops)),
    ]


def _name(plan: Plan) -> str:
    return f"ulysses {plan.ulysses} x ring {plan.ring}"


def _cell(value: float | None, unit: str) -> str:
    if value is None:
        return "?"
    if unit == "s":
        return duration(value)
    if unit in ("FLOP", "B"):
        return f"{amount(value)}{unit}"
    return f"{value:.4f}" if not unit else f"{value:g}"


def _change(row: Row) -> str:
    if row.left is None or row.right is None or not row.left or row.left == row.right or not row.unit:
        return ""
    return percent(row.right - row.left, row.left)


def _differences(left: Plan, right: Plan) -> list[str]:
    strategies = [Counter(a.strategy for a in plan.attention) for plan in (left, right)]
    lines = [] if strategies[0] == strategies[1] else ["attention: " + " | ".join(", ".join(f"{n} x {name}" for name, n in s.items()) or "none" for s in strategies)]
    ours, theirs = ({(o.op, o.source, o.reason) for o in plan.replicated_ops} for plan in (left, right))
    for name, only in ((_name(left), ours - theirs), (_name(right), theirs - ours)):
        if only:
            lines.append(f"only {name} replicates {len(only)} more: " + "; ".join(sorted(op for op, _, _ in only)[:3]))
    if left.machine != right.machine:
        lines.append(f"predicted for {left.machine} | {right.machine}")
    return lines
