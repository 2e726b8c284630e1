"""Read the plan off a partitioned model: run the emitted programs on meta tensors, and say for every attention and whole operator why."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from seqpar.partitioner.cost import node_flops
from seqpar.partitioner.division import division
from seqpar.partitioner.execution import execution_of
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.key_sources import KeySources
from seqpar.partitioner.layout import LayoutView
from seqpar.partitioner.lengths import part
from seqpar.partitioner.relation import Relation
from seqpar.partitioner.solve import Solution
from seqpar.passes.count import Counts, count
from seqpar.passes.localise import one_line
from seqpar.passes.plan import NO_RULE, AttentionPlan, Plan, ReplicatedOp
from seqpar.passes.text import amount
from seqpar.passes.timeline import Timeline, timeline

if TYPE_CHECKING:
    from seqpar.passes.pipeline import Partitioned


def plan_of(partitioned: Partitioned) -> Plan:
    """The plan of all ranks."""
    degrees, inference = partitioned.solution.degrees, partitioned.inference
    counts = partitioned.counts
    whole = whole_flops(partitioned)
    sources = KeySources(LayoutView(inference, partitioned.solution, 0))
    kinds = counts[0].traffic.bytes
    slowest = max(timelines_of(partitioned), key=lambda t: t.total)
    return Plan(
        ulysses=degrees.ulysses,
        ring=degrees.ring,
        flops_total=sum(whole.values()),
        flops_per_rank=tuple(c.total_flops for c in counts),
        comm_bytes_per_rank={k: max(c.traffic.bytes[k] for c in counts) for k in kinds},
        comm_calls={k: max(c.traffic.calls[k] for c in counts) for k in kinds},
        attention=tuple(_attention(partitioned, n, r, sources) for n, r in inference.relations.items() if r.attention is not None)
        + tuple(_written(partitioned, n, inference.relations[n]) for n in inference.written),
        replicated_ops=_replicated(partitioned, whole),
        seconds=partitioned.seconds,
        nothing_to_shard=partitioned.nothing_to_shard,
        notes=partitioned.notes,
        comm_dtype="" if partitioned.comm_dtype is None else str(partitioned.comm_dtype).removeprefix("torch."),
        machine=partitioned.machine.name,
        predicted_seconds=slowest.to_dict(),
        predicted_hidden=slowest.hidden,
        predicted_alone=sum(whole.values()) / partitioned.machine.flops_per_s,
    )


# -- counting --------------------------------------------------------------------------------------
def whole_flops(partitioned: Partitioned) -> dict[str, int]:
    """Node name -> operations of one process that runs the whole model, contractions only."""
    sizes = partitioned.inference.table.sizes
    return {n.name: f for n in partitioned.inference.relations if (f := node_flops(n, sizes))}


def counts_of(partitioned: Partitioned, rank: int) -> Counts:
    """Counts of a rank's program as it was emitted; ranks that hold and exchange parts of the same sizes share one run."""
    degrees = partitioned.solution.degrees
    key = None if partitioned.nothing_to_shard else _sizes_of(partitioned, rank) if partitioned.options.share_counts else rank
    known = partitioned.known_counts
    if key not in known:
        known[key] = count(partitioned.emitted(rank), example_of(partitioned), ulysses=degrees.ulysses, ring=degrees.ring, rank=rank, results=partitioned.meta_results)
    return known[key]


def timelines_of(partitioned: Partitioned) -> list[Timeline]:
    """The predicted course of one call, of every kind of rank: those that share their counts run alike."""
    known: dict[int, Timeline] = {}
    ranks = range(len(partitioned.counts))
    for rank in sorted(ranks, key=lambda r: not partitioned.has_program(r)):  # a program that is there needs not be scheduled again
        counts = partitioned.counts[rank]
        if id(counts) not in known:
            known[id(counts)] = timeline(partitioned.program(rank).graph.nodes, counts, partitioned.machine)
    return list(known.values())


def example_of(partitioned: Partitioned) -> list[torch.Tensor]:
    """Meta tensors of the example's global shapes, in the order of the placeholders."""
    hint = partitioned.inference.table.sizes.hint
    values = [n.meta["val"] for n in partitioned.traced.gm.graph.nodes if n.op == "placeholder"]
    return [torch.empty([hint(_expr(s)) for s in v.shape], dtype=v.dtype, device="meta") for v in values]


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _sizes_of(partitioned: Partitioned, rank: int) -> object:
    """Everything the work and the traffic of a rank depend on: its parts, those of its ring row together, its heads, whether it is an edge."""
    solution, inference = partitioned.solution, partitioned.inference
    degrees, table = solution.degrees, inference.table
    row, column = divmod(rank, degrees.ulysses)
    view, hint = partitioned.view, table.sizes.hint
    own = tuple(hint(view.atom_length(a, True, rank)) for a in inference.sequences)
    in_row = tuple(sum(hint(view.atom_length(a, True, row * degrees.ulysses + u)) for u in range(degrees.ulysses)) for a in inference.sequences)
    heads = {
        table.example_length(r.operand_axes[i][1])
        for n, r in inference.relations.items()
        if n in solution.labels.exchanged
        for i in (r.attention.q, r.attention.k)
    }
    has_halo = any(r.halo for r in inference.relations.values())
    edge = (rank == 0, rank == degrees.ranks - 1) if has_halo else ()
    return (
        own,
        in_row,
        tuple(part(h, column, degrees.ulysses) for h in sorted(heads)),
        rank if any(_differs(inference, solution, n) for n in inference.relations) else 0,
        column if any(h % degrees.ulysses for h in heads) else 0,
        edge,
        row if any(inference.relations[n].attention.is_causal for n in solution.labels.exchanged) else 0,
    )


