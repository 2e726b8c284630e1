"""Ranks share heads that `ulysses` does not divide: right for every mask and length, and the work is even."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.partitioner.cost import Machine
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

FREE = Machine(comm_share=0.0, call_share=0.0)  # communication costs nothing: always shared


class Attention(nn.Module):
    """[text | image] attends itself; the text's queries are read too."""

    def __init__(self, heads, kv_heads=None, **options):
        super().__init__()
        self.q, self.kv = nn.Linear(8, heads * 4), nn.Linear(8, (kv_heads or heads) * 8)
        self.options = options

    def forward(self, text, image, mask=None):
        x = torch.cat([text, image], 1)
        q = self.q(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options).transpose(1, 2).flatten(2)
        return out[:, : text.shape[1]], out[:, text.shape[1] :]


@functools.cache
def traced(heads, mask_shape=(), dynamic=False, text=3, **options):
    torch.manual_seed(0)
    length = text + 13
    masks = {"": (), "rows": (1, 1, length, length), "heads": (2, heads, length, length), "keys": (2, 1, 1, length), "flat": (length, length), "batchless": (heads, length, length)}
    mask = (torch.randn(masks[mask_shape]),) if mask_shape else ()
    return trace(Attention(heads, **options), (torch.randn(2, text, 8), torch.randn(2, 13, 8), *mask), {}, dynamic=dynamic)


def check(found, ranks, strategy):
    report = verify_traced(found, ulysses=ranks, ring=1, machine=FREE)
    assert report.ok, report
    assert [a.strategy for a in report.plan.attention] == [strategy]
    return report.plan


@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("heads", [1, 2, 3, 5, 6, 7])
def test_equals_one_process(heads, ranks):
    shared = heads % ranks != 0
    plan = check(traced(heads), ranks, "ulysses (shared heads)" if shared else "ulysses")
    assert plan.comm_calls["all_to_all"] == 2


@pytest.mark.parametrize("mask", ["rows", "heads", "keys", "flat", "batchless"])
def test_masks_are_cut_like_the_pieces(mask):
    check(traced(6, mask), 4, "ulysses (shared heads)")


def test_symbolic_lengths():
    check(traced(5, dynamic=True), 2, "ulysses (shared heads)")


@pytest.mark.parametrize(("mesh", "options"), [((4, 1), {"is_causal": True}), ((4, 1), {"kv_heads": 3, "enable_gqa": True}), ((4, 2), {}), ((4, 2), {"is_causal": True, "text": 9})])
def test_causal_grouped_and_with_a_ring(mesh, options):
    report = verify_traced(traced(6, **options), ulysses=mesh[0], ring=mesh[1], machine=FREE)
    assert report.ok and [a.strategy for a in report.plan.attention] == ["ulysses (shared heads)"]


def test_not_where_it_costs_more_than_it_saves():
    plan = partition(traced(6, is_causal=True), ulysses=4, machine=Machine(call_share=10.0)).plan
    assert [a.why for a in plan.attention] == ["queries, keys and values exchanged over the mesh; sharing heads would cost more than it saves"]


def test_the_busiest_rank_has_its_share():
    """6 heads over 1,056 tokens; with whole heads, the busiest of 4 and 5 ranks has 1.33 / 4 and 1.67 / 5 of the work."""
    with torch.device("meta"):
        found = trace(Attention(6), (torch.randn(1, 32, 8), torch.randn(1, 1024, 8)), {}, dynamic=False)
    for ranks in (4, 5):
        plan = partition(found, ulysses=ranks).plan
        assert max(plan.flops_per_rank) <= 1.05 / ranks * plan.flops_total
        assert {a.strategy for a in plan.attention} <= {"ulysses (shared heads)", "gather K/V", "local"}  # rows or whole heads by cost, never whole heads alone
