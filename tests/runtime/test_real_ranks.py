"""The same functions over real process groups (gloo), eager and compiled."""

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from seqpar.runtime.groups import all_reduce, start_all_gather, start_all_to_all, start_ring_exchange, wait
from seqpar.runtime.layout import gather, gather_many, parts_of, shard
from seqpar.runtime.mesh import build_mesh
from seqpar.runtime.ring import ring_attention, split_kv_attention
from seqpar.runtime.switch import switch
from seqpar.runtime.ulysses import heads_to_seq, seq_to_heads

SIZE = 4


def inputs(length, heads=6, key_heads=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, n, length, 8, generator=generator).to(dtype) for n in (heads, key_heads, key_heads)]


def mask_for(kind, length):
    visible = torch.rand(2, 1, length, length, generator=torch.Generator().manual_seed(1)) > 0.4
    visible[1, :, 3] = False
    return {"none": None, "causal": None, "padding": visible[:, :, :1], "bool": visible, "additive": visible.float() * 3}[kind]


def error(a, b):
    return ((a.float() - b).norm() / b.norm()).item()


def collectives():
    sp = build_mesh(SIZE, 1).groups["sp"]
    me = dist.get_rank()
    sizes = [[(i + j) % 3 for j in range(SIZE)] for i in range(SIZE)]  # sizes[source][target], some 0
    flat = torch.full((sum(sizes[me]),), me, dtype=torch.bfloat16)
    return {
        "all_to_all": wait(start_all_to_all(flat, [row[me] for row in sizes], sizes[me], sp)).tolist(),
        "nothing": wait(start_all_to_all(flat[:0], [0] * SIZE, [0] * SIZE, sp)).tolist(),
        "ring": wait(start_ring_exchange(torch.full((me,), me), (me - 1) % SIZE, sp)).tolist(),
        "gather": wait(start_all_gather(torch.full((1, 2), me).mT, sp)).flatten().tolist(),
        "gather nothing": wait(start_all_gather(torch.ones(0, 3), sp)).shape,
        "sum": all_reduce(torch.tensor([1 + 1j * me]), "sum", sp).tolist(),
        "avg": all_reduce(torch.tensor([float(me)], dtype=torch.float16), "avg", sp).tolist(),
        "max": all_reduce(torch.tensor([me]), "max", sp).tolist(),
    }


def test_collectives(ranks):
    sizes = [[(i + j) % 3 for j in range(SIZE)] for i in range(SIZE)]
    for me, result in enumerate(ranks.run(collectives)):
        before = (me - 1) % SIZE
        assert result == {
            "all_to_all": [i for i in range(SIZE) for _ in range(sizes[i][me])],
            "nothing": [],
            "ring": [before] * before,
            "gather": [0, 0, 1, 1, 2, 2, 3, 3],
            "gather nothing": (0, 3),
            "sum": [4 + 6j],
            "avg": [1.5],
            "max": [3],
        }


def gathers(dtype):
    sp, me = build_mesh(SIZE, 1).groups["sp"], dist.get_rank()
    segments = (2, parts_of(7, SIZE), parts_of(2, SIZE))
    x = torch.randn(2, 11, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = gather(shard(x, 1, segments, rank=me), 1, segments, group=sp)
    z = gather_many([shard(x, 1, segments, rank=me), x[:, :me]], [1, 1], [segments, ((0, 1, 2, 3),)], group=sp)
    return torch.equal(x, y) and torch.equal(z[0], x) and z[1].shape[1] == 6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.complex64])
def test_gather(ranks, dtype):
    assert ranks.run(gathers, dtype) == [True] * SIZE


def compiled_if(compiled, function):
    return torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function


