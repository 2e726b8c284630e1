"""A trace that copies what alike blocks do is the trace in which every block runs: node by node, for real models and for blocks that try to be different."""

import functools
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention

from seqpar.models import registry
from seqpar.models.randomise import randomise
from seqpar.passes.trace import trace

sys.path.append(str(Path(__file__).parent))  # test files are no package
from alike_blocks import COUNT, WIDTH, Block, Model, WritesToBuffer  # noqa: E402

# ---- real models


@pytest.mark.parametrize(
    ("name", "dynamic", "layers", "copied"),
    [
        ("flux", False, 10, 4), ("flux", True, 10, 1), ("qwen-image", False, 4, 2), ("wan", False, 4, 2), ("wan", None, 4, 2), ("sd3", False, 6, 1),
        ("z-image", False, 0, 0), ("pattern-unified", False, 0, 0), ("bagel", False, 0, 0),
    ],
)  # fmt: skip
def test_the_same_graph(name, dynamic, layers, copied, both):
    """copied: at least so many; layers that know their number differ in it."""
    family = registry.get(name)
    config = family.tiny_config(2, 1)
    if layers:
        config = family.with_layers(config, layers)
    model, inputs = randomise(family.build(config)), family.grid_inputs(config, rows=4, columns=4, text_len=5)
    assert both(model, (), inputs, dynamic=dynamic) >= copied


# ---- blocks, each with something of its own; COUNT of them in a row

elsewhere, features = {"calls": 0, "x": None}, []


class Complex(Block):
    def forward(self, x):
        turned = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2)) * torch.polar(torch.ones(2, device=x.device), torch.arange(2.0, device=x.device))
        return self.work(torch.view_as_real(turned).flatten(-2))


class InPlaceWithin(Block):
    def forward(self, x):
        y = x * 2
        y[:, :2] = self.norm(x)[:, :2]
        return self.work(y.relu_())


class ManyResults(Block):
    def forward(self, x):
        y = self.work(x)
        return {"y": y, "left": y[:, :2], "none": None, "number": 3, "same": x}


class UsesDict(Model):
    def forward(self, x):
        for block in self.blocks:
            found = block(x)
            x = found["y"] + found["left"].repeat(1, 2) * found["number"] + found["same"]
        return x, found["left"]


class SameTwice(Model):
    """Every block is called twice, from one line."""

    def forward(self, x):
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        return x


class TiedWeights(Model):
    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.up.weight, block.table = self.blocks[0].up.weight, self.blocks[1].table


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList([nn.ModuleList([Block() for _ in range(4)]) for _ in range(2)])

    def forward(self, x):
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return x


class TwoInputs(Block):
    def forward(self, x, y, scale=1.0, flag=None):
        return self.work(x) * scale + y, None


class KeepsNothing(Model):
    """The last call's result is not used, one call has the same tensor twice."""

    def __init__(self):
        super().__init__(TwoInputs)

    def forward(self, x):
        y = x + 1
        for i, block in enumerate(self.blocks):
            x, _ = block(x, x if i == 4 else y, scale=2.0, flag="a")
        self.blocks[0](x, y)
        return x


@pytest.mark.parametrize(
    ("model", "copied", "symbolic"),
    [
        (Model, COUNT - 2, COUNT - 2),
        (functools.partial(Model, Complex), COUNT - 2, 0),  # each call computes sizes from those that the one before has computed
        (functools.partial(Model, InPlaceWithin), COUNT - 2, COUNT - 2),
        (functools.partial(UsesDict, ManyResults), COUNT - 2, COUNT - 2),
        (SameTwice, 2 * COUNT - 2, 2 * COUNT - 2),
        (TiedWeights, COUNT - 2, COUNT - 2),
        (Nested, 6, 6),
        (KeepsNothing, COUNT - 3, COUNT - 3),
    ],
)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_copied(model, copied, symbolic, training, dynamic, both):
    """All but the two that are compared."""
    assert both(model().train(training), (torch.randn(3, WIDTH),), dynamic=dynamic) == (symbolic if dynamic else copied)


def test_nothing_stays():
    call, model = nn.Module.__call__, Model()
    state = {name: dict(vars(module)) for name, module in model.named_modules()}
    trace(model, (torch.randn(3, WIDTH),), {}, dynamic=False)
    assert nn.Module.__call__ is call and {name: dict(vars(module)) for name, module in model.named_modules()} == state


# ---- blocks that must run


class CountsItself(Block):
    calls = 0

    def forward(self, x):
        self.calls += 1
        return self.work(x) * self.calls


class CountsElsewhere(Block):
    """Different from the fourth call on."""

    def forward(self, x):
        elsewhere["calls"] += 1
        return self.work(x) * (1 if elsewhere["calls"] < 4 else 5)


class Remembers(Block):
    @staticmethod
    @functools.lru_cache(None)
    def ramp(n, device):
        return torch.arange(n, device=device).float()

    def forward(self, x):
        return self.work(x) + self.ramp(WIDTH, x.device)


class WritesToInput(Block):
    def forward(self, x):
        x.mul_(2)
        return self.work(x)


class ReturnsView(Block):
    def forward(self, x):
        self.work(x)
        return x[:, :]


class Constant(Block):
    def forward(self, x):
        return self.work(x) + torch.tensor([1.0, 2.0, 3.0, 4.0], device=x.device)


class Flexible(Block):
    def forward(self, x):
        q = self.work(x)[None, None]
        return flex_attention(q, q, q, score_mod=lambda score, b, h, i, j: score * (i - j))[0, 0]


class Reads(Block):
    def forward(self, x):
        return self.work(x) if (self.table > 0).all() else x


class Hooked(Block):
    def __init__(self):
        super().__init__()
        self.down.register_forward_hook(lambda module, args, output: features.append(output) or output + 1)


class Processor:
    calls = 0

    def __call__(self, block, x):
        self.calls += 1
        return block.work(x) * self.calls


class Processed(Block):
    def __init__(self):
        super().__init__()
        self.processor = Processor()

    def forward(self, x):
        return self.processor(self, x)


class Stores(Block):
    """What another block finds is an intermediate value."""

    def forward(self, x):
        elsewhere["x"] = self.up(x)
        return self.work(x)


@pytest.mark.parametrize(
    "kind",
    [CountsItself, CountsElsewhere, Remembers, WritesToInput, WritesToBuffer, ReturnsView, Constant, Flexible, Reads, Hooked, Processed, Stores],
)
def test_not_copied(kind, both):
    elsewhere.update(calls=0, x=None)
    assert both(Model(kind).eval(), (torch.randn(3, WIDTH),), dynamic=False, warm=False) == 0  # a warm one of these that keep state is refused
