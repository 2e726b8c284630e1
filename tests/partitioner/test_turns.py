"""Attention over the mesh in turns: right for all heads and masks, taken where it is faster, with no byte more."""

import functools
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqpar
from seqpar.models import registry
from seqpar.partitioner import turns
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.turns import Legs
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

LINK = Machine(flops_per_s=1e12, bytes_per_s=2e9, latency_s=1e-12, name="link as fast as the attention").at_real_rates()
TOKENS, WIDTH = 1021, 128


class Attention(nn.Module):
    """[text | image] attends itself. `options` go to scaled_dot_product_attention."""

    def __init__(self, heads, kv_heads=None, **options):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2048), nn.GELU(), nn.Linear(2048, WIDTH))  # too much to be done for all tokens on every rank
        self.q, self.kv = nn.Linear(WIDTH, heads * 4), nn.Linear(WIDTH, (kv_heads or heads) * 8)
        self.options = options

    def forward(self, text, image, mask=None):
        x = self.mlp(torch.cat([text, image], 1))
        q = self.q(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options).transpose(1, 2).flatten(2)
        return out[:, : text.shape[1]], out[:, text.shape[1] :]


@functools.cache
def traced(heads, text=5, image=TOKENS, mask=None, dynamic=False, device="cpu", **options):
    torch.manual_seed(0)
    with torch.device(device):
        inputs = [torch.randn(2, text, WIDTH), torch.randn(2, image, WIDTH)]
        if mask:
            inputs.append(torch.randn({"rows": (1, 1, text + image, text + image), "heads": (2, heads, text + image, text + image)}[mask]))
        return trace(Attention(heads, **options), inputs, {}, dynamic=dynamic)


def strategies(plan):
    return [a.strategy for a in plan.attention]


# -- the same result -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("heads", "ulysses", "options", "wanted"),
    [
        (16, 4, {}, 4),
        (8, 4, {}, 2),
        (9, 3, {}, 3),
        (15, 3, {}, 4),  # two heads of each rank in the first turn
        (9, 3, {"mask": "heads", "image": 14}, 3),
        (9, 3, {"mask": "rows", "image": 14, "text": 1}, 3),
        (6, 3, {"is_causal": True, "image": 14}, 2),
        (16, 4, {"kv_heads": 8, "enable_gqa": True, "image": 14}, 2),
        (16, 4, {"kv_heads": 8, "enable_gqa": True, "image": 14, "mask": "heads"}, 2),
        (6, 3, {"dynamic": True, "image": 14, "scale": 0.3}, 2),
    ],
)
def test_equals_one_process(heads, ulysses, options, wanted):
    with mock.patch.object(turns, "CLEARLY", 1e9):  # as many turns as possible
        report = verify_traced(traced(heads, **options), ulysses=ulysses, ring=1, machine=LINK)
    assert report.ok, report
    assert strategies(report.plan) == [f"ulysses (in {wanted} turns)"]
    assert report.plan.comm_calls["all_to_all"] == 2 * wanted


def test_rounded_exchanges():
    with mock.patch.object(turns, "CLEARLY", 1e9):
        report = verify_traced(traced(6, image=14), ulysses=3, ring=1, machine=LINK, comm_dtype=torch.bfloat16)
    assert report.ok and strategies(report.plan) == ["ulysses (in 2 turns)"]


def test_every_head_has_one_turn():
    for per_rank, count, ranks, group in [(5, 2, 4, 1), (3, 3, 2, 2), (7, 4, 3, 1), (2, 2, 8, 4)]:
        plans = list(turns._shares(per_rank, count, ranks, group))
        for width, ranges in ((group, [r for p in plans for r in p.queries]), (1, [r for p in plans for r in p.keys])):
            assert [h for start, stop in ranges for h in range(start, stop)] == list(range(per_rank * ranks * width))
        assert len(plans) == count and all(len({stop - start for start, stop in p.queries}) == 1 for p in plans)


