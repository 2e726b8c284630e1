"""Programs share the model's parameters, and generate code only when they are run."""

import copy
from unittest import mock

import torch
from torch import fx, nn

from seqpar.passes.pipeline import partition
from seqpar.passes.share import copied, share_graph, with_graph
from seqpar.passes.trace import trace


def doubled(scale: float) -> fx.Graph:
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("weight")
    graph.output(graph.call_function(torch.mul, (graph.call_function(torch.mul, (x, w)), scale)))
    return graph


def test_code_is_generated_by_the_first_call_of_a_program():
    model = nn.LayerNorm(3)
    with mock.patch.object(fx.Graph, "python_code", autospec=True, side_effect=fx.Graph.python_code) as generated:
        gm = share_graph(model, doubled(2.0), {})
        other = with_graph(gm, doubled(3.0))
        early = generated.call_count
        with_graph(gm, doubled(3.0), compiled=True)
        assert generated.call_count > early, "for torch.compile"
        late = generated.call_count
        for _ in range(2):
            assert torch.equal(gm(torch.ones(3)), torch.full((3,), 2.0)) and torch.equal(other(torch.ones(3)), torch.full((3,), 3.0))
        assert generated.call_count == late + 2, "once each"
    model.weight = nn.Parameter(torch.full((3,), 5.0))
    assert torch.equal(gm(torch.ones(3)), torch.full((3,), 10.0)), "the model's own parameters"
    assert torch.equal(copy.deepcopy(other)(torch.ones(3)), torch.full((3,), 15.0)) and "mul" in gm.code


class Attention(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x * 2, x * 3)


def test_partitioning_generates_no_code():
    """Of a large model it took a quarter of the time."""
    with mock.patch.object(fx.Graph, "python_code", autospec=True, side_effect=fx.Graph.python_code) as generated:
        traced = trace(Attention(), (torch.randn(1, 2, 8, 4),), {}, dynamic=False)
        before = generated.call_count
        program = partition(traced, ulysses=2).program(0)
    sizes = [len(call.args[0].nodes) for call in generated.call_args_list[before:]]
    assert not any(sizes), sizes
    assert len(program.graph.nodes) > 5


def test_a_copy_has_nodes_of_its_own():
    graph, copies = doubled(2.0), {}
    other = copied(graph, copies)
    assert [str(n) for n in other.nodes] == [str(n) for n in graph.nodes] and not set(other.nodes) & set(graph.nodes)
    assert [copies[n] for n in graph.nodes if n.op != "output"] == [n for n in other.nodes if n.op != "output"]
