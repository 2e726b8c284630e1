"""Slices that are written one after another become one call."""

import pytest
import torch
from torch import Tensor, nn

import seqpar
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.runtime.strided import write_slices

aten = torch.ops.aten


class Rotated(nn.Module):
    """Attention whose queries are written in two halves, as Wan does, and whose output is written into a table three times."""

    def __init__(self, twice: bool = False) -> None:
        super().__init__()
        self.twice = twice
        self.proj = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.proj(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        out = torch.empty_like(q)
        out[..., 0::2] = q[..., 0::2] - k[..., 1::2]
        out[..., 1::2] = q[..., 1::2] + k[..., 0::2]
        y = nn.functional.scaled_dot_product_attention(out, k, v).transpose(1, 2).flatten(2)
        table = x * 0.5
        table[..., :4] = y[..., 4:8]
        if self.twice:
            y = y + table  # the table as it is between two writes
        table[..., 2:6] = y[..., 8:12]
        table[:, 0] = 1.0
        return table + y


def targets(model: nn.Module, x: Tensor) -> list[object]:
    return [node.target for node in partition(trace(model, (x,), {}, dynamic=False), ulysses=2).program(0).graph.nodes]


def test_a_chain_of_writes_is_one_call() -> None:
    called = targets(Rotated(), torch.randn(1, 10, 16))
    assert called.count(write_slices) == 2
    assert aten.slice_scatter.default not in called
    assert aten.empty_like.default not in called


def test_what_is_read_between_two_writes_is_kept() -> None:
    called = targets(Rotated(twice=True), torch.randn(1, 10, 16))
    assert called.count(aten.slice_scatter.default) == 2


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 3)])
def test_equals_one_process(twice: bool, ulysses: int, ring: int) -> None:
    torch.manual_seed(0)
    report = seqpar.verify(Rotated(twice), (torch.randn(1, 11, 16),), ulysses=ulysses, ring=ring)
    assert report.ok


def test_gradients_flow() -> None:
    x, base = torch.randn(2, 4, requires_grad=True), torch.randn(2, 8, requires_grad=True)
    (write_slices(base, [x, x[:, :2]], [(1, 0, 8, 2), (1, 5, 7, 1)]) * torch.arange(8.0)).sum().backward()
    assert torch.equal(base.grad, torch.tensor([0.0, 1, 0, 3, 0, 0, 0, 7]).expand(2, 8))
    assert torch.equal(x.grad, torch.tensor([0.0 + 5, 2.0 + 6, 4.0, 0.0]).expand(2, 4))


def test_unwritten_parts_keep_the_base() -> None:
    base = torch.arange(6.0)
    assert write_slices(base, [torch.zeros(2)], [(0, 1, 3, 1)]).tolist() == [0, 0, 0, 3, 4, 5]
    assert base.tolist() == [0, 1, 2, 3, 4, 5]
