"""From a traced model to the programs of all ranks: infer, solve, emit, count."""

from __future__ import annotations

import copy
import hashlib
import time
from contextlib import nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx

from seqpar.compat import symbol_hints
from seqpar.partitioner.cost import Machine, node_work
from seqpar.partitioner.division import Degrees
from seqpar.partitioner.execution import execution_of, head_conditions
from seqpar.partitioner.infer import BESIDE, Inference, infer
from seqpar.partitioner.layout import LayoutView
from seqpar.partitioner.lengths import Sizes
from seqpar.partitioner.marker import graph_line
from seqpar.partitioner.repeats import Repeats, find_repeats
from seqpar.partitioner.solve import Solution, is_cross, solve
from seqpar.passes.apart import operands_apart
from seqpar.passes.boundary import detach
from seqpar.passes.composites import composites_apart
from seqpar.passes.conv_padding import pads_in_convolutions
from seqpar.passes.copies import drop_copies
from seqpar.passes.count import Counts
from seqpar.passes.emit import Emitter
from seqpar.passes.fastest import fastest
from seqpar.passes.flex import flex_to_attention
from seqpar.passes.flex_rows import flex_by_rows
from seqpar.passes.honour import check_plan, has_pins, honoured
from seqpar.passes.inspector import Inspector
from seqpar.passes.kernels import kernels_to_attention
from seqpar.passes.known_sizes import check_sizes_known
from seqpar.passes.losses import losses_by_token
from seqpar.passes.meta_results import MetaResults
from seqpar.passes.options import Options
from seqpar.passes.pack import pack_gathers
from seqpar.passes.plan import Plan
from seqpar.passes.plan_of import counts_of, plan_of
from seqpar.passes.progress import Dump, collector_paused, run_passes, stage
from seqpar.passes.rearranged import rearranged
from seqpar.passes.recognise import recognise_attention
from seqpar.passes.relative_shift import lookups_for_shifts
from seqpar.passes.same_padding import paddings_as_numbers
from seqpar.passes.schedule import collectives_of, schedule
from seqpar.passes.share import with_graph
from seqpar.passes.strided import strides_in_rows
from seqpar.passes.trace import Traced
from seqpar.passes.triangle import simplify_masks
from seqpar.passes.writes import join_writes
from seqpar.runtime.travel import check_comm_dtype

