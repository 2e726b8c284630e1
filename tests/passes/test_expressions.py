"""Lengths in a graph: the emitted arithmetic has the value of the expression, and each expression is written once."""

import math

import pytest
import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import CeilToInt, FloatTrueDiv, FloorDiv, FloorToInt, RoundToInt, ToFloat, TruncToInt

from seqpar.partitioner.lengths import part, total
from seqpar.passes.expressions import ExpressionEmitter

s, t = (sympy.Symbol(n, positive=True, integer=True) for n in "st")


def emitter():
    graph = fx.Graph()
    expressions = ExpressionEmitter(graph, {s: (0, 1), t: (1, 0)})
    for name in ("x", "y"):
        expressions.add_placeholder(graph.placeholder(name))
    return graph, expressions


@pytest.mark.parametrize(
    "length", [s, s + 1, 2 * s * t, part(s, 1, 4), total([part(s, 0, 3), part(t, 2, 3), 5]), FloorDiv(s * t, 2) - t, s**2, sympy.Mod(s, 3) + t]
)
@pytest.mark.parametrize("sizes", [(9, 4), (10, 7)])
def test_value(length, sizes):
    graph, expressions = emitter()
    graph.output(expressions.emit(length))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    assert gm(torch.empty(2, sizes[0]), torch.empty(sizes[1])) == int(length.subs({s: sizes[0], t: sizes[1]}))


@pytest.mark.parametrize("rounded", [FloorToInt, CeilToInt, TruncToInt, RoundToInt])
def test_lengths_that_were_rounded(rounded):
    """As `torch.arange(start, stop, -1.0)` makes them."""
    graph, expressions = emitter()
    graph.output(expressions.emit(rounded(FloatTrueDiv(ToFloat(s - 10), ToFloat(t)))))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    for size in (3, 14, 17):
        assert gm(torch.empty(2, size), torch.empty(4)) == {FloorToInt: math.floor, CeilToInt: math.ceil, TruncToInt: math.trunc, RoundToInt: round}[rounded]((size - 10) / 4)


def test_numbers_stay_numbers():
    graph, expressions = emitter()
    values = expressions.emit_all([3, sympy.Integer(4), 0])
    assert values == [3, 4, 0] and all(type(v) is int for v in values) and len(graph.nodes) == 2


def test_each_expression_is_written_once():
    graph, expressions = emitter()
    first = expressions.emit(part(s, 1, 4))
    before = len(graph.nodes)
    assert expressions.emit(part(s, 1, 4)) is first and len(graph.nodes) == before
    sizes = [n for n in graph.nodes if n.target is torch.ops.aten.sym_size.int]
    expressions.emit(s + 7)
    assert [n for n in graph.nodes if n.target is torch.ops.aten.sym_size.int] == sizes
