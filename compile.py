"""`sp_compile`: from a model and example inputs to a module that runs on all ranks."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import inspect
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from seqpar import logs
from seqpar.errors import SignatureError, UnsupportedError
from seqpar.module import SequenceParallelModule
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.machines import rates_of
from seqpar.partitioner.marker import graph_line, is_marker
from seqpar.passes.arguments import Call, canonical_call
from seqpar.passes.bind import axes_used, bind_groups
from seqpar.passes.declared import Declaration, Declared
from seqpar.passes.trace import Traced, trace
from seqpar.program import Interface, Program
from seqpar.runner import Runner
from seqpar.runtime.current import whole_tensors
from seqpar.runtime.mesh import build_mesh, check_degrees
from seqpar.runtime.travel import check_comm_dtype
from seqpar.signature import read
from seqpar.sp_plan import declarations

if TYPE_CHECKING:
    from seqpar.cache import Cache, Kept

log = logging.getLogger("seqpar.compile")

POST_TRACE_TIMEOUT_S = 600.0  # ranks may trace at different speed, a rank that fails says so at once


def sp_compile(
    model: torch.nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    *,
    ulysses: int = 1,
    ring: int = 1,
    mesh: Any = None,
    dynamic: bool | None = None,
    backend: str | None = None,
    sp_plan: Any = None,
    comm_dtype: torch.dtype | None = None,
    hardware: str | Machine | None = None,
) -> SequenceParallelModule:
    """Compile `model` into a sequence-parallel module over `ulysses` x `ring` processes.

    Every rank calls it with the same model and the same example inputs, and later calls the result with the same full inputs; every
    rank gets the full outputs.

    Args:
        model: any module; unchanged, and its parameters are shared, not copied.
        example_inputs: positional (tuple) or keyword (dict) inputs, full (global) tensors; nested lists, numbers, strings, None.
        ulysses: number of ranks that exchange attention heads.
        ring: number of ranks keys and values travel around.
        mesh: a `DeviceMesh` with dims named "ring" and "ulysses" (others may be present); built if None.
        dynamic: None: symbolic lengths where the model permits, else a program per input shape; True, False: force.
        backend: a Dynamo backend for the emitted program, for example "inductor"; None runs it as it is.
        sp_plan: a declared plan (`seqpar.sp_plan`): an `_sp_plan`, a diffusers `_cp_plan`, or "model" for that of the model's class. Its tensors
            are split and gathered as it says, everything else is inferred.
        comm_dtype: torch.bfloat16 or torch.float8_e4m3fn: queries, keys, values and results of attention are rounded to it while they travel between ranks,
            where they are wider. Fewer bytes, another result: `verify` with the same argument says by how much. None: they travel as they are.
        hardware: a name of `seqpar.partitioner.machines.MACHINES` ("H100", "A100-PCIe", "4090", …), a profile `NAME.json` of `seqpar.tools.calibrate`, or a `Machine`: its rates
            decide how each attention communicates. None: over the mesh, as the degrees say.

    Raises:
        PlanError: `sp_plan` contradicts the model.
        UnsupportedError: nothing travels as `comm_dtype`, or the model is compiled already.
        MeshError: degrees, world size, mesh do not fit, there is no process group, or no such hardware.
        TraceError: the model cannot be traced.
        SignatureError: the example inputs do not fit the model.
        DisagreementError: ranks hold different models, inputs or versions.
    """
    logs.configure()
    check_degrees(ulysses=ulysses, ring=ring)
    check_comm_dtype(comm_dtype)
    if any(isinstance(module, SequenceParallelModule) for module in model.modules()):
        raise UnsupportedError(f"{type(model).__name__} is or holds a module that sp_compile returned; compile the model itself, once")
    args, kwargs = split_inputs(example_inputs)
    canonical_call(inspect.signature(model.forward), args, kwargs)
    built = sequence_mesh(ulysses, ring, mesh, device_type(model, args, kwargs))
    settings = Settings(ulysses, ring, dynamic, backend, declarations(model, sp_plan), comm_dtype, rates_of(hardware))
    builder = Compiler(model, settings, built)
    return SequenceParallelModule(model, builder, args, kwargs)


def traced_with(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], plan: Sequence[Declaration] | None, dynamic: bool | None) -> Traced:
    """The model traced, with markers where a plan declares something."""
    with whole_tensors():
        return trace(model, args, kwargs, dynamic=dynamic, marks=None if plan is None else Declared(model, plan))


def split_inputs(example_inputs: Sequence[Any] | Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) of a tuple or a dict."""
    if isinstance(example_inputs, Mapping):
        return (), dict(example_inputs)
    if isinstance(example_inputs, list | tuple):
        return tuple(example_inputs), {}
    raise SignatureError(f"example_inputs must be a tuple of positional or a dict of keyword inputs, not a {type(example_inputs).__name__}")


