"""Remembered results of operators on meta tensors are those the operators give."""

import pytest
import torch
from torch import Tensor

from seqpar.passes.meta_results import MetaResults

aten = torch.ops.aten


def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


CALLS = [
    (aten.linear.default, (meta(2, 5, 8), meta(6, 8)), {}),
    (aten.add.Tensor, (meta(2, 5, 8), meta(8)), {"alpha": 2}),
    (aten.cat.default, ([meta(2, 3), meta(2, 4)], 1), {}),
    (aten.transpose.int, (meta(2, 5, 8), 1, 2), {}),
    (aten.slice.Tensor, (meta(2, 9, 8), 1, 3, 7), {}),
    (aten.split_with_sizes.default, (meta(2, 9, 8), [4, 5], 1), {}),
    (aten.native_layer_norm.default, (meta(2, 5, 8), [8], None, None, 1e-5), {}),
    (aten._to_copy.default, (meta(2, 5),), {"dtype": torch.bfloat16}),
    (aten.scaled_dot_product_attention.default, (meta(1, 2, 5, 4), meta(1, 2, 7, 4), meta(1, 2, 7, 4)), {"scale": 0.5}),
]


def described(result, operands):
    leaves = [result] if isinstance(result, Tensor) else result
    storages = {id(o): o.untyped_storage()._cdata for o in operands}
    return [
        (leaf.shape, leaf.stride(), leaf.dtype, leaf.storage_offset(), [leaf.untyped_storage()._cdata == storages[id(o)] for o in operands])
        for leaf in leaves
    ]


def tensors(args):
    return [t for a in args for t in (a if isinstance(a, list) else [a]) if isinstance(t, Tensor)]


def fresh(args):
    return tuple([meta(*t.shape, dtype=t.dtype) for t in a] if isinstance(a, list) and a and isinstance(a[0], Tensor) else meta(*a.shape, dtype=a.dtype) if isinstance(a, Tensor) else a for a in args)


@pytest.mark.parametrize(("target", "args", "kwargs"), CALLS, ids=lambda x: str(x) if isinstance(x, torch._ops.OpOverload) else "")
def test_the_second_call_is_like_the_first(target, args, kwargs, monkeypatch):
    results = MetaResults()
    first = results(target, args, kwargs)
    assert len(results._known) == 1
    again = fresh(args)
    monkeypatch.setattr(torch._ops.OpOverload, "__call__", None)  # it is not asked again
    second = results(target, again, kwargs)
    monkeypatch.undo()
    assert type(second) is type(first)
    assert described(second, tensors(again)) == described(first, tensors(args)) == described(target(*args, **kwargs), tensors(args))


def test_views_start_where_their_operand_starts():
    results, base = MetaResults(), meta(4, 10)
    for operand in (base, base[2:], meta(4, 10)[1:]):
        cut = results(aten.slice.Tensor, (operand, 1, 3, 7), {})
        assert cut.storage_offset() == operand[:, 3:7].storage_offset() and cut._base is not None


def test_what_decides_is_in_the_key():
    results, x = MetaResults(), meta(4, 6)
    assert results(aten.sum.dim_IntList, (x, [0]), {}).shape == (6,)
    assert results(aten.sum.dim_IntList, (x, [1]), {}).shape == (4,)
    assert results(aten.sum.dim_IntList, (x, [True]), {}).shape == (4,)
    assert results(aten.sum.dim_IntList, (x, [1], True), {}).shape == (4, 1)
    assert results(aten._to_copy.default, (x,), {"dtype": torch.float64}).dtype == torch.float64
    assert results(aten.mul.Tensor, (x, meta(4, 6, dtype=torch.float64)), {}).dtype == torch.float64
    assert results(aten.mul.Tensor, (x, x.t().contiguous().t()), {}).shape == (4, 6)


def test_calls_that_are_not_remembered_run():
    results, x = MetaResults(), meta(4, 6)
    assert results(aten.add_.Tensor, (x, 1), {}) is x  # writes
    assert results(torch.add, (x, x), {}).shape == (4, 6)  # no ATen operator
    assert results(aten.sym_size.int, (x, 1), {}) == 6  # no tensor
    complex_view = results(aten.view_as_complex.default, (meta(4, 2),), {})  # a view in another dtype
    assert complex_view.dtype == torch.complex64
    assert not results._known
