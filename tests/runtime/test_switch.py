import math

import pytest
import torch

from seqpar.runtime.layout import shard
from seqpar.runtime.simulate import SimulatedWorld
from seqpar.runtime.switch import switch

CASES = [
    (((2, 2, 2, 2),), ((3, 3, 3, 3),)),
    (((3, 3, 3, 2),), ((1, 1, 0, 0),)),
    (((1, 0, 0, 0),), ((2, 2, 2, 1),)),
    ((3, (2, 2, 1, 1)), ((2, 2, 1, 1), 2)),
    (((1, 1, 1, 0), 2, (4, 3, 3, 3)), ((2, 1, 1, 1),)),
]


def length(segments):
    return sum(s if isinstance(s, int) else sum(s) for s in segments)


@pytest.mark.parametrize(("before", "after"), CASES)
@pytest.mark.parametrize(("dim", "to_dim"), [(0, 1), (2, 0), (1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.complex64])
def test_switch_equals_gather_then_shard(before, after, dim, to_dim, dtype):
    shape = [2, 3, 2, 2]
    shape[dim], shape[to_dim] = length(before), length(after)
    x = torch.randint(0, 2, shape).to(dtype) if dtype == torch.bool else torch.randn(shape).to(dtype)
    world = SimulatedWorld(4, 1)

    def program(groups, rank):
        return switch(shard(x, dim, before, rank=rank), dim, before, to_dim, after, group=groups["sp"])

    results = world.run([lambda groups, rank=rank: program(groups, rank) for rank in range(4)])
    for rank, result in enumerate(results):
        assert torch.equal(result, shard(x, to_dim, after, rank=rank)) and result.dtype == dtype


def test_one_exchange_of_a_part_of_the_parts():
    x = torch.randn(1, 8, 12, 5)
    parts = ((2, 2, 2, 2),), ((3, 3, 3, 3),)
    world = SimulatedWorld(4, 1)
    world.run([lambda groups, r=r: switch(shard(x, 1, parts[0], rank=r), 1, parts[0], 2, parts[1], group=groups["sp"]) for r in range(4)])
    for traffic in world.traffic:
        assert traffic.calls["all_to_all"] == 1 and sum(traffic.calls.values()) == 1
        assert traffic.bytes["all_to_all"] == 4 * math.prod(x.shape) * 3 // 16
