"""Emit lengths into a graph: numbers as they are, sympy expressions as arithmetic on the sizes of the inputs.

Before: `s31 + FloorDiv(s87 + 1, 2)`
After:  %sym_size = aten.sym_size.int(%hidden_states, 1); %add = add(%sym_size, …)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node, Proxy
from torch.fx.proxy import GraphAppendingTracer

from seqpar.compat import PythonReferenceAnalysis, sympy_interp
from seqpar.partitioner.lengths import Length


class GraphAnalysis(PythonReferenceAnalysis):
    """Torch's analysis, with calls where it would round a number: a value of the graph is none."""

    @staticmethod
    def floor_to_int(x: Any, dtype: torch.dtype) -> Any:
        return _called(math.floor, x)

    @staticmethod
    def ceil_to_int(x: Any, dtype: torch.dtype) -> Any:
        return _called(math.ceil, x)

    @staticmethod
    def trunc_to_int(x: Any, dtype: torch.dtype) -> Any:
        return _called(math.trunc, x)

    @staticmethod
    def round_to_int(x: Any, dtype: torch.dtype) -> Any:
        return _called(round, x)

    @staticmethod
    def floor(x: Any) -> Any:
        return _called(float, _called(math.floor, x))

    @staticmethod
    def ceil(x: Any) -> Any:
        return _called(float, _called(math.ceil, x))


def _called(function: Callable[[Any], Any], x: Any) -> Any:
    return x.tracer.create_proxy("call_function", function, (x,), {}) if isinstance(x, Proxy) else function(x)


class ExpressionEmitter:
    """Writes each expression once, before the first node that uses it."""

    def __init__(self, graph: Graph, symbols: Mapping[sympy.Symbol, tuple[int, int]]) -> None:
        self._graph = graph
        self._symbols = symbols
        self._tracer = GraphAppendingTracer(graph)
        self._placeholders: list[Node] = []
        self._known: dict[sympy.Basic, Proxy] = {}

    def add_placeholder(self, node: Node) -> None:
        self._placeholders.append(node)

    def emit(self, length: Length) -> int | Node:
        """The value of a length in the emitted graph."""
        if isinstance(length, int):
            return length
        if length.is_number:
            return int(length)
        known = self._known.get(length)
        if known is None:
            for symbol in sorted(length.free_symbols, key=str):  # a set of symbols has another order in every process
                if symbol not in self._known:
                    index, dim = self._symbols[symbol]
                    size = self._graph.call_function(torch.ops.aten.sym_size.int, (self._placeholders[index], dim))
                    self._known[symbol] = Proxy(size, self._tracer)
            known = sympy_interp(GraphAnalysis, self._known, length)
            self._known[length] = known
        return known.node

    def emit_all(self, lengths: Sequence[Length]) -> list[Any]:
        return [self.emit(n) for n in lengths]
