"""Print a plan for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from seqpar.passes.plan import Plan

MAX_LINES = 12


def explain(plan: Plan) -> str:
    """One page: ranks, work, communication, attention strategies (equal ones folded), replicated operators."""
    lines = [
        f"seqpar: {plan.world_size} rank(s) = ulysses {plan.ulysses} x ring {plan.ring}",
        f"work      {amount(plan.flops_total)}FLOP in one process, {amount(max(plan.flops_per_rank))}FLOP on the busiest rank; {plan.sharded_flop_fraction:.4f} of it sharded",
        f"received  {communication(plan)}",
    ]
    if plan.nothing_to_shard:
        lines.append("nothing to shard: the model has no attention that seqpar knows; every rank runs it whole")
    if plan.attention:
        lines.append("attention")
        folded = Counter((a.strategy, a.queries, a.keys, a.heads, a.why) for a in plan.attention)
        rows = [f"  {n:>3} x {s:<13} queries [{q}] keys [{k}] {h} heads: {why}" for (s, q, k, h, why), n in folded.items()]
        lines += capped(rows)
    if plan.replicated_ops:
        lines.append("replicated (every rank computes all of it)")
        by_reason = Counter((o.op, o.reason, o.source) for o in plan.replicated_ops)
        flops: Counter[tuple[str, str, str]] = Counter()
        for o in plan.replicated_ops:
            flops[(o.op, o.reason, o.source)] += o.flops
        ordered = sorted(by_reason, key=lambda key: -flops[key])
        lines += capped(f"  {by_reason[k]:>3} x {k[0]:<28} {amount(flops[k])}FLOP  {k[1]}  {short(k[2])}" for k in ordered)
    if plan.notes:
        lines.append("declared")
        lines += capped(f"  {note}" for note in plan.notes)
    lines.append("seconds   " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in plan.seconds.items()))
    return "\n".join(lines)


def communication(plan: Plan) -> str:
    used = [(kind, n) for kind, n in plan.comm_calls.items() if n]
    if not used:
        return "nothing"
    total = sum(plan.comm_bytes_per_rank.values())
    kinds = ", ".join(f"{n} {kind} {amount(plan.comm_bytes_per_rank[kind])}B" for kind, n in used)
    return f"{amount(total)}B per rank and call of the model ({kinds})"


def capped(rows: Iterable[str]) -> list[str]:
    rows = list(rows)
    return rows if len(rows) <= MAX_LINES else [*rows[: MAX_LINES - 1], f"  … {len(rows) - MAX_LINES + 1} more"]


def short(source: str) -> str:
    """`…/site-packages/package/x.py:12` -> `package/x.py:12`; a user's own file keeps its path."""
    return source.rpartition("site-packages/")[2]


def amount(value: float) -> str:
    """12.3 M, 4.56 G, …"""
    for unit in ("", "k", "M", "G", "T"):
        if abs(value) < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.4g} P"
