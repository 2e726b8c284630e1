"""Every torch interface in use that is not public, in one place and behind one version check.

Supported: torch 2.11 to 2.13. Other files import these names from here, so that a new torch release is
a change to this file only.
"""

import contextlib
import functools
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv, free_unbacked_symbols
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from seqpar.errors import SeqparError

__all__ = [
    "FakeTensor", "FakeTensorMode", "FloorDiv", "HigherOrderOperator", "NO_MODULE", "OpOverload", "PythonReferenceAnalysis", "ShapeEnv", "Tape", "TorchDispatchMode",
    "active_modes", "aot_export", "being_compiled", "check_torch_version", "contentless", "fresh_tensors", "functional_mode", "has_global_hooks", "helpers_in_traces",
    "lazy_graph_module", "is_traced", "is_wrapper", "lookup_backend", "outside_compiler", "python_kernel", "pytree", "quiet", "shape_guards", "size_bounds",
    "size_functions", "sym_max", "sym_min", "sympy_interp", "symbol_range", "symbolic_shape", "tolist_seen_by_modes", "unbacked_symbols", "unscoped_call", "was_written",
]  # fmt: skip

OLDEST, NEWEST = (2, 11), (2, 13)
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # in place of a module path: sizes that are read from the inputs
FAKE_ATTRIBUTES = frozenset(vars(FakeTensorMode().from_tensor(torch.empty(1))))
NOISY_LOGGERS = ("torch._export.non_strict_utils", "torch.export", "torch.fx.experimental.symbolic_shapes")


def torch_version(text: str = torch.__version__) -> tuple[int, int]:
    """`"2.13.0+cpu"` -> `(2, 13)`."""
    found = re.match(r"(\d+)\.(\d+)", text)
    assert found is not None, f"unreadable torch version {text!r}"
    return int(found[1]), int(found[2])


def check_torch_version(text: str = torch.__version__) -> None:
    """Refuse torch older than 2.11; warn above 2.13 (the private interfaces below may have moved).

    Raises:
        SeqparError: this torch is too old.
    """
    version = torch_version(text)
    if version < OLDEST:
        raise SeqparError(f"seqpar needs torch >= {OLDEST[0]}.{OLDEST[1]} and < 2.14, this is torch {text}: pip install 'torch>=2.11,<2.14'")
    if version > NEWEST:
        warnings.warn(f"seqpar was tested with torch 2.11 to 2.13, this is torch {text}", stacklevel=2)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence what torch.export reports about its own internals (0/1 specialisation, tree specs)."""
    loggers = [logging.getLogger(name) for name in NOISY_LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", category=DeprecationWarning)
            warnings.filterwarnings("ignore", module=r"torch\..*")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def outside_compiler() -> Iterator[None]:
    """Step out of the tracing context of Dynamo, so that torch.export can run inside a backend."""
    from torch._guards import tracing

    with tracing(None):
        yield


@contextlib.contextmanager
def tolist_seen_by_modes() -> Iterator[None]:
    """Let function modes see `tolist` of traced tensors, whose classes override it with one that reads entry by entry."""
    saved = [(kind, kind.__dict__["tolist"]) for kind in (FunctionalTensor, FakeTensor) if "tolist" in kind.__dict__]
    try:
        for kind, _ in saved:
            kind.tolist = torch.Tensor.tolist  # type: ignore[method-assign]
        yield
    finally:
        for kind, own in saved:
            kind.tolist = own  # type: ignore[method-assign]


def aot_export(module: torch.nn.Module, args: tuple[Any, ...], dynamic_shapes: Any) -> torch.export.ExportedProgram:
    """What `torch.export.export(module, args, strict=False).run_decompositions({})` returns, traced once, after dispatch of autograd.

    `module` runs more than once and must not change. Composite operators that do not alias stay whole, as with an empty table. Generated code of
    intermediate graphs is made when it is called, that is never.
    """
    from torch.export._trace import _export
    from torch.export.exported_program import _override_composite_implicit_decomp
    from torch.fx._lazy_graph_module import _use_lazy_graph_module

    registered = frozenset(torch._C._dispatch_get_registrations_for_dispatch_key("CompositeImplicitAutograd"))
    with _override_composite_implicit_decomp(_composites(registered)), _use_lazy_graph_module(True):
        return _export(module, args, {}, dynamic_shapes, strict=False, pre_dispatch=False)


@functools.lru_cache(maxsize=1)
def _composites(registered: frozenset[str]) -> Mapping[Any, Callable[..., Any]]:
    """Composite operator -> what keeps it whole. registered: their names; torch asks for each library again what they are."""
    from torch.export.exported_program import _split_decomp_table_to_cia_and_python_decomp

    return _split_decomp_table_to_cia_and_python_decomp({})[0]


def has_global_hooks() -> bool:
    """True if somebody has put hooks on all modules."""
    return bool(torch.nn.modules.module._has_any_global_hook())


def is_traced(tensor: torch.Tensor) -> bool:
    """True for the tensors that AOTAutograd gives a model and what the model makes of them, with nothing added to them.

    What is made of constants alone is a fake tensor, all else a functional one that holds such.
    """
    if type(tensor) is FunctionalTensor:
        return vars(tensor).keys() == {"elem"}
    return type(tensor) is FakeTensor and tensor.constant is None and vars(tensor).keys() <= FAKE_ATTRIBUTES


def is_wrapper(tensor: Any) -> bool:
    """True for a tensor whose class says of which tensors it is made, and how operators compute with those."""
    return is_traceable_wrapper_subclass(tensor)


def functional_mode() -> Any:
    """The mode that makes operators functional here; None outside AOTAutograd. A higher-order operator runs its functions in another."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL)


