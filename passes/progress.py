"""What people see of a long compilation: one log line per stage, and a file per pass."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import logging
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from torch import fx

from seqpar.passes.config import config

Function = TypeVar("Function", bound=Callable[..., Any])
Pass = Callable[[fx.GraphModule], fx.GraphModule]


@contextlib.contextmanager
def stage(name: str, doing: str, *arguments: object) -> Iterator[None]:
    """Log what begins (INFO, logger `seqpar.<name>`) and how long it took (DEBUG)."""
    log = logging.getLogger(f"seqpar.{name}")
    log.info(doing, *arguments)
    started = time.perf_counter()
    yield
    log.debug("%s: %.2f s", doing % arguments, time.perf_counter() - started)


def staged(name: str, doing: str) -> Callable[[Function], Function]:
    """Make every call of a function a stage; `doing` has one %s, for the class of its first argument."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def run(first: Any, *args: Any, **kwargs: Any) -> Any:
            with stage(name, doing, type(first).__name__):
                return function(first, *args, **kwargs)

        return run  # type: ignore[return-value]

    return decorate


@dataclass
class Dump:
    """A folder with one file per pass of one program, numbered; writes nothing if there is no folder."""

    folder: Path | None = None
    _numbers: Iterator[int] = field(default_factory=itertools.count)

    @staticmethod
    def open(title: str) -> Dump:
        """A new folder `title_N` in `seqpar.config.dump_dir`, if that is set."""
        parent = config.dump_dir
        if parent is None:
            return Dump()
        parent.mkdir(parents=True, exist_ok=True)
        for number in itertools.count():
            with contextlib.suppress(FileExistsError):  # of an earlier program, or of another rank
                folder = parent / f"{title}_{number}{_of_rank()}"
                folder.mkdir()
                return Dump(folder)
        raise AssertionError("unreachable")

    def text(self, name: str, make: Callable[[], str]) -> None:
        """Write what `make` returns; not called if nothing is dumped."""
        if self.folder is not None:
            (self.folder / f"{next(self._numbers):02d}_{name}.txt").write_text(make() + "\n")

    def graph(self, name: str, gm: fx.GraphModule, before: fx.GraphModule | Counter[str] | None = None) -> None:
        """Write a graph, headed by what became more and fewer since `before` (a graph, or the operators it had)."""
        if self.folder is not None:
            earlier = operators(before) if isinstance(before, fx.GraphModule) else before
            self.text(name, lambda: "\n".join([*_header(name, operators(gm), earlier), gm.print_readable(print_output=False)]))


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """No search for garbage in the block: graphs are full of cycles, and nearly all of them stay; it was a quarter of the time."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()


def run_passes(gm: fx.GraphModule, passes: Sequence[Pass], dump: Dump) -> fx.GraphModule:
    """Apply the passes in order; each is dumped."""
    for each in passes:
        before = operators(gm) if dump.folder is not None else None
        gm = each(gm)
        dump.graph(each.__name__, gm, before)
    return gm


def operators(gm: fx.GraphModule) -> Counter[str]:
    """How often each operator is called."""
    return Counter(str(node.target) for node in gm.graph.nodes if node.op.startswith("call"))


def _header(name: str, now: Counter[str], before: Counter[str] | None) -> list[str]:
    if before is None:
        return [f"# {name}: {now.total()} operators"]
    changes = [f"#   {now[target] - before[target]:+d} {target}" for target in sorted({*now, *before}) if now[target] != before[target]]
    return [f"# {name}: {before.total()} -> {now.total()} operators", *(changes or ["#   no operator more or fewer"])]


def _of_rank() -> str:
    rank = os.environ.get("RANK")
    return "" if rank is None else f"_of_rank_{rank}"
