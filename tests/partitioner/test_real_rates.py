"""Hardware that the user names decides how attentions communicate: every strategy is right, chosen where it takes least time, and its bytes are those of the formulas."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqpar
from seqpar.errors import MeshError
from seqpar.partitioner.alternatives import attention_bytes
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.division import Degrees
from seqpar.partitioner.real_rates import RealRates
from seqpar.passes.pipeline import Partitioned, partition
from seqpar.passes.trace import trace
from seqpar.runtime.attention import causal_mask
from seqpar.runtime.head_shares import causal_rows
from seqpar.verification import verify_traced

SLOW = Machine(flops_per_s=1e12, bytes_per_s=1e9, latency_s=1e-9, name="slow link").at_real_rates()
LINK = Machine(flops_per_s=1e12, bytes_per_s=1e11, latency_s=1e-12, name="link of the same speed as the model").at_real_rates()
FAST = Machine(flops_per_s=1e9, bytes_per_s=1e12, latency_s=1e-9, name="fast link").at_real_rates()
WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """Attention with its own projections, then an MLP. `options` go to scaled_dot_product_attention; repeat: grouped keys are repeated by hand."""

    def __init__(self, kv_heads=HEADS, heads=HEADS, repeat=False, **options):
        super().__init__()
        self.heads, self.kv_heads, self.repeat, self.options = heads, kv_heads, repeat, options
        self.q, self.k, self.v = (nn.Linear(WIDTH, n * WIDTH // HEADS) for n in (heads, kv_heads, kv_heads))
        self.out, self.norm = nn.Linear(heads * WIDTH // HEADS, WIDTH), nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x, mask=None):
        y = self.norm(x)
        q, k, v = (p(y).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for p in (self.q, self.k, self.v))
        if self.repeat:
            k, v = (t.repeat_interleave(self.heads // self.kv_heads, 1) for t in (k, v))
        gqa = self.kv_heads != self.heads and not self.repeat
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa, **self.options)
        x = x + self.out(out.transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Model(nn.Module):
    """Two blocks: the first may compute its keys from the whole input."""

    def __init__(self, **options):
        super().__init__()
        self.blocks, self.last = nn.ModuleList(Block(**options) for _ in range(2)), nn.Linear(WIDTH, 4)

    def forward(self, x, mask=None):
        for block in self.blocks:
            x = block(x, mask)
        return self.last(x)


@functools.cache
def traced(length=64, masked=False, **options):
    torch.manual_seed(0)
    mask = (torch.arange(length * length).reshape(1, 1, length, length) % 5 != 1,) if masked else ()
    return trace(Model(**options), (torch.randn(1, length, WIDTH), *mask), {}, dynamic=False)


def strategies(found: Partitioned):
    return [a.strategy for a in found.plan.attention]


def formula(found: Partitioned) -> float:
    """The bytes of all attentions by their formulas, and those of gathering the answer."""
    inference, solution = found.inference, found.solution
    over = solution.labels.exchanged
    attentions = [n for n, r in inference.relations.items() if r.attention is not None]
    answer = 64 * 4 * 4 * (1 - 1 / solution.degrees.ranks)
    return answer + sum(attention_bytes(inference, solution, n, solution.degrees if n in over else None) for n in attentions)


@pytest.mark.parametrize(
    ("expected", "mesh", "machine", "options"),
    [
        (["ulysses"] * 2, (2, 1), None, {}),
        (["ulysses"] * 2, (4, 1), FAST, {}),
        (["gather K/V"] * 2, (2, 1), FAST, {}),  # as many bytes as two exchanges, in one call
        (["ring"] * 2, (1, 2), None, {}),
        (["ulysses+ring"] * 2, (2, 2), None, {}),
        (["gather K/V"] * 2, (4, 1), LINK, {"kv_heads": 1}),
        (["gather K/V"] * 2, (2, 1), LINK, {"kv_heads": 1, "repeat": True}),
        (["local", "gather input"], (2, 1), SLOW, {}),
        (["local", "gather input"], (2, 2), SLOW, {}),
    ],
)
def test_each_strategy_is_taken_where_it_is_cheapest_and_receives_what_its_formula_says(expected, mesh, machine, options):
    found = partition(traced(**options), ulysses=mesh[0], ring=mesh[1], machine=machine)
    assert strategies(found) == expected
    assert sum(found.plan.comm_bytes_per_rank.values()) == formula(found)
    assert found.plan.comm_calls["all_gather"] == 1 + sum(s.startswith("gather") for s in expected)  # keys and values travel together


def test_formulas_of_one_attention():
    """[1, 4 heads, 64, 8] of 4 bytes: q, k, v and the result are 8 KiB each; one K/V head 2 KiB."""
    found = partition(traced(), ulysses=2, machine=None)
    node = next(iter(found.solution.labels.exchanged))
    each = 64 * WIDTH * 4

    def bytes_of(u, r):
        return attention_bytes(found.inference, found.solution, node, Degrees(u, r))

    assert bytes_of(2, 1) == 4 * each / 4 and bytes_of(1, 2) == 2 * each / 2 and bytes_of(1, 4) == 2 * each * 3 / 4
    assert bytes_of(2, 2) == 4 * each / 2 / 4 + 2 * each / 2 / 2
    grouped = partition(traced(kv_heads=1), ulysses=4, machine=LINK)
    (why,) = {a.why for a in grouped.plan.attention}
    assert why == "gathers keys and values, 3.07 kB" and why in grouped.plan.explain()  # 2 x 2 KiB x 3/4
    slow = partition(traced(), ulysses=2, machine=SLOW)
    assert slow.plan.attention[1].why == "gathers the input of keys and values, 4.1 kB"  # half of what Ulysses receives


CAUSAL = {"is_causal": True}


@pytest.mark.parametrize("mesh", [(2, 1), (3, 1), (1, 3), (2, 2)])
@pytest.mark.parametrize("options", [CAUSAL, {"masked": True}, {"kv_heads": 2}, {"kv_heads": 2, "repeat": True, **CAUSAL}, {"heads": 3, "kv_heads": 3}])
@pytest.mark.parametrize("machine", [SLOW, LINK], ids=["slow", "link"])
def test_all_are_right_for_uneven_lengths(options, mesh, machine):
    report = verify_traced(traced(13, **options), ulysses=mesh[0], ring=mesh[1], machine=machine)
    assert report.ok, report
    assert not [a for a in report.plan.attention if a.strategy == "replicated"]  # ranks were asked for


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_rows_of_local_causal_attention_see_no_later_key(kv_heads):
    """64 rows on 4 ranks, 4 heads of 8: together the ranks compute the pairs that are visible, the last one 1 - 1/8 of its rows times all keys."""
    found = partition(traced(is_causal=True, kv_heads=kv_heads), ulysses=4, machine=SLOW)
    assert set(strategies(found)) <= {"local", "gather input", "gather K/V"}
    program = found.program(1).graph
    assert not any(n.target is causal_mask for n in program.nodes)
    attended = [sum(c.flops[n.name] for n in program.nodes if n.target is causal_rows) for c in found.counts]
    pairs = [sum(row + 1 for row in range(16 * r, 16 * r + 16)) for r in range(4)]
    assert attended == [2 * 4 * 4 * 8 * n for n in pairs] and sum(pairs) == 64 * 65 // 2  # two attentions of two products
    (one, _), rates = (n for n, r in found.inference.relations.items() if r.attention), RealRates(found.inference, found.solution.degrees, found.solution.prices)
    assert rates.local_causal(found.inference.relations[one], 2) == pytest.approx(max(pairs) / (sum(pairs) / 4))


def test_never_more_time_than_the_mesh_alone():
    """What is predicted with a profile is no more than what the default would take on that machine."""
    for options in ({}, {"kv_heads": 1}):
        for machine in (SLOW, FAST):
            found = traced(**options)
            chosen, meshed = (partition(found, ulysses=2, machine=m) for m in (machine, None))
            meshed.machine = machine
            assert chosen.plan.predicted_seconds["total"] <= meshed.plan.predicted_seconds["total"]


def test_plan_takes_hardware_by_name():
    torch.manual_seed(0)
    inputs = (torch.randn(1, 64, WIDTH),)
    assert seqpar.plan(Model(), inputs, ulysses=2, hardware="4090").machine.startswith("RTX 4090")
    slow = seqpar.plan(Model(), inputs, ulysses=2, hardware=Machine(1e12, 1e9, latency_s=1e-9))
    assert [a.strategy for a in slow.attention] == ["local", "gather input"]
    with pytest.raises(MeshError, match="no hardware profile 'abacus'"):
        seqpar.plan(Model(), inputs, hardware="abacus")


class Masked(nn.Module):
    """The mask has a length of its own: that it ends where the words do is known of the example only."""

    def __init__(self):
        super().__init__()
        self.block = Block()

    def forward(self, image, words, keep):
        x = self.block(torch.cat([words, image], 1), torch.cat([keep, keep.new_ones(image.shape[:2])], 1)[:, None, None])
        return x[:, words.shape[1] :], x[:, : words.shape[1]]


def test_a_part_without_positions_in_the_example():
    keep = torch.ones(2, 7, dtype=torch.bool)
    keep[1, 3:] = False
    found = trace(Masked().eval(), (torch.randn(2, 14, WIDTH), torch.randn(2, 7, WIDTH), keep), {}, dynamic=None)
    assert verify_traced(found, ulysses=2, ring=2, machine=SLOW).ok
