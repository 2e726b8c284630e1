"""`seqpar.verify`: run every rank of a partitioned model in this process and compare with the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from seqpar import logs
from seqpar.compat import pytree
from seqpar.compile import split_inputs, traced_with
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.machines import rates_of
from seqpar.passes.arguments import copied_inputs
from seqpar.passes.localise import one_line
from seqpar.passes.options import Options
from seqpar.passes.pipeline import Partitioned, partition
from seqpar.passes.plan import Plan
from seqpar.passes.trace import Traced
from seqpar.passes.warm import buffers_kept, restored
from seqpar.runtime.current import whole_tensors
from seqpar.runtime.mesh import check_degrees
from seqpar.runtime.simulate import SimulatedGroup, SimulatedWorld
from seqpar.sp_plan import declarations

COMM_TOLERANCE: dict[torch.dtype | None, float] = {torch.bfloat16: 2e-2, torch.float8_e4m3fn: 0.1}  # with these as `comm_dtype`
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 5e-3}


@dataclass(frozen=True)
class Report:
    """Result of a verification; `print` it. Errors are the largest over ranks and outputs.

    Attributes:
        ok: every output of every rank is within its tolerance.
        max_abs_err: largest absolute difference.
        max_rel_err: |out - ref| / |ref|, in the 2-norm.
        first_divergence: the first node whose value differs from the model's, with its source line; None if `ok`.
        plan: what was run.
        tolerance: the relative error that was allowed (the largest of all outputs).
        rounding: what the model's own result is off by from the one it computes in float64, if it can, or what it changes by when its inputs change in their last digit, if
            that is more; None if `ok`. A program that differs no more than that may be right: compare `model.double()` with inputs in float64.
    """

    ok: bool
    max_abs_err: float
    max_rel_err: float
    first_divergence: str | None
    plan: Plan
    tolerance: float = 0.0
    rounding: float | None = None

    def __str__(self) -> str:
        rounded = f", exchanged as {self.plan.comm_dtype}" if self.plan.comm_dtype else ""
        state = "ok" if self.ok else f"DIFFERS, first at {self.first_divergence}"
        text = f"{state}: relative error {self.max_rel_err:.2e}, absolute {self.max_abs_err:.2e} on {self.plan.world_size} ranks (tolerance {self.tolerance:.0e}{rounded})"
        if self.rounding is None or self.rounding < self.tolerance:
            return text
        return f"{text}; the model itself rounds by {self.rounding:.1e}: compare model.double() with inputs in float64, if it can compute so"


def verify(
    model: torch.nn.Module,
    example_inputs: Any,
    *,
    ulysses: int = 1,
    ring: int = 1,
    dynamic: bool | None = False,
    sp_plan: Any = None,
    comm_dtype: torch.dtype | None = None,
    hardware: str | Machine | None = None,
) -> Report:
    """Compare the sequence-parallel program with the model, all ranks in this process, no launcher.

    Args:
        model: any module, with its weights; it computes what the ranks are compared with.
        example_inputs: tuple of positional or dict of keyword inputs, full (global) tensors.
        ulysses: number of simulated ranks that exchange attention heads.
        ring: number of simulated ranks keys and values travel around.
        dynamic: False: a program for exactly these sizes; None and True as in `sp_compile`.
        sp_plan: a declared plan, as in `sp_compile`.
        comm_dtype: what attention's exchanges are rounded to, as in `sp_compile`; `ok` then allows for it (`COMM_TOLERANCE`), and `max_rel_err` says what it costs.
        hardware: what decides how attentions communicate, as in `sp_compile`.

    Raises:
        SeqparError: the model cannot be traced or partitioned; PlanError among them.
    """
    logs.configure()
    check_degrees(ulysses=ulysses, ring=ring)
    machine = rates_of(hardware)
    args, kwargs = split_inputs(example_inputs)
    traced = traced_with(model, args, kwargs, declarations(model, sp_plan), dynamic)
    given, named = copied_inputs((args, kwargs))
    with torch.no_grad(), whole_tensors(), restored(model), buffers_kept(model):
        expected = pytree.tree_leaves(model(*given, **named))
    report = verify_traced(traced, ulysses=ulysses, ring=ring, expected=expected, machine=machine, comm_dtype=comm_dtype)
    return report if report.ok else replace(report, rounding=rounding_of(model, args, kwargs, expected))


def rounding_of(model: torch.nn.Module, args: Any, kwargs: Any, expected: Sequence[Any]) -> float | None:
    """Largest relative difference between the model's outputs and those of a copy in float64, and those for inputs that differ in the last digit. None where both fail."""

    def outputs(model: Callable[[], torch.nn.Module], change: Callable[[Tensor], Tensor]) -> list[Any]:
        given = pytree.tree_map(lambda x: change(x) if isinstance(x, Tensor) and x.is_floating_point() else x, copied_inputs((args, kwargs)))
        try:
            with torch.no_grad(), whole_tensors(), restored(made := model()), buffers_kept(made):
                return pytree.tree_leaves(made(*given[0], **given[1]))
        except Exception:  # a model that names a dtype, quantised weights
            return []

    def errors(found: list[Any], *dtypes: torch.dtype) -> list[float]:
        return [difference(a, b)[1] for a, b in zip(expected, found, strict=bool(found)) if isinstance(b, Tensor) and (not dtypes or b.dtype in dtypes)]

    exact = errors(outputs(lambda: copy.deepcopy(model).double(), Tensor.double), torch.float64)
    stirred = errors(outputs(lambda: model, lambda x: x * (1 + torch.finfo(x.dtype).eps)))
    return max((*exact, *stirred), default=None)


