"""Blocks that are alike: one is read, decided and written for all, and the program is the one that comes out when each is looked at."""

from dataclasses import replace
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.models import registry
from seqpar.partitioner import infer
from seqpar.partitioner.cost import Prices
from seqpar.partitioner.label_problem import LabelProblem
from seqpar.partitioner.layout import LayoutView
from seqpar.partitioner.machines import find_machine
from seqpar.partitioner.mincut import CutProblem
from seqpar.partitioner.repeats import Repeats, find_repeats
from seqpar.passes.emit import Emitter
from seqpar.passes.options import Options
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

WIDTH, HEADS, DEPTH = 16, 2, 7
ONE_BY_ONE = Options(repeats=False)


def heads_of(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.up, self.down = (nn.Linear(WIDTH, n * WIDTH) for n in (3, 1, 2, 1))
        self.points, self.scale = nn.Parameter(torch.randn(5, WIDTH)), nn.Parameter(torch.randn(WIDTH))

    def attend(self, x, y=None):
        q, k, v = self.qkv(x).chunk(3, -1)
        if y is not None:
            _, k, v = self.qkv(y).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(*map(heads_of, (q, k, v))).transpose(1, 2).flatten(2))

    def mlp(self, x):
        return x + (self.up(x).chunk(2, -1)[0].sigmoid() * self.scale)


class Model(nn.Module):
    def __init__(self, run, depth=DEPTH, shared=False):
        super().__init__()
        layer = Layer()
        self.run, self.layers = run, nn.ModuleList(layer if shared else Layer() for _ in range(depth))

    def forward(self, *inputs):
        return self.run(self.layers, *inputs)


def plain(layers, x, y):
    for layer in layers:
        x = layer.mlp(x + layer.attend(x))
    return x


def two_streams(layers, x, y):
    """The second stream is cut off after every joint attention, and changed by the blocks."""
    for layer in layers:
        z = torch.cat([x, y], 1)
        z = z + layer.attend(z)
        x, y = layer.mlp(z[:, : x.shape[1]]), z[:, x.shape[1] :] * 0.5
    return x, y


def crossing(layers, x, y):
    for layer in layers:
        x = layer.mlp(x + layer.attend(x, y))
    return x


def own_points(layers, x, y):
    """Every layer has a sequence of its own."""
    for layer in layers:
        points = layer.points.expand(len(x), -1, -1)
        x = x + layer.attend(x, points + layer.attend(points, x))
    return x


def resampled(layers, x, y):
    """Every layer goes on with a sequence of its own."""
    for layer in layers:
        x = layer.mlp(layer.attend(layer.points.expand(len(x), -1, -1), x))
    return x


def alternating(layers, x, y):
    for i, layer in enumerate(layers):
        x = layer.mlp(x + layer.attend(x)) if i % 2 else x + layer.attend(x.flip(1)).flip(1)
    return x


def kept(layers, x, y):
    """What every layer makes is read at the end."""
    found = []
    for layer in layers:
        x = layer.mlp(x + layer.attend(x))
        found.append(x)
    return torch.stack(found).mean(0)


def from_the_first(layers, x, y):
    """Every layer reads what the first one made."""
    first = None
    for layer in layers:
        y = layer.attend(x)
        first = y if first is None else first
        x = layer.mlp(x + y + first)
    return x


def from_two_before(layers, x, y):
    before = x
    for layer in layers:
        x, before = layer.mlp(x + layer.attend(x)) + before, x
    return x


def counted(layers, x, y):
    """A number that is another one in every layer."""
    for i, layer in enumerate(layers):
        x = layer.mlp(x + layer.attend(x) * (i + 1))
    return x


def zeros_of_both_signs(layers, x, y):
    """They are equal, and not the same."""
    for i, layer in enumerate(layers):
        x = layer.mlp(x + layer.attend(x)).clamp(min=-0.0 if i == 4 else 0.0)
    return x


def handed_down(layers, x, y):
    """The next layer reads a weight of the one before."""
    for layer, before in zip(layers, (layers[-1], *layers[:-1]), strict=True):
        x = layer.mlp(x + layer.attend(x)) * before.scale
    return x


