"""Who shares heads, and over which ranks."""

import pytest
import torch
from torch.nn import functional as F

from seqpar.partitioner.cost import Prices
from seqpar.partitioner.division import Degrees, division
from seqpar.partitioner.head_shares import share_causal_heads
from seqpar.partitioner.infer import infer
from seqpar.partitioner.lengths import Sizes
from seqpar.passes.trace import trace


class Attention(torch.nn.Module):
    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize(("heads", "mesh", "price", "shared"), [(4, (4, 2), 0, False), (6, (4, 2), 0, True), (6, (4, 1), 1e9, False), (2, (4, 1), 1e9, True)])
def test_shared_where_uneven_and_worth_it_and_always_with_too_few_heads(heads, mesh, price, shared):
    traced = trace(Attention(), tuple(torch.randn(1, heads, 32, 4) for _ in range(3)), {}, dynamic=False)
    inference = infer(traced.gm.graph, Sizes())
    (node,) = (n for n, r in inference.relations.items() if r.attention is not None)
    found = division(inference, Degrees(*mesh), Prices(price, price, price), node)
    assert found.shared is shared and found.degrees == (Degrees(mesh[0] * mesh[1], 1) if shared else Degrees(*mesh))
    assert bool(found.reason) == (heads == 6 and not shared)


def test_parts_of_a_causal_head_have_equal_work():
    (((_, first),)) = [(p.first, p.last) for p in share_causal_heads(1, 2, 1000, 1000)[0]]
    assert first == 707 and all(p.first < p.last for pieces in share_causal_heads(3, 8, 8, 8) for p in pieces)
