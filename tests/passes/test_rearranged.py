"""Shuffles of pixels and channels are followed like the views they are made of."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqpar
from seqpar.passes.rearranged import CHANNELS, SHUFFLES, rearranged
from seqpar.passes.trace import trace

ROWS, COLUMNS, WIDTH = 12, 10, 16


class Shuffled(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.mix = kind, nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.kind == "unshuffle":
            x_BCHW = F.pixel_unshuffle(x_BCHW, 2)
        if self.kind == "channels":
            x_BCHW = F.channel_shuffle(x_BCHW, 4)
        rows = x_BCHW.shape[-2]
        x = self.mix(x_BCHW.flatten(-2).mT).unsqueeze(-3)
        x = F.scaled_dot_product_attention(x, x * 2, x + 1).squeeze(-3).mT.unflatten(-1, (rows, -1))
        return F.pixel_shuffle(x, 2) if self.kind == "shuffle" else x


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", ["shuffle", "unshuffle", "channels"])
def test_a_shuffle_keeps_rows_divided(kind: str, dynamic: bool) -> None:
    channels = WIDTH // 4 if kind == "unshuffle" else WIDTH
    report = seqpar.verify(Shuffled(kind), (torch.randn(2, channels, ROWS, COLUMNS),), ulysses=2, ring=2, dynamic=dynamic)
    assert report.ok and report.plan.sharded_flop_fraction > 0.95, report
    assert "aten.pixel" not in report.plan.explain() and "aten.channel" not in report.plan.explain()


@pytest.mark.parametrize(
    ("run", "shape"),
    [(lambda x: F.pixel_shuffle(x, 3), (2, 3, 18, 4, 6)), (lambda x: F.pixel_unshuffle(x, 2), (2, 5, 4, 6)), (lambda x: F.channel_shuffle(x, 9), (2, 18, 4))],
)
def test_values_are_those_of_the_shuffle(run, shape: tuple[int, ...]) -> None:
    class Program(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return run(x)

    x = torch.randn(shape)
    changed = rearranged(trace(Program(), (x,), {}, dynamic=False).gm)
    assert torch.equal(changed(x)[0], run(x))
    assert not any(n.target in (*SHUFFLES, *CHANNELS) for n in changed.graph.nodes)
    assert rearranged(changed) is changed
