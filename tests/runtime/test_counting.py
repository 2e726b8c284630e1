"""A lone rank's count on meta tensors equals what the simulated rank received."""

import pytest
import torch

from seqpar.runtime.counting import CountingGroup, Traffic
from seqpar.runtime.groups import all_reduce
from seqpar.runtime.layout import gather, parts_of
from seqpar.runtime.ring import ring_attention, split_kv_attention
from seqpar.runtime.simulate import SimulatedWorld
from seqpar.runtime.ulysses import heads_to_seq, seq_to_heads

SIZE = 3
SEGMENTS = (2, parts_of(7, SIZE))
HEADS = ((0, 2), (2, 3), (3, 4))


def program(rank, group, device):
    length = SEGMENTS[0] + SEGMENTS[1][rank]
    x = torch.zeros(2, 4, length, 8, device=device)
    (h,) = seq_to_heads([x], [SEGMENTS], [HEADS], group=group)
    y = heads_to_seq(h, SEGMENTS, HEADS, group=group)
    mask = torch.ones(1, 1, 1, 9, dtype=torch.bool, device=device)
    z = ring_attention(x, x, x, mask, query_segments=SEGMENTS, key_segments=SEGMENTS, group=group)
    c = ring_attention(x, x, x, query_segments=SEGMENTS, key_segments=SEGMENTS, is_causal=True, group=group)
    t = split_kv_attention(x[:, :, :2], x, x, query_segments=(2,), key_segments=SEGMENTS, group=group)
    w = gather(x, 2, SEGMENTS, group=group)
    r = all_reduce(x[:, :, :2].contiguous(), "sum", group)
    return [tuple(out.shape) for out in (h, y, z, c, t, w, r)]


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_alone_equals_together(device):
    world = SimulatedWorld(SIZE, 1)
    shapes = world.run([lambda groups, r=r: program(r, groups["sp"], "cpu") for r in range(SIZE)])
    for rank in range(SIZE):
        group = CountingGroup(SIZE, rank)
        assert program(rank, group, device) == shapes[rank]
        assert group.traffic == world.traffic[rank]
    assert world.traffic[0].calls == {"all_to_all": 2, "ring": 4, "all_gather": 2, "all_reduce": 1}


def test_groups_can_share_a_count():
    traffic = Traffic()
    for group in (CountingGroup(2, 0, traffic), CountingGroup(4, 1, traffic)):
        all_reduce(torch.zeros(8, device="meta"), "sum", group)
    assert traffic.calls["all_reduce"] == 2 and traffic.bytes["all_reduce"] == 32 + 48
