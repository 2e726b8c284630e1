"""Record the values a model reads from tensors, and repeat them while it is traced.

Before: `if mask.all(): ...` stops the tracer
After:  the eager run of the example said True: the tracer goes on with True, and the graph gets an output `mask.all()` that
        `passes/read_guard.py` turns into a condition for using the program
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from seqpar.errors import TraceError
from seqpar.passes.arguments import Call
from seqpar.passes.reads import HANDLERS, Positions, data
from seqpar.passes.state_digest import OPERATORS
from seqpar.passes.trace_error import calling_line, calling_modules
from seqpar.passes.warm import restored, warm_up

SET_DATA = Tensor.data.__set__  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Record:
    """One question a model asked about the content of a tensor.

    Invariants: `value` is what the guard compares, on the CPU: the tensor itself (`reduce` empty), or its `all()` or `any()` where
    that decides the answer. `function` and `where` tell a reader who asked, `modules` which modules were running, innermost first. `number`: a floating number, which may stay a symbol
    where it decides nothing (`x * scale.item()`).
    """

    value: Tensor
    reduce: str
    answer: Any
    function: str
    where: str
    number: bool = False
    modules: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.reduce in ("", "all", "any") and self.value.device.type == "cpu"


def operator_name(operator: Any) -> str:
    """`"aten::add"`, whatever the overload."""
    return str(getattr(operator, "_qualified_op_name", None) or operator._name).partition(".")[0]


class FunctionReader(TorchFunctionMode):
    """Sends the functions of `HANDLERS` to their handlers, which call back for answers."""

    replaying = False
    idle = False  # nothing is read

    def __init__(self) -> None:
        super().__init__()
        self.function = ""

    def ask(self, tensor: Tensor, summarise: Callable[[Tensor], Any]) -> Any:
        raise NotImplementedError

    def ask_mask(self, mask: Tensor) -> Positions:
        raise NotImplementedError

    def __torch_function__(self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        handler = HANDLERS.get(func)
        if handler is None or (self.idle and handler is not data):
            return func(*args, **(kwargs or {}))
        self.function = getattr(func, "__name__", str(func))
        return handler(self, func, args, kwargs or {})


class Recorder(FunctionReader):
    """Active during an eager run: answers truthfully and remembers."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.records: list[Record] = []
        self.names = {id(module): name for name, module in model.named_modules()}

    def note(self, value: Tensor, reduce: str, answer: Any, number: bool = False) -> None:
        self.records.append(Record(value, reduce, answer, self.function, calling_line(), number, calling_modules(self.names)))

    def ask(self, tensor: Tensor, summarise: Callable[[Tensor], Any]) -> Any:
        """The answer, from the content of `tensor`."""
        value = tensor.detach().cpu().clone()
        answer = summarise(value)
        self.note(value, "", answer, self.function == "item" and value.is_floating_point())
        return answer

    def ask_mask(self, mask: Tensor) -> Positions:
        """The true positions; that all or none are true is remembered instead of the mask where that is so."""
        value = mask.detach().cpu().clone()
        answer = Positions.of(value)
        reduce = "all" if answer.rows is None else "" if answer.rows else "any"
        self.note(getattr(value, reduce)() if reduce else value, reduce, answer)
        return answer


class Replayer(FunctionReader):
    """Active while tracing: repeats the answers in order, and collects what the guard has to compute.

    `numbers`: floating numbers are repeated as well; otherwise the tracer makes symbols of them, so that the program serves any value.
    """

    replaying = True

    def __init__(self, records: Sequence[Record], numbers: bool = True) -> None:
        super().__init__()
        self.records, self.numbers = tuple(records), numbers
        self.asked: list[Tensor] = []
        self.used: list[Record] = []  # those in `asked`
        self.position = 0
        self.idle = not self.records
        self.autocast: dict[str, set[torch.dtype | None]] = defaultdict(set)  # in which dtypes operators of other libraries were called; what is in them may be cast

    def __enter__(self) -> Replayer:
        self.asked, self.used, self.position = [], [], 0  # torch.export runs a model more than once
        return super().__enter__()

    def __torch_function__(self, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func is torch._C._set_grad_enabled:  # no value depends on it, and torch.export makes subgraphs of it, or fails where it lasts to the end of `forward`
            return None
        if isinstance(func, OPERATORS):
            device = next((x.device.type for x in args if isinstance(x, Tensor)), "meta")
            self.autocast[operator_name(func)].add(torch.get_autocast_dtype(device) if device != "meta" and torch.is_autocast_enabled(device) else None)
        if func == SET_DATA:
            raise TraceError(
                f"the model exchanges the content of a tensor of shape {tuple(args[0].shape)} by `.data = …` at {calling_line()} while it runs, which a program would leave out. Weights that are "
                "moved or exchanged for the time of a call (offloading by hooks, int8 layers of bitsandbytes): switch that off for this model, or do it once before compiling"
            )
        return super().__torch_function__(func, types, args, kwargs)

    def _next(self) -> Record:
        """The record of this question. Those before it which the tracer did not ask are left out: models skip some of their checks while they are traced."""
        where = calling_line()
        rest = range(self.position, len(self.records))
        if not rest:
            raise TraceError(f"{self.function} reads a value from a tensor at {where}, which the eager run of the example did not do")
        place = next((i for i in rest if (self.records[i].function, self.records[i].where) == (self.function, where)), self.position)
        record = self.records[place]
        if record.function != self.function:
            raise TraceError(f"{self.function} reads a value from a tensor at {where}, where the eager run of the example called {record.function} at {record.where}")
        self.position = place + 1
        return record

    def _guard(self, tensor: Tensor, record: Record) -> Any:
        # A copy, because the model may write to the tensor later.
        self.asked.append(getattr(tensor, record.reduce)() if record.reduce else tensor.detach().clone())
        self.used.append(record)
        return record.answer

    def ask(self, tensor: Tensor, summarise: Callable[[Tensor], Any]) -> Any:
        """The recorded answer; a floating number stays a symbol unless `numbers`."""
        record = self._next()
        return summarise(tensor) if record.number and not self.numbers else self._guard(tensor, record)

    def ask_mask(self, mask: Tensor) -> Positions:
        """The recorded positions."""
        return self._guard(mask, self._next())


def record_reads(model: torch.nn.Module, call: Call) -> tuple[Exception | None, tuple[Record, ...]]:
    """Run the model eagerly for tables it memoises, and once more if it read values.

    Returns what the run failed with, if it did, and the reads of a run with warm tables, which is what tracing will see.
    """
    cold = Recorder(model)
    failure = warm_up(model, *example(call), watch=cold)
    if failure is not None or not cold.records:
        return failure, ()
    warm = Recorder(model)
    with restored(model):
        failure = warm_up(model, *example(call), watch=warm)
    return failure, tuple(warm.records)


def example(call: Call) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """(args, kwargs) with tensors of their own, which the model may write to."""
    with torch.inference_mode(False), torch.no_grad():
        return call.rebuild([leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in call.leaves])
