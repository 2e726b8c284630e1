"""From a traced model to the programs of all ranks: infer, solve, emit, count."""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx import Node

from seqpar.compat import symbol_hints
from seqpar.errors import MeshError
from seqpar.partitioner.cost import Machine, is_contraction, node_work
from seqpar.partitioner.infer import BESIDE, Inference, infer
from seqpar.partitioner.labels import Degrees
from seqpar.partitioner.layout import LayoutView
from seqpar.partitioner.lengths import Sizes, part
from seqpar.partitioner.marker import graph_line
from seqpar.partitioner.op import outputs_of
from seqpar.partitioner.relation import Relation
from seqpar.partitioner.solve import Solution, is_cross, solve
from seqpar.passes.balance import in_zigzag
from seqpar.passes.boundary import detach
from seqpar.passes.count import Counts, count
from seqpar.passes.emit import Emitter
from seqpar.passes.flex import flex_to_attention
from seqpar.passes.honour import check_plan, has_pins, honoured
from seqpar.passes.kernels import kernels_to_attention
from seqpar.passes.localise import one_line
from seqpar.passes.options import Options
from seqpar.passes.plan import AttentionPlan, Plan, ReplicatedOp
from seqpar.passes.recognise import recognise_attention
from seqpar.passes.share import with_graph
from seqpar.passes.trace import Traced, check_sizes_known
from seqpar.passes.triangle import simplify_masks

CLEARLY = 0.99  # parts of whole rows are less even than parts cut anywhere


