"""From the entries of a plan to modules and parameters; nothing is traced here."""

import pytest
from torch import nn

from seqpar.errors import PlanError
from seqpar.passes.declared import Declared
from seqpar.sp_plan import SequenceParallelInput as Input
from seqpar.sp_plan import SequenceParallelOutput as Output
from seqpar.sp_plan import declarations


class Block(nn.Module):
    def forward(self, x, tables=None):
        return x


class Open(nn.Module):
    def forward(self, x, **more):
        return x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.outputs = nn.ModuleDict({"main": Block(), "side": Open()})
        self.alias = self.outputs["main"]

    def forward(self, x):
        return x


def entries(plan):
    model = Model()
    return {place: entry.where for place, entry in Declared(model, declarations(model, plan)).entries.items()}


def test_paths():
    found = entries({"": {"x": Input(1)}, "blocks.0": {"x": Input(1)}, "blocks.*": {"tables": [Input(0), Input(0)]}, "outputs.side": {"y": Input(1)}, "blocks.1": (None, Output(1))})
    assert found == {
        ("", "input", "x", None): "plan['']['x']",
        ("blocks.0", "input", "x", None): "plan['blocks.0']['x']",
        ("blocks.0", "input", "tables", 0): "plan['blocks.*']['tables'][0]",
        ("blocks.0", "input", "tables", 1): "plan['blocks.*']['tables'][1]",
        ("blocks.1", "input", "tables", 0): "plan['blocks.*']['tables'][0]",
        ("blocks.1", "input", "tables", 1): "plan['blocks.*']['tables'][1]",
        ("outputs.side", "input", "y", None): "plan['outputs.side']['y']",
        ("blocks.1", "output", 1, None): "plan['blocks.1'][1]",
    }


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"proj": Output(1)}, r"plan\['proj'\]: the model \(Model\) has no submodule 'proj'. It has blocks, outputs, alias"),
        ({"blocks.2": {"x": Input(1)}}, r"plan\['blocks.2'\]\['x'\]: blocks \(ModuleList\) has no submodule '2'. It has 0, 1"),
        ({"blocks.0.*": {"x": Input(1)}}, r"'\*' stands for the entries of a ModuleList, and blocks.0 is a Block"),
        ({"blocks.0": {"y": Input(1)}}, r"forward of blocks.0 \(Block, .*test_declared.py:\d+\) has no parameter 'y'. It has x, tables"),
        ({"blocks.*": {"x": Input(1)}, "blocks.1": {"x": Input(1)}}, r"plan\['blocks.\*'\]\['x'\] and plan\['blocks.1'\]\['x'\] declare the same tensor, input 'x' of blocks.1, split twice"),
        ({"alias": Output(1), "outputs.main": {0: Input(1, split_output=True)}}, r"the same tensor, output 0 of outputs.main, to gather and to split"),
        ({"blocks.0": {0: Input(1)}}, r"plan\['blocks.0'\]\[0\]: an index names an output, which needs split_output=True"),
        ("model", "sp_plan='model', but Model declares no plan"),
        ("plan", "a plan is a dict from module paths to entries, not 'plan' \\(the text 'model' stands for the model's own"),
    ],
)
def test_an_entry_that_means_nothing(plan, message):
    with pytest.raises(PlanError, match=message):
        entries(plan)


def test_an_empty_plan_declares_nothing():
    assert entries({}) == {} and declarations(Model(), None) is None
