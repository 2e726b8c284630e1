"""Facts about a model: what changes its program is among them, and named; its weights are not."""

import pytest
import torch
from torch import nn

from seqpar.fingerprint import first_difference, model_facts


class Config:
    def __init__(self):
        self.theta, self.axes, self._name = 100.0, [1, 2], "folder"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.config, self.act, self._eps = nn.LayerNorm(4), Config(), torch.relu, 1e-6
        self.table, self.kinds = torch.arange(3), {"a", "b"}


def change(text):
    def apply(model):
        exec(text, {"model": model, "torch": torch, "nn": nn})

    return apply


CHANGES = {
    "model.layer.eps = 1e-3": "attribute layer.eps is 0.001, and was 1e-05",
    "model.config.theta = 2.0": "attribute config.theta is 2.0, and was 100.0",
    "model.config.axes = [1]": r"attribute config.axes is \[1\]",
    "model.kinds = {'b', 'c'}": r"attribute kinds is \['b', 'c'\], and was \['a', 'b'\]",
    "model._eps = 0.1": "attribute _eps is 0.1",
    "model.table = torch.ones(3)": "attribute table is",
    "model.act = torch.sin": "attribute act is",
    "model.eval()": "training is False",
    "model.layer = nn.LayerNorm(5)": r"parameter layer.weight is \(5,\)",
    "model.register_buffer('b', torch.ones(1))": r"buffer b is \(1,\) float32, and was absent",
}


@pytest.mark.parametrize("text", CHANGES)
def test_a_change_is_named(text):
    model, before = Model(), model_facts(Model())
    change(text)(model)
    assert first_difference(before, before) is None
    with pytest.raises(AssertionError, match=CHANGES[text]):
        raise AssertionError(first_difference(before, model_facts(model)))


@pytest.mark.parametrize("text", ["model.layer.weight.data.mul_(2)", "model.config._name = 'elsewhere'", "model._cache = {}", "model.made_later = torch.ones(2)"])
def test_what_changes_no_program(text):
    model, before = Model(), model_facts(Model())
    change(text)(model)
    assert first_difference(before, model_facts(model)) is None and first_difference(model_facts(model), before) is None
    assert any(name.startswith("source of") for name in before)
