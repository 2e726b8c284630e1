"""Trace a model into one functional ATen graph.

Before: an `nn.Module` and one call of it
After:  %hidden_states = placeholder; %w = get_attr[proj.weight]; %linear = aten.linear(%hidden_states, %w); output (%linear,)

Shapes: placeholders are the tensor leaves of the call; every node keeps its fake tensor in `meta["val"]`, its source line in
`meta["stack_trace"]` (lines of functions that a `forward` calls in `meta["helper_lines"]`) and its module path in `meta["nn_module_stack"]`.
"""

import inspect
import re
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind

from seqpar.compat import OpOverload, ShapeEnv, check_torch_version, pytree, quiet, symbolic_shape, tolist_seen_by_modes, unbacked_symbols
from seqpar.errors import SeqparError, TraceError
from seqpar.passes.arguments import Call, canonical_call
from seqpar.passes.asked import as_it_runs
from seqpar.passes.boundary import Marks
from seqpar.passes.check_weights import check_weights
from seqpar.passes.export import export_functional
from seqpar.passes.flat_model import FlatModel, Result
from seqpar.passes.frames import helpers_seen, split_frames
from seqpar.passes.kept_state import check_no_state
from seqpar.passes.known_sizes import check_sizes_known, on_meta, with_constants_read
from seqpar.passes.opaque import Choice, OpaqueReplayer, Recording, emit_opaque, is_opaque, opaque_calls, record_opaque
from seqpar.passes.padded_encoder import padding_zeroed
from seqpar.passes.progress import collector_paused, staged
from seqpar.passes.read_guard import ActivationRead, ReadGuard, Unguarded, build_guard
from seqpar.passes.region import base_name
from seqpar.passes.replay import Record, Replayer, operator_name, record_reads
from seqpar.passes.share import share_graph
from seqpar.passes.state import Mutation, StateWrite
from seqpar.passes.trace_error import ContentNeeded, trace_error
from seqpar.passes.warm import restored
from seqpar.runtime.opaque import OpaqueCall

aten = torch.ops.aten
# Checks of shapes and dtypes of the whole tensors: their content is in the guards, and local tensors would fail them.
CHECKS = (aten._assert_tensor_metadata.default, aten.sym_constrain_range.default, aten.sym_constrain_range_for_size.default)
LITERALS = (type(None), bool, int, float, complex, str, torch.dtype, torch.device)
MAX_CHOICES = 8  # attempts to find the modules that must run as they are
ATTENTION = (aten.scaled_dot_product_attention.default, aten.softmax.int, aten._softmax.default)


@dataclass(frozen=True)
class Traced:
    """A model as one graph.

    Invariants: placeholders of `gm` are the leaves `call.leaves[i] for i in input_positions`, in order; the outputs of `gm` are
    the leaves of `out_spec` (tensors, SymInts and literal constants) followed by one per entry of `mutations`, then those that
    `states` (attributes the model assigns on its arguments) name. `guard`, if any, must
    hold for the inputs of a call: the graph is made for the values the model reads from them. `marks`: what put markers into `gm`. `assigns`: the traced call changed attributes of the model.
    """

    gm: fx.GraphModule
    constants: dict[str, torch.Tensor]
    call: Call
    input_positions: tuple[int, ...]
    out_spec: Any
    mutations: tuple[Mutation, ...]
    shape_env: ShapeEnv | None
    symbols: dict[sympy.Symbol, tuple[int, int]]
    seconds: float
    guard: ReadGuard | None = None
    states: tuple[StateWrite, ...] = ()
    marks: Marks | None = None
    assigns: bool = False

    @property
    def reads(self) -> tuple[Record, ...]:
        """The values read from tensors that the graph is made for."""
        return self.guard.reads if self.guard is not None else ()

    @property
    def opaque(self) -> tuple[OpaqueCall, ...]:
        """The calls of modules that run as they are, whole on every rank."""
        return opaque_calls(self.gm.graph)

    @property
    def num_outputs(self) -> int:
        """Number of outputs that belong to the model's result (mutations not counted)."""
        return self.out_spec.num_leaves


