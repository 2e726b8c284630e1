"""Parts of several tensors reach the ranks they are meant for, with the scales of what they were rounded with."""

import pytest
import torch

from seqpar.runtime.peers import Incoming, finish_from_peers, start_to_peers
from seqpar.runtime.simulate import SimulatedWorld
from seqpar.runtime.travel import FLOAT8, Form

SIZE = 3
ROWS = {0: (0, 2), 1: (2, 3), 2: (3, 3)}  # of every tensor, what each rank is to get; nothing for the last


def tensor(rank, i):
    return (torch.arange(6.0).view(3, 2) + 1) * 10 ** (rank + 3 * i)  # scales that differ by rank and tensor


def exchange(rank, group, comm_dtype, count=2):
    def outgoing(peer, encoded):
        start, stop = ROWS[peer]
        return [([x[start:stop]], 0) for x in encoded for _ in range(stop > start)]

    def incoming(peer):
        start, stop = ROWS[rank]
        return Incoming(count, [(i, [stop - start, 2]) for i in range(count) for _ in range(stop > start)])

    options = {"group": group, "comm_dtype": comm_dtype}
    wire = start_to_peers([tensor(rank, i) for i in range(count)], outgoing, incoming, **options)
    return wire, finish_from_peers(wire, torch.float32, incoming, **options)


@pytest.mark.parametrize("comm_dtype", [None, torch.bfloat16, FLOAT8])
def test_every_rank_has_its_parts(comm_dtype):
    results = SimulatedWorld(SIZE, 1).run([lambda groups, rank=rank: exchange(rank, groups["sp"], comm_dtype) for rank in range(SIZE)])
    for rank, (_, found) in enumerate(results):
        start, stop = ROWS[rank]
        assert found.keys() == {0, 1, 2} - {rank}
        for peer, parts in found.items():
            wanted = [Form.of(torch.float32, 1, comm_dtype).rounded(tensor(peer, i))[start:stop] for i in range(2) if stop > start]
            assert len(parts) == len(wanted) and all(torch.equal(a.float(), b) for a, b in zip(parts, wanted, strict=True))


def test_headers_come_once_per_peer_and_only_with_something_behind_them():
    results = SimulatedWorld(SIZE, 1).run([lambda groups, rank=rank: exchange(rank, groups["sp"], FLOAT8) for rank in range(SIZE)])
    assert [wire.numel() for wire, _ in results] == [2 * (2 * 4 + 2 * 2 * 2), 2 * (2 * 4 + 2 * 1 * 2), 0]


def test_one_dtype():
    with pytest.raises(AssertionError, match="one dtype per exchange"):
        start_to_peers([torch.ones(1), torch.ones(1).half()], lambda peer, encoded: [], lambda peer: Incoming(2, []), group=None, comm_dtype=None)
