"""Labels: what is sharded, what is whole, and what is gathered once."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.partitioner.cost import Machine
from seqpar.partitioner.division import Degrees
from seqpar.partitioner.infer import infer
from seqpar.partitioner.labels import REDUCED
from seqpar.partitioner.layout import LayoutView
from seqpar.partitioner.lengths import Sizes
from seqpar.partitioner.solve import solve
from seqpar.passes.trace import trace

SLOW = Machine(flops_per_s=1e9, bytes_per_s=1e3, comm_share=1e9)  # moving anything costs more than computing it
FREE = Machine(comm_share=0.0, call_share=0.0, keys_share=0.0, encoder_share=0.0)
FAIR = Machine(flops_per_s=1e9, bytes_per_s=2e7, comm_share=1e9, call_share=0.0)  # 50 operations per byte


class Program(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)


class Block(nn.Module):
    """Attention over [text | image]; each stream has an MLP of its own width."""

    def __init__(self, text_width):
        super().__init__()
        self.qkv = nn.Linear(8, 24)
        self.text = nn.Sequential(nn.Linear(8, text_width), nn.Linear(text_width, 64))
        self.image = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8))

    def forward(self, text, image):
        q, k, v = (t.unflatten(-1, (4, 2)).transpose(1, 2) for t in self.qkv(torch.cat([text, image], 1)).chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.text(text + out[:, : text.shape[1]]), self.image(image + out[:, text.shape[1] :])


def solved(model, *shapes, ulysses=1, ring=1, machine=None, cut=None):
    traced = trace(model, tuple(torch.randn(s) for s in shapes), {}, dynamic=False)
    inference = infer(traced.gm.graph, Sizes(), cut=cut)
    solution = solve(inference, Degrees(ulysses, ring), machine)
    return traced.gm.graph, LayoutView(inference, solution, 0)


def linears(graph, view):
    """Text form of the layouts of all linear layers."""
    return [view.text(n, view.produced(n)) for n in graph.nodes if n.target is torch.ops.aten.linear.default]


@pytest.mark.parametrize("mesh", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_long_streams_are_sharded(mesh):
    n = mesh[0] * mesh[1]
    graph, view = solved(Block(64), (1, 16, 8), (1, 48, 8), ulysses=mesh[0], ring=mesh[1], machine=FREE)
    assert linears(graph, view) == [f"1 (16/{n} + 48/{n}) 24", *[f"1 16/{n} {w}" for w in (64, 64)], *[f"1 48/{n} {w}" for w in (64, 8)]]
    assert len(view.labels.exchanged) == 1


def test_a_stream_shorter_than_the_ranks_is_whole():
    graph, view = solved(Block(64), (1, 3, 8), (1, 48, 8), ulysses=4)
    assert linears(graph, view) == ["1 (3 + 48/4) 24", "1 3 64", "1 3 64", "1 48/4 64", "1 48/4 8"]


def test_text_is_gathered_where_it_is_narrowest_and_computed_whole_where_that_is_cheap():
    cheap, dear = (solved(Block(w), (1, 4, 8), (1, 480, 8), ulysses=4, machine=FAIR) for w in (1, 4096))
    assert linears(*cheap)[1:3] == ["1 4/4 1", "1 4 64"] and linears(*dear)[1:3] == ["1 4/4 4096", "1 4/4 64"]
    assert linears(*cheap)[-1] == "1 480/4 8"


def attend(x, y):
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (x, y * 2, y * 3))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def test_one_rank_and_no_attention_shard_nothing():
    assert not solved(Program(lambda x: attend(x, x)), (1, 16, 8))[1].labels.sharded
    assert not solved(Program(lambda x: x * 2), (1, 16, 8), ulysses=2)[1].labels.sharded


def test_keys_of_other_positions_stay_whole_where_that_is_cheaper():
    _, view = solved(Program(attend), (1, 512, 8), (1, 4, 8), ulysses=2, machine=SLOW)
    assert not view.labels.exchanged and view.solution.reasons


def test_a_gather_shared_by_readers_is_paid_once():
    """Two results read the same sharded value: one price, so the second reader costs nothing more."""

    def twice(x):
        y = attend(x, x) * 2
        return y.cumsum(1), y.flip(1)

    one, two = (solved(Program(fn), (1, 64, 8), ring=2, machine=FAIR) for fn in (lambda x: twice(x)[0], twice))
    for graph, view in (one, two):
        mul = next(n for n in graph.nodes if n.target is torch.ops.aten.mul.Tensor and any(u.target is torch.ops.aten.cumsum.default for u in n.users))
        assert view.text(mul, view.produced(mul)) == "1 64/2 8"
    byte = two[1].solution.prices.byte
    assert two[1].labels.cost - one[1].labels.cost < 64 * 8 * 4 * byte + 64 * 8


def test_a_reduction_over_the_sequence_is_a_partial_result():
    graph, view = solved(Program(lambda x: attend(x, x).mean(1)), (1, 64, 8), ulysses=2, machine=FREE)
    mean = next(n for n in graph.nodes if n.target is torch.ops.aten.mean.dim)
    assert [dim for n, dim, _ in view.labels.sharded if n is mean] == [REDUCED]
    assert view.reduced(mean, view.inference.relations[mean]) == "sum"


@pytest.mark.parametrize("cut", [0, 1])
def test_a_reduction_over_a_flattened_grid_is_a_partial_result(cut):
    """Linear attention over frames x tokens: the state is summed over the ranks, whichever factor is cut."""

    def fn(x):
        x = attend(x.flatten(1, 2), x.flatten(1, 2))
        return x @ (x.mT @ x.relu())

    graph, view = solved(Program(fn), (1, 8, 6, 8), ulysses=2, machine=FREE, cut=cut)
    state = next(n for n in graph.nodes if n.target is torch.ops.aten.matmul.default)
    assert [dim for n, dim, _ in view.labels.sharded if n is state] == [REDUCED]


def test_products_of_pairs_count_as_what_must_move():
    """Pairs that meet in a product have to be gathered once, however dear: that must not make every narrow layer before it whole."""

    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(8, 12)
            self.rounds = nn.ModuleList(nn.ModuleList([nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(8, 12)]) for _ in range(3))

        def forward(self, x):
            x = attend(x, x)
            pairs = self.first(x[:, :, None] * x[:, None])
            for a, b, c in self.rounds:
                pairs = pairs + c((a(pairs).permute(0, 3, 1, 2) @ b(pairs).permute(0, 3, 2, 1)).permute(0, 2, 3, 1))
            return pairs.mean(2)

    graph, view = solved(Pairs(), (1, 48, 8), ulysses=2)
    assert all("48/2" in layout for layout in linears(graph, view))


def test_empty_parts_do_not_hide_a_sequence():
    """What is cut off behind the last position, and joined again, leaves the attention's rows those of its input."""

    def fn(x):
        padded = torch.cat([x * 2, x[:, 64:]], 1)
        return x + attend(padded, padded)

    _, view = solved(Program(fn), (1, 64, 8), ulysses=2, machine=FREE)
    assert len(view.labels.exchanged) == 1 and len(view.inference.sequences) == 1


def test_two_sequences_in_one_dim_shard_one_of_them():
    """Attention over frames and over tokens; a pooled value holds both in one dim."""

    def fn(x):
        space = attend(x.flatten(0, 1), x.flatten(0, 1)).view(x.shape)
        time = attend(space.transpose(1, 2).flatten(0, 1), space.transpose(1, 2).flatten(0, 1)).view(2, 12, 8, 8)
        return (time.flatten(1, 2) * 2).view(2, 12, 8, 8)

    graph, view = solved(Program(fn), (2, 8, 12, 8), ulysses=2)
    assert len(view.inference.sequences) == 2
    for node in view.inference.axes:
        assert sum(map(bool, view.produced(node))) <= 1, view.text(node, view.produced(node))
        for axis, sharded in zip(view.inference.axes[node][0], view.produced(node), strict=True):
            assert sum(bool(sharded & set(f)) for f in view.inference.table.expand_axis(axis)) <= 1


def test_the_same_problem_has_the_same_answer():
    answers = []
    for _ in range(2):
        graph, view = solved(Block(64), (1, 9, 8), (1, 48, 8), ulysses=2)
        answers.append([view.text(n, view.produced(n)) for n in view.inference.axes])
    assert answers[0] == answers[1]
