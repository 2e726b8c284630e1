import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from seqpar.errors import UnsupportedError
from seqpar.runtime.layout import parts_of, shard
from seqpar.runtime.mesh import build_mesh
from seqpar.runtime.simulate import SimulatedWorld
from seqpar.runtime.zigzag import attended, chunk_lengths, dealt, zigzag_attention


def make(length, key_heads=4, dtype=torch.float32, value_dim=8):
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, length, 8), (2, key_heads, length, 8), (2, key_heads, length, value_dim)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def check(segments, q, k, v, tolerance=1e-5, key_segments=None, **options):
    """Every rank's result is its part of the causal attention; the world."""
    world, layout = SimulatedWorld(1, len(segments[0])), {"query_segments": segments, "key_segments": key_segments or segments}

    def f(rank):
        local = [shard(x, 2, s, rank=rank) for x, s in zip((q, k, v), (segments, *[layout["key_segments"]] * 2), strict=True)]
        return lambda groups: zigzag_attention(*local, **layout, group=groups["ring"], **options)

    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, **options)
    for rank, result in enumerate(world.run([f(rank) for rank in range(world.size)])):
        part = shard(expected, 2, segments, rank=rank)
        assert result.dtype == q.dtype and result.shape == part.shape
        assert (result.float() - part).norm() <= tolerance * max(part.norm(), 1e-6)
    return world


PARTS = [(4, 4), (7, 6), parts_of(24, 3), parts_of(23, 3), parts_of(32, 4), parts_of(29, 4), parts_of(41, 5), parts_of(3, 4), (5, 0, 1, 2), (9,), (0, 0, 3)]


@pytest.mark.parametrize("parts", PARTS)
def test_causal_in_every_layout(parts):
    check((parts,), *make(sum(parts)))


SEVERAL = [((4, 4), (3, 3)), (parts_of(5, 3), parts_of(17, 3)), ((1, 1, 0, 0), parts_of(23, 4), (0, 0, 0, 2)), (parts_of(19, 4), parts_of(19, 4)), ((0, 0, 1), (0, 4, 0))]


@pytest.mark.parametrize("segments", SEVERAL)
@pytest.mark.parametrize("whole", [False, True])
def test_several_stretches(segments, whole):
    """Text and image, each in parts, in one causal sequence; keys of the first may be whole."""
    keys = (sum(segments[0]), *segments[1:]) if whole else segments
    check(segments, *make(sum(map(sum, segments)), key_heads=2), key_segments=keys, enable_gqa=True)


def test_queries_that_are_whole_are_refused():
    x = torch.randn(1, 1, 6, 8)
    with pytest.raises(AssertionError, match="every rank attends its own queries"):
        SimulatedWorld(1, 2).run([lambda groups: zigzag_attention(x, x, x, query_segments=(6,), key_segments=(6,), group=groups["ring"])] * 2)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_gqa_and_scale(key_heads):
    check(((5, 5, 4),), *make(14, key_heads), enable_gqa=True, scale=0.2)


def test_values_of_another_width():
    check(((5, 5, 4),), *make(14, value_dim=6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_merges_in_float32(dtype):
    check((parts_of(11, 4),), *make(11, dtype=dtype), tolerance=1e-2)


@pytest.mark.parametrize("parts", [parts_of(32, 4), parts_of(29, 4), parts_of(23, 3), (7, 6)])
def test_bytes_are_those_of_the_formula(parts):
    world = check((parts,), *make(sum(parts), key_heads=2, value_dim=6), enable_gqa=True)
    batch, heads, key_heads, dim, value_dim, size = 2, 4, 2, 8, 6, 4
    chunks, lengths, ranks = chunk_lengths(parts), dealt(parts), len(parts)
    both = [sum(chunks[c] for c in attended(r, ranks) if c // 2 == r) for r in range(ranks)]
    there, back = ([n - kept for n, kept in zip(have, both, strict=True)] for have in (lengths, parts))
    for rank, traffic in enumerate(world.traffic):
        moved = there[rank] * (heads * dim + key_heads * (dim + value_dim)) + back[rank] * heads * value_dim
        around = key_heads * (dim + value_dim) * (sum(lengths) - lengths[rank])
        assert traffic.bytes == {"all_to_all": batch * moved * size, "ring": batch * around * size, "all_gather": 0, "all_reduce": 0}
        assert traffic.calls == {"all_to_all": 2, "ring": len(parts) - 1, "all_gather": 0, "all_reduce": 0}


@pytest.mark.parametrize("size", [2, 3, 4, 7])
def test_chunks_are_dealt_once_and_evenly(size):
    assert sorted(c for r in range(size) for c in attended(r, size)) == list(range(2 * size))
    parts = parts_of(1000, size)
    assert sum(chunk_lengths(parts)) == sum(dealt(parts)) == 1000


def test_backward_is_refused_where_it_would_be_wrong():
    def f(groups):
        q = torch.randn(1, 1, 2, 8, requires_grad=True)
        zigzag_attention(q, q, q, query_segments=((2, 2),), key_segments=((2, 2),), group=groups["ring"]).sum().backward()

    with pytest.raises(UnsupportedError, match="no_grad"):
        SimulatedWorld(1, 2).run([f, f])


def real_error(compiled):
    segments = (parts_of(7, 4), parts_of(22, 4))
    group = build_mesh(1, 4).groups["ring"]
    torch._dynamo.reset()
    rank = dist.get_rank()
    q, k, v = make(sum(map(sum, segments)), key_heads=2)
    run = torch.compile(zigzag_attention, fullgraph=True, backend="aot_eager", dynamic=False) if compiled else zigzag_attention
    with torch.no_grad():
        out = run(*(shard(x, 2, segments, rank=rank) for x in (q, k, v)), query_segments=segments, key_segments=segments, enable_gqa=True, group=group)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    part = shard(expected, 2, segments, rank=rank)
    return ((out - part).norm() / part.norm()).item()


@pytest.mark.parametrize("compiled", [False, True])
def test_on_real_ranks(ranks, compiled):
    """With symbolic lengths a compiler sees one operator: tests/passes/test_seal.py."""
    assert max(ranks.run(real_error, compiled)) <= 1e-5
