"""Attention over one of several axes: the cut switches between frames and pixels where that is cheaper than exchanging heads."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqpar
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

WIDTH = 16


class Attention(nn.Module):
    def __init__(self, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BSD):
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x_BSD).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x_BSD + self.out(out.transpose(1, 2).flatten(2))


class Factorised(nn.Module):
    """Video tokens [B, T * S, D]: spatial attention within frames, temporal attention (causal) along each pixel."""

    def __init__(self, blocks: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.spatial = nn.ModuleList(Attention(heads, False) for _ in range(blocks))
        self.temporal = nn.ModuleList(Attention(heads, True) for _ in range(blocks))
        self.mlp = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(blocks))

    def forward(self, x_BTSD):
        batch, frames, pixels, width = x_BTSD.shape
        x = x_BTSD.flatten(1, 2)
        for spatial, temporal, mlp in zip(self.spatial, self.temporal, self.mlp, strict=True):
            x = spatial(x.view(batch * frames, pixels, width))
            x = x.view(batch, frames, pixels, width).transpose(1, 2).reshape(batch * pixels, frames, width)
            x = mlp(temporal(x))
            x = x.view(batch, pixels, frames, width).transpose(1, 2).reshape(batch, frames * pixels, width)
        return x


def traced(batch: int, frames: int, pixels: int):
    torch.manual_seed(0)
    return trace(Factorised().eval(), (torch.randn(batch, frames, pixels, WIDTH),), {}, dynamic=False)


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (4, 1), (2, 2), (1, 3)])
@pytest.mark.parametrize(("batch", "frames", "pixels"), [(1, 4, 16), (2, 8, 12), (1, 5, 7), (2, 3, 9), (1, 2, 17), (3, 1, 8)])
def test_equals_one_process(batch, frames, pixels, mesh):
    report = verify_traced(traced(batch, frames, pixels), ulysses=mesh[0], ring=mesh[1])
    assert report.ok, report


@pytest.mark.parametrize("batch", [1, 2])
def test_one_switch_between_two_attentions(batch):
    """Three switches for four attentions, and the gather of the result, each a fraction of what the heads would cost."""
    plan = partition(traced(batch, 8, 64), ulysses=4).plan
    part = batch * 8 * 64 * WIDTH * 4 // 16
    assert plan.comm_calls["all_to_all"] == 3 and plan.comm_bytes_per_rank["all_to_all"] == 3 * 3 * part
    assert plan.comm_calls["all_gather"] == 1
    assert [a.strategy for a in plan.attention] == ["local"] * 4
    assert plan.sharded_flop_fraction == 1.0


def test_an_axis_shorter_than_the_ranks_is_never_cut():
    """Two frames on four ranks: pixels stay sharded, the spatial attention exchanges heads, the temporal one nothing."""
    plan = partition(traced(1, 2, 64), ulysses=4).plan
    assert [a.strategy for a in plan.attention] == ["ulysses", "local"] * 2
    assert plan.sharded_flop_fraction == 1.0


def test_rows_too_few_everywhere_the_batch_is_divided():
    """Only temporal attention over three frames on four ranks: its pixels are divided and nothing is exchanged but the result."""

    class Temporal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Attention(2, False)

        def forward(self, x_STD):
            return self.block(x_STD)

    torch.manual_seed(0)
    case = trace(Temporal().eval(), (torch.randn(10, 3, WIDTH),), {}, dynamic=False)
    report = verify_traced(case, ulysses=2, ring=2)
    assert report.ok and report.plan.comm_calls["all_gather"] == 1 and sum(report.plan.comm_calls.values()) == 1
    assert min(report.plan.flops_per_rank) > 0 and max(report.plan.flops_per_rank) == report.plan.flops_total * 3 // 10


def on_real_ranks():
    torch.manual_seed(0)
    model = Factorised().eval()
    inputs = [torch.randn(1, frames, pixels, WIDTH) for frames, pixels in ((8, 12), (5, 9))]
    fast = seqpar.sp_compile(model, (inputs[0],), ulysses=2, ring=2)
    with torch.no_grad():
        errors = [((fast(x) - model(x)).norm() / model(x).norm()).item() for x in inputs]
    return errors, fast.plan.comm_calls


def test_on_real_ranks(ranks):
    for errors, calls in ranks.run(on_real_ranks):
        assert max(errors) <= 1e-5 and calls["all_to_all"] == 3
