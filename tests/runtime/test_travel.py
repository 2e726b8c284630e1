"""Exchanges in fewer bytes: what is rounded, what is not, and that whole values stay the same everywhere."""

import pytest
import torch
import torch.nn.functional as F

from seqpar.errors import UnsupportedError
from seqpar.runtime.layout import parts_of, shard
from seqpar.runtime.ring import ring_attention
from seqpar.runtime.simulate import SimulatedWorld
from seqpar.runtime.travel import COMM_DTYPES, FLOAT8, Form, check_comm_dtype
from seqpar.runtime.ulysses import heads_to_seq, seq_to_heads
from seqpar.runtime.zigzag import zigzag_attention

BFLOAT16 = torch.bfloat16
ERROR = {BFLOAT16: 2**-8, FLOAT8: 2**-4}  # half a step of the last bit, relative to a value (float8: of a normal one)


def everyone(world, f):
    return world.run([lambda groups, rank=rank: f(rank, groups["sp"]) for rank in range(world.size)])


@pytest.mark.parametrize("comm", COMM_DTYPES)
def test_a_rounded_tensor(comm):
    torch.manual_seed(0)
    x = torch.randn(3, 50) * 1e4
    form = Form.of(x.dtype, 1, comm)
    y = form.rounded(x)
    assert y.dtype == x.dtype and not torch.equal(x, y) and (y - x).abs().max() <= ERROR[comm] * x.abs().max()
    assert torch.equal(form.rounded(torch.zeros(2, 0)), torch.zeros(2, 0)) and torch.equal(form.rounded(torch.zeros(3)), torch.zeros(3))
    assert form.rounded(torch.tensor([1.0, float("nan")])).isnan().any(), "what is not finite is not hidden"


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_what_never_changes(dtype):
    assert all(Form.of(dtype, 1, comm) == Form(dtype, dtype, 0) for comm in COMM_DTYPES)
    assert Form.of(torch.float16, 1, BFLOAT16).wire == torch.float16 and Form.of(BFLOAT16, 1, BFLOAT16).wire == BFLOAT16


def test_other_dtypes_are_refused():
    for comm in (torch.float16, torch.int8, "bfloat16"):
        with pytest.raises(UnsupportedError, match="comm_dtype must be None or one of torch.bfloat16"):
            check_comm_dtype(comm)


@pytest.mark.parametrize("comm", COMM_DTYPES)
@pytest.mark.parametrize("length", [9, 1])
def test_there_and_back(comm, length):
    """A text on every rank beside an image in uneven, perhaps empty parts; 5 heads on 3 ranks."""
    torch.manual_seed(0)
    size, heads = 3, ((0, 2), (2, 4), (4, 5))
    segments = (4, parts_of(length, size))
    x = torch.randn(2, 5, 4 + length, 8)
    world = SimulatedWorld(size, 1)

    def f(rank, group):
        local = [shard(t, 2, segments, rank=rank) for t in (x, 3 * x)]
        mine = seq_to_heads(local, [segments] * 2, [heads] * 2, group=group, comm_dtype=comm)
        return mine, heads_to_seq(x[:, slice(*heads[rank])], segments, heads, group=group, comm_dtype=comm), local[0]

    results = everyone(world, f)
    for rank, (mine, back, local) in enumerate(results):
        for t, found in zip((x, 3 * x), mine, strict=True):
            want = t[:, slice(*heads[rank])]
            assert found.dtype == torch.float32 and (found - want).abs().max() <= ERROR[comm] * want.abs().max()
            assert torch.equal(found[:, :, :4], want[:, :, :4]), "what a rank has does not travel"
        assert (back - local).abs().max() <= ERROR[comm] * x.abs().max()
        assert torch.equal(back[:, :, :4], results[0][1][:, :, :4]), "a whole segment has the same bits on every rank"
        assert not torch.equal(back[:, :, :4], local[:, :, :4])


@pytest.mark.parametrize("comm", COMM_DTYPES)
def test_bytes(comm):
    def received(comm_dtype):
        world = SimulatedWorld(2, 1)
        everyone(world, lambda _, g: seq_to_heads([torch.ones(1, 4, 8, 8)] * 3, [((8, 8),)] * 3, [((0, 2), (2, 4))] * 3, group=g, comm_dtype=comm_dtype))
        return world.traffic[0].bytes["all_to_all"], world.traffic[0].calls["all_to_all"]

    assert received(None) == (3 * 8 * 2 * 8 * 4, 1)
    assert received(comm) == (3 * 8 * 2 * 8 * comm.itemsize + (3 * 4 if comm == FLOAT8 else 0), 1), "a float32 scale for each tensor"


@pytest.mark.parametrize("comm", COMM_DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_rings(comm, causal):
    torch.manual_seed(0)
    size, parts = 3, parts_of(14, 3)
    q, k, v = torch.randn(3, 1, 2, 14, 8).unbind()
    world = SimulatedWorld(1, size)

    def f(rank, group):
        local = [shard(t, 2, (parts,), rank=rank) for t in (q, k, v)]
        attention = zigzag_attention if causal else ring_attention
        return attention(*local, query_segments=(parts,), key_segments=(parts,), group=group, comm_dtype=comm)

    out = torch.cat(everyone(world, f), 2)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    error = ((out - expected).norm() / expected.norm()).item()
    assert 1e-5 < error < {BFLOAT16: 1e-2, FLOAT8: 0.1}[comm] and out.dtype == torch.float32
