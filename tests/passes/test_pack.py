"""Gathers in a row become one collective; what one of them needs stays apart."""

import torch
from torch.fx import Graph

from seqpar.passes.pack import pack_gathers
from seqpar.runtime.groups import all_reduce
from seqpar.runtime.layout import gather, gather_many

aten = torch.ops.aten
SEGMENTS = ((2, 2),)


def gathered(graph, x, dtype=torch.float32):
    node = graph.call_function(gather, (x, 0, SEGMENTS), {"group": "sp"})
    node.meta["seqpar_dtype"] = dtype
    return node


def targets(graph):
    return [n.target for n in graph.nodes if n.op == "call_function"]


def test_readers_of_the_first_move_behind_the_last():
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    first = graph.call_function(aten.neg.default, (gathered(graph, x),))
    second = gathered(graph, graph.call_function(aten.abs.default, (y,)))
    graph.output(graph.call_function(aten.add.Tensor, (first, second)))
    pack_gathers(graph)
    absolute, packed, *parts, negative, added = targets(graph)
    assert (absolute, packed, negative, added) == (aten.abs.default, gather_many, aten.neg.default, aten.add.Tensor) and len(parts) == 2
    (call,) = [n for n in graph.nodes if n.target is gather_many]
    assert [n.name for n in call.args[0]] == ["x", "abs_default"] and list(call.args[1:]) == [[0, 0], [SEGMENTS] * 2] and call.kwargs == {"group": "sp"}


def kept_apart(build):
    graph = Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    graph.output(build(graph, x, y))
    before = targets(graph)
    pack_gathers(graph)
    return targets(graph) == before


def test_what_needs_another_has_another_dtype_or_a_collective_between_stays():
    assert kept_apart(lambda g, x, y: gathered(g, g.call_function(aten.neg.default, (gathered(g, x),))))
    assert kept_apart(lambda g, x, y: [gathered(g, x), gathered(g, y, torch.bfloat16)])
    assert kept_apart(lambda g, x, y: [gathered(g, x), g.call_function(all_reduce, (y, "sum"), {"group": "sp"}), gathered(g, y)])
    assert not kept_apart(lambda g, x, y: [gathered(g, x), gathered(g, y)])
