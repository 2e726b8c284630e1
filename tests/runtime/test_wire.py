import pytest
import torch

from seqpar.runtime.wire import from_wire, pack, to_wire, unpack


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