def ring_error(length, kind, key_heads, compiled, dtype=torch.float32):
    ring = build_mesh(1, SIZE).groups["ring"]
    segments = (2, parts_of(length - 2, SIZE))
    q, k, v = inputs(length, key_heads=key_heads, dtype=dtype)
    local = [shard(x, 2, segments, rank=dist.get_rank()) for x in (q, k, v)]
    mask = mask_for(kind, length)
    options = {"is_causal": kind == "causal", "enable_gqa": key_heads != 6}
    run = compiled_if(compiled, ring_attention)
    out = run(*local, mask, query_segments=segments, key_segments=segments, **options, group=ring)
    text = compiled_if(compiled, split_kv_attention)(
        q[:, :, :2], *local[1:], None, query_segments=(2,), key_segments=segments, enable_gqa=key_heads != 6, group=ring
    )
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), mask, **options)
    expected_text = F.scaled_dot_product_attention(q[:, :, :2].float(), k.float(), v.float(), enable_gqa=True)
    return error(out, shard(expected, 2, segments, rank=dist.get_rank())), error(text, expected_text), text


@pytest.mark.parametrize(
    ("length", "kind", "key_heads", "compiled"),
    [
        (13, "none", 2, False),
        (13, "none", 2, True),
        (5, "none", 6, False),
        (13, "causal", 6, False),
        (13, "causal", 6, True),
        (13, "padding", 6, False),
        (13, "bool", 3, True),
        (13, "additive", 6, False),
        (13, "additive", 6, True),
    ],
)
def test_ring(ranks, length, kind, key_heads, compiled):
    results = ranks.run(ring_error, length, kind, key_heads, compiled)
    assert max(max(result[:2]) for result in results) <= 1e-5
    assert all(torch.equal(text, results[0][2]) for _, _, text in results)


def test_ring_in_bfloat16(ranks):
    assert max(max(result[:2]) for result in ranks.run(ring_error, 13, "padding", 6, False, torch.bfloat16)) <= 2e-2


def ulysses_error(length, compiled):
    group, me = build_mesh(SIZE, 1).groups["ulysses"], dist.get_rank()
    segments = (2, parts_of(length - 2, SIZE))
    heads = ((0, 2), (2, 4), (4, 5), (5, 6))
    kv_heads = ((0, 1), (0, 2), (1, 2), (1, 2))
    index = [[0, 0], [0, 1], [0], [0]][me]  # the local key head of each local query head
    q, k, v = inputs(length, key_heads=2)
    local = [shard(x, 2, segments, rank=me) for x in (q, k, v)]

    def attention(q, k, v):
        q, k, v = seq_to_heads([q, k, v], [segments] * 3, [heads, kv_heads, kv_heads], group=group)
        out = F.scaled_dot_product_attention(q, k[:, index], v[:, index])
        return heads_to_seq(out, segments, heads, group=group)

    out = compiled_if(compiled, attention)(*local)
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
    return error(out, shard(expected, 2, segments, rank=me)), out[:, :, :2]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("length", [13, 4])
def test_ulysses_with_uneven_heads_and_gqa(ranks, length, compiled):
    results = ranks.run(ulysses_error, length, compiled)
    assert max(e for e, _ in results) <= 1e-5
    assert all(torch.equal(text, results[0][1]) for _, text in results)


