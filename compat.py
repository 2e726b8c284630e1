"""Every torch interface in use that is not public, in one place and behind one version check.

Supported: torch 2.11 to 2.13. Other files import these names from here, so that a new torch release is
a change to this file only.
"""

import contextlib
import logging
import re
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._sympy.functions import FloorDiv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

from seqpar.errors import SeqparError

__all__ = [
    "FakeTensor",
    "FakeTensorMode",
    "FloorDiv",
    "HigherOrderOperator",
    "NO_MODULE",
    "OpOverload",
    "PythonReferenceAnalysis",
    "ShapeEnv",
    "TorchDispatchMode",
    "aot_export",
    "being_compiled",
    "check_torch_version",
    "helpers_in_traces",
    "lazy_graph_module",
    "lookup_backend",
    "outside_compiler",
    "pytree",
    "quiet",
    "shape_guards",
    "size_bounds",
    "size_functions",
    "sym_max",
    "sym_min",
    "sympy_interp",
    "symbol_range",
    "symbolic_shape",
    "tolist_seen_by_modes",
    "unbacked_symbols",
]

OLDEST, NEWEST = (2, 11), (2, 13)
NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"  # in place of a module path: sizes that are read from the inputs
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
    from torch.export.exported_program import _override_composite_implicit_decomp, _split_decomp_table_to_cia_and_python_decomp
    from torch.fx._lazy_graph_module import _use_lazy_graph_module

    composites, _ = _split_decomp_table_to_cia_and_python_decomp({})
    with _override_composite_implicit_decomp(composites), _use_lazy_graph_module(True):
        return _export(module, args, {}, dynamic_shapes, strict=False, pre_dispatch=False)


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


def lookup_backend(name: str) -> Callable[..., Any]:
    """The Dynamo backend registered as `name` (`"inductor"`, `"eager"`, `"aot_eager"`, ...)."""
    from torch._dynamo.backends.registry import lookup_backend as lookup

    return lookup(name)


def unbacked_symbols(value: Any) -> frozenset[sympy.Symbol]:
    """The symbols of a size or condition that stand for values read from tensors, not for input sizes."""
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

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
