"""The `torch.compile` backend "seqpar".

    torch.compile(model, backend="seqpar", options={"ulysses": 2, "ring": 2, "backend": "inductor"})

Every graph Dynamo captures is brought to the same ATen graph as `sp_compile` makes, partitioned, and handed to `backend`
(Inductor if not given). A graph without attention goes to it untouched. Sizes are specialised: another length is another graph.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from seqpar.compat import is_wrapper, lookup_backend, outside_compiler
from seqpar.compile import Compiler, Settings, sequence_mesh
from seqpar.errors import SeqparError
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.machines import rates_of
from seqpar.passes.arguments import Call, canonical_call
from seqpar.passes.share import copied
from seqpar.passes.trace import Traced, trace
from seqpar.passes.weight_parts import parts_of, rebuilt
from seqpar.program import Program, without_gradients
from seqpar.runtime.mesh import check_degrees
from seqpar.runtime.travel import check_comm_dtype

OPTIONS = ("ulysses", "ring", "mesh", "backend", "comm_dtype", "hardware")
# Nodes know the module that made them, but not by which name a value went in, or as which output it came out.
NO_PLAN = (
    "backend 'seqpar' has no option sp_plan: Dynamo's graph does not say which value is which input or output of a module, so no entry could be placed in it. "
    'Use seqpar.sp_compile(model, example_inputs, sp_plan=..., backend="inductor"), or write sp_shard(x, dim) and sp_gather(x, dim) into the model, which this backend reads'
)
# Attention is written with one of these; a graph with none of them has nothing to shard.
ATTENTION_NAMES = ("scaled_dot_product_attention", "softmax", "attention")


@dataclasses.dataclass(frozen=True)
class Options:
    """What `options=` (or keyword arguments of `functools.partial`) may say."""

    ulysses: int = 1
    ring: int = 1
    mesh: Any = None
    backend: str | Callable[..., Any] = "inductor"
    comm_dtype: torch.dtype | None = None
    hardware: str | Machine | None = None

    def __post_init__(self) -> None:
        check_degrees(ulysses=self.ulysses, ring=self.ring)
        check_comm_dtype(self.comm_dtype)
        if self.backend == "seqpar":
            raise SeqparError('options["backend"] is what compiles the emitted program ("inductor", "eager", ...), it cannot be "seqpar" itself')

    @staticmethod
    def read(options: Mapping[str, Any] | None, more: Mapping[str, Any]) -> "Options":
        """Merge `options` and keyword arguments; an unknown name is an error."""
        given = {**(options or {}), **more}
        if "sp_plan" in given:
            raise SeqparError(NO_PLAN)
        unknown = sorted(given.keys() - set(OPTIONS))
        if unknown:
            raise SeqparError(f"backend 'seqpar' does not know the option(s) {unknown}; it has {list(OPTIONS)}")
        return Options(**given)


def seqpar_backend(gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None, mode: str | None = None, **more: Any) -> Callable[..., Any]:
    """Compile one Dynamo graph for this rank.

    Args:
        gm: the graph; its placeholders are inputs and parameters.
        example_inputs: one tensor or (symbolic) integer per placeholder, full (global) shapes.
        options: "ulysses", "ring", "mesh", "backend", "comm_dtype", "hardware".
        mode: not used.

    Raises:
        SeqparError: as `sp_compile`; Dynamo reports it as BackendCompilerFailed.
    """
    settings = Options.read(options, more)
    inner = lookup_backend(settings.backend) if isinstance(settings.backend, str) else settings.backend
    if settings.ulysses * settings.ring == 1 or not may_attend(gm):
        return inner(gm, list(example_inputs))
    kinds = [value.device.type for value in example_inputs if isinstance(value, torch.Tensor)]
    mesh = sequence_mesh(settings.ulysses, settings.ring, settings.mesh, kinds[0] if kinds else "cpu")
    leaves = concrete_inputs(gm, example_inputs)
    opened = of_parts(gm, leaves)
    leaves = parts(leaves)
    asked = Settings(settings.ulysses, settings.ring, dynamic=False, comm_dtype=settings.comm_dtype, machine=rates_of(settings.hardware))
    builder = GraphCompiler(opened, asked, mesh)
    builder.warned = True  # a piece between two graph breaks may well have nothing to shard
    with outside_compiler():
        program = builder.build(canonical_call(builder.signature, leaves, {}), static=True)
    if not program.split:
        return inner(gm, list(example_inputs))
    return runner(program, inner, leaves, quantised=opened is not gm)


def may_attend(gm: fx.GraphModule) -> bool:
    """True if some operator of the graph (or of a graph inside it) has attention or softmax in its name."""
    for module in gm.modules():
        if isinstance(module, fx.GraphModule):
            for node in module.graph.nodes:
                if any(part in str(getattr(node.target, "__name__", node.target)).lower() for part in ATTENTION_NAMES):
                    return True
    return False


def concrete_inputs(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> list[Any]:
    """The inputs with integers for symbolic sizes. Reading them adds a guard, so that Dynamo compiles other sizes anew."""
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    leaves: list[Any] = []
    for node, value in zip(placeholders, example_inputs, strict=True):
        seen = node.meta.get("example_value", value)
        if isinstance(seen, torch.Tensor):
            sizes = [int(size) for size in seen.shape]
            leaves.append(torch.empty(sizes, dtype=seen.dtype, device=seen.device) if isinstance(value, int | torch.SymInt) else value)
        elif isinstance(value, torch.SymInt | torch.SymFloat | torch.SymBool):
            leaves.append(type_of(value)(value))
        else:
            leaves.append(value)
    return leaves


class Rebuild:
    """Makes a quantised weight, like the one that it was made for, of other tensors."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = weight
        self.__name__ = "rebuild"

    def __call__(self, *tensors: torch.Tensor) -> Any:
        return rebuilt(self.weight, iter(tensors))