@staged("trace", "tracing %s")
def trace(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, dynamic: bool | None = None, warm: bool = True, marks: Marks | None = None) -> Traced:
    """Trace `model(*args, **kwargs)`; the model is left as it was.

    Args:
        args, kwargs: an example call with full (global) tensors on any device, meta included.
        dynamic: True: sizes of inputs are symbols where the model permits, an error if nowhere; False: all sizes fixed;
            None: symbolic where that makes an attention length symbolic, else fixed.
        warm: run the model eagerly first, for tables it memoises; False for a plain graph.
        marks: puts markers on tensors that cross module boundaries.

    Raises:
        TraceError: the model cannot be traced; names the operator, the user's source line and what to try.
        SignatureError: the arguments do not fit the model.
        UnsupportedError: its weights are divided already, or an object of TorchScript holds them.
    """
    check_torch_version()
    check_weights(model)
    started = time.perf_counter()
    call = canonical_call(inspect.signature(model.forward), args, kwargs)
    warm_failure, records = record_reads(model, call) if warm else (None, ())
    by_token = () if marks is None else marks.by_token

    def traced_so() -> Traced:
        return with_constants_read(model, call, traced_with) if warm and on_meta(model, call) else traced_with(records)

    def traced_with(records: tuple[Record, ...]) -> Traced:
        try:
            return trace_sizes(model, call, dynamic, Recording(records), warm_failure)
        except ActivationRead as refused:
            return trace_activation_reads(model, call, dynamic, refused, warm_failure, Choice(by_token))
        except ContentNeeded as error:
            return trace_around(model, call, dynamic, error, Choice(by_token))

    with nullcontext() if marks is None else marks.active(model):
        traced = traced_so()
        if warm and warm_failure is None:
            traced = as_it_runs(model, call, traced, traced_so)
    if traced.assigns and warm and warm_failure is None:
        check_no_state(model, call)
    return replace(traced, seconds=time.perf_counter() - started, marks=marks)


def trace_activation_reads(model: torch.nn.Module, call: Call, dynamic: bool | None, refused: ActivationRead, warm_failure: Exception | None, choice: Choice) -> Traced:
    """Trace a model that reads activations: the tracer may cope with it (a value that changes no Python control flow), else the modules
    that read are leaves."""
    unguarded: Traced | None = None
    try:
        unguarded = trace_sizes(model, call, dynamic, Recording(), warm_failure)
        check_sizes_known(unguarded)
        return unguarded
    except TraceError:
        pass
    try:
        return trace_opaque(model, call, dynamic, refused, choice)
    except TraceError:
        if unguarded is not None:  # good enough for one rank
            return unguarded
        raise


def trace_opaque(model: torch.nn.Module, call: Call, dynamic: bool | None, refused: ActivationRead, choice: Choice) -> Traced:
    """Trace with the modules that read activations as leaves. All sizes are fixed: what such a module returns has no formula."""
    choice.add(refused)
    if dynamic:
        raise TraceError(f"dynamic=True, but {', '.join(choice.chosen)} must run as it is, with fixed sizes ({refused.reads[0].record.where}). Use dynamic=None: one program per input shape")
    for _ in range(MAX_CHOICES):
        failure, recording, unfit = record_opaque(model, call, choice)
        if isinstance(failure, SeqparError):
            raise failure
        if unfit:
            choice.drop(unfit)
            continue
        try:
            return trace_sizes(model, call, False, recording, failure)
        except ActivationRead as again:
            choice.add(again)
        except ContentNeeded as again:
            choice.add(as_read(again))
    raise refused


def trace_around(model: torch.nn.Module, call: Call, dynamic: bool | None, error: ContentNeeded, choice: Choice) -> Traced:
    """Trace with the modules as leaves in which the tracer needs the content of a tensor."""
    try:
        return trace_opaque(model, call, dynamic, as_read(error), choice)
    except ActivationRead as refused:
        raise (refused if any(error.modules) else error) from error  # why no module can be a leaf, if there is one
    except TraceError:
        raise error from None


def as_read(error: ContentNeeded) -> ActivationRead:
    """What the tracer could not do, as a read by the modules in which it happened: they may run as they are."""
    record = Record(torch.empty(0), "", None, error.operator, error.where, modules=error.modules)
    return ActivationRead(str(error), [Unguarded(record, "the tracer needs the content of a tensor")])


def trace_sizes(model: torch.nn.Module, call: Call, dynamic: bool | None, recording: Recording, warm_failure: Exception | None) -> Traced:
    """Trace with symbolic sizes, fixed ones, or whichever is worth it; see `trace`."""
    traced: Traced | None = None
    if dynamic is not False:
        try:
            traced = trace_once(model, call, recording, symbolic=True)
        except TraceError:
            if dynamic:
                raise
    if traced is not None and dynamic and traced.shape_env is None:
        raise TraceError("dynamic=True, but the model fixes every size of its inputs (its Python code depends on them). Use dynamic=None: one program per input shape")
    if traced is None or (dynamic is None and traced.shape_env is not None and not worth_symbols(traced)):
        try:
            traced = trace_once(model, call, recording, symbolic=False)
        except TraceError as error:
            if warm_failure is not None:
                raise TraceError(f"the model itself fails on the example inputs: {type(warm_failure).__name__}: {warm_failure}") from error
            raise
    return traced


