"""Layouts: text form, local lengths, and what an operator requires."""

import pytest
import sympy
from torch.fx import Graph

from seqpar.partitioner.atoms import AtomTable
from seqpar.partitioner.division import Degrees
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.labels import Labels
from seqpar.partitioner.layout import LayoutView
from seqpar.partitioner.lengths import Sizes
from seqpar.partitioner.solve import Solution
from seqpar.tools.check_rules import FREE

s = sympy.Symbol("s", positive=True, integer=True)


def view_of(*dims, sharded=(), ranks=4, rank=0):
    """A view of one value whose dims are given as factors of lengths; `sharded` are (dim, factor, index)."""
    table = AtomTable(Sizes({s: 10}))
    axes = tuple(tuple(tuple(table.fresh(n) for n in factor) for factor in dim) for dim in dims)
    node = Graph().placeholder("x")
    inference = Inference(table, {node: (axes,)})
    labels = Labels({(node, d, axes[d][f][i]) for d, f, i in sharded})
    return LayoutView(inference, Solution(labels, Degrees(ranks, 1), FREE), rank), node


@pytest.mark.parametrize(
    ("dims", "sharded", "text"),
    [
        (([[2]], [[12, 30]], [[16]]), [(1, 0, 1)], "2 (12 + 30/4) 16"),
        (([], [[30]], [[16]]), [(1, 0, 0)], "1 30/4 16"),
        (([[2], [12, 30], [3]],), [(0, 1, 0), (0, 1, 1)], "2*(12/4 + 30/4)*3"),
        (([[2], [12]], [[8]]), [], "24 8"),
        (([[s, 5]],), [(0, 0, 0)], "(s/4 + 5)"),
    ],
)
def test_text(dims, sharded, text):
    view, node = view_of(*dims, sharded=sharded)
    assert view.text(node, view.produced(node)) == text


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_local_lengths_add_up(ranks):
    total, alone = 0, 0
    for rank in range(ranks):
        view, node = view_of([[2], [7, 13]], sharded=[(0, 1, 1)], ranks=ranks, rank=rank)
        axis, (layout,) = view.inference.axes[node][0][0], view.produced(node)
        total += view.axis_length(axis, layout)
        alone += view.axis_length(axis, frozenset())
        assert sum(view.parts(axis[1][1])) == 13
    assert total == 2 * (7 * ranks + 13) and alone == 40 * ranks


def test_symbolic_lengths():
    view, node = view_of([[s]], sharded=[(0, 0, 0)], ranks=3, rank=1)
    length = view.axis_length(view.inference.axes[node][0][0], view.produced(node)[0])
    assert [int(length.subs(s, n)) for n in (9, 10, 11)] == [3, 3, 4]
