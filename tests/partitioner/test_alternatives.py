"""Prices of what the solver did not choose."""

import pytest
import torch
from torch.nn import functional as F

from seqpar.partitioner.alternatives import alternatives, attention_seconds
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.division import Degrees
from seqpar.partitioner.solve import solve
from seqpar.passes.pipeline import partition
from seqpar.passes.timeline import timeline
from seqpar.passes.trace import trace


class Cross(torch.nn.Module):
    """Self-attention over the tokens, then attention to 8 others."""

    def __init__(self):
        super().__init__()
        self.qkv, self.q, self.kv = torch.nn.Linear(8, 24), torch.nn.Linear(8, 8), torch.nn.Linear(8, 16)

    def forward(self, x, y):
        q, k, v = (t.unflatten(-1, (4, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        k, v = (t.unflatten(-1, (4, 2)).transpose(1, 2) for t in self.kv(y).chunk(2, -1))
        return F.scaled_dot_product_attention(self.q(x).unflatten(-1, (4, 2)).transpose(1, 2), k, v)


@pytest.fixture(scope="module")
def partitioned():
    return partition(trace(Cross(), (torch.randn(1, 64, 8), torch.randn(1, 8, 8)), {}, dynamic=False), ulysses=2, ring=2)


MACHINE = Machine(flops_per_s=1e9, bytes_per_s=1e9, latency_s=1e-6)


def split_by_mesh(inference, solution):
    """The attention over the mesh, the one that attends locally."""
    found = [n for n, r in inference.relations.items() if r.attention is not None]
    return [n for n in found if n in solution.labels.exchanged], [n for n in found if n not in solution.labels.exchanged]


def test_predicted_seconds_of_other_meshes_are_those_of_their_programs(partitioned):
    (node,), _ = split_by_mesh(partitioned.inference, partitioned.solution)
    for ulysses, ring in ((2, 2), (4, 1), (1, 4)):
        other = partition(partitioned.traced, ulysses=ulysses, ring=ring)
        parts = [n for n in other.program(0).graph.nodes if n.meta.get("seqpar_source") == node.name]
        counted = timeline(parts, other.counts[0], MACHINE).total
        assert counted > 0
        assert attention_seconds(partitioned.inference, partitioned.solution, node, Degrees(ulysses, ring), MACHINE) == pytest.approx(counted, rel=1e-9)


def test_alternatives_of_an_attention_over_the_mesh(partitioned):
    inference, solution = partitioned.inference, partitioned.solution
    (node,), _ = split_by_mesh(inference, solution)
    found = alternatives(inference, solution, {node}, MACHINE)
    assert {a.strategy for a in found} == {"ulysses 4", "ring 4", "gather K/V"} and [a.seconds for a in found] == sorted(a.seconds for a in found)
    prices = {a.strategy: a.cost for a in found}
    assert prices["gather K/V"] > solution.labels.cost and prices["ulysses 4"] is prices["ring 4"] is None
    eight = solve(inference, Degrees(4, 2))
    assert {a.strategy for a in alternatives(inference, eight, {node}, MACHINE)} == {"ulysses 8", "ring 8", "gather K/V"}


def test_alternatives_of_a_local_attention(partitioned):
    inference, solution = partitioned.inference, partitioned.solution
    _, (node,) = split_by_mesh(inference, solution)
    assert node in solution.local
    (meshed,) = alternatives(inference, solution, {node}, MACHINE)
    assert meshed.strategy == "ulysses+ring" and meshed.cost > solution.labels.cost
    local = attention_seconds(inference, solution, node, None, MACHINE)
    assert 0 < local < meshed.seconds  # nothing moves: its keys are whole
    assert local == pytest.approx(2 * 4 * 64 * 8 * 4 / 4 / 1e9)
