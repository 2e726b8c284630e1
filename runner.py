"""Run an emitted program as it is now, also after a user's own pass over its graph."""

from collections.abc import Callable
from typing import Any

from torch import fx


class Runner:
    """Calls `gm`, compiled by `compile_program` if given; `gm.recompile()` makes the next call run (and compile) the new code."""

    def __init__(self, gm: fx.GraphModule, compile_program: Callable[[fx.GraphModule], Callable[..., Any]] | None = None):
        self.gm = gm
        self.compile_program = compile_program
        self.prepare()

    def prepare(self) -> None:
        """Take the code that the program has now."""
        self.code = type(self.gm).forward
        self.run = self.gm.forward if self.compile_program is None else self.compile_program(self.gm)

    def __call__(self, *inputs: Any) -> Any:
        if type(self.gm).forward is not self.code:
            self.prepare()
        return self.run(*inputs)
