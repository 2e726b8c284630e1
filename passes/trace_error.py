"""Turn whatever torch.export raised into one message: which operator, which line of the user's code, what to try."""

import linecache
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Mapping, Sequence
from types import FrameType

import torch

from seqpar.errors import TraceError

TORCH = os.path.dirname(torch.__file__) + os.sep
HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep
STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
DATA_DEPENDENT = re.compile(r"data[- ]dependent|DataDependent|Could not guard|unbacked|local_scalar_dense|fake tensor", re.I)

FRAME = re.compile(r'File "([^"]+)", line (\d+), in (\S+)\n\s*(.*)')

READ_ADVICE = (
    "The model reads a value out of a tensor (`if tensor:`, `.item()`, `.tolist()`, indexing by a boolean mask), so its program depends on data: "
    "pass that value as a Python argument (a flag, a list of lengths), or drop the input it comes from (a mask that hides nothing can be None)."
)
GENERAL_ADVICE = (
    "Try dynamic=False; run the model eagerly with the same inputs; give every optional input explicitly; "
    "torch.export.export(model, args, kwargs, strict=False) shows the whole error."
)


class ContentNeeded(TraceError):
    """The tracer needs the content of a tensor. operator, where: at which call; modules: those that were running, innermost first."""

    def __init__(self, message: str, operator: str, where: str, modules: tuple[str, ...]) -> None:
        super().__init__(message)
        self.operator, self.where, self.modules = operator, where, modules


def trace_error(error: BaseException, model: torch.nn.Module) -> TraceError:
    """A TraceError that describes `error`: one of ours that torch or the model wrapped, or a new one."""
    cause = error.__cause__  # not what was being handled meanwhile: attempts before this one
    while cause is not None:
        if isinstance(cause, TraceError):
            return cause
        cause = cause.__cause__
    message = " ".join(str(error).split("\n\n")[0].split())[:400] or type(error).__name__
    where = user_line(error)
    data_dependent = bool(DATA_DEPENDENT.search(f"{type(error).__name__} {error}"))
    lines = [
        f"{type(model).__name__} cannot be traced into one graph: {type(error).__name__}: {message}",
        f"  operator: {operator_name(error)}",
        f"  where:    {where or 'unknown'}",
        f"  try:      {READ_ADVICE if data_dependent else GENERAL_ADVICE}",
    ]
    if data_dependent:
        names = {id(module): name for name, module in model.named_modules()}
        return ContentNeeded("\n".join(lines), operator_name(error), where or "unknown", running_modules(error, names))
    return TraceError("\n".join(lines))


def user_line(error: BaseException) -> str | None:
    """The innermost frame that is neither torch's, nor Python's, nor ours: `file:line in function: source`."""
    for exception in chain(error):
        for frame in reversed(traceback.extract_tb(exception.__traceback__)):
            path = os.path.abspath(frame.filename)
            if not path.startswith((TORCH, HERE, STDLIB + "contextlib", STDLIB + "functools")) and os.path.exists(path):
                return f"{frame.filename}:{frame.lineno} in {frame.name}: {frame.line}"
    # What a later pass of the tracer says names the line that made the node.
    for exception in chain(error):
        for path, number, name, source in reversed(FRAME.findall(str(exception))):
            if not os.path.abspath(path).startswith((TORCH, HERE)) and os.path.exists(path):
                return f"{path}:{number} in {name}: {source.strip()}"
    return None


def calling_line() -> str:
    """The innermost calling frame that is neither torch's, nor Python's, nor ours: `file:line in function: source`."""
    frame = sys._getframe(1)
    while frame is not None:
        path = os.path.abspath(frame.f_code.co_filename)
        if not path.startswith((TORCH, HERE, STDLIB + "contextlib", STDLIB + "functools")):
            return f"{path}:{frame.f_lineno} in {frame.f_code.co_name}: {linecache.getline(path, frame.f_lineno).strip()}"
        frame = frame.f_back  # type: ignore[assignment]
    return "unknown"


def calling_modules(names: Mapping[int, str]) -> tuple[str, ...]:
    """The modules whose `forward` is running, innermost first; `names`: id of a module -> its qualified name."""
    frames: list[FrameType] = []
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    return _modules_of(frames, names)


def running_modules(error: BaseException, names: Mapping[int, str]) -> tuple[str, ...]:
    """The same for where `error` was raised."""
    for exception in chain(error):  # the first that tells: an earlier trace may have failed elsewhere
        found = _modules_of([frame for frame, _ in reversed(list(traceback.walk_tb(exception.__traceback__)))], names)
        if found:
            return found
    return ()


def _modules_of(frames: Sequence[FrameType], names: Mapping[int, str]) -> tuple[str, ...]:
    found: list[str] = []
    for frame in frames:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            name = names.get(id(frame.f_locals.get(code.co_varnames[0])))
            if name is not None and name not in found:
                found.append(name)
    return tuple(found)


def operator_name(error: BaseException) -> str:
    """The ATen operator the message names, else the call in the failing source line, else 'unknown'."""
    for exception in chain(error):
        found = re.search(r"\b(?:torch\.ops\.)?((?:aten|_c10d_functional|prims|[a-z_]+)(?:::|\.)[a-z_0-9]+)(?:\.(?:default|Tensor|Scalar|int))?", str(exception))
        if found and re.search(r"aten|torch\.ops", found[0]):
            return found[0]
    line = user_line(error) or ""
    source = line.partition(": ")[2]
    called = re.findall(r"([\w.]+)\(", source)
    if called:
        return called[-1]
    return f"`{source}`" if source else "unknown"


def chain(error: BaseException) -> list[BaseException]:
    """`error` and what caused it, outermost first."""
    found: list[BaseException] = []
    current: BaseException | None = error
    while current is not None and current not in found:
        found.append(current)
        current = current.__cause__ or current.__context__
    return found
