"""A model that is changed after compiling: the next call computes what the changed model computes."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from seqpar import sp_compile
from seqpar.errors import SavedProgramError
from seqpar.model_watch import PATIENCE, ModelWatch


class Gain:
    """No module, as an attention processor is none."""

    def __init__(self):
        self.factor, self.settings = 1.0, SimpleNamespace(inner=SimpleNamespace(shift=0.0))

    def __call__(self, block, x):
        return x * self.factor * block.strength + self.settings.inner.shift


class Adapted(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.base, self.down, self.up = nn.Linear(width, width), nn.ModuleDict({"a": nn.Linear(width, 2, bias=False)}), nn.ModuleDict({"a": nn.Linear(2, width)})
        self.scaling, self.active = {"a": 1.0}, ["a"]

    def forward(self, x):
        return self.base(x) + sum(self.scaling[name] * self.up[name](self.down[name](x)) for name in self.active)


class Block(nn.Module):
    sign = 1.0

    def __init__(self, width=16):
        super().__init__()
        self.heads, self.strength, self.flipped, self.unused = 4, 1.0, False, 0
        self.norm, self.q, self.out, self.drop = nn.LayerNorm(width), Adapted(width), nn.Linear(width, width), nn.Dropout(1.0)
        self.gain, self.table, self.gain_layer = Gain(), torch.ones(width), nn.Module()
        self.registers = nn.Parameter(torch.ones(2, width))

    def forward(self, x):
        h = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        h = self.out(F.scaled_dot_product_attention(h, h, h).transpose(1, 2).flatten(-2)) * self.table
        return x + self.drop(self.gain(self, h.flip(-1) if self.flipped else h)) * self.sign


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


CHANGES = {
    "number": lambda block: setattr(block, "strength", 3.0),
    "flag": lambda block: setattr(block, "flipped", True),
    "heads": lambda block: setattr(block, "heads", 2),
    "hides-the-class": lambda block: setattr(block, "sign", -1.0),
    "in-a-dict": lambda block: block.q.scaling.update(a=0.5),
    "in-a-list": lambda block: block.q.active.clear(),
    "of-a-processor": lambda block: setattr(block.gain, "factor", 2.0),
    "processor": lambda block: setattr(block, "gain", lambda block, x: -x),
    "tensor": lambda block: setattr(block, "table", torch.full((16,), 2.0)),
    "epsilon": lambda block: setattr(block.norm, "eps", 1.0),
    "layer": lambda block: setattr(block.q, "base", nn.Identity()),
    "hook": lambda block: block.out.register_forward_hook(lambda layer, given, result: -result),
    "early-hook": lambda block: block.out.register_forward_pre_hook(lambda layer, given: (-given[0],)),
    "forward": lambda block: setattr(block.out, "forward", lambda x: -x),
    "bias": lambda block: setattr(block.q.down["a"], "bias", nn.Parameter(torch.ones(2))),
    "mode": lambda block: block.drop.train(),
    "layer-where-none-was": lambda block: block.gain_layer.add_module("extra", nn.Identity()),
    "shape-of-a-weight": lambda block: setattr(block, "registers", nn.Parameter(torch.ones(3, 16))),
    "deep-inside": lambda block: setattr(block.gain.settings.inner, "shift", 1.0),
}
# Weights are read anew in each call, and what no code reads, or a table made again, changes no result.
NO_CHANGES = {
    "registry-of-a-library": lambda block: setattr(block, "_diffusers_hook", SimpleNamespace(hooks={})),
    "same-shape": lambda block: setattr(block, "registers", nn.Parameter(torch.zeros(2, 16))),
    "weight": lambda block: setattr(block.out, "weight", nn.Parameter(torch.ones(16, 16))),
    "not-read": lambda block: setattr(block, "unused", 1),
    "unknown": lambda block: setattr(block, "note", 1),
    "same-tensor": lambda block: setattr(block, "table", torch.ones(16)),
    "same-number": lambda block: setattr(block, "heads", 4),
    "same-list": lambda block: block.q.active.reverse(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change):
    model = Model().eval()
    watch = ModelWatch(model)
    assert not watch.changed() and not watch.changes()
    CHANGES[change](model.blocks[1])
    assert watch.changed() and all("blocks.1" in place for place in watch.changes()), watch.changes()
    assert watch.changes()


@pytest.mark.parametrize("change", NO_CHANGES)
def test_what_changes_no_program_is_not_named(change):
    model = Model().eval()
    watch = ModelWatch(model)
    NO_CHANGES[change](model.blocks[1])
    assert not watch.changes()


def test_classes_are_watched_as_well(monkeypatch):
    model = Model().eval()
    watch = ModelWatch(model)
    monkeypatch.setattr(Block, "forward", lambda block, x: x)  # what caches for diffusion models do
    assert watch.changed() and watch.changes() == ["Block.forward"]
    monkeypatch.undo()
    monkeypatch.setattr(Block, "sign", -1.0)
    assert watch.changed() and watch.changes() == ["Block.sign"]


def test_a_changed_model_is_not_saved(tmp_path):
    model, x = Model().eval(), torch.randn(1, 4, 16)
    fast = sp_compile(model, (x,), dynamic=False)
    model.blocks[0].heads = 2
    with pytest.raises(SavedProgramError, match="changed since its programs were made .blocks.0.heads.: call it once"):
        fast.save(tmp_path / "programs")


def test_layers_added_and_removed():
    model = Model().eval()
    watch = ModelWatch(model)
    model.blocks.append(Block())
    assert watch.changed() and watch.changes() == ["the layers of blocks"]


def changed_on_ranks(names):
    """Largest difference of the compiled model, and largest effect, for one change after the other."""
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(1, 9, 16)
    differences, moved = [], []
    with torch.no_grad():
        fast = sp_compile(model, (x,), ulysses=2, dynamic=False)
        for name in names:
            before = model(x)
            CHANGES[name](model.blocks[0])
            expected = model(x)
            moved.append((expected - before).abs().max().item())
            differences.append((fast(x) - expected).abs().max().item())
    return differences, moved


def test_the_next_call_is_right_on_all_ranks(two_ranks):
    for differences, moved in two_ranks.run(changed_on_ranks, ["in-a-dict", "hook", "layer", "of-a-processor"]):
        assert max(differences) < 1e-5 and min(moved) > 1e-3, (differences, moved)


def test_one_program_as_long_as_nothing_changes(caplog):
    model, x = Model().eval(), torch.randn(1, 8, 16)
    with caplog.at_level(logging.INFO, logger="seqpar.compile"), torch.no_grad():
        fast = sp_compile(model, (x,), dynamic=False)
        first = fast.graph_module
        for change in NO_CHANGES.values():
            change(model.blocks[0])
            assert torch.equal(fast(x), model(x)) and fast.graph_module is first
        fast.train()
        fast(x)
        fast.eval()
        fast(x)
        assert fast.graph_module is first  # each mode keeps its program
        model.blocks[0].strength = 2.0
        assert torch.equal(fast(x), model(x)) and fast.graph_module is not first
    assert "because the model was changed: blocks.0.strength" in caplog.text


def test_a_place_that_changes_with_every_call_is_named_and_right(caplog):
    model, x = Model().eval(), torch.randn(1, 4, 16)
    with torch.no_grad():
        fast = sp_compile(model, (x,), dynamic=False)
        for step in range(PATIENCE + 1):
            model.blocks[0].strength = 2.0 + step
            assert torch.equal(fast(x), model(x)) and ("blocks.0.strength was changed" in caplog.text) == (step >= PATIENCE - 1)


class Routing(nn.Module):
    """A model whose router runs as it is inside the program; the model reads its scale, too."""

    def __init__(self):
        super().__init__()
        self.block, self.router = Block(), Router()

    def forward(self, x):
        return self.router(self.block(x)) * self.router.scale


class Router(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers, self.scale, self.chosen = nn.ModuleList(nn.Linear(16, 16) for _ in range(2)), 1.0, 0

    def forward(self, x):
        self.chosen = int(x.sum() > 0)
        return self.layers[self.chosen](x)


def test_modules_that_run_as_they_are_hold_what_others_read():
    model, x = Routing().eval(), torch.randn(1, 8, 16)
    with torch.no_grad():
        fast = sp_compile(model, (x,), dynamic=False)
        first = fast.graph_module
        for sign in (1, -1, 1):  # what it notes while it runs is no change
            assert torch.equal(fast(sign * x), model(sign * x)) and fast.graph_module is first
        model.router.scale = 3.0
        assert torch.equal(fast(x), model(x)) and fast.graph_module is not first


def test_parts_in_another_mode_stay_so():
    """Compiling must not switch layers that were frozen, or left in training, to the mode of the model."""
    model, x = Model().train(), torch.randn(1, 8, 16)
    model.blocks[0].drop.eval()
    fast = sp_compile(model, (x,), dynamic=False)
    assert [block.drop.training for block in model.blocks] == [False, True]
    assert torch.equal(fast(x), model(x))