class Partitioned:
    """A traced model partitioned for a mesh: its plan, and the program of every rank (made on demand)."""

    def __init__(
        self,
        traced: Traced,
        inference: Inference,
        solution: Solution,
        seconds: dict[str, float],
        options: Options = Options(),  # noqa: B008
        notes: tuple[str, ...] = (),
    ) -> None:
        self.traced = traced
        self.inference = inference
        self.solution = solution
        self.options = options
        self.notes = notes
        self._seconds = seconds
        self._programs: dict[int, fx.GraphModule] = {}

    @property
    def nothing_to_shard(self) -> bool:
        return not self.inference.sequences

    @cached_property
    def conditions(self) -> list[sympy.Basic]:
        """Relations between the symbols that this partition relies on."""
        if self.traced.shape_env is None:
            return []
        table, ranks = self.inference.table, self.solution.degrees.ranks
        cut = {a for _, _, a in self.solution.labels.sharded}
        # A sequence that no attention knows and that stays whole may have any length.
        sequences = [a for a, weight in self.inference.sequences.items() if weight != BESIDE or a in cut]
        relations = [c for c, about in table.sizes.conditions() if any(a in sequences for b in about for a in table.expand((b,)))]
        for atom in sequences:
            length = table.length(atom)
            if not isinstance(length, int):
                relations.append(sympy.Ge(length, ranks) if table.sizes.hint(length) >= ranks else sympy.Lt(length, ranks))
        return relations

    @cached_property
    def fingerprint(self) -> str:
        """Equal on ranks that run the same program; covers the graph, the sizes, the labels and the mesh."""
        digest = hashlib.sha256()
        degrees = self.solution.degrees
        digest.update(f"{degrees.ulysses} {degrees.ring}\n".encode())
        view = LayoutView(self.inference, self.solution, 0)
        for node in self.traced.gm.graph.nodes:
            digest.update(f"{graph_line(node)} {node in self.solution.labels.exchanged}".encode())
            if node in self.solution.labels.exchanged:
                digest.update(str(in_zigzag(self.inference, self.solution, node)).encode())
            if node in self.inference.axes:
                digest.update(view.text(node, view.produced(node)).encode())
        return digest.hexdigest()

    def program(self, rank: int) -> fx.GraphModule:
        """The program of `rank`, groups still named by axis; same placeholders and outputs as `traced.gm`."""
        if self.solution.degrees.ranks == 1 or self.nothing_to_shard:
            return detach(self.traced.gm, pins=True)[0]
        if rank not in self._programs:
            started = time.perf_counter()
            emitter = Emitter(self.traced.gm.graph, LayoutView(self.inference, self.solution, rank), self.traced.symbols)
            self._programs[rank] = with_graph(self.traced.gm, emitter.run())
            self._seconds.setdefault("rewrite", time.perf_counter() - started)
        return self._programs[rank]

    # -- the plan ----------------------------------------------------------------------------------
    @cached_property
    def plan(self) -> Plan:
        degrees = self.solution.degrees
        counts = self._counts()
        sizes = self.inference.table.sizes
        whole = {n.name: f for n in self.inference.relations if (f := self._contraction(n, sizes))}
        kinds = counts[0].traffic.bytes
        return Plan(
            ulysses=degrees.ulysses,
            ring=degrees.ring,
            flops_total=sum(whole.values()),
            flops_per_rank=tuple(c.total_flops for c in counts),
            comm_bytes_per_rank={k: max(c.traffic.bytes[k] for c in counts) for k in kinds},
            comm_calls={k: max(c.traffic.calls[k] for c in counts) for k in kinds},
            attention=tuple(self._attention(n, r) for n, r in self.inference.relations.items() if r.attention is not None)
            + tuple(self._written(n, self.inference.relations[n]) for n in self.inference.written),
            replicated_ops=self._replicated(whole),
            seconds=dict(self._seconds),
            nothing_to_shard=self.nothing_to_shard,
            notes=self.notes,
        )

    @staticmethod
    def _contraction(node: Node, sizes: Sizes) -> int:
        return node_work(node, sizes) if "flops" in node.meta or is_contraction(node.target) else 0

    def _counts(self) -> list[Counts]:
        """Counts of every rank; ranks that hold and exchange parts of the same sizes share one run."""
        degrees, example = self.solution.degrees, self._example()
        known: dict[object, Counts] = {}
        counts = []
        for rank in range(degrees.ranks):
            key = None if self.nothing_to_shard else self._sizes_of(rank) if self.options.share_counts else rank
            if key not in known:
                known[key] = count(self.program(rank), example, ulysses=degrees.ulysses, ring=degrees.ring, rank=rank)
            counts.append(known[key])
        return counts

    def _sizes_of(self, rank: int) -> object:
        """Everything the work and the traffic of a rank depend on: its parts, those of its ring row together, its heads, whether it is an edge."""
        degrees, table = self.solution.degrees, self.inference.table
        row, column = divmod(rank, degrees.ulysses)
        lengths = [table.sizes.hint(table.length(a)) for a in self.inference.sequences]
        own = tuple(part(n, rank, degrees.ranks) for n in lengths)
        in_row = tuple(sum(int(part(n, row * degrees.ulysses + u, degrees.ranks)) for u in range(degrees.ulysses)) for n in lengths)
        heads = {
            table.example_length(r.operand_axes[i][1])
            for n, r in self.inference.relations.items()
            if n in self.solution.labels.exchanged
            for i in (r.attention.q, r.attention.k)
        }
        has_halo = any(r.halo for r in self.inference.relations.values())
        edge = (rank == 0, rank == degrees.ranks - 1) if has_halo else ()
        return (
            own,
            in_row,
            tuple(part(h, column, degrees.ulysses) for h in sorted(heads)),
            column if any(h % degrees.ulysses for h in heads) else 0,
            edge,
            row if any(self.inference.relations[n].attention.is_causal for n in self.solution.labels.exchanged) else 0,
        )

    def _example(self) -> list[torch.Tensor]:
        hint = self.inference.table.sizes.hint
        values = [n.meta["val"] for n in self.traced.gm.graph.nodes if n.op == "placeholder"]
        return [torch.empty([hint(_expr(s)) for s in v.shape], dtype=v.dtype, device="meta") for v in values]

    def _attention(self, node: Node, relation: Relation) -> AttentionPlan:
        view = LayoutView(self.inference, self.solution, 0)
        spec, degrees = relation.attention, self.solution.degrees
        queries, keys = (view.axis_text(relation.operand_axes[i][-2], view.required(node, relation, i)[-2]) for i in (spec.q, spec.k))
        heads = self.inference.table.example_length(relation.operand_axes[spec.q][1])
        if node in self.solution.labels.exchanged:
            zigzag = " (zigzag)" if in_zigzag(self.inference, self.solution, node) else ""
            strategy = "+".join(n for n, d in (("ulysses", degrees.ulysses), ("ring", degrees.ring)) if d > 1) + zigzag
            why = "queries, keys and values exchanged over the mesh"
        else:
            cut = any(view.produced(node))
            strategy = "local" if cut else "replicated"
            along_batch = node in self.solution.along_batch and "its batch is sharded: nothing moves"
            why = along_batch or "keys are whole on every rank: nothing moves" if cut else self.solution.reasons.get(node, "one rank")
        return AttentionPlan(node.name, strategy, why, queries, keys, heads, one_line(node))

    def _written(self, node: Node, relation: Relation) -> AttentionPlan:
        """Attention that stays a product, a softmax and a product."""
        view = LayoutView(self.inference, self.solution, 0)
        layout = view.produced(node)
        rows, keys = (view.axis_text(relation.out_axes[0][d], layout[d]) for d in (-2, -1))
        strategy = "local" if any(layout) else "replicated"
        heads = self.inference.table.example_length(relation.out_axes[0][-3]) if len(layout) > 2 else 1
        return AttentionPlan(node.name, strategy, "written out in a form of its own: rows divided, keys whole", rows, keys, heads, one_line(node))

    def _replicated(self, whole: dict[str, int]) -> tuple[ReplicatedOp, ...]:
        if self.solution.degrees.ranks == 1 or self.nothing_to_shard:
            return ()
        view = LayoutView(self.inference, self.solution, 0)
        found = []
        for node, relation in self.inference.relations.items():
            flops = whole.get(node.name, 0)
            if (flops == 0 and relation.seen) or node in self.solution.labels.exchanged:
                continue
            if any(view.produced(node)) or view.reduced(node, relation):
                continue
            found.append(_opaque(node, flops) if "opaque" in node.meta else ReplicatedOp(node.name, str(node.target), self._reason(node, relation), flops, one_line(node)))
        return tuple(found)

    def _reason(self, node: Node, relation: Relation) -> str:
        if not relation.seen:
            return "no rule for this operator"
        table, ranks = self.inference.table, self.solution.degrees.ranks
        atoms = {
            a for axes in (*relation.operand_axes, *relation.out_axes) for axis in axes for a in table.roots(axis)
        } & self.inference.sequences.keys()
        if not atoms:
            return "has no sequence dim"
        if all(table.sizes.hint(table.length(a)) < ranks for a in atoms):
            return f"its sequence is shorter than {ranks} ranks"
        out = {a for axes in relation.out_axes for axis in axes for a in table.roots(axis)} & atoms
        return relation.reason if relation.reason and not out else "computing it everywhere costs less than communicating"


