"""Counts: bytes are those that move between simulated ranks, FLOPs those that torch counts."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import seqpar
from seqpar.models import registry
from seqpar.models.randomise import randomise
from seqpar.passes.count import count
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.runtime.simulate import SimulatedWorld
from seqpar.verification import SimulatedInterpreter

NAMES = ("flux", "wan")


def tiny(name):
    family = registry.get(name)
    config = family.tiny_config(2, 1)
    return randomise(family.build(config)), family.grid_inputs(config, rows=5, columns=4, text_len=7)


def traced_family(name):
    model, inputs = tiny(name)
    return trace(model, (), inputs, dynamic=False)


def inputs_of(traced):
    return [traced.call.leaves[i].contiguous() for i in traced.input_positions]


def torch_flops(run):
    """With attention as matrix products: not every fused kernel is known to torch's counter."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", NAMES)
def test_flops_of_a_model_are_torchs(name):
    model, example = tiny(name)
    traced = trace(model, (), example, dynamic=False)
    ours = count(traced.gm, inputs_of(traced), ulysses=1, ring=1, rank=0)
    assert ours.total_flops == torch_flops(lambda: model(**example))
    assert ours.total_flops == partition(traced, ulysses=2, ring=1).plan.flops_total
    assert sum(ours.traffic.calls.values()) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2)])
def test_counted_bytes_are_moved_bytes(name, mesh):
    traced = traced_family(name)
    partitioned = partition(traced, ulysses=mesh[0], ring=mesh[1])
    inputs, n = inputs_of(traced), mesh[0] * mesh[1]
    world = SimulatedWorld(*mesh)
    with torch.no_grad():
        world.run([lambda groups, r=r: SimulatedInterpreter(partitioned.program(r), groups, r, None).run(*inputs) for r in range(n)])
    counted = [count(partitioned.program(r), inputs, ulysses=mesh[0], ring=mesh[1], rank=r) for r in range(n)]
    assert [c.traffic.bytes for c in counted] == [t.bytes for t in world.traffic]
    assert [c.traffic.calls for c in counted] == [t.calls for t in world.traffic]
    plan = partitioned.plan
    assert plan.comm_bytes_per_rank == {k: max(t.bytes[k] for t in world.traffic) for k in world.traffic[0].bytes}
    assert plan.flops_per_rank == tuple(c.total_flops for c in counted)
    assert max(plan.flops_per_rank) < plan.flops_total


class Contractions(nn.Module):
    """One of each operator whose FLOPs are counted."""

    def __init__(self):
        super().__init__()
        self.linear, self.conv = nn.Linear(6, 10), nn.Conv2d(3, 5, 3, padding=1, groups=1)
        self.grouped, self.conv1d = nn.Conv2d(4, 8, 1, groups=2), nn.Conv1d(3, 4, 3, stride=2)

    def forward(self, x, image):
        y = self.linear(x) @ torch.ones(10, 4)
        y = torch.bmm(y, y.transpose(1, 2)) + torch.baddbmm(y @ y.transpose(1, 2), y, y.transpose(1, 2))
        grid = self.conv(image)
        out = F.scaled_dot_product_attention(x, x[:, :4] * 2, x[:, :4, :3].clone())
        spread = F.conv_transpose2d(image, torch.ones(3, 2, 3, 3), stride=2)
        mixed = torch.einsum("bsd,bte,bd->ste", x, y[..., :3], x[:, 0]), torch.einsum("...sd,...td->...st", x, x), torch.einsum("bsd,bs->bsd", x, x[..., 0])
        same = F.conv2d(image, torch.ones(4, 3, 3, 3), padding="same")
        return mixed, same, spread, y, grid, self.grouped(grid[:, :4].contiguous()), self.conv1d(image[:, :, 0]), out


def test_flops_of_each_operator():
    traced = trace(Contractions(), (torch.randn(2, 7, 6), torch.randn(2, 3, 8, 8)), {}, dynamic=False)
    inputs = inputs_of(traced)
    assert count(traced.gm, inputs, ulysses=1, ring=1, rank=0).total_flops == torch_flops(lambda: traced.gm(*inputs))


def test_recurrent_layers_are_work_too():
    """Else a model whose work is mostly theirs, on every rank, would count as divided."""
    layer = nn.LSTM(6, 5, 2, batch_first=True, bidirectional=True)
    matrices = sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2)
    plan = seqpar.plan(layer.eval(), (torch.randn(2, 7, 6),), ulysses=2)
    assert plan.flops_per_rank == (2 * 2 * 7 * matrices,) * 2 and plan.sharded_flop_fraction == 0


def test_an_operator_that_reads_values_is_counted_whole():
    """`istft` looks at its window, which meta tensors do not have."""

    class Sound(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(34, 3 * 34)

        def forward(self, x_BSD):
            q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x_BSD).chunk(3, -1))
            spectrum = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2)
            return torch.istft(torch.view_as_complex(spectrum.transpose(2, 3).contiguous()).transpose(1, 2), 32, 8, window=torch.hann_window(32))

    report = seqpar.verify(Sound().eval(), (torch.randn(1, 41, 34),), ulysses=2)
    assert report.ok, report
    assert "istft" in report.plan.explain()


def test_a_product_that_sums_nothing_has_no_work_on_any_side():
    """Else the ranks would seem to compute less than their parts."""

    class Outer(nn.Module):
        def forward(self, q, k, v):
            return torch.einsum("bhnd,bhnde->bhne", q, torch.einsum("bhnd,bhne->bhnde", k, v).cumsum(2))

    plan = partition(trace(Outer(), tuple(torch.randn(1, 3, 301, 8) for _ in range(3)), {}, dynamic=False), ulysses=2).plan
    assert plan.flops_total == 2 * 3 * 301 * 8 * 8 and plan.sharded_flop_fraction <= 1