def trace_once(model: torch.nn.Module, call: Call, recording: Recording, *, symbolic: bool) -> Traced:
    """One export, with all sizes symbolic where possible or all fixed; what the model reads from tensors is taken from `recording`."""
    if any(record.number for record in recording.reads):
        try:
            return export(model, call, recording, symbolic, numbers=False)
        except TraceError:
            pass  # a floating number decides something
    return export(model, call, recording, symbolic, numbers=True)


def export(model: torch.nn.Module, call: Call, recording: Recording, symbolic: bool, numbers: bool) -> Traced:
    """`trace_once`, with floating numbers fixed (`numbers`) or as symbols."""
    positions = [i for i, leaf in enumerate(call.leaves) if isinstance(leaf, torch.Tensor)]
    # A program must not depend on the example's strides: a later non-contiguous input is made contiguous as well.
    leaves = tuple(call.leaves[i].detach().contiguous() for i in positions)
    flat = FlatModel(model, call, positions, Replayer(recording.reads, numbers), OpaqueReplayer(model, recording.calls))
    flat.training = model.training  # its own alone: parts of the model may be in another mode
    dims = (tuple({d: torch.export.Dim.AUTO for d in range(leaf.dim())} for leaf in leaves),) if symbolic else None
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(quiet())
        stack.enter_context(collector_paused())  # fake tensors hold no memory
        stack.enter_context(helpers_seen())
        stack.enter_context(restored(model))
        stack.enter_context(padding_zeroed(model))
        stack.enter_context(flat.parts.apart())
        if recording.reads:
            stack.enter_context(tolist_seen_by_modes())
        try:
            exported = export_functional(flat, leaves, dims)
        except SeqparError:
            raise
        except Exception as error:
            raise trace_error(error, model) from error
    return build(model, call, positions, flat, exported, recording.calls)


def build(model: torch.nn.Module, call: Call, positions: Sequence[int], flat: FlatModel, exported: torch.export.ExportedProgram, calls: Sequence[OpaqueCall]) -> Traced:
    """Turn an exported program into a `Traced`: parameters become get_attr, checks go, outputs get their order."""
    result, graph = flat.result, fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    constants: dict[str, Any] = dict(flat.parts.contents)
    lifted: dict[fx.Node, str] = {}
    names = {path: re.sub(r"\W+", "_", call.paths[p]).strip("_") for path, p in enumerate(positions)}
    user_inputs: dict[str, int] = {}
    old_nodes = list(exported.graph.nodes)
    for node, spec in zip(old_nodes, exported.graph_signature.input_specs, strict=False):
        assert node.op == "placeholder" and spec.arg.name == node.name
        if spec.kind is InputKind.USER_INPUT:
            user_inputs[node.name] = len(user_inputs)
            env[node] = graph.placeholder(names[len(user_inputs) - 1])
            env[node].meta = clean_meta(node.meta)
        elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            lifted[node] = flat.parts.paths.get(spec.target) or spec.target.removeprefix("model.")
        else:
            lifted[node] = f"_constant_{len(constants)}"
            constants[lifted[node]] = exported.constants[spec.target]

    def new(node: fx.Node) -> fx.Node:
        if node not in env:
            env[node] = graph.get_attr(lifted[node])
            env[node].meta = clean_meta(node.meta)
        return env[node]

    for node in old_nodes:
        if node.op == "get_attr":  # the graph of a higher order operator
            attribute = f"_subgraph_{len(constants)}"
            constants[attribute] = getattr(exported.graph_module, node.target)
            env[node] = graph.get_attr(attribute)
        elif is_opaque(node):
            env[node] = emit_opaque(graph, node, calls, constants, new)
        elif node.op == "call_function" and not is_check(node):
            env[node] = graph.create_node(node.op, node.target, fx.map_arg(node.args, new), fx.map_arg(node.kwargs, new), name=base_name(node))  # numbered anew: which numbers the tracer leaves out tells nothing
            env[node].meta = clean_meta(node.meta)
            if isinstance(node.target, OpOverload) and (casts := flat.replayer.autocast.get(operator_name(node.target), {None})) != {None}:
                env[node].meta["autocast"] = tuple(casts)
    mutations, asked = emit_output(graph, old_nodes[-1], new, result, exported, user_inputs)
    records = flat.replayer.used
    guard = build_guard(model, asked, records, constants, [call.leaves[i].detach().contiguous() for i in positions]) if records else None
    graph.eliminate_dead_code()
    graph.lint()
    gm = share_graph(model, graph, constants, type(model).__name__)
    shape_env, symbols = read_symbols(gm)
    result_count = result.spec.num_leaves + len(mutations)
    tensors = {name: value for name, value in constants.items() if isinstance(value, torch.Tensor)}
    return Traced(gm, tensors, call, tuple(positions), result.spec, mutations, shape_env, symbols, 0.0, guard, tuple(write.moved(result_count) for write in result.states), assigns=result.assigns)