def device_type(model: torch.nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Where the model computes: the device type of its first parameter, else of its first input."""
    tensors: list[torch.Tensor] = []
    read([list(args), dict(kwargs)], [], tensors)
    first = next(model.parameters(), None)
    return first.device.type if first is not None else (tensors[0].device.type if tensors else "cpu")


def sequence_mesh(ulysses: int, ring: int, mesh: Any, kind: str) -> Any:
    """The mesh of process groups, or None when there is one process."""
    if ulysses * ring == 1:
        return None
    return build_mesh(ulysses, ring, mesh=mesh, device_type=kind)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What a compilation was asked for, equal on all ranks. Fields as the arguments of `sp_compile`; plan, machine: what it read from `sp_plan`, `hardware`."""

    ulysses: int = 1
    ring: int = 1
    dynamic: bool | None = None
    backend: str | None = None
    plan: tuple[Declaration, ...] | None = None
    comm_dtype: torch.dtype | None = None
    machine: Machine | None = None

    @property
    def ranks(self) -> int:
        """Processes of the mesh."""
        return self.ulysses * self.ring


class Compiler:
    """Builds the programs of one model; collective: every rank builds the same ones in the same order."""

    def __init__(self, model: torch.nn.Module, settings: Settings, mesh: Any = None) -> None:
        self.model, self.settings, self.mesh = model, settings, mesh
        self.signature = inspect.signature(model.forward)
        self.warned = False

    def build(self, call: Call, *, static: bool) -> Program:
        """Trace, partition, agree, bind. An error on one rank becomes an error on every rank."""
        self.agree(f"compile {self.settings}\n{call_fingerprint(call)}\n{model_fingerprint(self.model)}")
        dynamic = False if static and self.settings.dynamic is None else self.settings.dynamic
        cache = self.cache(call, dynamic)
        kept = None if cache is None else cache.read()
        if self.all_have(kept):
            return kept.program  # type: ignore[union-attr]
        args, kwargs = call.rebuild(call.leaves)
        try:
            traced = self.trace(args, kwargs, dynamic)
            program, fingerprint = self.emit(traced)
        except Exception as error:
            self.tell_failure(error)
            raise
        self.agree(f"traced graph {graph_fingerprint(traced)}\nprogram {fingerprint}", POST_TRACE_TIMEOUT_S)
        if cache is not None:
            cache.write(program)
        return program

    def cache(self, call: Call, dynamic: bool | None) -> "Cache | None":
        """Where the program for this call is kept, or None."""
        from seqpar.cache import Cache

        return Cache.of(self, call, dynamic)

    def all_have(self, kept: "Kept | None") -> bool:
        """True if every rank found the same program in its cache. Asked whatever the setting is here: it may differ between ranks."""
        mine = "" if kept is None else kept.digest
        if self.mesh is None:
            return bool(mine)
        from seqpar.runtime.agree import everybody_says

        said = everybody_says(mine, self.mesh, POST_TRACE_TIMEOUT_S)
        if mine and len(set(said.values())) > 1:
            log.info("the program in the cache is not used: rank(s) %s have another one, or none", [rank for rank, text in said.items() if text != mine])
        return bool(mine) and len(set(said.values())) == 1

    def trace(self, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic: bool | None) -> Traced:
        """Trace the model for this call."""
        return traced_with(self.model, args, kwargs, self.settings.plan, dynamic)

    def reuse(self, call: Call) -> None:
        """All ranks must go on with the same call."""
        self.agree(f"reuse a program\n{call_fingerprint(call)}")

    def emit(self, traced: Traced) -> tuple[Program, str]:
        """The bound program of this rank, and what must be equal on all ranks."""
        from seqpar.passes.pipeline import partition

        asked = self.settings
        partitioned = partition(traced, ulysses=asked.ulysses, ring=asked.ring, machine=asked.machine, comm_dtype=asked.comm_dtype)
        if partitioned.nothing_to_shard and not self.warned and asked.ranks > 1:
            self.warned = True
            unknown = f" (no rule for {', '.join(partitioned.unknown)})" if partitioned.unknown else ""
            warnings.warn(f"nothing to shard in {type(self.model).__name__}: it has no attention over a sequence{unknown}, and too little other work to divide; every rank runs all of it", stacklevel=2)
        rank = self.mesh.rank if self.mesh is not None else 0
        unbound = partitioned.program(rank)
        gm = bind_groups(unbound, self.mesh)
        # A module that runs as it is stays outside what the backend compiles.
        run = Runner(gm, self.compiled(not traced.opaque, traced.shape_env is not None))
        slim = dataclasses.replace(traced, call=traced.call.without_data(), marks=None)
        interface = Interface.of(slim, partitioned.conditions)
        split = bool(axes_used(unbound))
        program = Program(interface, gm, run, partitioned.plan, split, rank=rank, traced=slim)
        return program, f"{partitioned.fingerprint}\ncollectives {partitioned.collectives(rank)}"

    def compiled(self, fullgraph: bool, dynamic: bool) -> Callable[[fx.GraphModule], Callable[..., Any]] | None:
        """What compiles a program for the chosen backend; None runs it as it is."""
        if self.settings.backend is None:
            return None
        from seqpar.passes.seal import sealed_program

        run = functools.partial(torch.compile, backend=self.settings.backend, fullgraph=fullgraph, dynamic=dynamic)
        return (lambda gm: run(sealed_program(gm))) if dynamic else run

    def agree(self, text: str, timeout_s: float | None = None) -> None:
        """Compare `text` over the ranks of the sequence mesh."""
        if self.mesh is None:
            return
        from seqpar.runtime.agree import check_agreement

        fingerprint = f"{versions()} ulysses={self.settings.ulysses} ring={self.settings.ring}\n{text}"
        if timeout_s is None:
            check_agreement(fingerprint, self.mesh)
        else:
            check_agreement(fingerprint, self.mesh, timeout_s=timeout_s)

    def tell_failure(self, error: Exception) -> None:
        """Let the other ranks fail as well, without hiding this rank's own error."""
        try:
            self.agree(f"failed: {type(error).__name__}: {error}")
        except Exception as disagreement:
            log.debug("while reporting a failure: %s", disagreement)


def versions() -> str:
    """The versions that must be equal on all ranks."""
    try:
        own = importlib.metadata.version("seqpar")
    except importlib.metadata.PackageNotFoundError:
        own = "unknown"
    return f"seqpar={own} torch={torch.__version__}"


def model_fingerprint(model: torch.nn.Module) -> str:
    """Class, mode, and shape and dtype of every parameter and buffer, one a line."""
    state = [f"{name}: {tuple(tensor.shape)} {tensor.dtype}" for source in (model.named_parameters(), model.named_buffers()) for name, tensor in source]
    return "\n".join([f"{type(model).__qualname__} training={model.training}", *state])


def call_fingerprint(call: Call) -> str:
    """Shapes, dtypes and plain values of a call, one a line (devices left out: ranks have their own)."""
    parts = []
    for path, leaf in zip(call.paths, call.leaves, strict=True):
        parts.append(f"{path}: {tuple(leaf.shape)} {leaf.dtype}" if isinstance(leaf, torch.Tensor) else f"{path}: {leaf!r}")
    return "\n".join(parts)


def graph_fingerprint(traced: Traced) -> str:
    """Operators and wiring of the traced graph (device indices left out), and the values read it is made for."""
    lines = []
    for node in traced.gm.graph.nodes:
        if is_marker(node):
            lines.append(graph_line(node))
            continue
        arguments = {key: value for key, value in node.kwargs.items() if key != "device"}
        lines.append(f"{node.name}={node.op}:{getattr(node.target, '__name__', node.target)}{node.args}{arguments}")
    lines += [f"{call.title} {[*map(str, call.inputs)]} -> {[*map(str, call.outputs)]}" for call in traced.opaque]
    lines += [f"{read.function} {read.reduce} {read.value.tolist()}" for read in traced.reads]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
