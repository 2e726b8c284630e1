import math

import pytest
import torch
import torch.nn.functional as F

from seqpar.errors import UnsupportedError
from seqpar.runtime.counting import CountingGroup
from seqpar.runtime.layout import gather, parts_of, shard
from seqpar.runtime.ring import ring_attention, rotate, split_kv_attention
from seqpar.runtime.simulate import SimulatedWorld
from seqpar.runtime.ulysses import heads_to_seq, seq_to_heads


def whole(segments):
    return sum(s if isinstance(s, int) else sum(s) for s in segments)


def attend_all(q, k, v, mask=None, **options):
    """One process, float32, every row without a visible key 0."""
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, **options).nan_to_num(0.0)


def relative_error(a, b):
    return ((a.float() - b).norm() / b.norm().clamp_min(1e-12)).item()


def make(segments, key_segments=None, key_heads=4, dtype=torch.float32):
    torch.manual_seed(0)
    queries, keys = whole(segments), whole(key_segments or segments)
    shapes = [(2, 4, queries, 8), (2, key_heads, keys, 8), (2, key_heads, keys, 8)]
    return [torch.randn(shape).to(dtype) for shape in shapes]


def ring(size, q, k, v, mask=None, *, segments, key_segments=None, function=ring_attention, **options):
    """Every rank's result, and the world."""
    key_segments = key_segments or segments
    world = SimulatedWorld(1, size)

    def f(rank):
        local = [shard(x, 2, s, rank=rank) for x, s in ((q, segments), (k, key_segments), (v, key_segments))]
        laid_out = {"query_segments": segments, "key_segments": key_segments}
        return lambda groups: function(*local, mask, **laid_out, **options, group=groups["ring"])

    return world.run([f(rank) for rank in range(size)]), world


def check(size, q, k, v, mask=None, *, segments, tolerance=1e-5, **options):
    results, world = ring(size, q, k, v, mask, segments=segments, **options)
    options.pop("key_segments", None)
    expected = attend_all(q, k, v, mask, **options)
    for rank, result in enumerate(results):
        assert relative_error(result, shard(expected, 2, segments, rank=rank)) <= tolerance
        assert result.dtype == q.dtype
    return world


