"""Who shares heads, and over which ranks."""

import pytest
import torch
from torch.nn import functional as F

from seqpar.partitioner.alternatives import attention_bytes
from seqpar.partitioner.cost import Machine, Prices
from seqpar.partitioner.division import Degrees, division
from seqpar.partitioner.head_shares import plan_of_shares, share_causal_heads
from seqpar.partitioner.infer import infer
from seqpar.partitioner.lengths import Sizes
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(("heads", "mesh", "price", "shared"), [(4, (4, 2), 0, False), (6, (4, 2), 0, True), (6, (4, 1), 1e9, False), (2, (4, 1), 1e9, True)])
def test_shared_where_uneven_and_worth_it_and_always_with_too_few_heads(heads, mesh, price, shared):
    traced = trace(Attention(), tuple(torch.randn(1, heads, 32, 4) for _ in range(3)), {}, dynamic=False)
    inference = infer(traced.gm.graph, Sizes())
    (node,) = (n for n, r in inference.relations.items() if r.attention is not None)
    found = division(inference, Degrees(*mesh), Prices(price, price, price, price), node)
    assert found.shared is shared and found.degrees == (Degrees(mesh[0] * mesh[1], 1) if shared else Degrees(*mesh))
    assert bool(found.reason) == (heads == 6 and not shared)


def test_parts_of_a_causal_head_have_equal_work():
    (((_, first),)) = [(p.first, p.last) for p in share_causal_heads(1, 2, 1000, 1000)[0]]
    assert first == 707 and all(p.first < p.last for pieces in share_causal_heads(3, 8, 8, 8) for p in pieces)


class Projected(torch.nn.Module):
    """6 causal heads."""

    def __init__(self):
        super().__init__()
        self.qkv = torch.nn.Linear(24, 72)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (6, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)


def test_worked_out_once_for_all_who_ask(monkeypatch):
    """Solver, emitter of every rank, plan and alternatives: one answer per attention and mesh."""
    asked = []
    monkeypatch.setattr("seqpar.partitioner.division.plan_of_shares", lambda shares, group: asked.append(shares) or plan_of_shares(shares, group))
    traced = trace(Projected(), (torch.randn(1, 32, 24),), {}, dynamic=False)
    found = partition(traced, ulysses=4, machine=Machine(comm_share=0.0, call_share=0.0))
    assert found.plan.attention[0].strategy == "ulysses (shared heads)" and len(found.counts) == 4
    assert max(found.plan.flops_per_rank) <= 1.05 * found.plan.flops_total / 4, "parts of a causal head have equal work"
    (node,) = found.solution.labels.exchanged
    attention_bytes(found.inference, found.solution, node, found.solution.degrees)
    assert len(asked) <= 2, "once to price the whole program, once with those prices"
    assert division(found.inference, Degrees(3, 1), found.solution.prices, node).degrees == Degrees(3, 1), "another mesh, another answer"
