"""Models that use their blocks in ways which copies of what a block did would not show: the trace is the one in which all run."""

import contextvars
import functools
import logging
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.append(str(Path(__file__).parent))  # test files are no package
from alike_blocks import COUNT, WIDTH, AssignsBuffer, Block, Model, WritesToBuffer  # noqa: E402

elsewhere = {"scale": 1.0, "x": None}
deep = [[[[[[None]]]]]]  # deeper than variables are compared
current = contextvars.ContextVar("current", default=1.0)


class ManyResults(Block):
    def forward(self, x):
        y = self.work(x)
        return {"y": y, "left": y[:, :2]}


class Reaches(Block):
    """The input of the model, which is that of the first block as well."""

    def forward(self, x):
        return self.work(x) + elsewhere["x"]


class Setting(Block):
    def forward(self, x):
        return self.work(x) * elsewhere["scale"] * current.get()


class ReachesDeeper(Block):
    def forward(self, x):
        return self.work(x) + deep[0][0][0][0][0][0]


class StoresDeeper(Block):
    def forward(self, x):
        deep[0][0][0][0][0][0] = self.up(x)
        return self.work(x)


class Reaching(Model):
    def forward(self, x):
        elsewhere["x"] = deep[0][0][0][0][0][0] = x
        return super().forward(x)


class StoringDeeper(Model):
    """What a block has stored is used by the model."""

    def __init__(self):
        super().__init__(StoresDeeper)

    def forward(self, x):
        for block in self.blocks:
            x = block(x) + deep[0][0][0][0][0][0].sum(1, keepdim=True)
        return x


class Changing(Model):
    """Between calls the model changes a block, a variable, a context."""

    def __init__(self, what):
        super().__init__(Setting)
        self.what = what

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            if self.what == "block":
                block.drop.p = 0.0 if i < 4 else 1.0
            elif self.what == "variable":
                elsewhere["scale"] = 1.0 if i < 4 else 3.0
            elif self.what == "context":
                current.set(1.0 if i < 4 else 3.0)
            elif self.what == "weight":
                block.table = self.blocks[0].table
            with torch.autocast("cpu", torch.bfloat16, enabled=self.what == "autocast" and i > 3):
                x = block(x).float()
        elsewhere["scale"] = 1.0
        current.set(1.0)
        return x


@pytest.mark.parametrize(("what", "copied"), [("block", 2), ("variable", 2), ("context", 2), ("autocast", 2), ("weight", 0)])
def test_changes_between_calls(what, copied, both):
    """The first four calls are alike, and so may the last two be."""
    assert both(Changing(what).train(), (torch.randn(3, WIDTH),), dynamic=False) <= copied


class WritesToResult(Model):
    def forward(self, x):
        for block in self.blocks:
            x = block(x)
            x.add_(1)
        return x


class WritesToPart(Model):
    """One result is a view of another."""

    def __init__(self):
        super().__init__(ManyResults)

    def forward(self, x):
        for block in self.blocks:
            found = block(x)
            found["left"].mul_(2)
            x = found["y"]
        return x


class Lists(Block):
    def forward(self, x, seen):
        seen.append(x)
        return self.work(x)


class Listing(Model):
    def __init__(self):
        super().__init__(Lists)

    def forward(self, x):
        seen = []
        for block in self.blocks:
            x = block(x, seen)
        return x, *seen


class Unrolled(Model):
    """Every call is at a line of its own, which its nodes tell."""

    def forward(self, x):
        x = self.blocks[0](x)
        x = self.blocks[1](x)
        x = self.blocks[2](x)
        return self.blocks[3](x)


class SharedPart(Model):
    """A module with two names."""

    def __init__(self):
        super().__init__()
        for block in self.blocks:
            block.norm = self.blocks[0].norm


class Flag:
    on = False


class Flagged(Block):
    def forward(self, x, flag):
        flag.on = not flag.on
        return self.work(x) if flag.on else x * 2


class Flags(Model):
    def __init__(self):
        super().__init__(Flagged)

    def forward(self, x):
        flag = Flag()
        for block in self.blocks:
            x = block(x, flag)
        return x


class Marked(Block):
    def forward(self, x):
        return self.work(x) if getattr(x, "marked", False) else x * 2


class Marking(Model):
    """The model puts attributes on tensors."""

    def __init__(self):
        super().__init__(Marked)

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = x + 1
            if i > 3:
                x.marked = True
            x = block(x)
        return x


@pytest.mark.parametrize(
    ("model", "copied"),
    [
        (functools.partial(Reaching, Reaches), 0), (functools.partial(Reaching, ReachesDeeper), 0), (StoringDeeper, 0), (WritesToResult, 0), (WritesToPart, 0), (Listing, 0), (Unrolled, 0), (SharedPart, 0), (Flags, 0), (Marking, 2),
        (functools.partial(Model, Block, 2), 0),
    ],
)  # fmt: skip
def test_models_whose_blocks_run(model, copied, both):
    assert both(model().eval(), (torch.randn(3, WIDTH),), dynamic=False) == copied


class Mixed(nn.Module):
    """Blocks that cannot be copied beside others that can."""

    def __init__(self):
        super().__init__()
        self.first, self.second = Model(), Model(WritesToBuffer)

    def forward(self, x):
        return self.second(self.first(x))


def test_one_kind_is_left_out(both, caplog):
    with caplog.at_level(logging.DEBUG, "seqpar.trace"):
        assert both(Mixed().eval(), (torch.randn(3, WIDTH),), dynamic=False) == COUNT - 2
    assert "second.blocks.0 writes to its inputs" in caplog.text


def test_what_torch_export_decides(both):
    """A buffer that is assigned is none of AOTAutograd's business."""
    assert both(Model(AssignsBuffer), (torch.randn(3, WIDTH),), dynamic=False, warm=False) == 0