# -- where it is faster ------------------------------------------------------------------------------------
def test_a_replay_by_hand():
    legs = Legs(there=6, attend=8, back=2, call=1)
    assert legs.time(1) == (6 + 1) + 8 + (2 + 1)
    assert legs.time(2) == (3 + 1) + 4 + 4 + (1 + 1)  # the second turn has arrived, the first result is there
    assert Legs(there=12, attend=2, back=4, call=0).time(2) == 12 + 2 + 2  # the link is never idle
    assert Legs(there=6, attend=8, back=2, call=1, join=5).time(2) == legs.time(2) + 5


def test_not_without_rates_nor_where_a_call_costs_more():
    found = traced(8)
    with mock.patch.object(turns, "CLEARLY", 1e9):
        assert strategies(partition(found, ulysses=4).plan) == ["ulysses"]
    assert "turns" in strategies(partition(found, ulysses=4, machine=LINK).plan)[0]
    dear = Machine(**{**vars(LINK), "latency_s": 1.0})
    assert "turns" not in strategies(partition(found, ulysses=4, machine=dear).plan)[0]


@pytest.mark.parametrize(("heads", "mesh", "options"), [(4, (4, 1), {}), (8, (2, 2), {}), (8, (4, 1), {"kv_heads": 4, "enable_gqa": True}), (6, (4, 1), {})])
def test_not_with_one_head_a_ring_or_heads_that_do_not_divide(heads, mesh, options):
    with mock.patch.object(turns, "CLEARLY", 1e9):
        plan = partition(traced(heads, image=14, **options), ulysses=mesh[0], ring=mesh[1], machine=LINK).plan
    assert not any("turns" in s for s in strategies(plan))


@pytest.mark.parametrize("name", ["qwen-image", "wan"])
def test_a_published_model_waits_less_with_no_byte_more(name):
    """On boards without NVLink half of what is waited for is hidden behind attention, with at most a tenth more memory."""
    family = registry.get(name)
    settings = family.with_layers(family.full, 2)
    found = trace(family.build(settings, device="meta"), (), family.native_inputs(settings, device="meta"), dynamic=False)
    machine = seqpar.partitioner.machines.rates_of("RTX 4090")
    many = partition(found, ulysses=8, machine=machine).plan
    with mock.patch.object(turns, "MOST", 1):
        one = partition(found, ulysses=8, machine=machine).plan
    assert "turns" in " ".join(strategies(many)) and "turns" not in " ".join(strategies(one))
    assert many.comm_bytes_per_rank == one.comm_bytes_per_rank and many.flops_per_rank == one.flops_per_rank
    assert many.predicted_seconds["total"] < 0.92 * one.predicted_seconds["total"]
    assert many.predicted_hidden["all_to_all"] > one.predicted_hidden["all_to_all"]
    assert many.details.memory.total < 1.1 * one.details.memory.total


# -- in the graph --------------------------------------------------------------------------------------------
def test_the_next_turn_is_on_its_way_while_one_attends():
    program = partition(traced(8), ulysses=4, machine=LINK).program(0)
    lines = [n.target.__name__ for n in program.graph.nodes if n.op == "call_function"]
    order = [name for name in lines if "seq_to_heads" in name or "heads_to_seq" in name or "scaled_dot" in name]
    assert order == [
        "start_seq_to_heads", "start_seq_to_heads", "finish_seq_to_heads", "scaled_dot_product_attention.default", "start_heads_to_seq",
        "finish_seq_to_heads", "scaled_dot_product_attention.default", "start_heads_to_seq", "finish_heads_to_seq", "finish_heads_to_seq",
    ]  # fmt: skip


def turned(heads):
    """On every rank: error against the model, strategy, and that all ranks agree."""
    torch.manual_seed(0)
    model = Attention(heads)
    inputs = torch.randn(2, 5, WIDTH), torch.randn(2, TOKENS, WIDTH)
    fast = seqpar.sp_compile(model, inputs, ulysses=4, dynamic=False, hardware=LINK)
    with torch.no_grad():
        pairs = list(zip(fast(*inputs), model(*inputs), strict=True))
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs), strategies(fast.plan)


def test_on_real_ranks(ranks):
    for error, found in ranks.run(turned, 8, timeout=300):
        assert error < 1e-6 and "turns" in found[0], (error, found)