def _opaque(node: Node, flops: int) -> ReplicatedOp:
    call = node.meta["opaque"]
    where = call.where.partition(" in ")[0]
    return ReplicatedOp(node.name, call.title, f"routes by activations ({call.reader}), so it runs whole on every rank", flops, where)


def _expr(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def partition(traced: Traced, *, ulysses: int = 1, ring: int = 1, machine: Machine | None = None, options: Options = Options()) -> Partitioned:  # noqa: B008
    """Decide and prepare the programs of `ulysses * ring` ranks.

    Raises:
        MeshError: `ulysses` exceeds the heads of every attention.
        PlanError: what is declared contradicts the graph.
        TraceError: a size depends on activations.
    """
    sizes = Sizes(symbol_hints(traced.shape_env))
    started = time.perf_counter()
    as_traced, pinned = traced, has_pins(traced)
    if ulysses * ring > 1 or pinned:
        check_sizes_known(traced)
        gm = traced.gm
        for normalise in (flex_to_attention, kernels_to_attention, recognise_attention, simplify_masks) if options.recognise else ():
            gm = normalise(gm)
        traced = replace(traced, gm=gm)
    inference = infer(traced.gm.graph, sizes, fuse=options.fuse)
    notes = check_plan(as_traced, traced.gm, inference) if pinned else ()
    inferred = time.perf_counter()
    degrees = Degrees(ulysses, ring)
    _check_heads(inference, degrees)
    solution = solve(inference, degrees, machine, local_keys=options.local_keys, phases=options.phases)
    if options.grids and inference.fused and degrees.ranks > 1:
        inference, solution = _cheaper(inference, solution, traced, degrees, machine, options)
    if solution.reasons and not solution.labels.sharded:
        inference, solution = _along_batch(inference, solution, traced, degrees, machine)
    solved = time.perf_counter()
    seconds = {"trace": traced.seconds, "infer": inferred - started, "solve": solved - inferred}
    notes += honoured(traced, inference, solution) if pinned else ()
    return Partitioned(as_traced if degrees.ranks == 1 else traced, inference, solution, seconds, options, notes)


def _cheaper(
    inference: Inference, solution: Solution, traced: Traced, degrees: Degrees, machine: Machine | None, options: Options
) -> tuple[Inference, Solution]:
    """Cut sequences that are grids at any position, or between frames or rows where that is clearly cheaper: it keeps convolutions on the grid sharded."""
    best = (inference, solution)
    meshed = {n.name for n in solution.labels.exchanged | solution.along_batch if not is_cross(inference.relations[n], inference)}
    for factor in (0, 1):
        other = infer(traced.gm.graph, Sizes(symbol_hints(traced.shape_env)), cut=factor)
        trial = solve(other, degrees, machine, local_keys=options.local_keys, phases=options.phases)
        if meshed <= {n.name for n in trial.labels.exchanged | trial.along_batch} and trial.labels.cost < CLEARLY * best[1].labels.cost:
            best = (other, trial)
    return best


def _along_batch(
    inference: Inference, solution: Solution, traced: Traced, degrees: Degrees, machine: Machine | None
) -> tuple[Inference, Solution]:
    """No attention has rows for all ranks (few frames): what they have in their batch (pixels) is divided instead."""
    other = infer(traced.gm.graph, Sizes(symbol_hints(traced.shape_env)), batch=True)
    trial = solve(other, degrees, machine)
    return (other, trial) if trial.labels.sharded else (inference, solution)


def _check_heads(inference: Inference, degrees: Degrees) -> None:
    table = inference.table
    heads = [
        table.example_length(r.operand_axes[r.attention.q][1])
        for n, r in inference.relations.items()
        if r.attention is not None and len(outputs_of(n)[0].shape) == 4
    ]
    if heads and max(heads) < degrees.ulysses:
        raise MeshError(
            f"ulysses={degrees.ulysses} exceeds the model's {max(heads)} attention heads. Use ring for the rest, for example ulysses={max(heads)} with a larger ring"
        )
