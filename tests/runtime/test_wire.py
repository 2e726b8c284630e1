import pytest
import torch
from torch._functorch.aot_autograd import aot_function, make_boxed_func

from seqpar.runtime.wire import FEW, from_wire, joined, pack, to_wire, unpack


def tensors():
    a = torch.arange(24.0).view(2, 3, 4)
    return a, a.transpose(0, 2) + 100, a[:, :0]


@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("compiled", [False, True])
def test_pack_unpack(extra, compiled):
    a, b, empty = tensors()

    def f(a, b, empty):
        return pack([([a[:, 1:], a[:, :1]], 1), ([b], 0), ([empty], 0)], a, 48 + extra)

    flat = (torch.compile(f, backend="eager", fullgraph=True) if compiled else f)(a, b, empty)
    assert flat.shape == (48 + extra,)
    x, y, z = unpack(flat[:48], [(2, 3, 4), (4, 3, 2), (2, 0, 4)])
    assert torch.equal(x, torch.cat([a[:, 1:], a[:, :1]], 1)) and torch.equal(y, b) and z.numel() == 0


def test_a_compiler_reads_no_writes():
    """Neither from Dynamo nor in the trace of AOTAutograd alone: a wrong order of writes into a buffer would be a wrong result."""
    a, b, _ = tensors()
    graphs = []

    def keep(gm, example_inputs):
        graphs.append([str(node.target) for node in gm.graph.nodes])
        return make_boxed_func(gm.forward)

    flat = aot_function(lambda a, b: pack([([a[:, 1:], a[:, :1]], 1), ([b], 0)], a), fw_compiler=keep)(a, b)
    assert torch.equal(flat, torch.cat([a.roll(-1, 1).flatten(), b.flatten()]))
    assert len(graphs) == 1 and "aten.cat.default" in graphs[0] and not any("scatter" in target or "copy" in target for target in graphs[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiler_reads_a_copy_of_many_pieces_as_one_operator(dynamic):
    graphs = []

    def keep(gm, example_inputs):
        graphs.append([str(node.target) for node in gm.graph.nodes])
        return gm.forward

    def f(x):
        rows = [x.narrow(0, i, x.shape[0] - FEW) for i in range(FEW + 1)]
        return pack([(rows[:2], 1), (rows[2:], 0)], x, dtype=torch.bfloat16), joined([rows[0].to(torch.bfloat16), *rows[1:]], 1)

    compiled = torch.compile(f, backend=keep, fullgraph=True, dynamic=dynamic)
    for length in (FEW + 2, FEW + 5):
        x = torch.randn(length, 3)
        assert all(torch.equal(a, b) and a.dtype == b.dtype and a.stride() == b.stride() for a, b in zip(compiled(x), f(x), strict=True))
    assert len(graphs) == (1 if dynamic else 2)
    assert {target for graph in graphs for target in graph if target.startswith(("seqpar", "aten.cat"))} == {"seqpar.packed", "seqpar.joined"}


def test_pack_does_not_copy_what_is_packed_already():
    a, _, _ = tensors()
    assert pack([([a], 1)], a).data_ptr() == a.data_ptr()


@pytest.mark.parametrize("dtype", [torch.complex64, torch.bool, torch.bfloat16, torch.int64])
def test_wire_dtypes(dtype):
    x = torch.arange(6).view(2, 3).to(dtype)
    assert not to_wire(x).is_complex() and to_wire(x).dtype != torch.bool
    assert torch.equal(from_wire(to_wire(x), dtype), x)
    if dtype.is_complex:
        assert torch.equal(from_wire(to_wire((x * 1j).conj()), dtype), (x * 1j).conj())
