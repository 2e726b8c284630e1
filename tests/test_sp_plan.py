"""The types of declared plans, and plans of other libraries."""

from dataclasses import dataclass

import pytest
import torch
from torch import nn

from seqpar import sp_plan
from seqpar.errors import PlanError
from seqpar.sp_plan import (
    SequenceParallelConfig,
    SequenceParallelInput,
    SequenceParallelOutput,
    SequenceParallelPartialInput,
    declarations,
    get_sp_plan_from_model,
    validate_sp_plan,
)

PLAN = {
    "": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3, auto_pad=True), "lists": [SequenceParallelInput(0), SequenceParallelPartialInput(0, "txt_ids")]},
    "rope": {0: SequenceParallelInput(split_dim=1, expected_dims=4, split_output=True), 1: SequenceParallelPartialInput(split_dim=0, text_len_source=512, split_output=True)},
    "proj_out": SequenceParallelOutput(gather_dim=-1, expected_dims=3),
    "pair": (None, SequenceParallelOutput(1)),
}


def test_names_of_vllm_omni():
    names = {"SequenceParallelModelPlan", "SequenceParallelInputType", "SequenceParallelOutputType", "AnySequenceParallelInput", "sp_shard", "sp_gather", "get_sp_plan_from_model", "validate_sp_plan"}
    assert names <= set(sp_plan.__all__) <= set(dir(sp_plan))


def test_a_valid_plan():
    validate_sp_plan(PLAN)
    assert sp_plan.from_any(PLAN) == PLAN


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ([], "a plan is a dict from module paths to entries, not a list"),
        ({0: SequenceParallelOutput(1)}, "keys of a plan are module paths such as 'blocks.0', not 0"),
        ({"a": {"x": SequenceParallelOutput(1)}}, r"plan\['a'\]\['x'\] must be a SequenceParallelInput or SequenceParallelPartialInput"),
        ({"a": {1.5: SequenceParallelInput(1)}}, "the key is a parameter name or the index of an output, not 1.5"),
        ({"a": {0: SequenceParallelInput(1)}}, "an index names an output, which needs split_output=True"),
        ({"a": {"x": SequenceParallelInput(1, split_output=True)}}, "a name is an input, which needs split_output=False"),
        ({"a": {"x": SequenceParallelInput("1")}}, "split_dim must be an integer, not '1'"),
        ({"a": {"x": SequenceParallelInput(3, expected_dims=3)}}, "split_dim=3 is not a dim of a tensor with expected_dims=3"),
        ({"a": {"x": SequenceParallelPartialInput(1, -1)}}, "text_len_source is a parameter name or a length >= 0, not -1"),
        ({"a": SequenceParallelInput(1)}, r"plan\['a'\] must be a dict of inputs or a SequenceParallelOutput"),
        ({"a": SequenceParallelOutput(3, expected_dims=3)}, "gather_dim=3 is not a dim"),
    ],
)
def test_an_invalid_plan(plan, message):
    with pytest.raises(ValueError, match=message):
        validate_sp_plan(plan)
    with pytest.raises(PlanError, match=message):
        declarations(nn.Linear(1, 1), plan)


@dataclass(frozen=True)
class Foreign:
    """An entry of a library with the same fields."""

    split_dim: int
    expected_dims: int | None = None
    split_output: bool = False


@dataclass(frozen=True)
class ForeignOutput:
    gather_dim: int
    expected_dims: int | None = None


def test_plans_of_classes():
    class Theirs(nn.Module):
        _cp_plan = {"a": {"x": Foreign(1, 3)}, "b": ForeignOutput(1)}

    class Both(Theirs):
        _sp_plan = PLAN

    class Neither(nn.Module):
        _cp_plan = None

    assert get_sp_plan_from_model(Theirs()) == {"a": {"x": SequenceParallelInput(1, 3)}, "b": SequenceParallelOutput(1)}
    assert get_sp_plan_from_model(Both()) == PLAN and get_sp_plan_from_model(Neither()) is None


def test_declarations():
    found = {entry.where: entry for entry in declarations(nn.Linear(1, 1), PLAN)}
    assert set(found) == {"plan['']['hidden_states']", "plan['']['lists'][0]", "plan['']['lists'][1]", "plan['rope'][0]", "plan['rope'][1]", "plan['proj_out']", "plan['pair'][1]"}
    assert found["plan['']['hidden_states']"].auto_pad and found["plan['rope'][1]"].text == 512 and found["plan['']['lists'][1]"].text == "txt_ids"
    assert [found[where].verb for where in ("plan['rope'][0]", "plan['proj_out']")] == ["split", "gather"]
    assert (found["plan['pair'][1]"].name, found["plan['pair'][1]"].count, found["plan['rope'][0]"].kind) == (1, 2, "output")


def test_config():
    config = SequenceParallelConfig(ulysses_degree=2, ring_degree=3)
    assert config.sequence_parallel_size == 6 and config.convert_to_fp32 and not config.is_initialized()
    with pytest.raises(RuntimeError, match="not initialised: call setup"):
        config.get_rank()
    with pytest.raises(RuntimeError, match="needs a process group"):
        config.setup(0, 6, torch.device("cpu"))
    for wrong in (0, -1, 1.0, True):
        with pytest.raises(ValueError, match="ring_degree must be an integer >= 1"):
            SequenceParallelConfig(ring_degree=wrong)
