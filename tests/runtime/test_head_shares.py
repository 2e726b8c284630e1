"""Pieces of heads come back as parts of the sequence."""

import functools

import pytest
import torch

from seqpar.partitioner.head_shares import share_heads
from seqpar.runtime.head_shares import pieces_to_seq
from seqpar.runtime.layout import parts_of, shard
from seqpar.runtime.simulate import SimulatedWorld


@pytest.mark.parametrize(("heads", "ranks"), [(3, 2), (5, 3), (6, 4), (7, 4), (3, 4)])
@pytest.mark.parametrize("segments_of", [lambda n: (parts_of(11, n),), lambda n: (3, parts_of(8, n)), lambda n: (parts_of(9, n), 2)])
def test_every_rank_gets_its_rows_of_all_heads(heads, ranks, segments_of):
    x = torch.randn(2, heads, 11, 4)
    segments = segments_of(ranks)
    shares = share_heads(heads, ranks)
    table = [[(p.start, p.stop, *p.rows(11)) for p in pieces] for pieces in shares]

    def run(rank, groups):
        own = [x[:, a:b, first:last] for a, b, first, last in table[rank]]
        return pieces_to_seq(own, segments, table, group=groups["sp"])

    world = SimulatedWorld(ranks, 1)
    for rank, found in enumerate(world.run([functools.partial(run, rank) for rank in range(ranks)])):
        assert torch.equal(found, shard(x, 2, segments, rank=rank))
    assert world.traffic[0].calls["all_to_all"] == 1