def emit_output(graph: fx.Graph, old: fx.Node, new: Any, result: Result, exported: torch.export.ExportedProgram, user_inputs: Mapping[str, int]) -> tuple[tuple[Mutation, ...], list[fx.Node]]:
    """Append the output node: the model's leaves in `out_spec` order, then what it writes. Returns the writes, and the values read."""
    specs = exported.graph_signature.output_specs
    user = iter(value for value, spec in zip(old.args[0], specs, strict=True) if spec.kind is OutputKind.USER_OUTPUT)  # type: ignore[arg-type]
    outputs: list[Any] = []
    for inside, literal in zip(result.in_graph, result.literals, strict=True):
        if not inside and not isinstance(literal, LITERALS):
            raise TraceError(
                f"the model returns a {type(literal).__name__}, a type that is no tensor, number, string, None or known container of them: "
                "return those (return_dict=False, use_cache=False), or register the type with torch.export.register_dataclass"
            )
        value = next(user) if inside else literal
        outputs.append(new(value) if isinstance(value, fx.Node) else value)
    assigned = [new(next(user)) for write in result.states for kind, _ in write.sources if kind == "output"]
    asked = [new(value) for value in user]
    mutations: list[Mutation] = []
    for value, spec in zip(old.args[0], specs, strict=True):  # type: ignore[arg-type]
        if spec.kind is OutputKind.USER_OUTPUT:
            continue
        if spec.kind is OutputKind.BUFFER_MUTATION and spec.target.startswith("parts."):
            raise TraceError("the model writes to a quantised weight or buffer in its forward; only plain buffers and inputs can be written")
        if spec.kind is OutputKind.BUFFER_MUTATION:
            mutations.append(Mutation(len(outputs), buffer=spec.target.removeprefix("model.")))
        elif spec.kind is OutputKind.USER_INPUT_MUTATION:
            mutations.append(Mutation(len(outputs), placeholder=user_inputs[spec.target]))
        else:
            raise TraceError(f"the model writes to {spec.target} in its forward ({spec.kind.name}); only buffers and inputs can be written")
        outputs.append(new(value))
    graph.output((*outputs, *assigned))
    return tuple(mutations), asked


def is_check(node: fx.Node) -> bool:
    """True for a node that only checks what the guards check. An assertion about a value read from a tensor stays."""
    if node.target in CHECKS:
        return True
    if node.target is not aten._assert_scalar.default:
        return False
    condition = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else node.args[0]
    return not unbacked_symbols(condition)


def clean_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What later stages read: the value, the source line, the module path (without the wrapper of this file)."""
    kept = {key: meta[key] for key in ("val", "stack_trace") if meta.get(key) is not None}
    if meta.get("nn_module_stack"):
        entries = [(key, (path.removeprefix("model").removeprefix("."), kind)) for key, (path, kind) in meta["nn_module_stack"].items() if path]
        kept["nn_module_stack"] = dict(entries)
    if "stack_trace" in kept:
        split_frames(kept)
    return kept


def read_symbols(gm: fx.GraphModule) -> tuple[ShapeEnv | None, dict[sympy.Symbol, tuple[int, int]]]:
    """The ShapeEnv if any size in the graph is symbolic, and where each symbol can be read from the inputs."""
    symbols: dict[sympy.Symbol, tuple[int, int]] = {}
    shape_env: ShapeEnv | None = None
    for node in gm.graph.nodes:
        for value in pytree.tree_leaves(node.meta.get("val")):
            sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
            for size in sizes:
                if isinstance(size, torch.SymInt) and not size.node.expr.is_number:
                    shape_env = size.node.shape_env
    for index, node in enumerate(node for node in gm.graph.nodes if node.op == "placeholder"):
        for dim, size in enumerate(symbolic_shape(node.meta["val"])):
            if isinstance(size, sympy.Symbol):
                symbols.setdefault(size, (index, dim))
    return shape_env, symbols


def worth_symbols(traced: Traced) -> bool:
    """True if a symbolic program buys anything: an attention has a symbolic dim, and each symbol can be read from an input."""
    inputs = [node for node in traced.gm.graph.nodes if node.op == "placeholder"]
    for node in inputs:
        for size in symbolic_shape(node.meta["val"]):
            if isinstance(size, sympy.Expr) and not size.free_symbols <= traced.symbols.keys():
                return False
    for node in traced.gm.graph.nodes:
        if node.target in ATTENTION and any(isinstance(size, sympy.Expr) for size in symbolic_shape(node.args[0].meta["val"])):
            return True
    return False