def active_modes() -> tuple[int, ...]:
    """The modes that see functions and operators here, by identity."""
    from torch.overrides import _get_current_function_mode_stack
    from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

    return tuple(map(id, (*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack())))


def was_written(tensor: torch.Tensor) -> bool:
    """True if a tensor from `fresh_tensors`, or anything that shares its memory, was written to in place."""
    if isinstance(tensor, FakeTensor):
        return tensor._version > 0
    return bool(torch._functionalize_has_data_mutation(tensor.elem))  # type: ignore[attr-defined]


def fresh_tensors(like: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """New traced tensors with the shapes, strides and dtypes of these; they share no memory."""
    from torch.utils._python_dispatch import _disable_current_modes

    made = []
    values = [_content(tensor) for tensor in like]
    with _disable_current_modes():
        for value in values:
            with value.fake_mode:
                offset, kind = value.storage_offset(), {"dtype": value.dtype, "device": value.device}
                fresh = torch.empty(value.untyped_storage().nbytes() // value.itemsize, **kind) if offset else torch.empty_strided(value.shape, value.stride(), **kind)
                made.append((fresh.as_strided(value.shape, value.stride(), offset) if offset else fresh).requires_grad_(value.requires_grad))
    return [fresh if isinstance(tensor, FakeTensor) else FunctionalTensor.to_functional(fresh) for tensor, fresh in zip(like, made, strict=True)]


def _content(tensor: torch.Tensor) -> Any:
    """The fake tensor that a traced tensor holds now."""
    if isinstance(tensor, FakeTensor):
        return tensor
    torch._sync(tensor)
    return torch._from_functional_tensor(tensor.elem)  # type: ignore[attr-defined]


def unscoped_call(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    """A call of a module that no tracer notes as one; hooks run."""
    from torch.fx._symbolic_trace import _orig_module_call

    return _orig_module_call(module, *args, **kwargs)


class Tape:
    """The graph that grows while AOTAutograd runs a model for the second time."""

    @staticmethod
    def running() -> "Tape | None":
        """None in the first run, which notes nothing. Another inside a function of a higher-order operator, which has a graph of its own."""
        from torch.fx.experimental.proxy_tensor import get_proxy_mode

        mode = get_proxy_mode()
        return None if mode is None else Tape(mode.tracer)

    def __init__(self, tracer: Any) -> None:
        self.tracer = tracer
        self.graph: torch.fx.Graph = tracer.graph

    def scoped(self, module: torch.nn.Module, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """`function(*args, **kwargs)`, noted as a call of the module."""
        return self.tracer.call_module(module, function, args, kwargs)

    @property
    def modules(self) -> dict[str, tuple[str, str]]:
        """The modules that are running, outermost first, as nodes name them: key -> (path, class)."""
        stack = self.tracer.module_stack.items()
        return {key: (path, f"{kind.__module__}.{kind.__qualname__}" if isinstance(kind, type) else kind) for key, (path, kind) in stack}

    @property
    def calls(self) -> dict[str, int]:
        """How often each module was called, by its path; it may be written."""
        return self.tracer.num_calls

    def node_of(self, tensor: torch.Tensor) -> torch.fx.Node | None:
        """The node whose value a traced tensor holds now."""
        from torch.fx.experimental.proxy_tensor import get_proxy_slot

        slot = get_proxy_slot(_content(tensor), self.tracer, None)
        return None if slot is None else slot.proxy.node

    def stand_for(self, tensor: torch.Tensor, node: torch.fx.Node, *, sizes: bool) -> None:
        """Operators on a traced tensor refer to this node from now on. sizes: its sizes may be read from it, as from the result of an operator."""
        from torch.fx.experimental.proxy_tensor import _ProxyTensor, set_proxy_slot, track_tensor

        proxy, value = torch.fx.Proxy(node, self.tracer), _content(tensor)
        if sizes:
            track_tensor(value, proxy, constant=None, tracer=self.tracer)
        else:
            set_proxy_slot(value, self.tracer, _ProxyTensor(proxy, None))


def lazy_graph_module() -> type[torch.fx.GraphModule]:
    """The class of GraphModules that generate their Python code when they are first called or printed, not when they get a graph.

    A torch without it: GraphModule itself, which is right and slower.
    """
    try:
        from torch.fx._lazy_graph_module import _LazyGraphModule
    except ImportError:
        return torch.fx.GraphModule
    return _LazyGraphModule


@contextlib.contextmanager
def helpers_in_traces(hidden: tuple[str, ...]) -> Iterator[None]:
    """Let the stack traces of exported operators name the functions that a `forward` calls (an attention processor, a rotary embedding) too.

    hidden: beginnings of the paths of frames that stay out, torch's for example.
    """
    from torch.fx.experimental.proxy_tensor import PythonKeyTracer as Tracer

    name = "_filter_traceback_frames"
    usual, own = getattr(Tracer, name, None), Tracer.__dict__.get(name)

    def keep(tracer: Any, frames: traceback.StackSummary) -> traceback.StackSummary:
        assert usual is not None
        kept = {(frame.filename, frame.lineno, frame.name) for frame in usual(tracer, frames)}
        first = next((i for i, frame in enumerate(frames) if frame.name == "forward"), len(frames))
        chosen = [f for i, f in enumerate(frames) if (f.filename, f.lineno, f.name) in kept or (i > first and not f.filename.startswith(hidden))]
        return traceback.StackSummary.from_list(chosen)

    if usual is None:  # a torch without this hook: lines of `forward` only
        yield
        return
    try:
        setattr(Tracer, name, keep)
        with _lines_on_demand():
            yield
    finally:
        delattr(Tracer, name) if own is None else setattr(Tracer, name, own)


@contextlib.contextmanager
def _lines_on_demand() -> Iterator[None]:
    """Let stack traces look up lines of source when they are printed: of the eighty frames around an operator few are kept."""
    from torch.utils import _traceback as captured

    name = "_extract_symbolized_tb"
    usual = getattr(captured, name, None)

    def extract(frames: list[dict[str, Any]], skip: int) -> traceback.StackSummary:
        return traceback.StackSummary(traceback.FrameSummary(f["filename"], f["line"], f["name"], lookup_line=False) for f in reversed(frames[skip:]))

    if usual is None:
        yield
        return
    try:
        setattr(captured, name, extract)
        yield
    finally:
        setattr(captured, name, usual)


def being_compiled(x: torch.Tensor) -> bool:
    """Whether a compiler is to read what happens to `x`: Dynamo traces, or AOTAutograd a graph that a backend was given (`is_compiling()` is false then)."""
    return torch.compiler.is_compiling() or isinstance(x, FunctionalTensor)


def python_kernel(operator: OpOverload, device: str) -> torch._C.DispatchKey | None:
    """The dispatch key under which a Python function runs an operator on a kind of device; None if there is no kernel, or one that is no Python.

    On the meta device nothing runs; asked there for what would on a CPU.
    """
    name = operator._name
    key = {"cpu": "CPU", "meta": "CPU", "cuda": "CUDA"}.get(device)
    if key is None or not torch._C._dispatch_has_kernel(name):
        return None
    kernels = dict(line.split(": ", 1) for line in torch._C._dispatch_dump(name).splitlines() if ": registered at " in line)
    chosen = kernels.get(key) or next((where for alias, where in kernels.items() if alias.startswith("CompositeExplicitAutograd[")), "")
    return getattr(torch._C.DispatchKey, key) if ".py:" in chosen else None


@contextlib.contextmanager
def contentless(tensors: Sequence[Any]) -> Iterator[None]:
    """Fake tensors, and what is made of them, refuse to say where their content is: to code that is no Python they would say 0."""
    fake = [tensor for tensor in tensors if isinstance(tensor, FakeTensor)]
    before = [(mode, mode._allow_unsafe_data_ptr_access) for mode in {id(tensor.fake_mode): tensor.fake_mode for tensor in fake}.values()]
    for tensor in fake:
        torch._C._set_throw_on_mutable_data_ptr(tensor)
    try:
        for mode, _ in before:
            mode._allow_unsafe_data_ptr_access = False
        yield
    finally:
        for mode, allowed in before:
            mode._allow_unsafe_data_ptr_access = allowed


def lookup_backend(name: str) -> Callable[..., Any]:
    """The Dynamo backend registered as `name` (`"inductor"`, `"eager"`, `"aot_eager"`, ...)."""
    from torch._dynamo.backends.registry import lookup_backend as lookup

    return lookup(name)


def unbacked_symbols(value: Any) -> frozenset[sympy.Symbol]:
    """The symbols of a size or condition that stand for values read from tensors, not for input sizes."""
    return frozenset(free_unbacked_symbols(value))


def sym_max(a: int, b: int) -> int:
    """The larger of two sizes, without a guard on symbolic ones.

    `torch.sym_max`, but while Dynamo traces: that of torch 2.11 refuses it for two numbers. The built-in gives a number there, or for symbols `torch.sym_max`.
    """
    return max(a, b) if torch.compiler.is_dynamo_compiling() else torch.sym_max(a, b)


def sym_min(a: int, b: int) -> int:
    """The smaller of two sizes, as `sym_max`."""
    return min(a, b) if torch.compiler.is_dynamo_compiling() else torch.sym_min(a, b)


def symbolic_shape(value: torch.Tensor) -> tuple[int | sympy.Expr, ...]:
    """Shape of a fake tensor as ints and sympy expressions (what its ShapeEnv knows to be equal is replaced)."""
    sizes = (size.node.expr if isinstance(size, torch.SymInt) else int(size) for size in value.shape)
    return tuple(int(size) if isinstance(size, int) or size.is_number else size for size in sizes)


def shape_guards(shape_env: ShapeEnv) -> tuple[sympy.Basic, ...]:
    """Every relation between sizes that tracing relied on, with known equalities replaced, without repetition."""
    return tuple(dict.fromkeys(shape_env.replace(guard.expr) for guard in shape_env.guards))


def symbol_range(shape_env: ShapeEnv, symbol: sympy.Symbol) -> tuple[sympy.Expr, sympy.Expr]:
    """Smallest and largest value (inclusive) tracing assumed for `symbol`."""
    known = shape_env.var_to_range[symbol]
    return known.lower, known.upper


def symbol_hints(shape_env: ShapeEnv | None) -> dict[sympy.Symbol, int]:
    """The example's value of every symbol that comes from an input size."""
    return {} if shape_env is None else {symbol: int(value) for symbol, value in shape_env.backed_var_to_val.items()}


def size_functions() -> tuple[type, ...]:
    """The classes of torch's own functions of sizes that may occur in relations between input sizes."""
    from torch.utils._sympy import functions

    names = ("CeilDiv", "CeilToInt", "CleanDiv", "FloorDiv", "FloorToInt", "IntTrueDiv", "FloatTrueDiv", "Max", "Min", "Mod", "ModularIndexing", "PythonMod", "PowByNatural", "ToFloat", "TruncToInt", "Where")
    return tuple(getattr(functions, name) for name in names if hasattr(functions, name))


def size_bounds() -> dict[sympy.Basic, str]:
    """Ends of ranges that are no numbers, and their names."""
    from torch.utils._sympy.numbers import int_oo

    return {int_oo: "int_oo", -int_oo: "-int_oo", sympy.oo: "oo", -sympy.oo: "-oo"}
