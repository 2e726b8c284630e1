"""`seqpar.derive_sp_plan`: the declared plan that says what the compiler found, or why there is none."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from seqpar import logs
from seqpar.compat import pytree
from seqpar.compile import split_inputs
from seqpar.derived_plan import STYLES, Unexpressible, format_plan, plan_of
from seqpar.errors import NoPlanError, PlanError
from seqpar.hooked import MESH, has_context_parallelism, marked_attention, run_hooked, without_constants
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.declare import MeshRules
from seqpar.partitioner.division import Degrees
from seqpar.partitioner.machines import rates_of
from seqpar.partitioner.marker import boundary, is_marker, pin_of
from seqpar.passes import derive as analysis
from seqpar.passes.arguments import copied_inputs
from seqpar.passes.boundary import Boundary, Mark, Marks
from seqpar.passes.derive import Allowed, Problem
from seqpar.passes.derive_reason import reason
from seqpar.passes.flex import flex_to_attention
from seqpar.passes.kernels import kernels_to_attention
from seqpar.passes.progress import stage
from seqpar.passes.recognise import recognise_attention
from seqpar.passes.trace import Traced, trace
from seqpar.passes.triangle import simplify_masks
from seqpar.planning import plan as plan_of_model
from seqpar.runtime.mesh import check_degrees
from seqpar.sp_plan import validate_sp_plan
from seqpar.verification import TOLERANCE, difference, verify

__all__ = ["NoPlanError", "derive_sp_plan", "format_plan"]

DEPTH = 3  # of the modules whose boundaries are looked at: the model, its blocks, their attentions and feed-forwards
LISTS = 2  # lists of blocks that are tried as one sequence
REPAIRS = 6  # entries without a form that are ruled out one by one
aten = torch.ops.aten


def derive_sp_plan(
    model: nn.Module, example_inputs: Any, *, ulysses: int = 1, ring: int = 1, style: str = "sp_plan", hardware: str | Machine | None = None
) -> dict[str, Any]:
    """The smallest declared plan with which every rank computes its part of the sequence, as the compiler would.

    Args:
        example_inputs: tuple of positional or dict of keyword inputs, full (global) tensors; on the meta device too.
        style: "sp_plan": entries of `seqpar.sp_plan`; "cp_plan": diffusers' `ContextParallelInput` and `ContextParallelOutput`, for a diffusers model.
        hardware: as in `sp_compile`: what the compiler finds depends on the rates of the machine.

    A plan is checked before it is returned, and compared with the model (shapes only, if the inputs are on meta; parameters that are still constant, such as
    layers that begin at zero, are random in the comparison): a `cp_plan` by diffusers' own hooks
    on simulated ranks, an `sp_plan` by `seqpar.verify` with it.

    Raises:
        NoPlanError: there is none; names the line at which a tensor would have to be split or gathered between two modules.
        MeshError: no such hardware, or the degrees are no positive integers.
        SeqparError: the model cannot be traced.
    """
    logs.configure()
    check_degrees(ulysses=ulysses, ring=ring)
    machine = rates_of(hardware)
    if style not in STYLES:
        raise ValueError(f"style must be one of {STYLES}, not {style!r}")
    if style == "cp_plan" and not has_context_parallelism(model):
        raise NoPlanError(f"{type(model).__name__} has no enable_parallelism: a cp_plan is for models of diffusers. Use style='sp_plan'")
    if ulysses * ring == 1:
        raise NoPlanError("one rank has nothing to split: derive a plan for ulysses=2 (or ring=2) or more; the same plan serves any number of ranks that it suits")
    args, kwargs = split_inputs(example_inputs)
    search = _Search(without_constants(model), args, kwargs, Degrees(ulysses, ring), style, machine)
    return search.run()


@dataclass
class _Search:
    """One derivation: which marks are allowed, from the earliest splits on, until a plan holds."""

    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    degrees: Degrees
    style: str
    machine: Machine | None
    forms: dict[str, int | None] = field(default_factory=dict)  # number of output tensors of every module called; None: other outputs
    expected: list[Any] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    formless: list[str] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        self.expected = self._call()
        traced = self._trace()
        plain = self._pose(traced, ())
        self._check_attention(plain)
        why: str | None = None
        tried: list[dict[str, Any]] = []
        for problem in self._readings(traced, plain):
            for allowed in self._restrictions(analysis.tables(problem)):
                plan = self._plan(problem, allowed)
                if plan is None:
                    why = why or self._why(problem, allowed)
                elif plan not in tried:
                    tried.append(plan)
                    if self._holds(plan):
                        return plan
        raise NoPlanError(f"no {self.style} for {type(self.model).__name__} on {self.degrees.ranks} ranks: {self._because(why, tried)}")

    def _why(self, problem: Problem, allowed: Allowed) -> str:
        """The reason for what has just failed."""
        answer = analysis.declare(problem, lambda place, change: self._has_form(place) and allowed(place, change), strict=False)
        if answer.feasible and problem.needed and self.formless:
            return f"what would be needed has no place in a plan: {self.formless[-1]}"
        return reason(problem, answer)

    def _because(self, why: str | None, tried: list[dict[str, Any]]) -> str:
        if why is not None and not (tried and self.refused):
            return why
        text = f"the model fails or differs, {self.refused[0]}, with\n{format_plan(tried[0])}" if self.refused else "nothing is found"
        return f"{text}\n{why}" if why else text

    # -- reading the model ------------------------------------------------------------------------
    def _call(self) -> list[Any]:
        """The model's own outputs, and the forms of its modules'."""

        def watch(path: str) -> Callable[..., None]:
            def note(module: nn.Module, args: Any, output: Any) -> None:
                found = 1 if isinstance(output, Tensor) else len(output) if type(output) in (list, tuple) and all(isinstance(x, Tensor) for x in output) else None
                self.forms[path] = found if self.forms.get(path, found) == found else None

            return note

        handles = [module.register_forward_hook(watch(path)) for path, module in self.model.named_modules()]
        try:
            args, kwargs = copied_inputs((self.args, self.kwargs))
            with torch.no_grad():
                return pytree.tree_leaves(self.model(*args, **kwargs))
        finally:
            for handle in handles:
                handle.remove()

    def _trace(self) -> Traced:
        marks = Marks(self._choose())
        if self.style == "sp_plan":
            return trace(self.model, self.args, self.kwargs, dynamic=False, marks=marks)

        def mark(query: Tensor, kind: str) -> Tensor:
            return boundary(query, Boundary("", kind, "query").key)

        with marked_attention(self.model, mark) as knowing:
            return trace(knowing, self.args, self.kwargs, dynamic=False, marks=marks)

    def _choose(self) -> Callable[[Boundary, Tensor, Mapping[str, Any]], Mark | None]:
        """Boundaries that a plan may name: of modules near the top, and of those the leaves only if they are the model's own."""
        modules = dict(self.model.named_modules())

        def choose(place: Boundary, tensor: Tensor, arguments: Mapping[str, Any]) -> Mark | None:
            depth = len(place.module.split(".")) if place.module else 0
            near = depth <= 1 or (depth <= DEPTH and next(modules[place.module].children(), None) is not None)
            return Mark() if near else None

        return choose

    def _has_form(self, place: Boundary) -> bool:
        """Hooks can be put on the module: it returns tensors, and nothing else."""
        return self.style == "sp_plan" or self.forms.get(place.module) is not None

    def _pose(self, traced: Traced, begin: Any) -> Problem:
        gm = traced.gm
        if self.style == "cp_plan":
            rules = MeshRules(even=True, alike=True, partial=False)
            return analysis.pose(gm.graph, self.degrees, rules, _over_mesh, self.machine, begin)
        for normalise in (flex_to_attention, kernels_to_attention, recognise_attention, simplify_masks):
            gm = normalise(gm)
        return analysis.pose(gm.graph, self.degrees, MeshRules(even=False, alike=False, partial=True), None, self.machine, begin)

    def _readings(self, traced: Traced, plain: Problem) -> Iterator[Problem]:
        """The graph as it is; then with one list of blocks, or every module inside these blocks, taken as one sequence."""
        yield plain
        for find in (analysis.beginnings, analysis.inner_beginnings):
            for path in analysis.block_lists(plain)[:LISTS]:
                begin = find(plain, path)
                if begin:
                    yield self._pose(traced, begin)

    def _check_attention(self, problem: Problem) -> None:
        """What diffusers' attention refuses whatever the plan."""
        for node in problem.mesh if self.style == "cp_plan" else ():
            spec = problem.inference.relations[node].attention
            heads = problem.inference.table.example_length(problem.inference.relations[node].operand_axes[spec.q][1])
            what = "causal attention" if spec.is_causal else "grouped heads" if spec.enable_gqa else None
            if heads % self.degrees.ulysses:
                what = f"{heads} heads over ulysses={self.degrees.ulysses}"
            if what:
                from seqpar.passes.localise import one_line

                raise NoPlanError(f"no cp_plan for {type(self.model).__name__}: diffusers' attention over ranks does not support {what} ({one_line(node)})")

    # -- plans --------------------------------------------------------------------------------------
    def _restrictions(self, tables: Set[Boundary]) -> Iterator[Allowed]:
        """Which boundaries may change a layout: the model's own inputs too (the earliest), any but those, blocks and outputs only, blocks and tables only;
        last, inside blocks too.

        A later split is needed where the code in between reads sizes of whole tensors.
        """

        def inner(place: Boundary, change: str) -> bool:
            return change == "gather" and analysis.ITEM.search(place.module) is not None and place.module not in self.lasts

        def from_inputs(place: Boundary, change: str) -> bool:
            return not inner(place, change) and (place.module != "" or change == "split")

        def behind_inputs(place: Boundary, change: str) -> bool:
            return not inner(place, change) and (place.module != "" or change == "gather")

        def at_blocks(place: Boundary, change: str) -> bool:
            late = place.kind == "output" or place.module == "" or analysis.ITEM.search(place.module) is not None
            return from_inputs(place, change) and late

        def at_blocks_and_tables(place: Boundary, change: str) -> bool:
            at_block = place.kind == "input" and analysis.ITEM.search(place.module) is not None
            return behind_inputs(place, change) and (change == "gather" or at_block or place in tables)

        yield from (from_inputs, behind_inputs, at_blocks, at_blocks_and_tables)
        yield lambda place, change: behind_inputs(place, change) or (place.module != "")

    @cached_property
    def lasts(self) -> frozenset[str]:
        """The last items of all lists of modules."""
        lists = [(path, module) for path, module in self.model.named_modules() if isinstance(module, nn.ModuleList) and len(module)]
        return frozenset(f"{path}.{len(module) - 1}".removeprefix(".") for path, module in lists)

    def _plan(self, problem: Problem, allowed: Allowed) -> dict[str, Any] | None:
        """The cheapest plan of this reading that has a form; None if there is none."""
        banned: set[tuple[str, str]] = set()

        def permitted(place: Boundary, change: str) -> bool:
            return (place.module, change) not in banned and self._has_form(place) and allowed(place, change)

        for _ in range(REPAIRS):
            answer = analysis.declare(problem, permitted)
            if not answer.feasible or not problem.needed:
                return None
            found = analysis.entries(problem, answer.labels)
            odd = analysis.told_apart(problem, found)
            try:
                if odd is not None:
                    place, verb = odd.boundary, "split" if odd.change == "split" else "gathered"
                    raise Unexpressible(f"{place} would be {verb} in one call of the module and not in another, and a plan means all of them", place.module, odd.change)
                plan = plan_of(self.model, found, self.style, {path: count or 1 for path, count in self.forms.items()})
            except Unexpressible as error:
                self.formless.append(str(error))
                banned.add((error.module, error.change))
                continue
            return plan or None
        return None

    def _holds(self, plan: dict[str, Any]) -> bool:
        """Whether the model computes the same with this plan; what goes wrong is kept in `refused`."""
        with stage("solve", "trying a plan with entries for %d modules on %d ranks", len(plan), self.degrees.ranks):
            return self._compiles(plan) if self.style == "sp_plan" else self._runs(plan)

    def _runs(self, plan: dict[str, Any]) -> bool:
        """Whether diffusers' hooks compute the same with it."""
        try:
            returned = run_hooked(self.model, self.args, self.kwargs, plan, ulysses=self.degrees.ulysses, ring=self.degrees.ring)
        except Exception as error:  # whatever the user's code raises on parts
            self.refused.append(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            return False
        for outputs in returned:
            problem = _difference(self.expected, pytree.tree_leaves(outputs))
            if problem:
                self.refused.append(problem)
                return False
        return True

    def _compiles(self, plan: dict[str, Any]) -> bool:
        """Whether the compiler accepts the plan as pins, and computes the same with it."""
        inputs = self.kwargs or self.args
        ulysses, ring = self.degrees.ulysses, self.degrees.ring
        try:
            validate_sp_plan(plan)
            if any(isinstance(x, Tensor) and x.device.type == "meta" for x in pytree.tree_leaves(inputs)):
                plan_of_model(self.model, inputs, ulysses=ulysses, ring=ring, sp_plan=plan)
                return True
            report = verify(self.model, inputs, ulysses=ulysses, ring=ring, sp_plan=plan)
        except PlanError as error:
            self.refused.append(str(error))
            return False
        if not report.ok:
            self.refused.append(str(report))
        return report.ok


def _difference(expected: list[Any], found: list[Any]) -> str | None:
    if len(expected) != len(found):
        return f"{len(found)} outputs instead of {len(expected)}"
    for a, b in zip(expected, found, strict=True):
        if not isinstance(a, Tensor):
            continue
        if not isinstance(b, Tensor) or a.shape != b.shape:
            return f"an output of shape {tuple(a.shape)} has shape {tuple(getattr(b, 'shape', ()))}"
        if a.device.type != "meta" and a.dtype.is_floating_point and difference(b, a)[1] > 10 * TOLERANCE.get(a.dtype, 1e-5):
            return f"an output of shape {tuple(a.shape)} differs by {difference(b, a)[1]:.1e}"
        if a.device.type != "meta" and not a.dtype.is_floating_point and not torch.equal(a, b):
            return f"an output of shape {tuple(a.shape)} differs"
    return None


def _over_mesh(attention: Node) -> bool:
    """The dispatcher of diffusers was told about the ranks: its queries are marked."""
    node = attention.args[0]
    while isinstance(node, Node) and not is_marker(node):
        if node.target not in (aten.permute.default, aten.transpose.int, aten.expand.default, aten._to_copy.default, aten.clone.default):
            return False
        node = node.args[0]
    return isinstance(node, Node) and Boundary.from_key(pin_of(node).key).kind == MESH
