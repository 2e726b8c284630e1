"""Folding a program for a picture: equal blocks are one stage, boxes make no circle, bytes and operators are all there."""

import networkx as nx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.errors import UnsupportedError
from seqpar.passes.drawing import block_of, drawing, folded, relative
from seqpar.passes.pipeline import partition
from seqpar.passes.plan import Plan
from seqpar.passes.trace import trace


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.qkv, self.mlp = nn.Linear(width, 3 * width), nn.Sequential(nn.Linear(width, width), nn.GELU())

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return x + self.mlp(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, blocks=4, width=32):
        super().__init__()
        self.first, self.blocks = nn.Linear(width, width), nn.ModuleList(Block(width) for _ in range(blocks))

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(scope="module")
def partitioned():
    return partition(trace(Model().eval(), (torch.randn(1, 64, 32),), {}, dynamic=False), ulysses=2, ring=2)


@pytest.fixture(scope="module")
def drawn(partitioned):
    return drawing(partitioned)


def test_equal_blocks_are_one_stage(drawn):
    counts = {stage.title: count for stage, count in zip(drawn.stages, drawn.repeats, strict=True)}
    assert counts["inputs"] == counts["first"] == counts["outputs"] == 1
    folded_blocks = {title: count for title, count in counts.items() if title.startswith("blocks")}
    assert sum(folded_blocks.values()) == 4 and max(folded_blocks.values()) >= 3 and len(folded_blocks) <= 2
    assert next(s for s in drawn.stages if len(s.names) > 1).title in ("blocks.0 … blocks.3", "blocks.0 … blocks.2", "blocks.1 … blocks.3")


def test_what_is_drawn_is_what_the_plan_counts(partitioned, drawn):
    plan = partitioned.plan
    received = sum(stage.received * count for stage, count in zip(drawn.stages, drawn.repeats, strict=True))
    flops = sum(box.flops * count for stage, count in zip(drawn.stages, drawn.repeats, strict=True) for box in stage.boxes)
    assert received == drawn.ranks[0].received == sum(plan.comm_bytes_per_rank.values()) > 0
    assert flops == drawn.ranks[0].flops == plan.flops_per_rank[0] and drawn.alone.flops == plan.flops_total
    assert [use.rank for use in drawn.ranks] == [0, 1, 2, 3] and {use.received for use in drawn.ranks} == {received}


def test_memory(partitioned, drawn):
    model_bytes = sum(p.numel() * p.element_size() for p in partitioned.traced.gm.parameters())
    assert drawn.alone.weights == drawn.ranks[0].weights == model_bytes and drawn.alone.inputs == 64 * 32 * 4
    # q, k and v of all positions and their input are alive together in one process; a rank has a quarter, and buffers of exchanges
    assert drawn.alone.activations >= 4 * 64 * 32 * 4 and drawn.alone.activations / 4 <= drawn.ranks[0].activations < drawn.alone.activations
    told = partitioned.plan.details.memory
    assert (max(use.activations for use in drawn.ranks), drawn.alone.activations) == (told.peak, told.peak_alone), "the page says what explain() says"


def test_boxes(drawn):
    stage = next(s for s in drawn.stages if len(s.names) > 1)
    kinds = [box.kind for box in stage.boxes]
    assert kinds.count("collective") == 2 and kinds.count("attention") == 1 and all(box.sharded for box in stage.boxes)
    (attention,) = (box for box in stage.boxes if box.kind == "attention")
    assert attention.title == "ring_attention over ring" and attention.received > 0 and "test_drawing.py:" in attention.ops[0].source
    assert any(op.layout == "1 64/4 32" and op.shape == "[1, 16, 32]" and op.module.startswith("blocks.") for box in stage.boxes for op in box.ops)
    for stage in drawn.stages:
        graph = nx.DiGraph(stage.edges)
        assert nx.is_directed_acyclic_graph(graph) and (len(stage.boxes) == 1 or nx.is_weakly_connected(graph))


def test_a_value_that_every_rank_computes_is_not_sharded():
    class Conditioned(Model):
        def forward(self, x, time):
            return super().forward(x) * self.first(F.silu(time))[:, None]

    drawn = drawing(partition(trace(Conditioned(1).eval(), (torch.randn(1, 64, 32), torch.randn(1, 32)), {}, dynamic=False), ulysses=2))
    states = {op.call: box.sharded for stage in drawn.stages for box in stage.boxes for op in box.ops}
    assert states["silu"] is False and states["gelu"] is True


@pytest.mark.parametrize(
    ("letters", "stages", "repeats"),
    [("abbbc", "abc", (1, 3, 1)), ("abababc", "abc", (3, 3, 1)), ("abcabd", "abcabd", (1,) * 6), ("aabaab", "aab", (2, 2, 2)), ("", "", ())],
)
def test_folding(letters, stages, repeats):
    from dataclasses import make_dataclass

    Fake = make_dataclass("Fake", ["signature", "names"], frozen=True)
    found, counts = folded([Fake(letter, (f"{letter}{i}",)) for i, letter in enumerate(letters)])
    assert "".join(stage.signature for stage in found) == stages and counts == repeats
    assert sum(len(stage.names) for stage in found) == len(letters)


def test_names_of_blocks():
    assert block_of("blocks.3.attn.0.q") == "blocks.3" and relative("blocks.3.attn.0.q") == "attn.0.q"
    assert block_of("embed.proj") == "embed" and block_of("") == "the model itself"


def test_a_plan_from_elsewhere_has_no_picture(partitioned, tmp_path):
    plan = Plan.from_dict(partitioned.plan.to_dict())
    assert plan == partitioned.plan
    with pytest.raises(UnsupportedError, match="no graph to draw"):
        plan.to_html(tmp_path / "plan.html")