def _differs(inference: Inference, solution: Solution, node: Node) -> bool:
    """Whether ranks with parts of equal sizes have different work: pieces of shared heads, or rows of a triangle."""
    if node in solution.labels.exchanged:
        return division(inference, solution.degrees, solution.prices, node).shared
    spec = inference.relations[node].attention
    return spec is not None and spec.is_causal


# -- attention and whole operators -----------------------------------------------------------------
def _attention(partitioned: Partitioned, node: Node, relation: Relation, sources: KeySources) -> AttentionPlan:
    inference, solution, view = partitioned.inference, partitioned.solution, sources.view
    spec = relation.attention
    queries, keys = (view.axis_text(relation.operand_axes[i][-2], view.required(node, relation, i)[-2]) for i in (spec.q, spec.k))
    heads = inference.table.example_length(relation.operand_axes[spec.q][1])
    source = sources.of(node)
    moved = f"{source.what}, {amount(source.received)}B" if source.values else source.what
    if node in solution.labels.exchanged:
        run = execution_of(inference, solution, node)
        strategy = run.name
        why = "queries, keys and values exchanged over the mesh" if any(view.required(node, relation, spec.k)) else moved
        why = "; ".join(filter(None, (why, run.division.reason, solution.reasons.get(node))))
    else:
        cut = node in solution.labels.split or any(view.produced(node))
        strategy = source.strategy if cut else "replicated"
        along_batch = node in solution.along_batch and "its batch is sharded: nothing moves"
        gathered = "" if node in solution.local else solution.reasons.get(node, "")
        why = along_batch or "; ".join(filter(None, (moved, gathered))) if cut else solution.reasons.get(node, "one rank")
    return AttentionPlan(node.name, strategy, why, queries, keys, heads, one_line(node))


def _written(partitioned: Partitioned, node: Node, relation: Relation) -> AttentionPlan:
    """Attention that stays a product, a softmax and a product, or `flex_attention`."""
    view = partitioned.view
    layout = view.produced(node)
    flex = node.target is torch.ops.higher_order.flex_attention
    rows = view.axis_text(relation.out_axes[0][-2], layout[-2])
    keys = view.axis_text(relation.operand_axes[1][-2], frozenset()) if flex else view.axis_text(relation.out_axes[0][-1], layout[-1])
    strategy = "local" if any(layout) else "replicated"
    heads = partitioned.inference.table.example_length(relation.out_axes[0][-3]) if len(layout) > 2 else 1
    return AttentionPlan(node.name, strategy, f"{'with functions' if flex else 'written out in a form'} of its own: rows divided, keys whole", rows, keys, heads, one_line(node))


def _replicated(partitioned: Partitioned, whole: dict[str, int]) -> tuple[ReplicatedOp, ...]:
    if partitioned.solution.degrees.ranks == 1:
        return ()
    view, labels, alone = partitioned.view, partitioned.solution.labels, partitioned.nothing_to_shard
    found = []
    for node, relation in partitioned.inference.relations.items():
        flops = whole.get(node.name, 0)
        if ((flops == 0 or alone) and relation.seen and "opaque" not in node.meta) or node in labels.exchanged or node in labels.split:
            continue
        if any(view.produced(node)) or view.reduced(node, relation):
            continue
        reason = replication_reason(view, relation)
        found.append(_opaque(node, flops) if "opaque" in node.meta else ReplicatedOp(node.name, str(node.target), reason, flops, one_line(node)))
    return tuple(found)


def replication_reason(view: LayoutView, relation: Relation) -> str:
    """Why every rank executes a node on whole values."""
    if not relation.seen:
        return NO_RULE
    table, ranks, sequences = view.inference.table, view.ranks, view.inference.sequences.keys()
    atoms = {a for axes in (*relation.operand_axes, *relation.out_axes) for axis in axes for a in table.roots(axis)} & sequences
    if not atoms:
        return "has no sequence dim"
    if all(table.sizes.hint(table.length(a)) < ranks for a in atoms):
        return f"its sequence is shorter than {ranks} ranks"
    out = {a for axes in relation.out_axes for axis in axes for a in table.roots(axis)} & atoms
    return relation.reason if relation.reason and not out else "computing it everywhere costs less than communicating"


def _opaque(node: Node, flops: int) -> ReplicatedOp:
    call = node.meta["opaque"]
    where = call.where.partition(" in ")[0]
    hint = "" if call.by_token else " (unless a plan says ByToken)"
    return ReplicatedOp(node.name, call.title, f"routes by activations ({call.reader}), so it runs whole on every rank{hint}", flops, where)