def tied(layers, x, y):
    """The first two are one layer."""
    for layer in (layers[0], *layers[:-1]):
        x = layer.mlp(x + layer.attend(x))
    return x


def leaving_the_last_token(layers, x, y):
    for layer in layers:
        x = torch.cat([layer.mlp(x[:, 1:] + layer.attend(x[:, 1:], x)), x[:, :1]], 1)
    return x


def wide_keys(layers, x, y):
    """Gathered before it is projected, x takes least."""
    for layer in layers:
        q, k = heads_of(layer.up(x * 2)), heads_of(layer.up(x))
        x = layer.mlp(x + F.scaled_dot_product_attention(q, k, k).transpose(1, 2).flatten(2)[..., :WIDTH])
    return x


COPIES = [
    (plain, DEPTH - 3), (two_streams, DEPTH - 3), (crossing, DEPTH - 3), (own_points, DEPTH - 3), (resampled, DEPTH - 3), (alternating, 0), (kept, 0), (from_the_first, DEPTH - 4),
    (from_two_before, 0), (counted, 0), (zeros_of_both_signs, 2), (handed_down, 0), (tied, DEPTH - 4), (leaving_the_last_token, DEPTH - 3),
]  # fmt: skip


def traced_of(run, depth=DEPTH, shared=False, dynamic=False):
    torch.manual_seed(0)
    return trace(Model(run, depth, shared).eval(), (torch.randn(2, 12, WIDTH), torch.randn(2, 6, WIDTH)), {}, dynamic=dynamic)


def copies(repeats):
    return sum(len(run.blocks) - 2 for run in repeats.runs)


def text(partitioned):
    """The program before it is scheduled, with all that is noted for people and later passes."""
    held = (n.meta.get(key) for n in partitioned.emitted(0).graph.nodes for key in ("seqpar_value", "seqpar_layout"))
    notes = ("nn_module_stack", "stack_trace", "seqpar_source", "seqpar_dtype")
    lines = [(n.format_node(), *(str(n.meta.get(key)) for key in notes)) for n in partitioned.emitted(0).graph.nodes]
    return lines, [value and (value[0], list(map(len, value[1]))) for value in held]  # atoms have other numbers


@pytest.mark.parametrize(("run", "count"), COPIES, ids=[run.__name__ for run, _ in COPIES])
def test_copies_are_those_that_depend_on_nothing_else(run, count):
    """The first block, the one that stands for the others, and the last are looked at."""
    graph = traced_of(run).gm.graph
    found = find_repeats(graph)
    assert copies(found) == count
    for node, first in found.like.items():
        assert node.target == first.target or node.op == "get_attr"


@pytest.mark.parametrize(("dynamic", "mesh"), [(False, (2, 2)), (None, (2, 1))])
@pytest.mark.parametrize("run", [run for run, _ in COPIES], ids=[run.__name__ for run, _ in COPIES])
def test_right_and_as_if_each_were_looked_at(run, dynamic, mesh):
    traced = traced_of(run, dynamic=dynamic)
    found, apart = (partition(traced, ulysses=mesh[0], ring=mesh[1], options=options) for options in (Options(), ONE_BY_ONE))
    assert not apart.inference.repeats and found.layouts() == apart.layouts() and found.plan.comm_calls == apart.plan.comm_calls
    report = verify_traced(traced, ulysses=mesh[0], ring=mesh[1])
    assert report.ok, report


def test_shared_weights():
    traced = traced_of(plain, shared=True)
    assert copies(find_repeats(traced.gm.graph)) == DEPTH - 3 and verify_traced(traced, ulysses=2, ring=1).ok


def test_two_kinds_of_layers_take_turns():
    traced = traced_of(alternating, depth=12)
    assert copies(find_repeats(traced.gm.graph)) == 12 // 2 - 3 and verify_traced(traced, ulysses=1, ring=2).ok


