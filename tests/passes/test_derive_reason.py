"""Reasons name the operator, the line, and what to extract."""

import inspect

import pytest
import torch
from torch import nn

from seqpar.partitioner.declare import MeshRules
from seqpar.partitioner.division import Degrees
from seqpar.passes import derive
from seqpar.passes.boundary import Boundary, Mark, Marks
from seqpar.passes.derive_reason import frames, marker_reason, reason
from seqpar.passes.trace import trace


class Model(nn.Module):
    """kind: what is done between two modules, or what the attention is given."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.first, self.last = kind, nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x, mask):
        x = self.first(x)
        if self.kind == "positions":
            steps = torch.arange(8)
            steps = steps * 2
            x = x + steps[None, :, None]
        q = x.unflatten(-1, (4, 4)).transpose(1, 2)
        x = nn.functional.scaled_dot_product_attention(q, q * 2, q + 1, mask if self.kind == "mask" else None)
        x = self.last(x.transpose(1, 2).flatten(2))
        return x.flip(1) if self.kind == "flip" else x


def explained(kind, mesh=True, ungathered=False):
    inputs = (torch.randn(1, 8, 16), torch.zeros(1, 4, 8, 8))
    graph = trace(Model(kind), inputs, {}, dynamic=False, marks=Marks(lambda *_: Mark())).gm.graph
    problem = derive.pose(graph, Degrees(2, 1), MeshRules(), lambda node: mesh)

    def allowed(place, change):
        return not (ungathered and change == "gather")

    assert not derive.declare(problem, allowed).feasible
    return problem, reason(problem, derive.declare(problem, allowed, strict=False))


def line_of(text):
    lines, start = inspect.getsourcelines(Model.forward)
    return start + next(i for i, line in enumerate(lines) if text in line)


def test_positions_made_between_modules():
    problem, why = explained("positions")
    assert "would have to be split there" in why
    assert f"Extract line {line_of('steps[None')} of forward" in why or f"Extract lines {line_of('torch.arange')} to" in why
    assert "test_derive_reason.py:" in why
    node = next(n for n in problem.graph.nodes if "arange" in n.name)
    assert frames(node)[-1].line == line_of("torch.arange") and frames(node)[-1].function == "forward"


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("mask", {}, "its mask of shape (1, 4, 8, 8) does not fit keys in parts"),
        ("plain", {"mesh": False}, "does not exchange over the ranks"),
        ("plain", {"ungathered": True}, "is returned in parts"),
    ],
)
def test_what_stands_in_the_way_is_said(kind, options, words):
    assert words in explained(kind, **options)[1]


def test_what_no_plan_can_name_comes_with_advice():
    marker = torch.fx.Graph().placeholder("x")
    gathered = marker_reason(Boundary("blocks.0", "input", "mask", source="model.py:12"), marker, "gathered")
    assert gathered.startswith("input 'mask' of blocks.0 (model.py:12) would have to be gathered, and a plan gathers outputs.") and "nn.Identity" in gathered
    split = marker_reason(Boundary("", "input", "ids"), marker, "split")
    assert split.startswith("input 'ids' of the model would have to be split") and "flat tuple" in split
