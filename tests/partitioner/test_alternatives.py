"""Prices of what the solver did not choose."""

import pytest
import torch
from torch.nn import functional as F

from seqpar.partitioner.alternatives import other_meshes, other_placement
from seqpar.partitioner.labels import Degrees
from seqpar.partitioner.solve import solve
from seqpar.passes.pipeline import partition
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


def test_other_meshes_are_priced_as_the_solver_prices_them(partitioned):
    inference, solution = partitioned.inference, partitioned.solution
    found = {a.strategy: a.cost for a in other_meshes(inference, solution)}
    assert list(found) == ["ulysses 4", "ring 4"]
    alone = partition(partitioned.traced, ulysses=2, ring=2)
    assert not any(a.strategy == "ulysses+ring" for a in other_meshes(alone.inference, alone.solution))
    # The exchange of heads is priced by its bytes, a ring's almost nothing: it travels behind the attention.
    assert found["ring 4"] < solution.labels.cost < found["ulysses 4"]


def test_more_ranks_than_heads_are_no_alternative(partitioned):
    inference = partitioned.inference
    solution = solve(inference, Degrees(4, 2))
    assert [a.strategy for a in other_meshes(inference, solution)] == ["ring 8"]


def test_the_other_placement_costs_more(partitioned):
    inference, solution = partitioned.inference, partitioned.solution
    (exchanged,) = ({n} for n in solution.labels.exchanged)
    (local,) = ({n} for n, r in inference.relations.items() if r.attention is not None and n not in exchanged)
    assert local <= solution.local
    gathered, meshed = other_placement(inference, solution, exchanged), other_placement(inference, solution, local)
    assert gathered.strategy == "local" and meshed.strategy == "ulysses+ring"
    assert min(gathered.cost, meshed.cost) > solution.labels.cost
