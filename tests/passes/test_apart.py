"""One value as queries, keys and values: the attention uses the mesh like any other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.passes.apart import operands_apart
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

aten = torch.ops.aten


class Attention(nn.Module):
    def __init__(self, roles):
        super().__init__()
        self.roles, self.qkv = roles, nn.Linear(16, 48)

    def forward(self, x):
        made = dict(zip("qkv", (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1)), strict=True))
        return F.scaled_dot_product_attention(*(made[role] for role in self.roles)).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("roles", ["qqv", "qkk", "qqq", "qkq"])
def test_uses_the_mesh(roles):
    torch.manual_seed(0)
    traced = trace(Attention(roles).eval(), (torch.randn(2, 13, 16),), {}, dynamic=False)
    for ulysses, ring in ((2, 1), (1, 3), (2, 2)):
        report = verify_traced(traced, ulysses=ulysses, ring=ring)
        assert report.ok, report
        assert [a.strategy for a in report.plan.attention] == ["+".join(n for n, d in (("ulysses", ulysses), ("ring", ring)) if d > 1)]


def test_three_operands_stay_as_they_are():
    gm = trace(Attention("qkv").eval(), (torch.randn(1, 4, 16),), {}, dynamic=False).gm
    assert operands_apart(gm) is gm
