"""Print a plan for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from seqpar.partitioner.alternatives import Alternative
from seqpar.passes.inspector import Details
from seqpar.passes.plan import NO_RULE, AttentionPlan, Plan
from seqpar.passes.stages import Stage
from seqpar.passes.text import amount, capped, duration, percent, short, table
from seqpar.runtime.counting import KINDS


def explain(plan: Plan) -> str:
    """One page: ranks, work, time, memory; stages, collectives, attention strategies (equal ones folded), replicated operators.

    Stages, memory and runners-up are worked out on the first call; a plan without an inspector has none.
    """
    details = plan.details
    lines = [
        f"seqpar: {plan.world_size} rank(s) = ulysses {plan.ulysses} x ring {plan.ring}",
        f"work      {amount(plan.flops_total)}FLOP in one process, {amount(max(plan.flops_per_rank))}FLOP on the busiest rank; {plan.sharded_flop_fraction:.4f} of it sharded",
        f"received  {communication(plan)}",
    ]
    if uncounted := Counter(op.op for op in plan.replicated_ops if op.reason == NO_RULE and not op.flops and not op.op.startswith(("aten.", "prims."))):
        lines.insert(2, f"          not counted: what {', '.join(f'{n} x {name}' for name, n in uncounted.items())} do, whole on every rank")
    if plan.comm_dtype:
        lines.append(f"rounded   to {plan.comm_dtype} on the way: queries, keys, values and results of attention over the mesh, where they are wider")
    if plan.predicted_seconds:
        lines.append(f"time      {prediction(plan)}")
    if details is not None:
        m = details.memory
        peaks = f"{amount(m.peak_alone)}B in one process, {amount(m.peak)}B per rank"
        lines.append(f"memory    parameters {amount(m.parameters)}B and inputs {amount(m.inputs)}B, whole on every rank; activations at their peak {peaks}")
    if plan.nothing_to_shard:
        lines.append("nothing to shard: the model has no attention that seqpar knows, and too little other work to divide; every rank runs it whole")
    if details is not None:
        lines += stage_lines(details.stages, details.rank)
    lines += collective_lines(plan) + attention_lines(plan, details) + replicated_lines(plan)
    if plan.notes:
        lines.append("declared")
        lines += capped(f"  {note}" for note in plan.notes)
    lines.append("seconds   " + ", ".join(f"{stage} {seconds:.2f}" for stage, seconds in plan.seconds.items()))
    return "\n".join(lines)


def communication(plan: Plan) -> str:
    """Everything received, and how much of each kind."""
    used = [(kind, n) for kind, n in plan.comm_calls.items() if n]
    if not used:
        return "nothing"
    total = sum(plan.comm_bytes_per_rank.values())
    kinds = ", ".join(f"{n} {kind} {amount(plan.comm_bytes_per_rank[kind])}B" for kind, n in used)
    return f"{amount(total)}B per rank and call of the model ({kinds})"


def exposed_seconds(predicted: Mapping[str, float]) -> float:
    """Of `Plan.predicted_seconds`: how long the rank does nothing but wait for collectives."""
    return max(0.0, predicted["total"] - predicted["compute"])


def prediction(plan: Plan) -> str:
    """One process against the slowest rank."""
    p = plan.predicted_seconds
    moving = sum(seconds for kind, seconds in p.items() if kind in KINDS)
    parts = f": computing {duration(p['compute'])}, collectives {duration(exposed_seconds(p))} exposed and {duration(p['hidden'])} hidden" if moving else ""
    return f"about {duration(plan.predicted_alone)} in one process, {duration(p['total'])} on the slowest rank{parts} ({plan.machine}; contractions only)"


def stage_lines(stages: tuple[Stage, ...], rank: int) -> list[str]:
    """A row per stage; numbers are of one of equal stages."""
    if not stages:
        return []
    rows = [
        (
            f"{s.name} x {s.repeats}" if s.repeats > 1 else s.name,
            f"{amount(s.flops_alone)}FLOP",
            f"{amount(s.flops)}FLOP",
            stage_traffic(s),
            duration(s.seconds),
            ", ".join(s.results),
        )
        for s in stages
    ]
    header = ("", "one process", f"rank {rank}", "received", "time", "hands on")
    return ["stages (each; layouts as sizes, a sharded one as size/ranks)", *capped(table(header, rows))]


def stage_traffic(stage: Stage) -> str:
    """`2 all_to_all 30.7 kB, 1 ring 20.5 kB`."""
    return ", ".join(f"{n} {kind} {amount(stage.received[kind])}B" for kind, n in stage.calls.items() if n) or "-"


def collective_lines(plan: Plan) -> list[str]:
    """A row per kind of collective, with its predicted time on the wire."""
    used = [kind for kind, n in plan.comm_calls.items() if n]
    if not used or not plan.predicted_seconds:
        return []
    rows = []
    for kind in used:
        hidden = plan.predicted_hidden.get(kind, 0.0)
        note = f"{duration(hidden)} of it hidden" if hidden else ""
        rows.append((kind, str(plan.comm_calls[kind]), f"{amount(plan.comm_bytes_per_rank[kind])}B", duration(plan.predicted_seconds[kind]), note))
    return ["collectives (per rank and call of the model)", *table(("", "calls", "received", "on the wire", ""), rows)]


def attention_lines(plan: Plan, details: Details | None) -> list[str]:
    """A row per group of equal attentions, and under it how long one takes, and would take otherwise."""

    def key(a: AttentionPlan) -> tuple[object, ...]:
        others = runner_up(details, a.node) if details is not None else ""
        return (f"{a.strategy:<13} queries [{a.queries}] keys [{a.keys}] {a.heads} heads: {a.why}", others)

    lines = []
    for (text, others), n in Counter(map(key, plan.attention)).items():
        lines += [f"  {n:>3} x {text}", *([f"        {others}"] if others else [])]
    return ["attention", *capped(lines)] if lines else []


def runner_up(details: Details, node: str) -> str:
    """The predicted time of one attention and of what else was possible; with the solver's price of the program where the solver decided."""

    def text(a: Alternative) -> str:
        moved = f", {amount(a.received)}B" if a.received else ""
        return f"{a.strategy} {duration(a.seconds)}{moved}" + (f" (solver's price of the program {percent(a.cost - details.cost, details.cost)})" if a.cost is not None else "")

    others = details.runners_up.get(node, ())
    if not others:
        return ""
    first, *more = map(text, others)
    return f"about {duration(details.attention_seconds[node])} each; runner-up {first}" + "".join(f", then {other}" for other in more)


def replicated_lines(plan: Plan) -> list[str]:
    """A row per operator, reason and source line, the dearest first."""
    if not plan.replicated_ops:
        return []
    found: Counter[tuple[str, str, str]] = Counter()
    flops: Counter[tuple[str, str, str]] = Counter()
    for o in plan.replicated_ops:
        found[(o.op, o.reason, o.source)] += 1
        flops[(o.op, o.reason, o.source)] += o.flops
    ordered = sorted(found, key=lambda key: -flops[key])
    rows = (f"  {found[k]:>3} x {k[0]:<28} {amount(flops[k])}FLOP  {k[1]}  {short(k[2])}" for k in ordered)
    return ["replicated (every rank computes all of it)", *capped(rows)]
