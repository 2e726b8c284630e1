"""Parts of the sequence become pieces of heads, and come back; and causal attention of a piece's rows."""

import functools

import pytest
import torch
import torch.nn.functional as F

from seqpar.errors import UnsupportedError
from seqpar.partitioner.head_shares import share_heads
from seqpar.runtime.head_shares import causal_rows, pieces_to_seq, seq_to_pieces
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


SEGMENTS = {"one": lambda n: (parts_of(11, n),), "text first": lambda n: (3, parts_of(8, n)), "two": lambda n: (parts_of(9, n), parts_of(2, n)), "whole": lambda _: (11,)}


@pytest.mark.parametrize("comm_dtype", [None, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("keys", SEGMENTS)
@pytest.mark.parametrize("queries", SEGMENTS)
def test_every_rank_gets_its_pieces(queries, keys, comm_dtype):
    """5 heads on 3 ranks, by rows; 2 key heads that some ranks share; the exchange back has the same table."""
    ranks = 3
    q, k = torch.randn(2, 5, 11, 4), torch.randn(2, 2, 11, 6)
    shares = [[(p.start, p.stop, *p.rows(11)) for p in pieces] for pieces in share_heads(5, ranks)]
    tables = [shares, [[(0, 1, 0, 11)], [(0, 2, 0, 11)], [(1, 2, 0, 11)]]]
    segments = [SEGMENTS[queries](ranks), SEGMENTS[keys](ranks)]

    def run(rank, groups):
        own = [shard(x, 2, s, rank=rank) for x, s in zip((q, k), segments, strict=True)]
        pieces = seq_to_pieces(own, segments, tables, group=groups["sp"], comm_dtype=comm_dtype)
        return pieces, pieces_to_seq(pieces[: len(shares[rank])], segments[0], shares, group=groups["sp"], comm_dtype=comm_dtype)

    world = SimulatedWorld(ranks, 1)
    error = {None: 0.0, torch.bfloat16: 2**-8, torch.float8_e4m3fn: 2**-3}[comm_dtype]
    results = world.run([functools.partial(run, rank) for rank in range(ranks)])
    for rank, (pieces, back) in enumerate(results):
        wanted = [x[:, a:b, first:last] for x, table in zip((q, k), tables, strict=True) for a, b, first, last in table[rank]]
        assert len(pieces) == len(wanted) and back.dtype == torch.float32
        for piece, want in zip([*pieces, back], [*wanted, shard(q, 2, segments[0], rank=rank)], strict=True):
            torch.testing.assert_close(piece, want, rtol=error, atol=error)
        assert queries != "whole" or torch.equal(back, results[0][1])
    assert world.traffic[0].calls["all_to_all"] == 1 + ((queries, keys) != ("whole", "whole"))
    if comm_dtype is None and queries == keys == "one":  # rank 0 holds 4 of 11 rows, and attends head 0 and 7 rows of head 1
        assert world.traffic[0].bytes["all_to_all"] == 2 * 4 * ((7 + 3) * 4 + 7 * 6 + (4 * 5 - 4 - 4) * 4)


@pytest.mark.parametrize("keys", [3, 8, 11])
@pytest.mark.parametrize(("first", "rows"), [(0, 4), (2, 5), (6, 2), (7, 1), (9, 2), (5, 0)])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_causal_rows(first, rows, keys, kv_heads):
    q, k, v = torch.randn(2, 4, 11, 8), torch.randn(2, kv_heads, keys, 8), torch.randn(2, kv_heads, keys, 8)
    want = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=0.3)[:, :, first : first + rows]
    found = causal_rows(q[:, :, first : first + rows], k, v, first=first, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True])
def test_causal_rows_compiled(dynamic):
    """Sizes are compared while Dynamo traces, whether they are numbers or symbols."""
    q, k, v = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 11, 8), torch.randn(1, 2, 11, 8)
    compiled = torch.compile(causal_rows, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(q, k, v, first=5), causal_rows(q, k, v, first=5), rtol=1e-5, atol=1e-6)


def test_no_gradient_passes_through_a_merge():
    q = torch.randn(1, 1, 4, 8, requires_grad=True)
    with pytest.raises(UnsupportedError, match="no gradient"):
        causal_rows(q[:, :, 2:], q, q, first=2).sum().backward()
