"""Sequences that lie one after another, attended by a kernel that is told where each ends, use the mesh like any other."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.passes.kernels import kernels_to_attention
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

HEADS, WIDTH = 4, 8
SCHEMAS = {
    "flash_attn": "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, "
    "float softmax_scale, bool causal, SymInt window_size_left=-1, SymInt window_size_right=-1, float softcap=0.0, Tensor? alibi_slopes=None, bool return_softmax=False, "
    "Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, bool zero_tensors=False) -> (Tensor, Tensor, Tensor, Tensor)",
    "flash_attn_3": "_flash_attn_forward(Tensor q, Tensor k, Tensor v, Tensor? k_new=None, Tensor? out_=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, Tensor? seqused_k=None, "
    "SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, float? softmax_scale=None, bool causal=False, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "SymInt attention_chunk=0, float softcap=0.0) -> (Tensor, Tensor, Tensor, Tensor)",
}


def packed(q, k, v, ends_q, ends_k, causal, scale):
    """[tokens of all sequences, heads, width], one sequence after another."""
    spans = zip(ends_q[:-1].tolist(), ends_q[1:].tolist(), ends_k[:-1].tolist(), ends_k[1:].tolist(), strict=True)
    parts = [[x[a:b].transpose(0, 1)[None] for x, a, b in ((q, *one), (k, *two), (v, *two))] for one, two in (((a, b), (c, d)) for a, b, c, d in spans)]
    outs = [F.scaled_dot_product_attention(*part, is_causal=causal, scale=scale, enable_gqa=True)[0].transpose(0, 1) for part in parts]
    return F.pad(torch.cat(outs), (0, 0, 0, 0, int(ends_q[0]), len(q) - int(ends_q[-1]))).contiguous(), *(torch.zeros_like(q) for _ in range(3))


def flash_2(q, k, v, ends_q, ends_k, longest_q, longest_k, dropout_p, scale, causal, *rest):
    return packed(q, k, v, ends_q, ends_k, causal, scale)


def flash_3(q, k, v, k_new, out, ends_q, ends_k, used, longest_q, longest_k, scale, causal=False, *rest):
    return packed(q, k, v, ends_q, ends_k, causal, scale)


KERNELS = {"flash_attn": flash_2, "flash_attn_3": flash_3}


def call_2(q, k, v, ends_q, ends_k, causal=False, **more):
    return torch.ops.flash_attn._flash_attn_varlen_forward(q, k, v, ends_q, ends_k, 99, 99, 0.0, 0.3, causal, **more)


def call_3(q, k, v, ends_q, ends_k, causal=False, **more):
    return torch.ops.flash_attn_3._flash_attn_forward(q, k, v, None, None, ends_q, ends_k, None, 99, 99, 0.3, causal, **more)


CALLS = {"flash_attn": call_2, "flash_attn_3": call_3}


@pytest.fixture(params=SCHEMAS)
def kernel(request):
    schema = SCHEMAS[request.param]
    with torch.library._scoped_library(request.param, "FRAGMENT") as library:
        library.define(schema)
        library.impl(schema.partition("(")[0], KERNELS[request.param], "CPU")
        library.impl(schema.partition("(")[0], lambda q, *rest: tuple(torch.empty_like(q) for _ in range(4)), "Meta")
        yield CALLS[request.param]


def numbers(*lengths):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


def filled(*lengths):
    return torch.cat([torch.zeros(1, dtype=torch.int32), torch.full((len(lengths),), lengths[0], dtype=torch.int32)]).cumsum(0).int()


ENDS = {"numbers": numbers, "filled": filled}


class Model(nn.Module):
    """[B, S, …]; `lengths`: of the sequences of which its tokens are made, of the keys in them."""

    def __init__(self, kernel, lengths, keys=None, groups=HEADS, ends="numbers", use=0, **more):
        super().__init__()
        self.kernel, self.lengths, self.keys, self.ends, self.use, self.more = kernel, lengths, keys or lengths, ENDS[ends], use, more
        self.q, self.kv, self.out = nn.Linear(32, HEADS * WIDTH), nn.Linear(32, 2 * groups * WIDTH), nn.Linear(HEADS * WIDTH, 32)

    def forward(self, x):
        flat = x.flatten(0, 1)
        q = self.q(flat).unflatten(-1, (-1, WIDTH))
        k, v = self.kv(flat).unflatten(-1, (2, -1, WIDTH)).unbind(1)
        out = self.kernel(q, k, v, self.ends(*self.lengths), self.ends(*self.keys), **self.more)[self.use]
        return x + self.out(out.reshape(len(flat), -1)[:, : HEADS * WIDTH]).view(x.shape)



@pytest.mark.parametrize(
    ("batch", "kwargs", "attentions"),
    [
        (1, {"lengths": (101,)}, 1),
        (2, {"lengths": (101, 101), "groups": 2}, 1),
        (2, {"lengths": (101, 101), "ends": "filled", "causal": True}, 1),
        (1, {"lengths": (101,), "keys": (77,)}, 1),
        (1, {"lengths": (40, 61)}, 2),
    ],
    ids=str,
)
def test_uses_the_mesh(kernel, batch, kwargs, attentions):
    torch.manual_seed(0)
    traced = trace(Model(kernel, **kwargs).eval(), (torch.randn(batch, 101, 32),), {}, dynamic=False)
    for ulysses, ring in ((2, 1), (1, 2), (2, 2)):
        report = verify_traced(traced, ulysses=ulysses, ring=ring)
        assert report.ok, report
        assert [a.heads for a in report.plan.attention] == [HEADS] * attentions
        assert report.plan.sharded_flop_fraction > 0.96, report.plan.explain()


@pytest.mark.parametrize("kwargs", [{"window_size_left": 4}, {"softcap": 30.0}, {"use": 1}, {"causal": True, "lengths": (101,), "keys": (77,)}], ids=str)
def test_of_another_kind_stays(kernel, kwargs):
    """A window, capped scores, statistics that are used, a triangle over unequal lengths."""
    traced = trace(Model(kernel, **{"lengths": (101,), **kwargs}).eval(), (torch.randn(1, 101, 32),), {}, dynamic=False)
    assert kernels_to_attention(traced.gm) is traced.gm
    partitioned = partition(traced, ulysses=2)
    assert len(partitioned.unknown) == 1 and partitioned.unknown[0].startswith("flash_attn") and f"1 x {partitioned.unknown[0]}" in partitioned.plan.explain()


class Given(Model):
    """Where the sequences end is an input."""

    def forward(self, x, ends):
        self.ends = lambda *lengths: ends
        return super().forward(x)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dynamic", [False, None])
def test_ends_that_are_inputs(kernel, causal, dynamic):
    torch.manual_seed(0)
    traced = trace(Given(kernel, (101,), causal=causal).eval(), (torch.randn(1, 101, 32), numbers(40, 1, 60)), {}, dynamic=dynamic)
    for ulysses, ring in ((2, 1), (1, 2), (2, 2)):
        report = verify_traced(traced, ulysses=ulysses, ring=ring)
        assert report.ok and [a.heads for a in report.plan.attention] == [HEADS], report
        assert report.plan.sharded_flop_fraction > 0.96, report.plan.explain()


def test_ends_that_begin_later(kernel):
    """One sequence of several: its first end is not 0, and nothing before it is seen."""

    class Second(Given):
        def forward(self, x, ends):
            return super().forward(x, ends[1:])[:, 40:]

    torch.manual_seed(0)
    traced = trace(Second(kernel, (101,)).eval(), (torch.randn(1, 101, 32), numbers(40, 61)), {}, dynamic=False)
    report = verify_traced(traced, ulysses=2, ring=1)
    assert report.ok and len(report.plan.attention) == 1, report


def test_one_after_another(kernel):
    """The result of one is what the next attends."""

    class Twice(Model):
        def forward(self, x):
            q = self.q(x.flatten(0, 1)).unflatten(-1, (-1, WIDTH))
            first = self.kernel(q, q, q, numbers(101), numbers(101))[0]
            return self.kernel(first, q, first, numbers(101), numbers(101))[0].flatten(1)

    torch.manual_seed(0)
    report = verify_traced(trace(Twice(kernel, (101,)).eval(), (torch.randn(1, 101, 32),), {}, dynamic=False), ulysses=2, ring=1)
    assert report.ok and len(report.plan.attention) == 2, report


def test_layers_share_a_mask(kernel):
    class Layers(Given):
        def forward(self, x, ends):
            return super().forward(super().forward(x, ends), ends)

    torch.manual_seed(0)
    traced = trace(Layers(kernel, (101,)).eval(), (torch.randn(1, 101, 32), numbers(40, 61)), {}, dynamic=False)
    assert sum(node.target is torch.ops.aten.eq.Tensor for node in kernels_to_attention(traced.gm).graph.nodes) == 1
    report = verify_traced(traced, ulysses=2, ring=1)
    assert report.ok and len(report.plan.attention) == 2, report


def test_many_sequences_are_one_attention(kernel):
    torch.manual_seed(0)
    traced = trace(Model(kernel, tuple(3 + n % 2 for n in range(30))).eval(), (torch.randn(1, 105, 32),), {}, dynamic=False)
    report = verify_traced(traced, ulysses=2, ring=1)
    assert report.ok and [a.heads for a in report.plan.attention] == [HEADS], report


def test_rows_behind_the_last_end(kernel):
    """They belong to no sequence, and may be anything."""

    class Shorter(Model):
        def forward(self, x):
            return super().forward(x)[:, :60]

    torch.manual_seed(0)
    traced = trace(Shorter(kernel, (40, 20)).eval(), (torch.randn(1, 101, 32),), {}, dynamic=False)
    report = verify_traced(traced, ulysses=2, ring=1)
    assert report.ok and [a.heads for a in report.plan.attention] == [HEADS], report


def test_torchs_own():
    """Runs on GPUs only; so here it is planned."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    model = Model(lambda q, k, v, ends_q, ends_k: (varlen.varlen_attn(q, k, v, ends_q, ends_k, 99, 99),), (101,)).to("meta").eval()
    model.ends = lambda *lengths: torch.arange(0, 2 * 101, 101, dtype=torch.int32, device="meta")
    plan = partition(trace(model, (torch.randn(1, 101, 32, device="meta"),), {}, dynamic=False), ulysses=2).plan
    assert [a.strategy for a in plan.attention] == ["ulysses"] and plan.sharded_flop_fraction > 0.96
