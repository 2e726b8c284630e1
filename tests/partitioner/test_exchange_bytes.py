"""What an attention over the mesh receives, by formula: equal to what the emitted programs are counted to receive, on every rank."""

import functools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.partitioner.alternatives import attention_bytes
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.division import division, mesh_bytes
from seqpar.partitioner.exchange_bytes import around, back, to_heads
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.runtime.zigzag import zigzag_attention

FREE = Machine(comm_share=0.0, call_share=0.0)  # communication costs nothing: heads are shared wherever that evens out the work


class Attention(nn.Module):
    """[text | image] attends itself."""

    def __init__(self, heads, kv_heads, is_causal):
        super().__init__()
        self.q, self.kv = nn.Linear(8, heads * 4), nn.Linear(8, kv_heads * 8)
        self.options = {"enable_gqa": heads != kv_heads, "is_causal": is_causal}

    def forward(self, text, image):
        x = torch.cat([text, image], 1)
        q = self.q(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        return F.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2)


class Language(Attention):
    """One causal sequence, of which the last tokens are left out behind it."""

    def __init__(self, heads, kv_heads, left_out):
        super().__init__(heads, kv_heads, True)
        self.left_out = left_out

    def forward(self, text, image):
        x = super().forward(text[:, :0], image)
        return (x[:, : -self.left_out] if self.left_out else x).softmax(-1)


@functools.cache
def traced(text, heads, kv_heads, is_causal=False, image=29):
    with torch.device("meta"):
        return trace(Attention(heads, kv_heads, is_causal), (torch.randn(2, text, 8), torch.randn(2, image, 8)), {}, dynamic=False)


CASES = [(3, 4, 2, False), (11, 6, 6, False), (11, 5, 1, False), (3, 1, 1, False), (11, 3, 3, True), (11, 6, 3, True)]  # text, heads, K/V heads, causal


@pytest.mark.parametrize("mesh", [(4, 1), (2, 2)])
@pytest.mark.parametrize(("text", "heads", "kv_heads", "is_causal"), CASES)
def test_of_the_busiest_rank(text, heads, kv_heads, is_causal, mesh):
    found = partition(traced(text, heads, kv_heads, is_causal), ulysses=mesh[0], ring=mesh[1], machine=FREE)
    assert predicted(found) == pytest.approx(max(counted(found)), rel=1e-12)


def predicted(found):
    (node,) = found.solution.labels.exchanged
    return attention_bytes(found.inference, found.solution, node, found.solution.degrees)


def counted(found):
    """Of every rank, what the one attention receives."""
    (node,) = found.solution.labels.exchanged
    received = []
    for rank, counts in enumerate(found.counts):
        names = {n.name for n in found.emitted(rank).graph.nodes if n.meta.get("seqpar_source") == node.name}
        received.append(sum(sum(t.bytes.values()) for name, t in counts.received.items() if name in names))
    return received


@pytest.mark.parametrize(("mesh", "length", "left_out", "heads"), [
    ((1, 4), 29, 0, (3, 3)), ((1, 4), 32, 1, (4, 2)), ((1, 3), 30, 2, (2, 2)), ((2, 2), 31, 1, (4, 2)), ((2, 2), 29, 0, (4, 1)), ((2, 3), 40, 1, (6, 3)), ((4, 2), 41, 1, (12, 3)),
])  # fmt: skip
def test_of_a_ring_in_zigzag_order(mesh, length, left_out, heads):
    """With its two further exchanges; tokens that are cut off ride, so that parts are those of the whole sequence."""
    with torch.device("meta"):
        found = partition(
            trace(Language(*heads, left_out), (torch.randn(2, 3, 8), torch.randn(2, length, 8)), {}, dynamic=False), ulysses=mesh[0], ring=mesh[1], machine=FREE
        )
    assert found.plan.attention[0].strategy.endswith("(zigzag)")
    assert predicted(found) == pytest.approx(max(counted(found)), rel=1e-12)


@pytest.mark.parametrize("mesh", [(1, 2), (1, 4), (2, 2), (2, 4)])
def test_the_formula_of_zigzag_order_in_the_table_of_strategies(mesh):
    """(q + k + v + o)/N of docs/design.md, half of it for a ring of two."""
    with torch.device("meta"):
        found = partition(trace(Language(4, 2, 0), (torch.randn(2, 3, 8), torch.randn(2, 96, 8)), {}, dynamic=False), ulysses=mesh[0], ring=mesh[1], machine=FREE)
    emitted = found.emitted(0).graph.nodes
    received = [sum(c.received[n.name].bytes["all_to_all"] for n in emitted if n.target is zigzag_attention) for c in found.counts]
    assert max(received) == 2 * (4 + 2 + 2 + 4) * 96 * 4 * 4 / (mesh[0] * mesh[1]) / (2 if mesh[1] == 2 else 1)


