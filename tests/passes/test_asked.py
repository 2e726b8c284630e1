"""Models that ask whether they are traced, and do something else then."""

from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses import FakeTensor

import seqpar
from seqpar.errors import TraceError
from seqpar.passes import trace as trace_file


class Attention(nn.Module):
    """traced(x): whether the code thinks that it is traced."""

    def __init__(self, traced, causal_then):
        super().__init__()
        self.qkv, self.traced, self.causal_then = nn.Linear(16, 48), traced, causal_then

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        causal = self.causal_then and self.traced(x)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


def compiling(x):
    return torch.compiler.is_compiling()


def tracing(x):
    return torch.jit.is_tracing() or torch.compiler.is_exporting()


def fake(x):
    return torch.compiler.is_compiling() or isinstance(x, FakeTensor) or type(x) is not torch.Tensor


def verified(model):
    torch.manual_seed(0)
    with mock.patch.object(trace_file, "trace_sizes", side_effect=trace_file.trace_sizes) as traces:
        report = seqpar.verify(model.eval(), (torch.randn(2, 13, 16),), ulysses=2)
    return report, traces.call_count


@pytest.mark.parametrize("traced", [compiling, tracing])
def test_the_graph_does_what_an_ordinary_call_does(traced):
    report, traces = verified(Attention(traced, causal_then=True))
    assert report.ok and traces == 2, report


def test_code_that_asks_and_does_the_same_is_traced_once():
    report, traces = verified(Attention(fake, causal_then=False))
    assert report.ok and traces == 1


def test_code_that_finds_it_out_otherwise_is_refused():
    with pytest.raises(TraceError, match=r"Attention computes something else while it is traced .* asks whether it is traced \(.*is_compiling.*\)"):
        verified(Attention(fake, causal_then=True))
