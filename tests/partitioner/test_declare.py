"""The cut of a declared plan: layouts change at marks only, and attention exchanges what it is given."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.partitioner.declare import DeclareProblem, Mark, MeshRules
from seqpar.partitioner.division import Degrees
from seqpar.partitioner.infer import infer
from seqpar.partitioner.lengths import Sizes
from seqpar.partitioner.marker import boundary, is_marker, pin_of
from seqpar.partitioner.solve import solve
from seqpar.passes.trace import trace

SDPA = torch.ops.aten.scaled_dot_product_attention.default
BOTH, SPLIT, GATHER, NONE = Mark(True, True), Mark(True, False), Mark(False, True), Mark(False, False)


class Program(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn, self.linear = fn, nn.Linear(8, 8)

    def forward(self, *args):
        return self.fn(self.linear, *args)


def attend(x, keys=None, mask=None):
    q, k = (y.unflatten(-1, (4, 2)).transpose(1, 2) for y in (x, x if keys is None else keys))
    return F.scaled_dot_product_attention(q, k, k * 2, mask).transpose(1, 2).flatten(2)


def answer(fn, *inputs, ranks=2, strict=True, rules=None, **marks):
    """The problem and its answer for a program whose markers are named by their keys."""
    graph = trace(Program(fn), inputs, {}, dynamic=False).gm.graph
    inference = infer(graph, Sizes())
    degrees = Degrees(ranks, 1)
    named = {node: marks[pin_of(node).key] for node in graph.nodes if is_marker(node)}
    mesh = {node for node in graph.nodes if node.target is SDPA}
    problem = DeclareProblem(inference, degrees, solve(inference, degrees).prices, named, mesh, mesh, rules or MeshRules(), strict)
    found = problem.solve_declared()
    cut = {pin_of(node).key for node, _, _ in found.labels.sharded if is_marker(node)}
    return found, cut


def simple(linear, x):
    return boundary(attend(linear(boundary(x, "in"))) + 1, "out")


X = torch.randn(1, 16, 8)


def test_a_value_is_split_and_gathered_at_marks():
    found, cut = answer(simple, X, **{"in": SPLIT, "out": GATHER})
    assert found.feasible and not found.violations and cut == {"in"}


@pytest.mark.parametrize(("marks", "change"), [({"in": NONE, "out": GATHER}, "split"), ({"in": SPLIT, "out": NONE}, "gather")])
def test_where_no_mark_may_change_there_is_no_answer(marks, change):
    assert not answer(simple, X, **marks)[0].feasible
    fewest, _ = answer(simple, X, strict=False, **marks)
    assert {v.change for v in fewest.violations} == {change} and len(fewest.violations) == 1


def test_lengths_must_be_even_if_the_runtime_says_so():
    odd = torch.randn(1, 15, 8)
    assert not answer(simple, odd, **{"in": SPLIT, "out": GATHER})[0].feasible
    assert answer(simple, odd, rules=MeshRules(even=False, alike=False), **{"in": SPLIT, "out": GATHER})[0].feasible


def test_positions_need_a_mark_of_their_own():
    def fn(linear, x):
        table = boundary(torch.arange(16.0)[:, None] * linear.weight[0], "table")
        return boundary(attend(linear(boundary(x, "in")) + table), "out")

    found, cut = answer(fn, X, **{"in": SPLIT, "table": SPLIT, "out": GATHER})
    assert found.feasible and cut == {"in", "table"}
    assert not answer(fn, X, **{"in": SPLIT, "table": NONE, "out": GATHER})[0].feasible


def joint(linear, x, text):
    x, text = boundary(x, "in"), boundary(text, "text")
    out = attend(linear(torch.cat([text, x], 1)))
    return boundary(out[:, text.shape[1] :], "out")


def test_all_keys_are_cut_or_none():
    """Whole text beside an image in parts would be counted once per rank; a runtime that attends whole keys once may have it."""
    text = torch.randn(1, 8, 8)
    found, cut = answer(joint, X, text, **{"in": SPLIT, "text": SPLIT, "out": GATHER})
    assert found.feasible and cut == {"in", "text"}
    assert not answer(joint, X, text, **{"in": SPLIT, "text": NONE, "out": GATHER})[0].feasible
    found, cut = answer(joint, X, text, rules=MeshRules(alike=False), **{"in": SPLIT, "text": NONE, "out": GATHER})
    assert found.feasible and cut == {"in"}


@pytest.mark.parametrize(("shape", "fits"), [((1, 1, 1, 16), True), ((1, 4, 1, 16), False)])
def test_masks_are_cut_like_their_keys(shape, fits):
    def fn(linear, x, mask):
        return boundary(attend(linear(boundary(x, "in")), mask=boundary(mask, "mask")), "out")

    found, cut = answer(fn, X, torch.zeros(shape), **{"in": SPLIT, "mask": SPLIT, "out": GATHER})
    assert found.feasible is fits and (not fits or cut == {"in", "mask"})