@pytest.mark.parametrize(("mesh", "text", "heads"), [((1, 4), 11, (4, 2)), ((2, 2), 9, (4, 4)), ((1, 3), 2, (2, 1)), ((1, 4), 3, (4, 4)), ((2, 3), 17, (6, 2))])
def test_of_two_stretches_in_zigzag_order(mesh, text, heads):
    """A short text is whole as keys, and nothing of it is exchanged."""
    found = partition(traced(text, *heads, True), ulysses=mesh[0], ring=mesh[1], machine=FREE)
    assert found.plan.attention[0].strategy.endswith("(zigzag)")
    assert predicted(found) == pytest.approx(max(counted(found)), rel=1e-12)


def test_of_a_plain_ring_with_riders():
    """No call is worth it: the parts are those of the whole sequence all the same."""
    with torch.device("meta"):
        found = partition(trace(Language(4, 4, 3), (torch.randn(2, 3, 8), torch.randn(2, 32, 8)), {}, dynamic=False), ring=4, machine=Machine(call_share=10.0))
    assert found.plan.attention[0].strategy == "ring" and "(29/4 + 3/4)" in found.plan.attention[0].queries
    assert predicted(found) == pytest.approx(max(counted(found)), rel=1e-12)


# heads, K/V heads, ranks; of the busiest rank: the part of the rows it attends that it holds, the K/V heads that these read
SHARED = [(3, 3, 2, 2 / 3, 2), (6, 6, 4, 1 / 6, 2), (6, 3, 4, 1 / 6, 2), (2, 2, 4, 0, 1), (2, 1, 4, 0, 1), (1, 1, 4, 1, 1), (3, 3, 8, 0, 2)]


@pytest.mark.parametrize(("heads", "kv_heads", "ranks", "own", "read"), SHARED)
def test_the_formula_of_shared_heads_in_the_table_of_strategies(heads, kv_heads, ranks, own, read):
    """(q + o)(1 - a)/N + (k + v)(c/g)(N - 1)/N of docs/design.md."""
    found = partition(traced(0, heads, kv_heads, image=96), ulysses=ranks, machine=FREE)
    assert found.plan.attention[0].strategy == "ulysses (shared heads)"
    q, k = 2 * heads * 96 * 4 * 4, 2 * kv_heads * 96 * 4 * 4
    assert predicted(found) == max(counted(found)) == pytest.approx(2 * q * (1 - own) / ranks + 2 * k * read / kv_heads * (ranks - 1) / ranks)


@pytest.mark.parametrize(("heads", "kv_heads", "ranks", "most", "read"), [(3, 3, 2, 2, 2), (6, 3, 4, 2, 1), (5, 1, 4, 2, 1), (7, 7, 3, 3, 3)])
def test_the_formula_of_uneven_heads_in_the_table_of_strategies(heads, kv_heads, ranks, most, read):
    """q(m/h)(u - 1)/u + (k + v)(c/g)(u - 1)/u + o(1 - m/h)/u of docs/design.md; no call is worth it to share them."""
    found = partition(traced(0, heads, kv_heads, True, image=96), ulysses=ranks, machine=Machine(call_share=10.0))
    assert found.plan.attention[0].strategy == "ulysses"
    q, k = 2 * heads * 96 * 4 * 4, 2 * kv_heads * 96 * 4 * 4
    expected = (q * most / heads + 2 * k * read / kv_heads) * (ranks - 1) / ranks + q * (1 - most / heads) / ranks
    (node,), degrees = found.solution.labels.exchanged, found.solution.degrees
    assert mesh_bytes(found.inference, degrees, node, division(found.inference, degrees, found.solution.prices, node)) == pytest.approx(expected)
    assert predicted(found) == max(counted(found))  # here the result is the program's, and whole on every rank


def test_by_hand():
    """3 heads of 8 rows on 2 ranks: rank 0 attends head 0 and the first half of head 1. Every rank holds 4 rows, or 4 and 2 of 6 from position 2 on."""
    table = (((0, 1, 0, 8), (1, 2, 0, 4)), ((1, 2, 4, 8), (2, 3, 0, 8)))
    assert to_heads(table, (0, 4, 8)) == (4, 4)  # the other half of the whole head: of the shared one every rank has its rows
    assert back(table, (0, 4, 8), whole=False) == (4, 4) and back(table, (0, 4, 8), whole=True) == (12, 12)
    assert to_heads(table, (2, 6, 8)) == (2, 2 + 4) and back(table, (2, 6, 8), whole=False) == (12 - 4 - 2, 6 - 2 - 2)


def test_by_hand_around_a_ring():
    """2 x 2 ranks, 3 heads of 8 rows: every row of ranks has half of them, rank 0 of it two heads."""
    table = (((0, 2, 0, 8),), ((2, 3, 0, 8),))
    assert to_heads(table, (0, 2, 4, 6, 8)) == (4, 2, 4, 2) and back(table, (0, 2, 4, 6, 8), whole=False) == (2, 4, 2, 4)
    assert around((2, 1), (0, 2, 4, 6, 8)) == (8, 4, 8, 4)
