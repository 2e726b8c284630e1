"""Attention called by the name of a kernel uses the mesh like any other."""

import operator

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule

from seqpar.compat import FakeTensorMode
from seqpar.passes.kernels import MASKS, kernels_to_attention
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

aten = torch.ops.aten
HEADS, DIM = 4, 8
flash = aten._scaled_dot_product_flash_attention_for_cpu
math = aten._scaled_dot_product_attention_math


def bias(length):
    return torch.arange(length * length).view(length, length).sin()


CALLS = {
    "plain": lambda q, k, v: flash(q, k, v)[0],
    "scale": lambda q, k, v: flash(q, k, v, 0.0, False, scale=0.3)[0],
    "causal": lambda q, k, v: flash(q, k, v, 0.0, True)[0],
    "mask": lambda q, k, v: flash(q, k, v, attn_mask=bias(q.shape[2]))[0],
    "math": lambda q, k, v: math(q, k, v, bias(q.shape[2]), scale=0.3)[0],
    "grouped": lambda q, k, v: math(q, k[:, ::2], v[:, ::2], enable_gqa=True)[0],
}


class Model(nn.Module):
    def __init__(self, attend) -> None:
        super().__init__()
        self.attend = attend
        self.qkv = nn.Linear(HEADS * DIM, 3 * HEADS * DIM)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.attend(q, k, v).transpose(1, 2).flatten(2)


def traced_model(attend):
    torch.manual_seed(0)
    return trace(Model(attend).eval(), (torch.randn(2, 11, HEADS * DIM),), {}, dynamic=False)


@pytest.mark.parametrize("kind", CALLS)
def test_uses_the_mesh(kind) -> None:
    traced = traced_model(CALLS[kind])
    for ulysses, ring in ((2, 1), (1, 2), (2, 2)):
        report = verify_traced(traced, ulysses=ulysses, ring=ring)
        assert report.ok, report
        assert [a.heads for a in report.plan.attention] == [HEADS]


def lse_used(q, k, v):
    out, lse = flash(q, k, v)
    return out + lse.unsqueeze(-1)


def unequal_triangle(q, k, v):
    return flash(q, k[:, :, :7], v[:, :, :7], 0.0, True)[0]


def boolean_mask(q, k, v):
    return math(q, k, v, bias(q.shape[2]) > 0.5)[0]


@pytest.mark.parametrize("attend", [lse_used, unequal_triangle])
def test_left_alone_and_right(attend) -> None:
    report = verify_traced(traced_model(attend), ulysses=2, ring=1)
    assert report.ok and not report.plan.attention


def test_a_kernel_that_is_written_in_other_operators_is_divided_as_these_are() -> None:
    report = verify_traced(traced_model(boolean_mask), ulysses=2, ring=1)
    assert report.ok and [a.strategy for a in report.plan.attention] == ["local"], report


REST = {
    aten._scaled_dot_product_flash_attention.default: (),
    aten._scaled_dot_product_flash_attention_for_cpu.default: (),
    aten._scaled_dot_product_efficient_attention.default: (None, False),
    aten._scaled_dot_product_cudnn_attention.default: (None, False),
    aten._scaled_dot_product_fused_attention_overrideable.default: (None,),
    aten._scaled_dot_product_attention_math.default: (None,),
}


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("target", MASKS)
def test_every_kernel(target, dropout) -> None:
    graph = Graph()
    value = FakeTensorMode().from_tensor(torch.randn(1, HEADS, 6, DIM))
    places = [graph.placeholder(n) for n in ("q", "k", "v")]
    call = graph.call_function(target, (*places, *REST[target], dropout))
    item = graph.call_function(operator.getitem, (call, 0))
    for node in (*places, item):
        node.meta["val"] = value
    call.meta["val"] = (value,)
    graph.output((item,))
    kept = [n.target for n in kernels_to_attention(GraphModule(nn.Module(), graph)).graph.nodes if n.op == "call_function"]
    assert kept == ([target, operator.getitem] if dropout else [aten.scaled_dot_product_attention.default])


# ---- flash-attn's own operator, with its arguments; [batch, length, heads, width]

SCHEMA = (
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right, float softcap, "
    "Tensor? alibi_slopes, bool return_softmax) -> (Tensor, Tensor, Tensor, Tensor)"
)


def flash_on_cpu(q, k, v, dropout_p, softmax_scale, causal, left, right, softcap, slopes, return_softmax):
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=softmax_scale, enable_gqa=True).transpose(1, 2)
    return out, q.new_zeros(q.shape[:3], dtype=torch.float32), q.new_empty(0), q.new_empty(2, dtype=torch.int64)


@pytest.fixture
def flash_attn():
    with torch.library._scoped_library("flash_attn", "FRAGMENT") as library:
        library.define(SCHEMA)
        library.impl("_flash_attn_forward", flash_on_cpu, "CPU")
        library.impl("_flash_attn_forward", flash_on_cpu, "Meta")
        yield lambda *args: torch.ops.flash_attn._flash_attn_forward(*args)


def called(flash_attn, groups=HEADS, causal=False, left=-1, softcap=0.0, slopes=None, use=0):
    def attend(q, k, v):
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k[:, :groups], v[:, :groups]))
        return flash_attn(q, k, v, 0.0, 0.3, causal, left, -1, softcap, slopes, False)[use].reshape(q.shape[0], q.shape[1], HEADS, -1).transpose(1, 2)

    return attend


@pytest.mark.parametrize("kwargs", [{}, {"causal": True}, {"groups": 2}], ids=str)
def test_flash_attention_by_its_library(flash_attn, kwargs) -> None:
    traced = traced_model(called(flash_attn, **kwargs))
    for ulysses, ring in ((2, 1), (1, 2), (2, 2)):
        report = verify_traced(traced, ulysses=ulysses, ring=ring)
        assert report.ok, report
        assert [a.heads for a in report.plan.attention] == [HEADS]


@pytest.mark.parametrize("kwargs", [{"left": 4}, {"softcap": 30.0}, {"slopes": torch.ones(HEADS)}, {"use": 1}], ids=["window", "softcap", "slopes", "log-sum-exp"])
def test_flash_attention_of_another_kind_stays(flash_attn, kwargs) -> None:
    traced = traced_model(called(flash_attn, **kwargs))
    assert kernels_to_attention(traced.gm) is traced.gm