@pytest.mark.parametrize(("name", "hardware"), [*((name, None) for name in registry.names()), ("flux", "4090"), ("wan", "4090")])
def test_programs_are_the_same_texts(name, hardware):
    """With two kinds of blocks, both are repeated."""
    family = registry.get(name)
    config = family.with_layers(family.tiny_config(heads=4), 7 if family.single_layers_key is None else 15)
    traced = trace(family.build(config, device="meta"), (), family.grid_inputs(config, rows=8, columns=8, device="meta"), dynamic=False)
    found, apart = (partition(traced, ulysses=2, ring=2, options=options, machine=find_machine(hardware) if hardware else None) for options in (Options(), ONE_BY_ONE))
    assert copies(found.inference.repeats) >= 3
    assert found.solution.labels.cost == pytest.approx(apart.solution.labels.cost, rel=1e-9)
    assert text(found) == text(apart)


@pytest.mark.parametrize("price", [1.0, 30.0, 300.0])
@pytest.mark.parametrize("run", [plain, two_streams, crossing, wide_keys], ids=lambda run: run.__name__)
def test_labels_cost_what_they_would_block_by_block(run, price):
    """The cut with one block for all prices its labels as the cut of all blocks does, which finds hardly better ones."""
    partitioned = partition(traced_of(run), ulysses=3)
    inference, degrees, prices = partitioned.inference, partitioned.solution.degrees, Prices(price, 10 * price, 10 * price, 10 * price)
    attentions = [node for node, relation in inference.relations.items() if relation.attention is not None]
    for exchanged in (set(attentions), set(attentions[:-1]), set[torch.fx.Node]()):
        labels = LabelProblem(inference, degrees, prices, exchanged).solve()
        problem = LabelProblem(inference, degrees, prices, exchanged, apart=True)
        best = problem.solve()
        for key, vertex in problem.vertices.items():
            costs = problem.problem.no_cost if key in labels.sharded else problem.problem.yes_cost
            costs[vertex] = float("inf")
        assert problem.problem.solve()[0] == pytest.approx(labels.cost, rel=1e-6)
        assert best.cost <= labels.cost * (1 + 1e-6) and labels.cost <= 1.001 * best.cost


def test_blocks_that_go_on_with_sequences_of_their_own_are_read_one_by_one():
    partitioned = partition(traced_of(resampled), ulysses=2)
    assert find_repeats(partitioned.traced.gm.graph) and not partitioned.inference.repeats


def test_sequences_of_single_blocks_weigh_what_one_of_them_does():
    found, apart = (partition(traced_of(own_points), ulysses=2, options=options).inference for options in (Options(), ONE_BY_ONE))
    assert set(found.sequences.values()) == set(apart.sequences.values()) and len(found.sequences) < len(apart.sequences)


def test_a_block_with_other_labels_is_written_itself():
    """Labels may differ where the cut switches between axes; here one block's MLP is whole, and its attention attends locally."""
    traced = traced_of(two_streams)
    partitioned = partition(traced, ulysses=2)
    block = partitioned.inference.repeats.runs[0].blocks[4]
    labels = partitioned.solution.labels
    labels.sharded = {key for key in labels.sharded if key[0] not in block}
    labels.exchanged -= set(block)
    view = LayoutView(partitioned.inference, partitioned.solution, 0)
    apart = LayoutView(replace(partitioned.inference, repeats=Repeats()), partitioned.solution, 0)
    found, one_by_one = (str(Emitter(partitioned.traced.gm.graph, v, traced.symbols).run()) for v in (view, apart))
    assert found == one_by_one and found.count("ulysses.seq_to_heads](") == DEPTH - 1


def test_a_deeper_model_takes_no_more_rules_vertices_and_calls_that_are_written():
    """Of three blocks (the first, one for all others, the last) what they do is found out and priced; one more is written, to be copied."""
    counts = []
    for depth in (DEPTH, DEPTH + 5):
        traced = traced_of(two_streams, depth)
        with (
            mock.patch.object(infer, "_read_call", side_effect=infer._read_call) as read,
            mock.patch.object(CutProblem, "vertex", side_effect=CutProblem.vertex, autospec=True) as vertex,
            mock.patch.object(Emitter, "emit_call", side_effect=Emitter.emit_call, autospec=True) as written,
        ):
            partitioned = partition(traced, ulysses=2, options=Options(grids=False))
            partitioned.emitted(0)
        counts.append((read.call_count, vertex.call_count, written.call_count))
        assert len(partitioned.plan.attention) == depth
    assert counts[0] == counts[1] and all(count > 0 for count in counts[0])
