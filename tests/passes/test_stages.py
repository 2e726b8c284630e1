"""Which stage a node belongs to, and when stages are folded."""

import torch

from seqpar.compat import NO_MODULE
from seqpar.models import registry
from seqpar.passes.pipeline import partition
from seqpar.passes.stages import ITSELF, ranges, stage_of
from seqpar.passes.trace import trace


def node_in(*path):
    node = torch.fx.Graph().call_function(torch.relu)
    node.meta["nn_module_stack"] = {str(i): (p, "Class") for i, p in enumerate(path)}
    return node


def test_a_stage_is_the_outermost_entry_of_a_list_or_a_child():
    assert stage_of(node_in("", "blocks.3", "blocks.3.mlp.0.proj")) == "blocks.3"
    assert stage_of(node_in("", "model.down.1.blocks.2.attn")) == "model.down.1"
    assert stage_of(node_in("", "time_embed.linear_1")) == "time_embed"
    assert stage_of(node_in("", "blocks.3@1")) == "blocks.3"
    assert stage_of(node_in("")) == stage_of(node_in(NO_MODULE)) == stage_of(torch.fx.Graph().call_function(torch.relu)) == ""


def test_ranges():
    assert ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"
    assert ranges([4]) == "4"


def stages(change=None):
    family = registry.get("pattern-standard")
    config = family.tiny_config(heads=2, layers=4)
    model = family.build(config, device="meta")
    if change is not None:
        change(model)
    inputs = family.grid_inputs(config, rows=4, columns=4, device="meta")
    return partition(trace(model, (), inputs, dynamic=False), ulysses=2).plan.details.stages


def test_equal_blocks_are_one_row_with_what_they_hand_on():
    found = {s.name: s for s in stages()}
    assert list(found) == ["patch_embed", "time_embed.0", "time_embed.2", "blocks.0-3", "proj_out", ITSELF]
    blocks = found["blocks.0-3"]
    assert blocks.repeats == 4 and blocks.results == ("1 4/2*4 32",) and blocks.calls["all_to_all"] == 2
    # a block: qkv, out and mlp of 16 positions and 32 channels, and attention; half of it on each of two ranks
    assert blocks.flops_alone == 2 * 16 * 32 * 32 * (3 + 1 + 8) + 2 * 2 * 16 * 16 * 32 and blocks.flops == blocks.flops_alone // 2
    assert found["time_embed.2"].flops == found["time_embed.2"].flops_alone == 2 * 32 * 32


def test_blocks_that_differ_are_not_folded():
    def narrower(model):
        model.blocks[2].mlp = torch.nn.Sequential(torch.nn.Linear(32, 64, device="meta"), torch.nn.GELU(), torch.nn.Linear(64, 32, device="meta"))

    found = {s.name: s for s in stages(narrower)}
    assert found["blocks.0-1,3"].repeats == 3 and found["blocks.2"].repeats == 1
    assert found["blocks.2"].flops < found["blocks.0-1,3"].flops