def verify_traced(
    traced: Traced,
    *,
    ulysses: int,
    ring: int,
    expected: Sequence[Any] | None = None,
    machine: Machine | None = None,
    options: Options = Options(),  # noqa: B008
    comm_dtype: torch.dtype | None = None,
) -> Report:
    """`verify` for a model that is traced already; its example inputs are the ones compared.

    expected: the model's own outputs as leaves; without them, those of the traced graph. machine: what decides
    between strategies.
    """
    partitioned = partition(traced, ulysses=ulysses, ring=ring, machine=machine, options=options, comm_dtype=comm_dtype)
    inputs = [traced.call.leaves[i].contiguous() for i in traced.input_positions]
    with torch.no_grad():
        reference = traced.gm(*inputs)
        reference = reference if expected is None else [*expected, *reference[len(expected) :]]
        outputs = simulate(partitioned, inputs)
    least = max(attention_tolerance(partitioned.traced.gm.graph), COMM_TOLERANCE.get(comm_dtype, 0.0))
    absolute, relative, ok = compare(reference, outputs, least)
    divergence = None if ok else find_divergence(partitioned, inputs)
    allowed = max((allowance(x, least) for x in reference if isinstance(x, Tensor)), default=least)
    return Report(ok, absolute, relative, divergence, partitioned.plan, allowed)


def simulate(partitioned: Partitioned, inputs: Sequence[Tensor], watch: Callable[[int, fx.Node, Any], None] | None = None) -> list[Any]:
    """Outputs of every rank's program, run together on threads. `watch(rank, node, value)` sees every value."""
    degrees = partitioned.solution.degrees
    programs = [partitioned.program(r) for r in range(degrees.ranks)]

    def run(rank: int) -> Callable[[dict[str, SimulatedGroup]], Any]:
        def body(groups: dict[str, SimulatedGroup]) -> Any:
            with torch.no_grad():
                return SimulatedInterpreter(programs[rank], groups, rank, watch).run(*inputs)

        return body

    return SimulatedWorld(degrees.ulysses, degrees.ring).run([run(r) for r in range(degrees.ranks)])


class SimulatedInterpreter(fx.Interpreter):
    """Runs one rank's unbound program with simulated groups."""

    def __init__(self, gm: fx.GraphModule, groups: dict[str, SimulatedGroup], rank: int, watch: Callable[[int, fx.Node, Any], None] | None) -> None:
        super().__init__(gm)
        self.groups, self.rank, self.watch = groups, rank, watch
        self.extra_traceback = False

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "group" in kwargs:
            kwargs = {**kwargs, "group": self.groups[kwargs["group"]]}
        return super().call_function(target, args, kwargs)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if self.watch is not None:
            self.watch(self.rank, n, value)
        return value


def attention_tolerance(graph: fx.Graph) -> float:
    """Tolerance of the lowest precision that the model attends in: a model may cast to bfloat16 inside and return float32."""
    values = [n.meta["val"] for n in graph.nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default]
    return max((tolerance(v) for v in values), default=0.0)


