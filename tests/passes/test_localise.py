"""Literals in calls follow the local shapes: each kind of rewrite, by what it emits on each rank."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.partitioner.division import Degrees
from seqpar.partitioner.infer import infer
from seqpar.partitioner.label_problem import LabelProblem
from seqpar.partitioner.layout import LayoutView
from seqpar.partitioner.lengths import Sizes
from seqpar.partitioner.relation import Rewrite
from seqpar.partitioner.rules import parts, reduce, view
from seqpar.partitioner.solve import Solution
from seqpar.passes.emit import Emitter
from seqpar.passes.localise import KINDS, source_line
from seqpar.passes.trace import trace
from seqpar.tools.check_rules import FREE

aten = torch.ops.aten


class Program(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)


def local_calls(fn, *shapes, ranks=2):
    """[(targets and arguments of all calls) per rank] with every atom of dim 1 of the first input a sequence."""
    inputs = tuple(torch.randn(s) for s in shapes)
    graph = trace(Program(fn), inputs, {}, dynamic=False).gm.graph
    inference = infer(graph, Sizes())
    first = next(n for n in graph.nodes if n.op == "placeholder")
    inference.sequences = dict.fromkeys(inference.table.roots(inference.axes[first][0][1]), 1)
    problem = LabelProblem(inference, Degrees(ranks, 1), FREE, set())
    problem.divisible = set(inference.axes)  # constants too
    labels = problem.solve()
    solution = Solution(labels, Degrees(ranks, 1), FREE)
    graphs = [Emitter(graph, LayoutView(inference, solution, r), {}).run() for r in range(ranks)]
    return [{n.target: n.args for n in g.nodes if n.op == "call_function"} for g in graphs]


def test_every_kind_of_rewrite_is_known():
    kinds = {Rewrite(kind).kind for kind in ("sizes", "view", "slice", "slice_scatter", "split", "pad", "mean", "repeat_interleave")}
    assert kinds <= set(KINDS)
    assert parts and reduce and view


def test_view_and_expand():
    calls = local_calls(lambda x: x.view(2, 7, 2, 3).expand(5, 2, 7, 2, 3) * 2, (2, 7, 6))
    assert [c[aten.reshape.default][1] for c in calls] == [[2, 4, 2, 3], [2, 3, 2, 3]]
    assert [c[aten.expand.default][1] for c in calls] == [[5, 2, 4, 2, 3], [5, 2, 3, 2, 3]]


def test_slice_cuts_what_precedes():
    calls = local_calls(lambda x: x[:, 5:] * 2 + x[:, :5].sum(1, keepdim=True), (2, 12, 6))
    assert [c[aten.slice.Tensor][1:] for c in calls] == [(1, 0, 3), (1, 0, 2)] or [c[aten.slice.Tensor][1:] for c in calls] == [(1, 3, 7), (1, 2, 5)]


def test_split():
    calls = local_calls(lambda x: [t * 2 for t in x.split([5, 8], 1)], (2, 13, 6))
    assert [c[aten.split_with_sizes.default][1] for c in calls] == [[3, 4], [2, 4]]


def test_pad_puts_each_part_where_it_is_held():
    calls = local_calls(lambda x: F.pad(x, (0, 0, 0, 5)) * 2, (2, 7, 6))
    assert [list(c[aten.pad.default][1]) for c in calls] == [[0, 0, 0, 5]] * 2, "padding is no sequence here, so it is whole"


def test_mean_is_a_sum_over_the_global_count():
    calls = local_calls(lambda x: x.mean(1), (2, 7, 6))
    assert all(aten.mean.dim not in c and c[aten.div.Tensor][1] == 7 for c in calls)


def test_squeeze_never_drops_a_part_of_length_one():
    calls = local_calls(lambda x: x.squeeze() * 2, (1, 3, 6), ranks=3)
    assert [c[aten.reshape.default][1] for c in calls] == [[1, 6]] * 3


def test_constants_take_the_local_shape():
    calls = local_calls(lambda x: x + torch.full((7, 6), 2.0), (2, 7, 6))
    assert [c[aten.full.default][0] for c in calls] == [[4, 6], [3, 6]]


@pytest.mark.parametrize(("fn", "target"), [(lambda x: x.unflatten(-1, (2, 3)) * 2, aten.reshape.default), (lambda x: x.permute(1, 0, 2) * 2, aten.permute.default)])
def test_what_needs_no_rewriting_keeps_its_literals(fn, target):
    literal = [c[target][1] for c in local_calls(fn, (2, 12, 6))]
    assert literal[0] == literal[1]


def test_source_line():
    graph = trace(Program(lambda x: x.cumsum(1)), (torch.randn(2, 3),), {}, dynamic=False).gm.graph
    assert "test_localise.py" in source_line(next(n for n in graph.nodes if n.op == "call_function"))
    assert source_line(next(n for n in graph.nodes if n.op == "output")) == ""