# What brings attention in other forms to attention nodes, and what hides dims to operators that show them.
NORMALISE = (kernels_to_attention, composites_apart, kernels_to_attention, strides_in_rows, paddings_as_numbers, pads_in_convolutions, rearranged, lookups_for_shifts, flex_to_attention, flex_by_rows, recognise_attention, operands_apart, simplify_masks, losses_by_token)
TIDY = (drop_copies,)
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
        machine: Machine = Machine(),  # noqa: B008
        notes: tuple[str, ...] = (),
        comm_dtype: torch.dtype | None = None,
    ) -> None:
        self.traced = traced
        self.machine = machine
        self.inference = inference
        self.solution = solution
        self.options = options
        self.notes = notes
        self.comm_dtype = comm_dtype
        self._seconds = seconds
        self._emitted: dict[int, fx.GraphModule] = {}
        self._programs: dict[int, fx.GraphModule] = {}
        self.known_counts: dict[object, Counts] = {}  # by what they depend on
        self.meta_results = MetaResults()
        self.dump = Dump()  # where the passes of this program are written to

    @property
    def nothing_to_shard(self) -> bool:
        """No attention over a sequence, and no other work whose division would pay."""
        return all(weight == BESIDE for weight in self.inference.sequences.values()) and not self.solution.labels.sharded

    @property
    def unknown(self) -> tuple[str, ...]:
        """Operators without a rule, which may hold the attention."""
        return tuple(dict.fromkeys(str(node.target) for node, relation in self.inference.relations.items() if not relation.seen))

    @cached_property
    def view(self) -> LayoutView:
        """The layouts, as rank 0 sees them."""
        return LayoutView(self.inference, self.solution, 0)

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
        relations += head_conditions(self.inference, self.solution)
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
        digest.update(f"{degrees.ulysses} {degrees.ring} {self.comm_dtype}\n".encode())
        view = self.view
        for node in self.traced.gm.graph.nodes:
            digest.update(f"{graph_line(node)} {node in self.solution.labels.exchanged} {node in self.solution.labels.split}".encode())
            if node in self.solution.labels.exchanged:
                digest.update(execution_of(self.inference, self.solution, node).name.encode())
            if node in self.inference.axes:
                digest.update(view.text(node, view.produced(node)).encode())
        return digest.hexdigest()

    def collectives(self, rank: int) -> list[str]:
        """What a rank's program calls, over which ranks, in order; the same on all ranks."""
        return collectives_of(self.program(rank).graph)

    @collector_paused()
    def program(self, rank: int) -> fx.GraphModule:
        """The program of `rank`, groups still named by axis; same placeholders and outputs as `traced.gm`."""
        if rank not in self._programs:
            program = self.emitted(rank)
            if self.options.schedule and not self._alone:
                program = schedule(program, counts_of(self, rank), self.machine)
                self.dump.graph(f"scheduled_of_rank_{rank}", program, self.traced.gm)
            self._programs[rank] = program
        return self._programs[rank]

    def has_program(self, rank: int) -> bool:
        """Whether `program(rank)` was asked for before."""
        return rank in self._programs

    def emitted(self, rank: int) -> fx.GraphModule:
        """The program before its exchanges are put behind work."""
        if self._alone:
            return detach(self.traced.gm, pins=True)[0]
        if rank not in self._emitted:
            started = time.perf_counter()
            first = not self._emitted
            with stage("emit", "writing the programs of %d ranks", self.solution.degrees.ranks) if first else nullcontext():
                emitter = Emitter(self.traced.gm.graph, self.view.for_rank(rank), self.traced.symbols, self.comm_dtype)
                graph = emitter.run()
                if self.options.pack:
                    pack_gathers(graph)
                if self.options.tidy:
                    join_writes(graph)
                self._emitted[rank] = with_graph(self.traced.gm, graph)
            self.dump.graph(f"program_of_rank_{rank}", self._emitted[rank], self.traced.gm)
            self._seconds.setdefault("rewrite", time.perf_counter() - started)
        return self._emitted[rank]

    @property
    def _alone(self) -> bool:
        return self.solution.degrees.ranks == 1 or self.nothing_to_shard

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per stage so far."""
        return dict(self._seconds)

    def layouts(self) -> str:
        """The layout of every value on rank 0, one a line."""
        return "\n".join(f"{node.name}: {self.view.text(node, self.view.produced(node))}" for node in self.inference.axes)

    @cached_property
    def plan(self) -> Plan:
        """What was decided and counted. It keeps this object, without the example inputs, for what is asked later."""
        return replace(plan_of(self), inspector=Inspector(self.without_data()))

    def without_data(self) -> Partitioned:
        """The same, with meta tensors for the inputs of the traced call; programs and counts are shared."""
        slim = copy.copy(self)
        slim.traced = replace(self.traced, call=self.traced.call.without_data())
        return slim

    @cached_property
    def counts(self) -> list[Counts]:
        """What the program of every rank does, by running it on meta tensors."""
        return [counts_of(self, rank) for rank in range(self.solution.degrees.ranks)]


@collector_paused()
def partition(
    traced: Traced,
    *,
    ulysses: int = 1,
    ring: int = 1,
    machine: Machine | None = None,
    options: Options = Options(),  # noqa: B008
    comm_dtype: torch.dtype | None = None,
) -> Partitioned:
    """Decide and prepare the programs of `ulysses * ring` ranks. comm_dtype: what attention's exchanges are rounded to (`runtime/travel.py`).

    Raises:
        PlanError: what is declared contradicts the graph.
        UnsupportedError: nothing travels as `comm_dtype`.
        TraceError: a size depends on activations.
    """
    check_comm_dtype(comm_dtype)
    sizes = Sizes(symbol_hints(traced.shape_env))
    started = time.perf_counter()
    dump = Dump.open(f"{ulysses}x{ring}")
    dump.graph("traced", traced.gm)
    as_traced, pinned = traced, has_pins(traced)
    if ulysses * ring > 1 or pinned:
        check_sizes_known(traced)
        traced = replace(traced, gm=run_passes(traced.gm, (*(NORMALISE if options.recognise else ()), *(TIDY if options.tidy else ())), dump))
    with stage("infer", "inferring what the dims of %d operators are", len(traced.gm.graph.nodes)):
        repeats = find_repeats(traced.gm.graph) if options.repeats and not pinned and ulysses * ring > 1 else Repeats()
        inference = infer(traced.gm.graph, sizes, fuse=options.fuse, repeats=repeats)
    notes = check_plan(as_traced, traced.gm, inference) if pinned else ()
    inferred = time.perf_counter()
    degrees = Degrees(ulysses, ring)
    with stage("solve", "choosing layouts for ulysses %d x ring %d", ulysses, ring):
        solution = solve(inference, degrees, machine, local_keys=options.local_keys, phases=options.phases)
        if options.grids and (inference.fused or inference.shortens) and degrees.ranks > 1:
            inference, solution = _cheaper(inference, solution, traced, degrees, machine, options)
        if solution.reasons and not solution.labels.sharded:
            inference, solution = _along_batch(inference, solution, traced, degrees, machine)
    solved = time.perf_counter()
    seconds = {"trace": traced.seconds, "infer": inferred - started, "solve": solved - inferred}

    def programs(solution: Solution) -> Partitioned:
        kept = notes + honoured(traced, inference, solution) if pinned else ()
        return Partitioned(as_traced if degrees.ranks == 1 else traced, inference, solution, dict(seconds), options, machine or Machine(), kept, comm_dtype)

    if options.replay and solution.close:
        partitioned = fastest(programs, solution)
        partitioned._seconds["replay"] = time.perf_counter() - solved
    else:
        partitioned = programs(solution)
    dump.text("layouts", partitioned.layouts)
    partitioned.dump = dump
    return partitioned


def _cheaper(
    inference: Inference, solution: Solution, traced: Traced, degrees: Degrees, machine: Machine | None, options: Options
) -> tuple[Inference, Solution]:
    """Cut sequences that are grids at any position, or between frames or rows where that is clearly cheaper: it keeps convolutions on the grid sharded.

    So does cutting what strides shorten as it is cut afterwards. Where every rank then still does much of the work (convolutions over pixels beside attention over
    a few frames, a mask that no cut of a grid suits), sequences as they are and what attentions have in their batch are tried, too.
    """
    best = (inference, solution)
    if solution.labels.floor >= CLEARLY * solution.labels.cost and not _along_others(inference):  # nothing to win: deep models, whose ends are little
        return best
    meshed = {n.name for n in solution.labels.exchanged | solution.along_batch if not is_cross(inference.relations[n], inference)}
    cuts: list[dict[str, Any]] = [{"cut": 0}, {"cut": 1}] if inference.fused else [{"cut": 0}]
    for cut in [*cuts, {}, {"batch": True}] if inference.shortens else cuts:
        if "cut" not in cut and _whole_share(*best) < 1 - CLEARLY:
            break
        other = infer(traced.gm.graph, Sizes(symbol_hints(traced.shape_env)), **cut, strides=inference.shortens, repeats=inference.repeats)
        trial = solve(other, degrees, machine, local_keys=options.local_keys, phases=options.phases)
        on_mesh = meshed <= {n.name for n in trial.labels.exchanged | trial.along_batch}
        if (on_mesh or "batch" in cut) and trial.labels.cost < CLEARLY * best[1].labels.cost:
            best = (other, trial)
    return best


def _whole_share(inference: Inference, solution: Solution) -> float:
    """The share of all work that every rank does."""
    labels, sizes = solution.labels, inference.table.sizes
    work = {n: node_work(n, sizes) for n in inference.relations}
    divided = labels.exchanged | {n for n, _, _ in labels.sharded}
    return 1 - sum(work[n] for n in divided) / max(sum(work.values()), 1)


def _along_others(inference: Inference) -> bool:
    """Whether an attention has another sequence in its batch, and might be divided along that one if it were cut otherwise."""
    spans = (r.operand_axes[r.attention.q][0] for r in inference.relations.values() if r.attention is not None)
    return any(inference.table.roots(axis) & inference.sequences.keys() for axis in spans)


def _along_batch(
    inference: Inference, solution: Solution, traced: Traced, degrees: Degrees, machine: Machine | None
) -> tuple[Inference, Solution]:
    """No attention has rows for all ranks (few frames): what they have in their batch (pixels) is divided instead."""
    other = infer(traced.gm.graph, Sizes(symbol_hints(traced.shape_env)), batch=True, repeats=inference.repeats)
    trial = solve(other, degrees, machine)
    return (other, trial) if trial.labels.sharded else (inference, solution)
