"""Few queries, many keys: every rank attends the keys that it holds, wherever that is less than moving the keys."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqpar
from seqpar.partitioner.alternatives import attention_bytes
from seqpar.partitioner.split_keys import can_split
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

WIDTH, HEADS = 64, 8


def heads_of(x, heads=HEADS):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class Perceiver(nn.Module):
    """Latents read a long input again and again (Perceiver, Q-Former, Resampler). `options` go to scaled_dot_product_attention."""

    def __init__(self, latents=16, depth=2, kv_heads=HEADS, **options):
        super().__init__()
        self.latents, self.embed, self.kv_heads, self.options = nn.Parameter(torch.randn(latents, WIDTH)), nn.Linear(WIDTH, WIDTH), kv_heads, options
        self.q, self.out = (nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(depth)) for _ in range(2))
        self.kv = nn.ModuleList(nn.Linear(WIDTH, 2 * kv_heads * WIDTH // HEADS) for _ in range(depth))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(depth))

    def forward(self, x, mask=None):
        x, y = self.embed(x), self.latents.expand(len(x), -1, -1)
        for q, kv, out, mlp in zip(self.q, self.kv, self.out, self.mlp, strict=True):
            k, v = (heads_of(t, self.kv_heads) for t in kv(x).chunk(2, -1))
            found = F.scaled_dot_product_attention(heads_of(q(y)), k, v, attn_mask=mask, enable_gqa=self.kv_heads != HEADS, **self.options)
            y = y + out(found.transpose(1, 2).flatten(2))
            y = y + mlp(y)
        return y


class Pooled(nn.Module):
    """An encoder of [text | image] tokens, and one query that reads its result: the head of a vision tower."""

    def __init__(self):
        super().__init__()
        self.encoder, self.probe = nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True), nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pool = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)

    def forward(self, text, image):
        x = self.encoder(torch.cat([text, image], 1))
        return self.pool(self.probe.expand(len(x), -1, -1), x, x, need_weights=False)[0]


MASKS = {
    "rows": lambda n: torch.arange(16 * n).reshape(1, 1, 16, n) % 7 != 1,
    "keys": lambda n: torch.arange(n).reshape(1, 1, 1, n) % 3 != 1,
    "heads": lambda n: torch.randn(2, HEADS, 16, n),
    "far": lambda n: (torch.arange(n) < 5).expand(1, 1, 16, n),  # nobody sees what the last ranks hold
}


@functools.cache
def traced(length=1021, mask=None, dynamic=False, **options):
    torch.manual_seed(0)
    inputs = [torch.randn(2, length, WIDTH)] + ([MASKS[mask](length)] if mask else [])
    return trace(Perceiver(**options).eval(), inputs, {}, dynamic=dynamic)


@pytest.mark.parametrize("mesh", [(2, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize(
    "options",
    [{}, {"mask": "rows"}, {"mask": "keys"}, {"mask": "heads"}, {"mask": "far"}, {"kv_heads": 4, "latents": 3}, {"scale": 0.3, "latents": 1}, {"dynamic": True}],
    ids=str,
)
def test_equals_one_process(options, mesh):
    report = verify_traced(traced(**options), ulysses=mesh[0], ring=mesh[1])
    assert report.ok, report
    assert [a.strategy for a in report.plan.attention] == ["split K/V"] * 2
    assert report.plan.sharded_flop_fraction > 0.97, report.plan.explain()


def test_received_bytes_are_those_of_the_formula():
    """[2, 8 heads, 16, 8 + 1] float32 of three other ranks, twice; and the last linear layers are whole."""
    found = partition(traced(), ulysses=4)
    (each,) = {attention_bytes(found.inference, found.solution, n, None) for n in found.solution.labels.split}
    assert each == 3 * 2 * 8 * 16 * 9 * 4
    gathered = [c.traffic.bytes["all_gather"] for c in found.counts]
    assert all(2 * each <= n for n in gathered) and set(found.plan.comm_calls.values()) - {0} == {found.plan.comm_calls["all_gather"]}


def test_a_pooling_head_moves_none_of_the_keys():
    torch.manual_seed(0)
    inputs = torch.randn(2, 7, WIDTH), torch.randn(2, 1021, WIDTH)
    report = seqpar.verify(Pooled().eval(), inputs, ulysses=2)
    assert report.ok, report
    plan = report.plan
    assert [a.strategy for a in plan.attention] == ["ulysses", "split K/V"]
    assert plan.comm_calls["all_gather"] == 1 and plan.comm_bytes_per_rank["all_gather"] == 2 * HEADS * (WIDTH // HEADS + 1) * 4
    assert "every rank attends the keys that it holds" in plan.explain()


def test_not_where_the_queries_are_many():
    """As many queries as keys, or few keys: partial results of all ranks would be more than the keys."""
    for latents, length in ((256, 512), (64, 40)):
        plan = partition(traced(latents=latents, length=length), ulysses=4).plan
        assert "split K/V" not in {a.strategy for a in plan.attention}
    assert "split K/V" not in {a.strategy for a in partition(traced(is_causal=True), ulysses=4).plan.attention}  # all see the first few keys only
    found = partition(traced(), ulysses=4)
    relations = [r for r in found.inference.relations.values() if r.attention is not None]
    assert all(can_split(found.inference, r, 4) and not can_split(found.inference, r, 128) for r in relations)


def split(latents):
    """On every rank: errors against the model for the length it was compiled with, one that the same program serves, and a short one; the strategies; the last result."""
    torch.manual_seed(0)
    model, errors = Perceiver(latents).eval(), []
    fast = seqpar.sp_compile(model, (torch.randn(2, 1021, WIDTH),), ulysses=2, ring=2)
    strategies = {a.strategy for a in fast.plan.attention}
    for length in (1021, 702, 3):
        x = torch.randn(2, length, WIDTH)
        with torch.no_grad():
            out, expected = fast(x), model(x)
        errors.append(((out - expected).norm() / expected.norm()).item())
    return max(errors), strategies, out


def test_on_real_ranks(ranks):
    found = ranks.run(split, 3, timeout=300)
    assert all(error < 1e-6 and strategies == {"split K/V"} for error, strategies, _ in found), found
    assert all(torch.equal(out, found[0][2]) for _, _, out in found)
