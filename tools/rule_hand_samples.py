"""Calls written by hand, for operators that PyTorch's own samples leave out or only try on two or three positions.

Lengths: 12 is even on 2, 3 and 4 ranks, 7 on none of them. A row of a table is (overload, arguments) or (overload, arguments, keywords).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from seqpar.tools.rule_conv_samples import convolutions
from seqpar.tools.rule_samples import Sample

aten = torch.ops.aten
Row = tuple[Any, ...]


class Maker:
    """Reproducible tensors: `f(12, 4)` float, `i(9, 12, 4)` integers below 9, `b(12)` booleans, `c(12, 4)` complex."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(0)

    def f(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def i(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator)

    def b(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) < 0.5

    def c(self, *shape: int) -> Tensor:
        return torch.complex(self.f(*shape), self.f(*shape))


def hand_samples() -> Iterator[Sample]:
    m = Maker()
    for table in (contractions, quantised, attention, norms, reductions, views, parts, indexing, creation, pointwise, convolutions):
        for target, args, *kwargs in table(m):
            yield Sample(target, tuple(args), dict(*kwargs))


def contractions(m: Maker) -> list[Row]:
    x, square, wide = m.f(2, 12, 6), m.f(7, 7), m.f(12, 12)
    return [
        (aten.linear.default, (x, m.f(6, 6))),
        (aten.linear.default, (x, m.f(5, 6), m.f(5))),
        (aten.linear.default, (m.f(7, 6), m.f(8, 6))),
        (aten.linear.default, (square, square)),
        (aten.linear.default, (m.f(7), m.f(9, 7))),
        (aten.matmul.default, (x, m.f(6, 7))),
        (aten.matmul.default, (m.f(2, 7, 12), m.f(2, 12, 5))),
        (aten.matmul.default, (m.f(3, 1, 7, 4), m.f(2, 4, 5))),
        (aten.matmul.default, (m.f(7), m.f(3, 7, 4))),
        (aten.matmul.default, (m.f(5, 7, 12), m.f(12))),
        (aten.matmul.default, (m.f(12), m.f(12))),
        (aten.matmul.default, (wide, wide)),
        (aten.matmul.default, (m.f(5, 12, 1), m.f(5, 1, 12))),
        (aten.mm.default, (m.f(7, 12), m.f(12, 4))),
        (aten.bmm.default, (m.f(4, 7, 12), m.f(4, 12, 3))),
        (aten.mv.default, (m.f(7, 12), m.f(12))),
        (aten.dot.default, (m.f(7), m.f(7))),
        (aten.addmm.default, (m.f(4), m.f(7, 12), m.f(12, 4)), {"beta": 2, "alpha": 3}),
        (aten.addmm.default, (m.f(12), m.f(7, 12), wide)),
        (aten.addmm.default, (m.f(7, 1), m.f(7, 12), m.f(12, 4))),
        (aten.baddbmm.default, (m.f(4, 7, 5), m.f(4, 7, 12), m.f(4, 12, 5))),
        (aten.baddbmm.default, (m.f(1, 1, 5), m.f(4, 7, 12), m.f(4, 12, 5)), {"beta": 0}),
        (aten.outer.default, (m.f(7), m.f(7))),
        (aten.ger.default, (m.f(7), m.f(12))),
        (aten.einsum.default, ("bsd,hd->bsh", [x, m.f(5, 6)])),
        (aten.einsum.default, ("bhsd,bhse->bhde", [m.f(2, 3, 7, 4), m.f(2, 3, 7, 5)])),
        (aten.einsum.default, ("bsd,bsd->", [m.f(2, 12, 4), m.f(2, 12, 4)])),
        (aten.einsum.default, ("i,j->ji", [m.f(7), m.f(12)])),
        (aten.einsum.default, ("bij,bjk,bkl->bil", [m.f(2, 7, 5), m.f(2, 5, 12), m.f(2, 12, 4)])),
        (aten.einsum.default, ("...sd,de->...se", [x, m.f(6, 3)])),
        (aten.einsum.default, ("ii->i", [wide])),
        (aten.einsum.default, ("ij,kl->ijl", [m.f(7, 4), m.f(12, 5)])),
    ]


def quantised(m: Maker) -> list[Row]:
    x, weight = m.i(9, 7, 32).to(torch.int8), m.i(9, 5, 32).to(torch.int8)
    rows, wide = m.f(12, 32).to(torch.float8_e4m3fn), m.f(16, 32).to(torch.float8_e4m3fn).t()
    by_group, zeros = aten._convert_weight_to_int4pack_for_cpu(m.i(16, 16, 64).int(), 1), m.f(2, 16, 2).bfloat16()
    by_channel = aten._dyn_quant_pack_4bit_weight(m.i(255, 16, 32).byte(), m.f(16, 1), None, 64, 64, 16)
    return [
        (aten._int_mm.default, (x, weight.t())),
        (aten._weight_int8pack_mm.default, (m.f(7, 32).bfloat16(), weight, m.f(5).bfloat16())),
        (aten._weight_int4pack_mm_for_cpu.default, (m.f(7, 64).bfloat16(), by_group, 32, zeros)),
        (aten._dyn_quant_matmul_4bit.default, (m.f(7, 64), by_channel, 64, 64, 16)),
        (aten._scaled_mm.default, (rows, wide, m.f(), m.f()), {"out_dtype": torch.bfloat16}),
        (aten._scaled_mm.default, (rows, wide, m.f(12, 1), m.f(1, 16)), {"out_dtype": torch.bfloat16}),
        (aten._scaled_mm.default, (rows, wide, m.f(1, 1), m.f(1, 1), m.f(16).bfloat16()), {"out_dtype": torch.bfloat16}),
    ]


def attention(m: Maker) -> list[Row]:
    q, k, v = m.f(2, 4, 12, 8), m.f(2, 4, 7, 8), m.f(2, 4, 7, 8)
    same = m.f(2, 4, 7, 8)
    sdpa = aten.scaled_dot_product_attention.default
    return [
        (sdpa, (q, k, v)),
        (sdpa, (same, same, same)),
        (sdpa, (q, k, k)),
        (sdpa, (k, k, v)),
        (sdpa, (q, k, v, m.b(2, 1, 1, 7))),
        (sdpa, (q, k, v, m.f(1, 4, 12, 7))),
        (sdpa, (q, k, v, m.f(12, 7))),
        (sdpa, (k, m.f(2, 4, 7, 8), v, None, 0.0, True)),
        (sdpa, (q, m.f(2, 2, 7, 8), m.f(2, 2, 7, 8)), {"enable_gqa": True}),
        (sdpa, (q, m.f(2, 1, 7, 8), m.f(2, 1, 7, 8)), {"enable_gqa": True}),
        (sdpa, (m.f(12, 8), m.f(7, 8), m.f(7, 5)), {"scale": 0.3}),
        (sdpa, (m.f(5, 12, 8), m.f(5, 7, 8), m.f(5, 7, 4))),
        (sdpa, (m.f(2, 4, 12, 8), m.f(2, 4, 12, 8), m.f(2, 4, 12, 8), m.b(2, 4, 12, 1))),
    ]


def norms(m: Maker) -> list[Row]:
    x = m.f(2, 12, 6)
    return [
        (aten.layer_norm.default, (x, [6], m.f(6), m.f(6), 1e-5)),
        (aten.rms_norm.default, (x, [6], m.f(6))),
        (aten.rms_norm.default, (m.f(7, 5), [5])),
        (aten.native_layer_norm.default, (x, [6], m.f(6), None, 1e-5)),
        (aten.group_norm.default, (m.f(4, 6, 7), 3, m.f(6), m.f(6))),
        (aten._native_batch_norm_legit_no_training.default, (m.f(4, 6, 7), m.f(6), m.f(6), m.f(6), m.f(6).exp(), 0.1, 1e-5)),
        (aten.instance_norm.default, (m.f(4, 6, 7), None, None, None, None, True, 0.1, 1e-5, True)),
        (aten.native_group_norm.default, (m.f(4, 6, 7), None, None, 4, 6, 7, 3, 1e-5)),
        (aten.softmax.int, (m.f(2, 12, 7), -1)),
        (aten.softmax.int, (m.f(2, 12, 7), 1)),
        (aten._safe_softmax.default, (m.f(7, 12), -1)),
        (aten.log_softmax.int, (m.f(7, 12), 1)),
    ]


def reductions(m: Maker) -> list[Row]:
    x, y, odd = m.f(2, 12, 5), m.f(4, 7, 6), m.f(7)
    rows: list[Row] = []
    for op in (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default):
        rows += [(op, (x, [1])), (op, (x, [-2, 0], True)), (op, (y, [0, 1, 2])), (op, (odd, [0])), (op, (y, [1], True))]
    return rows + [
        (aten.sum.default, (x,)),
        (aten.sum.default, (m.b(2, 12),)),
        (aten.sum.dim_IntList, (m.b(3, 7), [1])),
        (aten.sum.dim_IntList, (m.f(4, 12).bfloat16(), [1]), {"dtype": torch.float32}),
        (aten.sum.dim_IntList, (m.i(9, 4, 12), [1])),
        (aten.sum.dim_IntList, (x, [])),
        (aten.mean.dim, (m.f(4, 12).bfloat16(), [1])),
        (aten.mean.dim, (m.f(4, 7).half(), [1, 0]), {"dtype": torch.float32}),
        (aten.mean.dim, (x, None)),
        (aten.mean.dim, (x, [])),
        (aten.amax.default, (m.i(99, 4, 12), [1])),
        (aten.max.dim, (x, 1)),
        (aten.min.dim, (y, -2, True)),
        (aten.max.default, (y,)),
        (aten.count_nonzero.dim_IntList, (m.b(4, 12), [1])),
        (aten.count_nonzero.default, (m.b(7, 3),)),
        (aten.median.dim, (m.f(7, 12), 1)),
        (aten.kthvalue.default, (m.f(7, 12), 3, 0)),
        (aten.min.default, (y,)),
        *((target, (m.b(7, 3),)) for target in (aten.all.default, aten.any.default)),
        (aten.argmax.default, (x, 1)),
        (aten.any.dim, (m.b(12, 7), 1)),
        (aten.any.dims, (m.b(4, 12, 7), [1, 2])),
        (aten.all.dim, (m.b(12, 7), 0)),
        (aten.prod.dim_int, (x, 1)),
        (aten.var.correction, (x, [1])),
        (aten.std.correction, (y, [0, 1]), {"correction": 0}),
        (aten.var_mean.correction, (x, [-1]), {"keepdim": True}),
        (aten.logsumexp.default, (x, [1])),
        (aten.linalg_vector_norm.default, (x, 2, [-1], True)),
        (aten.linalg_vector_norm.default, (y,)),
        (aten.linalg_norm.default, (y, None, [-1])),
        (aten.norm.ScalarOpt_dim, (x, 2, [1])),
        (aten.topk.default, (y, 2, 1)),
        (aten.topk.default, (m.f(12, 7), 3)),
        (aten.sort.stable, (m.f(12, 7),), {"stable": True, "dim": 0}),
        (aten.cummax.default, (m.f(12, 7), 1)),
        (aten.cumsum.default, (m.f(12, 7), 1)),
        (aten.argsort.stable, (m.f(12, 7),), {"dim": 0, "stable": True}),
    ]


def views(m: Maker) -> list[Row]:
    x, flat = m.f(2, 12, 6), m.f(2, 84, 3)
    one = m.f(1, 7, 1, 4)
    return [
        (aten.view.default, (x, [2, 12, 2, 3])),
        (aten.view.default, (x, [24, 6])),
        (aten.view.default, (x, [-1])),
        (aten.view.default, (x, [1, 2, 12, 1, 6])),
        (aten.view.default, (x, [2, 3, 4, 6])),
        (aten.view.default, (x, [2, 72])),
        (aten.view.default, (flat, [2, 7, 12, 3])),
        (aten.view.default, (flat, [2, 12, 7, 3])),
        (aten.view.default, (m.f(7, 12), [7, 12])),
        (aten.view.default, (m.f(3, 7, 4), [7, 3, 4])),
        (aten.view.default, (one, [7, 4])),
        (aten.reshape.default, (m.f(4, 7, 3), [28, 3])),
        (aten._unsafe_view.default, (x, [24, 6])),
        (aten.permute.default, (m.f(7, 7, 7), [1, -1, 0])),
        (aten.transpose.int, (x, -1, 1)),
        (aten.t.default, (m.f(7, 12),)),
        (aten.numpy_T.default, (x,)),
        (aten.unsqueeze.default, (x, -1)),
        (aten.unsqueeze.default, (x, 1)),
        (aten.squeeze.dim, (one, 2)),
        (aten.squeeze.dim, (one, 1)),
        (aten.squeeze.dim, (one, -2)),
        (aten.squeeze.dims, (one, [0, 2])),
        (aten.squeeze.default, (one,)),
        (aten.squeeze.default, (m.f(1, 4, 3),)),
        (aten.expand.default, (one, [3, 7, 5, 4])),
        (aten.expand.default, (one, [12, -1, 7, 12, -1])),
        (aten.expand.default, (m.f(7, 1), [7, 7, 3])),
        (aten.broadcast_to.default, (m.f(7, 1), [2, 7, 12])),
        (aten.expand_as.default, (m.f(7, 1), m.f(4, 7, 12))),
        (aten.repeat.default, (x, [1, 3, 1])),
        (aten.repeat.default, (m.f(7, 4), [12, 1, 2])),
        (aten.repeat.default, (one, [4, 1, 5, 1])),
        (aten.repeat_interleave.self_int, (x, 3, 1)),
        (aten.repeat_interleave.self_int, (x, 2, -1), {"output_size": 12}),
        (aten.repeat_interleave.self_int, (one, 4, 2)),
        (aten.view_as_complex.default, (m.f(7, 4, 2),)),
        (aten.view_as_real.default, (m.c(7, 12),)),
        *[(aten.meshgrid.indexing, ([m.f(7), m.f(12)],), {"indexing": i}) for i in ("ij", "xy")],
        (aten.meshgrid.default, ([m.f(7), m.f(4), m.f(5)],)),
        (aten.flip.default, (x, [1])),
        (aten.roll.default, (x, [2], [1])),
        (aten.roll.default, (m.f(7, 4), [2], [])),
        (aten.tril.default, (m.f(4, 7, 12), 1)),
        (aten.triu.default, (m.f(12, 7),)),
        (aten.diag_embed.default, (m.f(4, 7),)),
        (aten.unfold.default, (m.f(4, 12), 1, 3, 3)),
        (aten.select.int, (x, 1, -3)),
        (aten.unbind.int, (x, -1)),
    ]


def parts(m: Maker) -> list[Row]:
    x, y, one = m.f(2, 12, 4), m.f(2, 7, 4), m.f(2, 1, 4)
    return [
        (aten.cat.default, ([x, y], 1)),
        (aten.cat.default, ([y, x, y], -2)),
        (aten.cat.default, ([x, x], 0)),
        (aten.cat.default, ([one, x], 1)),
        (aten.cat.default, ([one, one, one, one], 1)),
        (aten.cat.default, ([x.int(), m.f(2, 7, 4)], 1)),
        (aten.cat.default, ([m.f(0), m.f(7)],)),
        (aten.concat.default, ([x, m.f(2, 4, 4)], 1)),
        (aten.stack.default, ([m.f(12, 5) for _ in range(12)],)),
        (aten.stack.default, ([x, m.f(2, 12, 4)], -1)),
        (aten.stack.default, ([y, y], 1)),
        (aten.slice.Tensor, (x, 1, 3, 10)),
        (aten.slice.Tensor, (x, -2, 5)),
        (aten.slice.Tensor, (x, 1, -7, -2)),
        (aten.slice.Tensor, (x, 1, 0, 2**63 - 1)),
        (aten.slice.Tensor, (x, 1, 0, 12, 2)),
        (aten.slice.Tensor, (x, 1, 20, 30)),
        (aten.slice.Tensor, (x, 1, 4, 5)),
        (aten.slice.Tensor, (x, 1, -100, 5)),
        (aten.slice_copy.Tensor, (y, 1, 1, 6)),
        (aten.narrow.default, (x, 1, 2, 7)),
        (aten.narrow.default, (x, -2, 2, 7)),
        (aten.split.Tensor, (x, 5, 1)),
        (aten.split.Tensor, (x, 2, -1)),
        (aten.split_with_sizes.default, (x, [4, 8], 1)),
        (aten.split_with_sizes.default, (y, [1, 6], 1)),
        (aten.split_with_sizes.default, (y, [0, 7], 1)),
        *((target, (y, [3, 4], 1)) for target in (aten.split_with_sizes_copy.default, aten.unsafe_split_with_sizes.default)),
        *((aten.chunk.default, (value, n, 1)) for value, n in ((x, 2), (y, 3))),
        (aten.constant_pad_nd.default, (x, [0, 0, 0, 5], 1.5)),
        (aten.constant_pad_nd.default, (y, [1, 0, 4, 4])),
        (aten.constant_pad_nd.default, (y, [0, 0, 5, 0, 3, 0])),
        (aten.constant_pad_nd.default, (y, [0, 0, -2, 3])),
        (aten.constant_pad_nd.default, (one, [0, 0, 0, 6])),
        (aten.constant_pad_nd.default, (y, [-1, 0])),
        (aten.pad.default, (y, [0, 0, 0, 5])),
        (aten.pad.default, (y, [0, 0, 2, 3], "replicate")),
        (aten.pad.default, (y, [2, 3], "reflect")),
        (aten.pad_sequence.default, ([m.f(7, 4), m.f(12, 4), m.f(9, 4)], True)),
        (aten.pad_sequence.default, ([m.f(7), m.f(12)],), {"padding_value": 3.0}),
        (aten.pad_sequence.default, ([y[0], y[0]], True)),
        (aten.pad_sequence.default, ([m.f(4, 3), m.f(1, 3)], True)),
        (aten.slice_scatter.default, (x, m.f(2, 5, 4), 1, 3, 8)),
        (aten.slice_scatter.default, (x, m.f(2, 12, 2), 2, 0, 4, 2)),
        (aten.slice_scatter.default, (x, m.f(2, 12, 4), 1)),
        (aten.slice_scatter.default, (x, m.f(2, 4, 4), -2, -4)),
        (aten.slice_scatter.default, (x, m.f(2, 6, 4), 1, 0, 12, 2)),
        (aten.slice_scatter.default, (y, m.f(2, 1, 4), 1, 3, 4)),
        (aten.select_scatter.default, (x, m.f(2, 4), 1, 3)),
        (aten.select_scatter.default, (x, m.f(2, 12), -1, 0)),
    ]


def indexing(m: Maker) -> list[Row]:
    table, x = m.f(9, 4), m.f(7, 12, 5)
    square = m.i(7, 7, 7)
    return [
        (aten.embedding.default, (table, m.i(9, 2, 12))),
        *((aten.index_select.default, (x, dim, index)) for dim, index in ((1, m.i(12, 8)), (-3, m.i(7, 7)))),
        (aten.index.Tensor, (table, [m.i(9, 2, 12)])),
        (aten.index.Tensor, (x, [None, m.i(12, 7)])),
        (aten.index.Tensor, (x, [m.i(7, 4, 1), m.i(12, 6)])),
        (aten.index.Tensor, (x, [m.i(7, 5), None, m.i(5, 5)])),
        (aten.index.Tensor, (x, [m.b(7)])),
        (aten.index.Tensor, (m.i(7, 7, 4), [m.i(7, 12)])),
        (aten.index.Tensor, (square, [square])),
        (aten.gather.default, (x, 1, m.i(12, 7, 4, 5))),
        (aten.gather.default, (x, -1, m.i(5, 7, 12, 8))),
        (aten.gather.default, (x, 0, m.i(7, 7, 6, 5))),
        (aten.gather.default, (square, 0, square)),
        (aten.grid_sampler.default, (m.f(7, 4, 6, 9), m.f(7, 8, 5, 2), 0, 0, False)),
        (aten.scatter.src, (x, 1, m.i(12, 7, 4, 5), m.f(7, 4, 5))),
        (aten.scatter.src, (m.f(12, 5), 1, m.i(5, 12, 3), m.f(12, 3))),
        (aten.scatter.src, (m.f(12, 5), 1, m.i(5, 12, 3), m.f(12, 7))),
        (aten.scatter.value, (m.f(7, 5), 0, m.i(7, 4, 5), 2.0)),
        (aten.scatter_add.default, (m.f(12, 5), -1, m.i(5, 12, 3), m.f(12, 3))),
        (aten.scatter_add.default, (m.f(4, 5), 0, m.i(4, 12, 5), m.f(12, 5))),
        (aten.index_put.default, (m.f(12, 4), [m.i(12, 7)], m.f(7, 4))),
        (aten.index_put.default, (m.f(4, 12), [None, torch.tensor([3, 1, 5])], m.f(4, 3))),
        (aten.index_copy.default, (m.f(7, 12), 1, torch.tensor([4, 0]), m.f(7, 2))),
        (aten.index_add.default, (m.f(7, 12), 1, torch.tensor([4, 0]), m.f(7, 2))),
        (aten.index_fill.int_Scalar, (m.f(7, 12), 1, torch.tensor([4, 0]), 2.0)),
        (aten.one_hot.default, (m.i(5, 2, 12), 5)),
        (aten.bucketize.Tensor, (m.f(2, 12), torch.arange(4.0))),
        (aten.linalg_cross.default, (m.f(7, 3), m.f(7, 3)), {"dim": 1}),
        (aten.linalg_qr.default, (m.f(7, 4, 3),)),
        (aten.isin.Tensor_Tensor, (m.i(9, 7, 4), m.i(9, 5))),
    ]


def creation(m: Maker) -> list[Row]:
    x = m.f(2, 7)
    return [
        (aten.full.default, ([2, 12, 4], 3.0)),
        (aten.zeros.default, ([7, 4],), {"dtype": torch.int64}),
        (aten.ones.default, ([12],)),
        (aten.empty.memory_format, ([12, 7],)),
        (aten.new_zeros.default, (x, [12, 7])),
        (aten.new_ones.default, (x, [4, 7])),
        (aten.new_full.default, (x, [7], 2.0)),
        (aten.arange.default, (12,)),
        (aten.arange.start, (3, 15)),
        (aten.arange.start_step, (0, 12, 2)),
        (aten.linspace.default, (0, 1, 7)),
        (aten.eye.default, (7,)),
        (aten.scalar_tensor.default, (3.0,)),
        (aten.zeros_like.default, (x,)),
        (aten.full_like.default, (x, 2.0)),
    ]


def pointwise(m: Maker) -> list[Row]:
    x = m.f(2, 12, 4)
    return [
        (torch.ops.seqpar.boundary.default, (m.f(7, 12), "key", 1, None, 5)),
        (aten.add.Tensor, (x, m.f(12, 1))),
        (aten.mul.Tensor, (m.f(1, 7, 1), m.f(4, 1, 5))),
        (aten.mul.Tensor, (m.f(7, 7), m.f(7))),
        (aten.add.Tensor, (m.f(7, 4).bfloat16(), m.f(4))),
        (aten.div.Tensor, (m.i(9, 7, 4), m.i(9, 4) + 1)),
        (aten.floor_divide.default, (m.i(99, 7, 4), m.i(9, 4) + 1)),
        (aten.floor_divide.Scalar, (m.i(99, 7, 4), 3)),
        *[(op, (m.i(9, 7, 4), 3)) for op in (aten.__and__.Scalar, aten.__or__.Scalar, aten.__xor__.Scalar)],
        *[(op, (m.b(7, 4), m.b(4))) for op in (aten.__and__.Tensor, aten.__or__.Tensor, aten.__xor__.Tensor)],
        (aten.fill.Tensor, (x, torch.tensor(2.0))),
        (aten.where.self, (m.b(12, 1), x, m.f(1))),
        (aten.where.Scalar, (m.b(7, 4), 1.0, 2.0)),
        (aten.where.ScalarOther, (m.b(7, 4), m.f(7, 4), 2.0)),
        (aten.where.ScalarSelf, (m.b(7, 4), 1.0, m.f(7, 4))),
        (aten.pow.Scalar, (2.0, x)),
        (aten.to.dtype, (x, torch.float16)),
        (aten._to_copy.default, (x,), {"dtype": torch.float64}),
        (aten.copy.default, (m.f(2, 7), m.f(7))),
        (aten.type_as.default, (x, m.f(7).half())),
        (aten.lift_fresh_copy.default, (x,)),
        *((target, [m.f(7, 4) for _ in target._schema.arguments]) for target in (aten.polar.default, aten.log_sigmoid.default)),
        (aten.complex.default, (m.f(7, 4), m.f(4))),
        (aten.masked_fill.Scalar, (x, m.b(12, 1), -1.0)),
        (aten.glu.default, (x,)),
        (aten.glu.default, (x, 1)),
        (aten.dropout.default, (x, 0.5, False)),
    ]
