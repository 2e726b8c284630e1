"""Linear layers over the tokens (gated MLPs, Linformer): divided by rows or columns of their weight."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqpar

WIDTH, FEW = 32, 16


class Mixer(nn.Module):
    """Attention, a spatial gating unit [S, S], and a bottleneck over the tokens, S -> FEW -> S; the last two without attention."""

    def __init__(self, tokens, bias=True):
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.mix, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(tokens, tokens, bias=bias), nn.Linear(2 * WIDTH, WIDTH)
        self.few, self.back = nn.Linear(tokens, FEW, bias=bias), nn.Linear(FEW, tokens, bias=bias)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        u, gate = F.gelu(self.up(x)).chunk(2, -1)
        x = x + self.down(u * self.mix(gate.transpose(1, 2)).transpose(1, 2))
        return x + self.back(F.gelu(self.few(x.transpose(1, 2)))).transpose(1, 2)


class Linformer(nn.Module):
    """Keys and values are FEW sums over the tokens."""

    def __init__(self, tokens):
        super().__init__()
        self.qkv, self.few, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(tokens, FEW), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        for _ in range(2):
            q, k, v = self.qkv(x).chunk(3, -1)
            k, v = (self.few(t.transpose(1, 2)).transpose(1, 2) for t in (k, v))
            q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in (q, k, v))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x


@pytest.mark.parametrize("mesh", [(2, 1), (4, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize(("tokens", "bias"), [(63, True), (256, True), (63, False)])
def test_gates_and_bottlenecks(tokens, bias, mesh):
    torch.manual_seed(0)
    report = seqpar.verify(Mixer(tokens, bias), (torch.randn(2, tokens, WIDTH),), ulysses=mesh[0], ring=mesh[1])
    assert report.ok, report
    assert report.plan.sharded_flop_fraction > 0.9, report.plan.explain()


def test_a_sum_over_the_tokens_adds_its_bias_once():
    torch.manual_seed(0)
    model, x = Mixer(63), torch.randn(2, 63, WIDTH)
    nn.init.constant_(model.few.bias, 3.0)
    report = seqpar.verify(model, (x,), ring=3)
    assert report.ok and report.plan.comm_calls["all_reduce"] == 1, report


@pytest.mark.parametrize("mesh", [(2, 1), (4, 1), (2, 2)])
def test_keys_that_are_sums_over_the_tokens(mesh):
    torch.manual_seed(0)
    report = seqpar.verify(Linformer(101), (torch.randn(2, 101, WIDTH),), ulysses=mesh[0], ring=mesh[1])
    assert report.ok, report


def test_a_gate_is_most_of_the_work_and_is_divided():
    """At 2,048 tokens; the gate alone is half of the operations."""
    with torch.device("meta"):
        plan = seqpar.plan(Mixer(2048), (torch.empty(2, 2048, WIDTH),), ulysses=4)
    assert plan.sharded_flop_fraction > 0.95 and max(plan.flops_per_rank) < 0.3 * plan.flops_total, plan.explain()


class Explicit(nn.Module):
    """The same layers written as addmm and baddbmm over the tokens; `factors` are theirs."""

    def __init__(self, tokens, factors):
        super().__init__()
        self.qkv, self.mix, self.bias = nn.Linear(WIDTH, 3 * WIDTH), nn.Parameter(torch.randn(tokens, tokens) / tokens**0.5), nn.Parameter(torch.randn(tokens, WIDTH))
        self.factors = factors

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        one = torch.addmm(self.bias, self.mix, y[0], **self.factors)
        return one, torch.baddbmm(self.bias[None], self.mix.expand(len(y), -1, -1), y, **self.factors)


@pytest.mark.parametrize("factors", [{}, {"beta": 2, "alpha": 0.5}])
def test_what_a_product_is_added_to_enters_the_sum_once(factors):
    torch.manual_seed(0)
    report = seqpar.verify(Explicit(1025, factors), (torch.randn(2, 1025, WIDTH),), ulysses=3)
    assert report.ok and report.plan.comm_calls["all_reduce"] == 2, report
    assert report.plan.sharded_flop_fraction > 0.97, report.plan.explain()
