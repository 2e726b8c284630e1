"""Markers at module boundaries: what they name, that they change nothing, and that nothing is left of them."""

import pytest
import torch
from torch import nn

from seqpar.errors import UnsupportedError
from seqpar.models.patterns import Block
from seqpar.passes.boundary import Boundary, Mark, Marks, detach, markers
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced


class Pair(nn.Module):
    def forward(self, both, *, scale=None, **more):
        a, b = both
        return {"sum": a + b + more["extra"], "pair": [a, b], "none": None}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.pair = Pair()
        self.blocks = nn.ModuleList(Block(8, 2) for _ in range(2))
        self.blocks.append(self.blocks[0])  # one module under two names

    def forward(self, x, y):
        out = self.pair((x, y), extra=y)
        h = out["sum"] * 2
        for block in self.blocks:
            h = block(h)
        return h + out["pair"][0]


def everywhere(*_):
    return Mark()


def traced(model, inputs, choose=everywhere, dynamic=False):
    return trace(model, inputs, {}, dynamic=dynamic, marks=Marks(choose))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture(scope="module")
def inputs():
    return (torch.randn(2, 9, 8), torch.randn(2, 9, 8))


@pytest.fixture(scope="module")
def marked(model, inputs):
    return traced(model, inputs)


def test_every_boundary_is_named(marked):
    names = [str(place) for place in marked.marks.placed if "." not in place.module]
    assert names == [
        "input 'x' of the model", "input 'y' of the model", "input 'both'[0] of pair", "input 'both'[1] of pair", "input 'extra' of pair",
        "output 0 of pair", "output 1[0] of pair", "output 1[1] of pair", "output 0 of the model",
    ]  # fmt: skip
    calls = [(place.module, place.call) for place in marked.marks.placed if place.name == "x_BSC"]
    assert calls == [("blocks.0", 0), ("blocks.1", 0), ("blocks.0", 1)], "a module called twice says so, under its first name"
    assert all(place.source.startswith(__file__) for place in marked.marks.placed if place.module in ("", "pair"))
    assert all(Boundary.from_key(place.key) == place for place in marked.marks.placed)


def test_detach_leaves_the_same_graph(model, inputs, marked):
    plain = trace(model, inputs, {}, dynamic=False)
    gm, crossings = detach(marked.gm)
    assert [str(n.target) for n in gm.graph.nodes] == [str(n.target) for n in plain.gm.graph.nodes]
    assert not markers(gm.graph) and len(markers(marked.gm.graph)) == len(crossings)
    into = next(c for c in crossings if str(c.boundary) == "input 'x_BSC' of blocks.0")
    assert into.value == "mul" and set(into.readers) == {"layer_norm", "add_2"}
    assert detach(plain.gm) == (plain.gm, ())


def test_markers_cost_nothing_and_leave_no_trace(marked):
    plain, unmarked = partition(marked, ulysses=2), detach(marked.gm)[0]
    assert not markers(plain.program(0).graph)
    assert [str(n.target) for n in plain.program(0).graph.nodes] == [
        str(n.target) for n in partition(trace_of(marked, unmarked), ulysses=2).program(0).graph.nodes
    ]
    assert not markers(partition(marked).program(0).graph), "with one rank neither"
    report = verify_traced(marked, ulysses=2, ring=2)
    assert report.ok and report.max_rel_err < 1e-6 and report.plan.notes == ()


def trace_of(traced, gm):
    from dataclasses import replace

    return replace(traced, gm=gm)


def test_symbolic_sizes(model, inputs):
    dynamic = traced(model, inputs, lambda place, x, _: Mark(split=1, keep=x.shape[1] - 4) if place.name == "x_BSC" else None, dynamic=True)
    kept = [node.args[4] for node in markers(dynamic.gm.graph)]
    assert dynamic.shape_env is not None and len(kept) == 3 and all(isinstance(k, torch.fx.Node) for k in kept)


def test_the_users_hooks_run_first(inputs):
    model = Model()
    handle = model.pair.register_forward_pre_hook(lambda module, args, kwargs: (args, {**kwargs, "extra": kwargs["extra"] * 3}), with_kwargs=True)
    graph = traced(model, inputs, lambda place, *_: Mark() if place.name == "extra" else None).gm.graph
    (marker,) = markers(graph)
    handle.remove()
    assert marker.args[0].target is torch.ops.aten.mul.Tensor
    assert not model._forward_pre_hooks and not model.pair._forward_pre_hooks and not model.pair._forward_hooks


class Writes(nn.Module):
    """A submodule that writes to its input; the caller reads it afterwards."""

    def __init__(self, outside):
        super().__init__()
        self.inner, self.outside = Inner(outside), outside

    def forward(self, x):
        h = x * 2
        y = self.inner(h)
        if self.outside:
            y += 1
        return h + y * 3


class Inner(nn.Module):
    def __init__(self, outside):
        super().__init__()
        self.outside = outside

    def forward(self, h):
        if self.outside:
            return h
        h.add_(1)
        return h * 5


def test_a_write_to_a_marked_input_reaches_the_caller():
    model, x = Writes(outside=False), torch.randn(3, 4)
    torch.testing.assert_close(traced(model, (x,)).gm(x)[0], model(x))


def test_a_write_to_an_input_passed_through_is_refused():
    with pytest.raises(UnsupportedError, match="output 0 of inner is one of the module's inputs, and is written to in place later"):
        traced(Writes(outside=True), (torch.randn(3, 4),))
