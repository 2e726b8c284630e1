import pytest
import torch

from seqpar.runtime.layout import gather, gather_many, global_ranges, local_ranges, parts_of, shard
from seqpar.runtime.simulate import SimulatedWorld

SEGMENTS = [
    ((2, 2, 2, 2),),
    ((3, 3, 3, 2),),
    ((1, 1, 0, 0),),
    ((0, 0, 0, 0),),
    (3, (2, 2, 1, 1)),
    ((1, 1, 1, 0), 2, (4, 3, 3, 3)),
    ((2, 2, 1, 1), (0, 1, 5, 0)),
    (4, 1),
]


def whole_length(segments):
    return sum(s if isinstance(s, int) else sum(s) for s in segments)


def everyone(world, f):
    return world.run([lambda groups, rank=rank: f(rank, groups["sp"]) for rank in range(world.size)])


@pytest.mark.parametrize(("length", "size", "parts"), [(8, 4, (2, 2, 2, 2)), (5, 3, (2, 2, 1)), (2, 4, (1, 1, 0, 0))])
def test_parts(length, size, parts):
    assert parts_of(length, size) == parts


def test_ranges():
    segments = (3, (2, 1))
    assert local_ranges(segments, 1) == [(0, 3), (3, 1)]
    assert global_ranges(segments, 1) == [(0, 3), (5, 1)]


@pytest.mark.parametrize("segments", SEGMENTS)
@pytest.mark.parametrize(("dim", "batch"), [(0, 1), (1, 1), (1, 2), (-1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_gather_undoes_shard(segments, dim, batch, dtype):
    shape = [batch, 2, 3]
    shape[dim] = whole_length(segments)
    x = torch.randint(0, 2, shape) if dtype == torch.bool else torch.randn(shape)
    x = x.to(dtype)
    world = SimulatedWorld(4, 1)
    results = everyone(world, lambda rank, group: gather(shard(x, dim, segments, rank=rank), dim, segments, group=group))
    for result in results:
        assert torch.equal(result, x) and result.dtype == dtype
    assert world.traffic[0].calls["all_gather"] == any(isinstance(s, tuple) for s in segments)


def test_shard_of_one_segment_is_a_view():
    x = torch.randn(2, 5)
    local = shard(x, 1, ((3, 2),), rank=1)
    assert torch.equal(local, x[:, 3:]) and local.data_ptr() == x[:, 3:].data_ptr()


def test_gather_many_is_one_call_and_pads_the_wire_only():
    x, y, z = torch.randn(2, 7, 3), torch.randn(5), torch.randn(4)
    segments = [((4, 3),), (3, (1, 1)), (4,)]
    world = SimulatedWorld(2, 1)

    def f(rank, group):
        local = [shard(t, d, s, rank=rank) for t, d, s in zip([x, y, z], [1, 0, 0], segments, strict=True)]
        return gather_many(local, [1, 0, 0], segments, group=group)

    for result in everyone(world, f):
        assert all(torch.equal(a, b) for a, b in zip(result, [x, y, z], strict=True))
    for traffic in world.traffic:
        assert traffic.calls["all_gather"] == 1
        assert traffic.bytes["all_gather"] == 4 * (2 * 4 * 3 + 1)  # the longest part, also from the shorter one


def test_even_gather_along_the_first_dim_is_the_wire_buffer():
    x = torch.randn(1, 4, 3)
    world = SimulatedWorld(2, 1)
    for result in everyone(world, lambda rank, group: gather(shard(x, 1, ((2, 2),), rank=rank), 1, ((2, 2),), group=group)):
        assert torch.equal(result, x) and result.is_contiguous()


def test_gather_of_different_dtypes_is_refused():
    with pytest.raises(AssertionError, match="one dtype"):
        everyone(
            SimulatedWorld(2, 1),
            lambda _, group: gather_many([torch.ones(1), torch.ones(1).int()], [0, 0], [((1, 1),)] * 2, group=group),
        )
