"""Masks that sizes decide: a triangle is `is_causal`, one that hides nothing is none."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqpar.passes.trace import trace
from seqpar.passes.triangle import SMALL, simplify_masks

LENGTH = 12
aten = torch.ops.aten


def numbers(x):
    return torch.arange(x.shape[1])


TRIANGLES = {
    "columns up to the row": lambda x: numbers(x)[None, :] <= numbers(x)[:, None],
    "rows from the column": lambda x: (numbers(x)[:, None] + 1 > numbers(x)[None, :])[None, None],
    "not behind": lambda x: ~(numbers(x)[None, :] > numbers(x)[:, None]),
    "tril": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril(),
    "not triu": lambda x: torch.logical_not(torch.ones(x.shape[1], x.shape[1]).bool().triu(1)),
    "added": lambda x: torch.full((x.shape[1], x.shape[1]), -math.inf).triu(1),
    "filled": lambda x: torch.zeros(x.shape[1], x.shape[1]).masked_fill(numbers(x)[None, :] > numbers(x)[:, None], -math.inf),
    "parts": lambda x: (
        x.new_ones((), dtype=torch.bool) & ((numbers(x) * 0)[None, :] == (numbers(x) * 0)[:, None]) & (numbers(x)[None, :] <= numbers(x)[:, None])
    ).expand(2, 1, -1, -1),
}
NOTHING_HIDDEN = {
    "ones": lambda x: torch.ones(x.shape[1], x.shape[1], dtype=torch.bool),
    "zeros": lambda x: torch.zeros(2, 1, 1, x.shape[1]),
    "far": lambda x: numbers(x)[None, :] < numbers(x)[:, None] + 100,
}
KEPT = {
    "window": lambda x: (numbers(x)[None, :] <= numbers(x)[:, None]) & (numbers(x)[None, :] + 3 > numbers(x)[:, None]),
    "strict": lambda x: (numbers(x)[None, :] < numbers(x)[:, None]) | (numbers(x)[None, :] == 0),
    "upper": lambda x: numbers(x)[None, :] >= numbers(x)[:, None],
    "one row": lambda x: numbers(x)[None, :] <= 0,
    "content": lambda x: (numbers(x)[None, :] <= numbers(x)[:, None]) & (x[:, None, None, :, 0] < 100),
    "unlike by number": lambda x: torch.ones(x.shape[1], x.shape[1]),
}


class Model(nn.Module):
    def __init__(self, mask) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        q = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, q * 2, q * 3, self.mask(x), scale=0.3) + 1


def simplified(mask, small):
    """What the attention is called with: (mask, dropout, is_causal); the result is checked."""
    torch.manual_seed(0)
    x = torch.randn(2, LENGTH, 16)
    gm = trace(Model(mask).eval(), (x,), {}, dynamic=False).gm
    found = simplify_masks(gm, small)
    torch.testing.assert_close(found(x), gm(x))
    (attention,) = [n for n in found.graph.nodes if n.target is aten.scaled_dot_product_attention.default]
    return attention.args[3:]


@pytest.mark.parametrize("small", [SMALL, 2 * LENGTH])  # computed, and described
@pytest.mark.parametrize("kind", TRIANGLES)
def test_triangle(kind, small) -> None:
    assert simplified(TRIANGLES[kind], small) == (None, 0.0, True)


@pytest.mark.parametrize("small", [SMALL, 2 * LENGTH])
@pytest.mark.parametrize("kind", NOTHING_HIDDEN)
def test_nothing_hidden(kind, small) -> None:
    assert simplified(NOTHING_HIDDEN[kind], small) == (None, 0.0, False)


@pytest.mark.parametrize("small", [SMALL, 2 * LENGTH])
@pytest.mark.parametrize("kind", KEPT)
def test_kept(kind, small) -> None:
    assert simplified(KEPT[kind], small)[0] is not None


def test_symbolic_sizes_decide_nothing() -> None:
    traced = trace(Model(TRIANGLES["tril"]).eval(), (torch.randn(2, LENGTH, 16),), {}, dynamic=True)
    assert traced.symbols and simplify_masks(traced.gm) is traced.gm