def compare(reference: Sequence[Any], outputs: Sequence[Sequence[Any]], least: float = 0.0) -> tuple[float, float, bool]:
    """Largest absolute and relative error over outputs and ranks, and whether each is within its dtype's tolerance and equal on all ranks."""
    absolute, relative, ok = 0.0, 0.0, True
    for i, expected in enumerate(reference):
        if not isinstance(expected, Tensor):
            continue
        for rank_outputs in outputs:
            error, rel = difference(rank_outputs[i], expected)
            absolute, relative = max(absolute, error), max(relative, rel)
            ok = ok and rel <= allowance(expected, least) and same_bits(rank_outputs[i], outputs[0][i])
    return absolute, relative, ok


def difference(value: Tensor, expected: Tensor) -> tuple[float, float]:
    """(max |v - e|, |v - e| / |e|); infinite where shapes differ or only one is NaN."""
    if value.shape != expected.shape:
        return float("inf"), float("inf")
    if value.numel() == 0:
        return 0.0, 0.0
    wide = torch.complex128 if expected.is_complex() else torch.float64
    v, e = value.to(wide), expected.to(wide)
    if not torch.equal(torch.isfinite(v), torch.isfinite(e)):
        return float("inf"), float("inf")
    finite = torch.isfinite(e)
    v, e = torch.where(finite, v, 0), torch.where(finite, e, 0)
    gap = (v - e).abs()
    return gap.max().item(), (gap.norm() / e.norm().clamp_min(1e-30)).item()


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(torch.nan_to_num(a), torch.nan_to_num(b))


def tolerance(value: Tensor) -> float:
    """Relative tolerance for a dtype; integers and booleans must agree exactly."""
    return TOLERANCE.get(value.dtype, 1e-5 if value.is_complex() else 0.0)


def allowance(value: Tensor, least: float) -> float:
    """The relative error that is allowed; `least` for any floating point."""
    return max(tolerance(value), least) if value.is_floating_point() else tolerance(value)


def find_divergence(partitioned: Partitioned, inputs: Sequence[Tensor]) -> str | None:
    """The first node of the model (in program order) whose reassembled value differs; keeps every value, so for debugging sizes."""
    expected: dict[str, Any] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            expected[n.name] = value = super().run_node(n)
            return value

    Record(partitioned.traced.gm).run(*inputs)
    found: dict[int, dict[str, Tensor]] = {}
    bad: list[str] = []

    def watch(rank: int, node: fx.Node, value: Any) -> None:
        if "seqpar_value" in node.meta and isinstance(value, Tensor):
            found.setdefault(rank, {})[node.meta["seqpar_value"][0]] = value

    try:
        simulate(partitioned, inputs, watch)
    except Exception as error:  # the values seen so far still tell where it began
        bad.append(f"{type(error).__name__}: {error}")
    for node in partitioned.traced.gm.graph.nodes:
        for rank, values in found.items():
            if node.name in values:
                local = localised(partitioned, node, expected[node.name], rank)
                _, relative = difference(values[node.name], local)
                if relative > allowance(local, COMM_TOLERANCE.get(partitioned.comm_dtype, 0.0)):
                    return f"{node.name} ({node.target}) on rank {rank}, relative error {relative:.1e}, {one_line(node)}"
    return bad[0] if bad else "the outputs only"


def localised(partitioned: Partitioned, node: fx.Node, value: Tensor, rank: int) -> Tensor:
    """The part of a whole value that `rank` should hold."""
    from seqpar.runtime.layout import shard

    view = partitioned.view.for_rank(rank)
    hint = partitioned.inference.table.sizes.hint
    for dim, sharded in enumerate(view.produced(node)):
        if not sharded:
            continue
        axis = partitioned.inference.table.expand_axis(partitioned.inference.axes[node][0][dim])
        place = next(i for i, f in enumerate(axis) if sharded & set(f))
        segments = [tuple(hint(n) for n in view.parts(a)) if a in sharded else hint(view.atom_length(a, False)) for a in axis[place]]
        shape = list(value.shape)
        before = [hint(view.factor_length(f, frozenset())) for f in axis[:place]]
        opened = value.reshape(*shape[:dim], int(torch.tensor(before).prod()) if before else 1, sum(s if isinstance(s, int) else sum(s) for s in segments), -1, *shape[dim + 1 :])
        part = shard(opened, dim + 1, segments, rank=rank)
        value = part.reshape(*shape[:dim], -1, *shape[dim + 1 :])
    return value