def both_error(kind, compiled):
    mesh = build_mesh(2, 2)
    segments = (3, parts_of(10, SIZE))
    row = (3, segments[1][mesh.rank // 2 * 2 :][:2])
    rows = (3, (sum(segments[1][:2]), sum(segments[1][2:])))
    heads = ((0, 3), (3, 6))
    q, k, v = inputs(13)
    local = [shard(x, 2, segments, rank=mesh.rank) for x in (q, k, v)]
    mask = mask_for(kind, 13)

    def attention(q, k, v, mask):
        q, k, v = seq_to_heads([q, k, v], [row] * 3, [heads] * 3, group=mesh.groups["ulysses"])
        layout = {"query_segments": rows, "key_segments": rows, "is_causal": kind == "causal"}
        out = ring_attention(q, k, v, mask, **layout, group=mesh.groups["ring"])
        out = heads_to_seq(out, row, heads, group=mesh.groups["ulysses"])
        return gather(out, 2, segments, group=mesh.groups["sp"])

    out = compiled_if(compiled, attention)(*local, mask)
    return error(out, F.scaled_dot_product_attention(q, k, v, mask, is_causal=kind == "causal"))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["none", "causal", "padding", "bool"])
def test_ulysses_times_ring(ranks, kind, compiled):
    assert max(ranks.run(both_error, kind, compiled)) <= 1e-5


def dynamic_frames():
    """Graphs compiled for three lengths."""
    from torch._dynamo.testing import CompileCounterWithBackend

    group, me = build_mesh(SIZE, 1).groups["ulysses"], dist.get_rank()
    counter = CompileCounterWithBackend("aot_eager")

    def run(q, image):
        segments, heads = ((image + 3) // 4, (image + 2) // 4, (image + 1) // 4, image // 4), ((0, 2), (2, 4), (4, 5), (5, 6))
        (mine,) = seq_to_heads([q], [(3, segments)], [heads], group=group)
        return gather(heads_to_seq(mine, (3, segments), heads, group=group), 2, (3, segments), group=group)

    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    for image in (42, 37, 40):
        q = inputs(3 + image)[0]
        out = compiled(shard(q, 2, (3, parts_of(image, SIZE)), rank=me), image)
        assert torch.equal(out, q), image
    return counter.frame_count


def test_symbolic_lengths_compile_once(ranks):
    assert ranks.run(dynamic_frames) == [1] * SIZE


def switches(compiled):
    sp, me = build_mesh(SIZE, 1).groups["sp"], dist.get_rank()
    before, after = (parts_of(7, SIZE),), (2, parts_of(5, SIZE))
    x = torch.randn(2, 7, 7, 3, generator=torch.Generator().manual_seed(0))
    turn = compiled_if(compiled, lambda part: switch(part, 1, before, 2, after, group=sp))
    return torch.equal(turn(shard(x, 1, before, rank=me)), shard(x, 2, after, rank=me))


@pytest.mark.parametrize("compiled", [False, True])
def test_switch(ranks, compiled):
    assert ranks.run(switches, compiled) == [True] * SIZE


def rounded(comm_dtype):
    """Errors of an exchange there and back and of a ring, whether a compiled exchange is the same, and the text that all ranks hold."""
    sp, me = build_mesh(SIZE, 1).groups["sp"], dist.get_rank()
    segments, heads = (2, parts_of(7, SIZE)), ((0, 2), (2, 4), (4, 5), (5, 6))
    x, k, v = inputs(9)
    local = shard(x, 2, segments, rank=me)

    def there(local):
        return seq_to_heads([local], [segments], [heads], group=sp, comm_dtype=comm_dtype)[0]

    def back(mine):
        return heads_to_seq(mine, segments, heads, group=sp, comm_dtype=comm_dtype)

    mine = x[:, slice(*heads[me])]
    same = [torch.equal(torch.compile(f, fullgraph=True, backend="aot_eager")(a), f(a)) for f, a in ((there, local), (back, mine))]
    ring = build_mesh(1, SIZE).groups["ring"]
    keys = [shard(t, 2, segments, rank=me) for t in (k, v)]
    out = ring_attention(local, *keys, query_segments=segments, key_segments=segments, group=ring, comm_dtype=comm_dtype)
    expected = shard(F.scaled_dot_product_attention(x, k, v), 2, segments, rank=me)
    return same, [error(there(local), mine), error(back(mine), local), error(out, expected)], back(mine)[:, :, :2]


@pytest.mark.parametrize(("comm_dtype", "bound"), [(torch.bfloat16, 5e-3), (torch.float8_e4m3fn, 5e-2)])
def test_exchanges_in_fewer_bytes(ranks, comm_dtype, bound):
    found = ranks.run(rounded, comm_dtype)
    for same, errors, text in found:
        assert same == [True, True] and all(1e-5 < e < bound for e in errors), errors
        assert torch.equal(text, found[0][2]), "what all ranks hold has the same bits"
