"""Programs of all ranks as JSON: what is read back runs, on simulated ranks, to the same bits."""

import json

import pytest
import torch

from seqpar.models import registry
from seqpar.models.randomise import randomise
from seqpar.passes.pipeline import partition
from seqpar.passes.save_graph import Constants, attribute, is_plain_name, read_constants, read_graph, write_graph
from seqpar.passes.save_values import Codec
from seqpar.passes.trace import trace
from seqpar.verification import simulate

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def qwen():
    """A model whose program has constants and reads its mask."""
    family = registry.get("qwen-image")
    config = family.tiny_config(4, 1)
    model = randomise(family.build(config))
    inputs = family.grid_inputs(config, rows=3, columns=5, text_len=7, batch=2, pad_text=2)
    return model, trace(model, (), inputs, dynamic=False)


def through_json(gm, model):
    """A program written and read, and how many constants it has."""
    codec = Codec(CPU)
    constants = Constants(codec)
    data = json.loads(json.dumps(write_graph(gm, constants), allow_nan=False))
    held = json.loads(json.dumps({"tensors": constants.tensors, "calls": constants.calls}))
    return read_graph(data, model, read_constants(held, constants.raw.__getitem__, codec), CPU, "Program"), len(constants.tensors)


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2), (2, 2)])
def test_programs_of_all_ranks(qwen, degrees):
    model, traced = qwen
    partitioned = partition(traced, ulysses=degrees[0], ring=degrees[1])
    inputs = [traced.call.leaves[i].contiguous() for i in traced.input_positions]
    expected = simulate(partitioned, inputs)
    codes = [partitioned.program(rank).code for rank in range(degrees[0] * degrees[1])]
    for rank in range(len(codes)):
        partitioned._programs[rank], constants = through_json(partitioned.program(rank), model)
        assert constants and partitioned.program(rank).code == codes[rank]
    outputs = simulate(partitioned, inputs)
    assert all(torch.equal(a, b) for mine, theirs in zip(outputs, expected, strict=True) for a, b in zip(mine, theirs, strict=True))
    assert torch.allclose(outputs[0][0], traced.gm(*inputs)[0], atol=1e-5) and outputs[0][0].std() > 0.01


def test_source_lines_and_modules_survive(qwen):
    model, traced = qwen
    gm, _ = through_json(partition(traced, ulysses=2).program(0), model)
    (attend,) = (node for node in gm.graph.nodes if "attention" in str(node.target))
    assert ".py" in attend.meta["stack_trace"] and next(iter(attend.meta["nn_module_stack"])).startswith("transformer_blocks.0")


@pytest.mark.parametrize("name", ["a b", "1a", "class", "a.b", "a\n", "", None, 3])
def test_names_that_are_no_names(name):
    assert not is_plain_name(name)


def test_attributes_are_state_of_the_model():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2))
    assert attribute("0.weight", model, {}) == "0.weight" and attribute("made", model, {"made": 1}) == "made"
    for name in ("0.forward", "0.missing", "__class__", "1.weight", "0.weight.data", '0"', None):
        with pytest.raises(ValueError, match="the file reads"):
            attribute(name, model, {})
