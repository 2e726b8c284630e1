"""Causal rings are balanced where that pays."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqpar.partitioner.cost import Machine, attention_pairs
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

HEADS, DIM = 4, 8
FREE = Machine(comm_share=0.0, call_share=0.0)  # communication costs nothing: always balanced
aten = torch.ops.aten


class Causal(nn.Module):
    def __init__(self, key_heads: int = HEADS, text: int = 0) -> None:
        super().__init__()
        self.key_heads, self.text = key_heads, text
        self.q, self.kv = nn.Linear(HEADS * DIM, HEADS * DIM), nn.Linear(HEADS * DIM, 2 * key_heads * DIM)

    def forward(self, x: Tensor) -> Tensor:
        if self.text:
            x = torch.cat([x[:, : self.text] * 2, x], 1)
        q = self.q(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.key_heads, DIM)).transpose(1, 2) for t in self.kv(x).chunk(2, dim=-1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)


def traced_model(length: int, dynamic: bool = False, **options):
    torch.manual_seed(0)
    return trace(Causal(**options).eval(), (torch.randn(2, length, HEADS * DIM),), {}, dynamic=dynamic)


@pytest.mark.parametrize(("length", "key_heads"), [(16, 4), (19, 1)])
def test_exact_in_zigzag_order(length, key_heads) -> None:
    traced = traced_model(length, key_heads=key_heads)  # every mesh balances these; 8 positions over 3 ranks cannot be
    for ulysses, ring in ((1, 2), (1, 3), (1, 4), (2, 2)):
        report = verify_traced(traced, ulysses=ulysses, ring=ring, machine=FREE)
        assert report.ok, report
        assert [a.strategy for a in report.plan.attention] == ["ulysses+ring (zigzag)" if ulysses > 1 else "ring (zigzag)"]


def test_symbolic_lengths() -> None:
    traced = traced_model(19, dynamic=True)
    report = verify_traced(traced, ulysses=2, ring=2, machine=FREE)
    assert report.ok and report.plan.attention[0].strategy.endswith("(zigzag)"), report


def test_only_where_it_pays() -> None:
    """Tiny: a projection is dearer than the triangle that idle ranks could have taken over."""
    strategies = [partition(traced_model(n), ring=4).plan.attention[0].strategy for n in (16, 2048)]
    assert strategies == ["ring", "ring (zigzag)"]
    never = Machine(call_share=10.0)
    assert partition(traced_model(2048), ring=4, machine=never).plan.attention[0].strategy == "ring"


@pytest.mark.parametrize(("ulysses", "ring", "text"), [(1, 2, 8), (1, 3, 7), (1, 4, 3), (2, 2, 9), (1, 4, 16)])
def test_two_stretches(ulysses, ring, text) -> None:
    """Each is held in parts, a short one whole or one position a rank; attention deals them out as one sequence, and brings them back."""
    traced = traced_model(19, text=text)
    for machine, order in ((Machine(call_share=10.0), ""), (FREE, " (zigzag)")):
        report = verify_traced(traced, ulysses=ulysses, ring=ring, machine=machine)
        assert report.ok, report
        assert report.plan.attention[0].strategy == ("ulysses+ring" if ulysses > 1 else "ring") + order


def test_keys_that_are_a_part_of_the_queries_are_not_dealt_out() -> None:
    """Though calls are cheap enough for what zigzag order would save of as many keys as queries."""

    class Prefix(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q, k = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (x * 2, x[:, :24].sin()))
            return F.scaled_dot_product_attention(q, k, k + 1, is_causal=True).transpose(1, 2).flatten(2) + x

    report = verify_traced(trace(Prefix(), (torch.randn(1, 240, HEADS * DIM),), {}, dynamic=False), ulysses=1, ring=2, machine=Machine(comm_share=0.0, call_share=0.4))
    assert report.ok and report.plan.attention[0].strategy == "ring", report


def test_two_stretches_are_balanced() -> None:
    """A prompt and a picture in one causal sequence: without zigzag order nearly every block is computed whole."""
    plain, dealt = (partition(traced_model(700, text=300), ring=4, machine=machine).plan for machine in (Machine(call_share=10.0), FREE))
    triangle = 2 * 2 * HEADS * attention_pairs(1000, 1000, True) * 2 * DIM
    linear = plain.flops_total - triangle
    busiest = [(max(plan.flops_per_rank) - linear / 4) / (triangle / 4) for plan in (plain, dealt)]
    assert busiest[0] > 1.7 and busiest[1] < 1.02


def test_other_keys_are_not_dealt_out() -> None:
    """Queries and keys that are not the same positions have no order that is even for both: a plain ring, or heads shared by rows of equal work."""

    class More(nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            q, k = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in (x * 2, torch.cat([y, x], 1).sin()))
            return F.scaled_dot_product_attention(q, k, k + 1, is_causal=True).transpose(1, 2).flatten(2) + x

    traced = trace(More(), (torch.randn(1, 24, HEADS * DIM), torch.randn(1, 19, HEADS * DIM)), {}, dynamic=False)
    for machine, strategy in ((Machine(call_share=10.0), "ring"), (FREE, "ulysses (shared heads)")):
        report = verify_traced(traced, ulysses=1, ring=2, machine=machine)
        assert report.ok and report.plan.attention[0].strategy == strategy, report


@pytest.mark.parametrize(("ulysses", "ring", "length"), [(1, 4, 1024), (1, 4, 509), (2, 2, 509)])
def test_work_is_balanced(ulysses, ring, length) -> None:
    """The busiest rank's attention, against an even share of the triangle."""
    partitioned = partition(traced_model(length), ulysses=ulysses, ring=ring, machine=FREE)
    plan, ranks = partitioned.plan, ulysses * ring
    triangle = 2 * 2 * HEADS * attention_pairs(length, length, True) * 2 * DIM
    linear = 2 * 2 * length * HEADS * DIM * 3 * HEADS * DIM
    assert plan.flops_total == linear + triangle
    assert max(plan.flops_per_rank) - linear / ranks <= 1.1 * triangle / ranks
    assert plan.sharded_flop_fraction > 0.98
    plain = partition(traced_model(length), ulysses=ulysses, ring=ring, machine=Machine(call_share=10.0)).plan
    assert max(plain.flops_per_rank) > 1.2 * max(plan.flops_per_rank)


def test_long_language_model() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
    ids = torch.zeros(1, 2048, dtype=torch.long)
    plan = partition(trace(model, (), {"input_ids": ids, "use_cache": False, "return_dict": False}, dynamic=False), ring=4).plan
    assert [a.strategy for a in plan.attention] == ["ring (zigzag)"]
    assert max(plan.flops_per_rank) <= 1.01 * plan.flops_total / 4