def mask_of(kind, queries, keys):
    generator = torch.Generator().manual_seed(1)
    visible = torch.rand(2, 1, queries, keys, generator=generator) > 0.5
    visible[1, :, queries // 2] = False  # a row that sees nothing
    padding = visible[:, :, :1].clone()
    additive = torch.randn(1, 4, queries, keys, generator=generator)
    return {
        "none": None,
        "key padding": padding,
        "full": visible,
        "2-D": visible[0, 0],
        "additive": additive,
        "additive, blind": additive.masked_fill(~visible[1:], -math.inf),
        "per query": additive[..., :1],
        "all dark": torch.zeros(1, 1, 1, keys, dtype=torch.bool),
    }[kind]


LAYOUTS = {
    "even": (3, ((3, 3, 3),)),
    "uneven": (4, (parts_of(10, 4),)),
    "shorter than the ring": (4, (parts_of(2, 4),)),
    "one": (2, ((1, 0),)),
    "empty in the middle": (3, ((4, 0, 2),)),
    "replicated text": (3, (2, parts_of(7, 3))),
    "two parts": (3, (parts_of(4, 3), 3, parts_of(5, 3))),
    "text only": (2, (5,)),
    "single rank": (1, (2, (5,))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["none", "key padding", "full", "2-D", "additive", "additive, blind", "per query", "all dark"])
def test_masks_in_every_layout(layout, kind):
    size, segments = LAYOUTS[layout]
    q, k, v = make(segments)
    check(size, q, k, v, mask_of(kind, whole(segments), whole(segments)), segments=segments)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_causal_in_every_layout(layout):
    size, segments = LAYOUTS[layout]
    check(size, *make(segments), segments=segments, is_causal=True)


@pytest.mark.parametrize(("queries", "keys"), [(5, 9), (9, 5), (9, 1)])
@pytest.mark.parametrize("is_causal", [False, True])
def test_cross_attention(queries, keys, is_causal):
    segments, key_segments = (parts_of(queries, 3),), (2, parts_of(keys, 3))
    q, k, v = make(segments, key_segments)
    check(3, q, k, v, segments=segments, key_segments=key_segments, is_causal=is_causal)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_gqa_and_scale(key_heads):
    segments = (2, parts_of(7, 3))
    check(3, *make(segments, key_heads=key_heads), segments=segments, enable_gqa=True, scale=0.2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_merges_in_float32(dtype):
    segments = (parts_of(11, 4),)
    q, k, v = make(segments, dtype=dtype)
    check(4, q, k, v, segments=segments, tolerance=1e-2)
    check(4, q, k, v, mask_of("key padding", 11, 11), segments=segments, tolerance=1e-2)


@pytest.mark.parametrize("ulysses_order", [False, True])
def test_blocks_travel_to_the_neighbour_only(ulysses_order):
    segments = (2, parts_of(7, 3))  # parts 3, 2, 2: the replicated part never travels
    q, k, v = make(segments)
    if ulysses_order:
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    world = check(3, q, k, v, segments=segments)
    row = 2 * 4 * 8 * 2 * 4
    assert [t.bytes["ring"] for t in world.traffic] == [4 * row, 5 * row, 5 * row]
    assert all(t.calls == {"ring": 2, "all_to_all": 0, "all_gather": 0, "all_reduce": 0} for t in world.traffic)


def test_keys_on_every_rank_need_no_communication():
    segments, key_segments = (parts_of(5, 2),), (6,)
    world = check(2, *make(segments, key_segments), segments=segments, key_segments=key_segments)
    assert world.traffic[0].calls["ring"] == 0


@pytest.mark.parametrize("kind", ["none", "causal", "key padding", "additive, blind", "all dark"])
@pytest.mark.parametrize("key_segments", [(parts_of(10, 4),), (2, parts_of(3, 4)), (parts_of(2, 4), 3), (5,)])
def test_whole_queries_give_the_same_bits_everywhere(kind, key_segments):
    is_causal = kind == "causal"
    mask = None if is_causal else mask_of(kind, 3, whole(key_segments))
    q, k, v = make((3,), key_segments)
    layout = {"segments": (3,), "key_segments": key_segments, "is_causal": is_causal}
    results, world = ring(4, q, k, v, mask, **layout, function=split_kv_attention)
    assert relative_error(results[0], attend_all(q, k, v, mask, is_causal=is_causal)) <= 1e-5
    assert all(torch.equal(result, results[0]) for result in results)
    assert world.traffic[0].calls["all_gather"] == any(isinstance(s, tuple) for s in key_segments)


def test_backward_is_refused_where_it_would_be_wrong():
    def f(groups):
        q = torch.randn(1, 1, 2, 8, requires_grad=True)
        segments = {"query_segments": ((2, 2),), "key_segments": ((2, 2),)}
        ring_attention(q, q, q, **segments, group=groups["ring"]).sum().backward()

    with pytest.raises(UnsupportedError, match="no_grad"):
        SimulatedWorld(1, 2).run([f, f])


def ring_within_ulysses(u, r, q, k, v, mask, segments, heads, **options):
    """The composition an emitted program makes: heads over u, sequence blocks around r."""
    kv_heads = tuple((a * k.shape[1] // q.shape[1], b * k.shape[1] // q.shape[1]) for a, b in heads)
    rows = tuple(
        s if isinstance(s, int) else tuple(sum(s[j * u : (j + 1) * u]) for j in range(r)) for s in segments
    )

    def f(rank):
        j = rank // u
        row = [s if isinstance(s, int) else s[j * u : (j + 1) * u] for s in segments]

        def run(groups):
            local = [shard(x, 2, segments, rank=rank) for x in (q, k, v)]
            mine = seq_to_heads(local, [row] * 3, [heads, kv_heads, kv_heads], group=groups["ulysses"])
            own_mask = mask[:, slice(*heads[rank % u])] if mask is not None and mask.shape[1] > 1 else mask
            layout = {"query_segments": rows, "key_segments": rows}
            out = ring_attention(*mine, own_mask, **layout, **options, group=groups["ring"])
            out = heads_to_seq(out, row, heads, group=groups["ulysses"])
            return out, gather(out, 2, segments, group=groups["sp"])

        return run

    return SimulatedWorld(u, r).run([f(rank) for rank in range(u * r)])


@pytest.mark.parametrize(("u", "r", "heads"), [(2, 2, ((0, 2), (2, 4))), (2, 3, ((0, 2), (2, 4))), (3, 2, ((0, 2), (2, 3), (3, 4)))])
@pytest.mark.parametrize("segments", [(13,), (3, 0), (5, 2)])
@pytest.mark.parametrize("kind", ["none", "key padding", "additive, blind", "causal"])
def test_ulysses_times_ring(u, r, heads, segments, kind):
    image, text = segments[0], segments[1:]
    segments = (*text, parts_of(image, u * r))
    q, k, v = make(segments)
    length = whole(segments)
    options = {"is_causal": kind == "causal"}
    mask = None if kind == "causal" else mask_of(kind, length, length)
    expected = attend_all(q, k, v, mask, **options)
    for rank, (local, everything) in enumerate(ring_within_ulysses(u, r, q, k, v, mask, segments, heads, **options)):
        assert relative_error(local, shard(expected, 2, segments, rank=rank)) <= 1e-5
        assert relative_error(everything, expected) <= 1e-5


def test_ulysses_times_ring_with_gqa():
    segments = (2, parts_of(11, 4))
    q, k, v = make(segments, key_heads=2)
    expected = attend_all(q, k, v, enable_gqa=True)
    for _, everything in ring_within_ulysses(2, 2, q, k, v, None, segments, ((0, 2), (2, 4)), enable_gqa=True):
        assert relative_error(everything, expected) <= 1e-5


def test_one_key_head_serves_all_queries():
    q, k, v = make(((5, 4),), key_heads=1)
    check(2, q, k, v, segments=((5, 4),))


@pytest.mark.parametrize("lowest", [torch.finfo(torch.float32).min, -1e9])
@pytest.mark.parametrize("broadcast", [False, True])
def test_rows_that_see_only_a_finite_minus_infinity_weigh_all_keys_alike(lowest, broadcast):
    """13 keys in parts of 5, 4 and 4: the log-sum-exp of such a row has no digits left for their numbers."""
    segments = ((5, 4, 4),)
    q, k, v = make(segments)
    visible = torch.ones(2, 1, 13, 1 if broadcast else 13, dtype=torch.bool)
    visible[:, :, 3:6] = False
    check(3, q, k, v, torch.zeros(visible.shape).masked_fill(~visible, lowest), segments=segments)


def test_the_next_block_is_in_flight_before_one_is_attended():
    done = []

    class Watched(CountingGroup):
        def all_to_all(self, *args):
            done.append("start")
            return super().all_to_all(*args)

    k = torch.randn(1, 2, 4, 8)
    rotate(k, k, [(0, 4)], [4, 4, 4], lambda result, source, k, v: done.append("attend"), Watched(3, 0))
    assert done == ["start", "attend", "start", "attend", "attend"]