def of_parts(gm: fx.GraphModule, inputs: Sequence[Any]) -> fx.GraphModule:
    """`gm` as a graph of the tensors in its inputs.

    Before: %w = placeholder (an `Int8Tensor` of `qdata` and `scale`)
    After:  %w_0 = placeholder; %w_1 = placeholder; %rebuild = Rebuild(...)(%w_0, %w_1)
    """
    if not any(map(is_wrapper, inputs)):
        return gm
    graph = copied(gm.graph)
    placeholders = graph.find_nodes(op="placeholder")
    first = placeholders[-1].next
    for node, value in zip(placeholders, inputs, strict=True):
        if is_wrapper(value):
            with graph.inserting_before(node):
                inside = tuple(graph.placeholder(f"{node.name}_{i}") for i in range(len(parts([value]))))
            with graph.inserting_before(first):
                node.replace_all_uses_with(graph.call_function(Rebuild(value), inside))
            graph.erase_node(node)
    return fx.GraphModule(gm, graph)


def parts(inputs: Sequence[Any]) -> list[Any]:
    """Inputs as `of_parts` takes them."""
    return [part for value in inputs for part in ([tensor for _, tensor in parts_of(value, "")] if is_wrapper(value) else [value])]


def type_of(value: Any) -> type:
    """int for a SymInt, float for a SymFloat, bool for a SymBool."""
    return {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}[type(value)]


class GraphCompiler(Compiler):
    """`Compiler` for a graph of Dynamo: nothing memoised to warm up, parameters are placeholders."""

    def trace(self, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic: bool | None) -> Traced:
        """Trace without running the graph first."""
        return trace(self.model, args, kwargs, dynamic=False, warm=False)

    def cache(self, call: Call, dynamic: bool | None) -> None:
        """Dynamo makes other graph modules, with other names, at every start."""


def runner(program: Program, inner: Callable[..., Any], leaves: Sequence[Any], *, quantised: bool = False) -> Callable[..., list[Any]]:
    """Compile the program with `inner`; the result takes what Dynamo passes and returns what it expects.

    Inputs the graph writes to (buffers among them) are updated afterwards. quantised: some inputs are made of several tensors, each of which the program takes.
    """
    traced = program.traced
    assert traced is not None
    positions = traced.input_positions
    tensors = [leaves[position].contiguous() for position in positions]
    with torch.no_grad():
        compiled = inner(with_buffers(program.gm), tensors)

    def run(*inputs: Any) -> list[Any]:
        opened = parts(inputs) if quantised else inputs
        given = [opened[position] for position in positions]
        outputs = call(compiled, [tensor if tensor.is_contiguous() else tensor.contiguous() for tensor in given])
        with torch.no_grad():
            for mutation in traced.mutations:
                assert mutation.placeholder is not None
                given[mutation.placeholder].copy_(outputs[mutation.output])
        return list(outputs[: traced.num_outputs])

    return run


def call(compiled: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> Sequence[Any]:
    """Run forward only: gradients through a split program raise in backward."""
    return without_gradients(compiled, inputs, ()) if torch.is_grad_enabled() else compiled(*inputs)


def with_buffers(gm: fx.GraphModule) -> fx.GraphModule:
    """The same program with its constants as registered buffers, as compilers expect.

    Before: %c = get_attr[_constant_0]    (a plain attribute)
    After:  %c = get_attr[_constant_0]    (a buffer of a module of its own)
    """
    root = torch.nn.Module()
    graph = copied(gm.graph)
    for node in graph.nodes:
        if node.op == "get_attr":
            value: Any = gm
            for part in node.target.split("."):
                value = getattr(value, part)
            node.target = node.target.replace(".", "_")
            if isinstance(value, torch.Tensor):
                root.register_buffer(node.target, value.detach(), persistent=False)
            else:
                setattr(root, node.target, value)
    return fx.GraphModule(root, graph)
