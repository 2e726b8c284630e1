import pytest
import torch

from seqpar.runtime.layout import parts_of, shard
from seqpar.runtime.simulate import SimulatedWorld
from seqpar.runtime.ulysses import heads_to_seq, seq_to_heads


def even_heads(heads, size):
    stops = [sum(parts_of(heads, size)[: r + 1]) for r in range(size)]
    return tuple(zip([0, *stops[:-1]], stops, strict=True))


def everyone(world, f):
    return world.run([lambda groups, rank=rank: f(rank, groups["sp"]) for rank in range(world.size)])


def whole_length(segments):
    return sum(s if isinstance(s, int) else sum(s) for s in segments)


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("heads", [3, 6, 7])
@pytest.mark.parametrize("lengths", [(8,), (7,), (5, 2), (1, 4), (0, 3)])
@pytest.mark.parametrize("text", ["none", "replicated", "between"])
def test_there_and_back(size, heads, lengths, text):
    sharded = [parts_of(n, size) for n in lengths]
    segments = {"none": sharded, "replicated": [3, *sharded], "between": [sharded[0], 3, *sharded[1:]]}[text]
    x = torch.randn(2, heads, whole_length(segments), 4)
    ranges = even_heads(heads, size)
    world = SimulatedWorld(size, 1)

    def f(rank, group):
        local = shard(x, 2, segments, rank=rank)
        (mine,) = seq_to_heads([local], [segments], [ranges], group=group)
        return mine, heads_to_seq(mine, segments, ranges, group=group), local

    for rank, (mine, back, local) in enumerate(everyone(world, f)):
        assert torch.equal(mine, x[:, slice(*ranges[rank])])
        assert torch.equal(back, local)
    assert world.traffic[0].calls["all_to_all"] == (2 if size > 1 else 0)


def test_qkv_in_one_exchange_with_overlapping_gqa_heads():
    # 6 query heads over 4 ranks, 2 key heads: rank 1 has queries of both groups, so its range overlaps the others.
    segments = (2, parts_of(9, 4))
    q, k, v = torch.randn(1, 6, 11, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 4)
    q_heads = even_heads(6, 4)  # 2, 2, 1, 1
    kv_heads = tuple((start // 3, (stop - 1) // 3 + 1) for start, stop in q_heads)
    assert kv_heads == ((0, 1), (0, 2), (1, 2), (1, 2))
    world = SimulatedWorld(4, 1)

    def f(rank, group):
        local = [shard(x, 2, segments, rank=rank) for x in (q, k, v)]
        return seq_to_heads(local, [segments] * 3, [q_heads, kv_heads, kv_heads], group=group)

    for rank, results in enumerate(everyone(world, f)):
        for x, heads, result in zip((q, k, v), (q_heads, kv_heads, kv_heads), results, strict=True):
            assert torch.equal(result, x[:, slice(*heads[rank])])
    assert world.traffic[0].calls["all_to_all"] == 1


def test_keys_replicated_queries_sharded():
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 3, 8)
    heads, segments = even_heads(4, 2), [(parts_of(5, 2),), (3,)]
    world = SimulatedWorld(2, 1)
    results = everyone(
        world, lambda r, g: seq_to_heads([shard(q, 2, segments[0], rank=r), k], segments, [heads] * 2, group=g)
    )
    for rank, (mine, keys) in enumerate(results):
        assert torch.equal(mine, q[:, slice(*heads[rank])]) and torch.equal(keys, k[:, slice(*heads[rank])])
    assert world.traffic[0].bytes["all_to_all"] == 2 * 2 * 2 * 8 * 4  # only the other rank's queries


def test_replicated_needs_no_communication():
    x = torch.randn(1, 4, 5, 8)
    world = SimulatedWorld(2, 1)
    results = everyone(world, lambda _, group: seq_to_heads([x], [(5,)], [((0, 3), (3, 4))], group=group)[0])
    assert torch.equal(results[1], x[:, 3:]) and world.traffic[0].calls["all_to_all"] == 0


def test_traffic_is_exactly_the_others_share():
    world = SimulatedWorld(4, 1)
    segments, heads = (parts_of(8, 4),), even_heads(4, 4)
    everyone(world, lambda _, group: seq_to_heads([torch.ones(1, 4, 2, 8)], [segments], [heads], group=group))
    assert all(t.bytes["all_to_all"] == 3 * 2 * 8 * 4 for t in world.traffic)


@pytest.mark.parametrize("order", ["heads first", "sequence first"])
def test_memory_order_lets_the_heads_be_merged_for_free(order):
    x = torch.randn(2, 4, 3, 8) if order == "heads first" else torch.randn(2, 3, 4, 8).transpose(1, 2)
    segments, heads = ((3, 3),), ((0, 4), (4, 8))
    results = everyone(SimulatedWorld(2, 1), lambda _, g: heads_to_seq(torch.cat([x, x], 2), segments, heads, group=g))
    assert results[0].transpose(1, 2).is_contiguous()


def test_heads_that_are_not_adjacent_are_refused():
    with pytest.raises(AssertionError, match="adjacent"):
        everyone(
            SimulatedWorld(2, 1),
            lambda _, g: heads_to_seq(torch.ones(1, 2, 2, 4), ((1, 1),), ((0, 2), (1, 3)), group=g),
        )
