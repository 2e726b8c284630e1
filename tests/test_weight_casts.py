"""Weights that are cast for the time of a call."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqpar
from seqpar.errors import TraceError
from seqpar.models import registry

WIDTH = 32
INPUTS = {"x": torch.randn(2, 37, WIDTH, generator=torch.Generator().manual_seed(0))}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attend, self.out, self.up = nn.MultiheadAttention(WIDTH, 4, batch_first=True), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)

    def forward(self, x):
        return x + self.out(self.attend(x, x, x, need_weights=False)[0])


def layerwise(name="flux"):
    torch.manual_seed(0)
    family = registry.get(name)
    made = family.build().eval()
    made.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    return made, family.example_inputs(height=64, width=64)


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_layerwise_casting(name):
    cast, inputs = layerwise(name)
    plain = registry.get(name).build()
    report = seqpar.verify(cast, inputs, ulysses=2, ring=2)
    assert report.ok and report.plan.sharded_flop_fraction == seqpar.plan(plain, inputs, ulysses=2, ring=2).sharded_flop_fraction
    assert sum(p.dtype == torch.float8_e4m3fn for p in cast.parameters()) > 20  # as they were
    assert report.plan.inspector.memory.parameters < 0.6 * seqpar.plan(plain, inputs, ulysses=2, ring=2).inspector.memory.parameters


def test_a_cast_is_seen_wherever_the_weight_is():
    class Casting(Block):
        def forward(self, x):
            self.out.to(torch.float64)
            assert self.again.weight.dtype == torch.float64 and isinstance(self.out.weight, nn.Parameter)
            y = F.linear(x.double(), self.again.weight).float()
            self.out.to(torch.float32)
            return super().forward(x) + y

    block = Casting().eval()
    block.again = nn.Linear(WIDTH, WIDTH)
    block.again.weight = block.out.weight
    assert seqpar.verify(block, INPUTS, ulysses=2).ok
    assert "_apply" not in vars(block.out) and block.again.weight is block.out.weight and block.out.weight.dtype == torch.float32


def test_a_layer_that_stays_cast_is_refused():
    class Leaving(Block):
        def forward(self, x):
            self.out.to(torch.bfloat16 if self.out.weight.dtype == torch.float32 else torch.float32)
            return x + self.up(x).sum(-1, keepdim=True)

    with pytest.raises(TraceError, match=r"out\.weight.*Cast it back"):
        seqpar.plan(Leaving().eval(), INPUTS, ulysses=2)


def test_a_layer_that_changes_its_weights_is_refused():
    class Doubling(Block):
        def forward(self, x):
            self.out._apply(lambda weight: weight * 2)
            return super().forward(x)

    with pytest.raises(TraceError, match=r"Linear\.weight during a call"):
        seqpar.plan(Doubling().eval(), INPUTS, ulysses=2)
