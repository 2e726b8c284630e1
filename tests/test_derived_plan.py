"""From changes at boundaries to a plan: folding, lists of outputs, what has no form, and the text."""

import pytest
from torch import nn

from seqpar.derived_plan import Unexpressible, format_plan, plan_of
from seqpar.passes.boundary import Boundary
from seqpar.passes.derive import Entry
from seqpar.sp_plan import SequenceParallelInput, SequenceParallelOutput, SequenceParallelPartialInput


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(2, 2) for _ in range(2))
        self.rope = nn.Identity()


def split(module, name, dim=1, dims=3, kind="input", index=None, **more):
    return Entry(Boundary(module, kind, name, index), "split", dim, dims, **more)


def gather(module, name=0, dim=1, dims=3):
    return Entry(Boundary(module, "output", name), "gather", dim, dims)


def build(*entries, outputs=None, style="sp_plan"):
    return plan_of(Model(), entries, style, outputs or {})


INPUT, OUTPUT = SequenceParallelInput(1, expected_dims=3), SequenceParallelOutput(1, expected_dims=3)


def test_equal_entries_of_all_blocks_are_folded():
    plan = build(split("blocks.0", "x"), split("blocks.0", "mask"), split("blocks.1", "mask"), gather("blocks.1"))
    assert plan == {"blocks.0": {"x": INPUT}, "blocks.*": {"mask": INPUT}, "blocks.1": OUTPUT}


def test_entries_of_some_blocks_or_different_ones_are_not():
    assert build(split("blocks.0", "x")) == {"blocks.0": {"x": INPUT}}
    different = build(split("blocks.0", "x"), split("blocks.1", "x", dim=0))
    assert different == {"blocks.0": {"x": INPUT}, "blocks.1": {"x": SequenceParallelInput(0, expected_dims=3)}}


def test_outputs_of_blocks_that_have_inputs_as_well_are_listed():
    plan = build(*(f(f"blocks.{i}", *name) for i in range(2) for f, name in ((split, ("x",)), (gather, ()))))
    assert plan == {"blocks.*": {"x": INPUT}, "blocks.0": OUTPUT, "blocks.1": OUTPUT}


def test_outputs_and_lists():
    plan = build(split("rope", 0, 0, 2, kind="output"), split("blocks.0", "rope", 0, 2, index=0), split("blocks.0", "rope", 0, 2, index=1))
    table = SequenceParallelInput(0, expected_dims=2)
    assert plan == {"rope": {0: SequenceParallelInput(0, expected_dims=2, split_output=True)}, "blocks.0": {"rope": [table, table]}}
    assert build(gather("blocks.1", 0), gather("blocks.1", 1), outputs={"blocks.1": 2}) == {"blocks.1": [OUTPUT, OUTPUT]}


def test_text_that_stays_whole():
    plan = build(split("rope", 0, 0, 2, kind="output", keep=7, keep_like="txt_ids"), split("blocks.0", "table", 0, 2, keep=7))
    assert plan["rope"][0] == SequenceParallelPartialInput(0, "txt_ids", expected_dims=2, split_output=True)
    assert plan["blocks.0"]["table"] == SequenceParallelPartialInput(0, 7, expected_dims=2)
    with pytest.raises(Unexpressible, match="first 7 positions"):
        build(split("blocks.0", "table", 0, 2, keep=7), style="cp_plan")


@pytest.mark.parametrize(
    ("entries", "outputs", "words"),
    [
        ((split("rope", "x"), gather("rope")), {}, "both inputs and outputs"),
        ((split("rope", "x"), split("rope", "x", dim=0)), {}, "another way"),
    ],
)
def test_what_has_no_form_says_where(entries, outputs, words):
    with pytest.raises(Unexpressible, match=words) as error:
        build(*entries, outputs=outputs)
    assert error.value.module == entries[0].boundary.module


def test_outputs_that_are_left_as_they_are():
    plan = build(gather("blocks.1", 1), outputs={"blocks.1": 3})
    assert plan == {"blocks.1": [None, OUTPUT, None]}
    space = {}
    exec(format_plan(plan), space)
    assert space["_sp_plan"] == plan
    with pytest.raises(Unexpressible, match="only some are gathered") as error:
        build(gather("blocks.1", 1), outputs={"blocks.1": 3}, style="cp_plan")
    assert error.value.module == "blocks.1"


@pytest.mark.parametrize("style", ["sp_plan", "cp_plan"])
def test_the_text_is_python_that_makes_the_same_plan(style):
    plan = build(split("", "x", dim=0), split("rope", 0, 0, 2, kind="output"), split("blocks.0", "r", index=0), gather("blocks.1"), style=style)
    text = format_plan(plan)
    space = {}
    exec(text, space)
    assert space[f"_{style}"] == plan and "split_dim=0" in text
