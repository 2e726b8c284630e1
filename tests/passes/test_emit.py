"""Emission: the programs are what they should be, and compute what the model computes."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.errors import UnsupportedError
from seqpar.partitioner.cost import Machine
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.runtime.layout import finish_first_rank, first_rank, gather, shard
from seqpar.runtime.ring import ring_attention
from seqpar.runtime.ulysses import heads_to_seq, seq_to_heads
from seqpar.verification import verify, verify_traced

FREE = Machine(comm_share=0.0, call_share=0.0, keys_share=0.0, encoder_share=0.0)  # everything that can be sharded is
aten = torch.ops.aten
MESHES = [(2, 1), (1, 2), (3, 1), (2, 2), (1, 4)]


class Block(nn.Module):
    """Self-attention over [text | image] with a pooled vector; everything seqpar shards is in it."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out, self.pool = nn.Linear(8, 72), nn.Linear(24, 8), nn.Linear(8, 8)

    def forward(self, text, image):
        x = torch.cat([text, image], 1)
        x = x + self.pool(x.mean(1, keepdim=True))
        q, k, v = (t.unflatten(-1, (6, 4)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x[:, text.shape[1] :], x.amax(1)


def emitted(model, inputs, ulysses=1, ring=1, rank=0):
    torch.manual_seed(0)
    return list(partition(trace(model, inputs, {}, dynamic=False), ulysses=ulysses, ring=ring, machine=FREE).program(rank).graph.nodes)


def count(nodes, target):
    return sum(n.target is target for n in nodes)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("text", [4, 5, 24])
def test_the_programs_compute_the_model(mesh, text):
    torch.manual_seed(0)
    report = verify(Block(), (torch.randn(2, text, 8), torch.randn(2, 25, 8)), ulysses=mesh[0], ring=mesh[1])
    assert report.ok, report


def test_work_beside_the_sequence_is_divided():
    """A batch of pictures that no attention sees, and text that is permuted before it is joined: divided, then gathered once each."""

    class Beside(Block):
        def __init__(self):
            super().__init__()
            self.see, self.read = nn.Conv2d(3, 8, 3, padding=1), nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8))

        def forward(self, text, image, pictures, order):
            seen = self.see(pictures).mean((2, 3))
            return super().forward(self.read(text)[:, order], image + seen.sum(0))[0]

    torch.manual_seed(0)
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    traced = trace(Beside(), (torch.randn(2, 7, 8), torch.randn(2, 25, 8), torch.randn(5, 3, 6, 6), order), {}, dynamic=False)
    for mesh in ((2, 1), (1, 3)):
        report = verify_traced(traced, ulysses=mesh[0], ring=mesh[1])
        assert report.ok, report
        whole = {op.op for op in report.plan.replicated_ops if op.flops > 1e-2 * report.plan.flops_total}
        assert not whole, report.plan.explain()


def test_what_is_communicated():
    inputs = torch.randn(1, 512, 8), torch.randn(1, 2048, 8)
    nodes = emitted(Block(), inputs, ulysses=2)
    assert count(nodes, seq_to_heads) == count(nodes, heads_to_seq) == 1 and count(nodes, ring_attention) == 0
    assert count(nodes, shard) == 2 and count(nodes, gather) == 1, "inputs are cut once, the result is gathered once"
    both = emitted(Block(), inputs, ulysses=2, ring=2)
    assert count(both, seq_to_heads) == count(both, heads_to_seq) == count(both, ring_attention) == 1
    assert count(emitted(Block(), inputs, ring=2), seq_to_heads) == 0


def test_a_node_keeps_its_source_line():
    nodes = emitted(Block(), (torch.randn(1, 8, 8), torch.randn(1, 8, 8)), ulysses=2)
    for target in (seq_to_heads, heads_to_seq, aten.linear.default):
        node = next(n for n in nodes if n.target is target)
        assert "test_emit.py" in node.meta["stack_trace"] and node.meta["seqpar_source"]


def test_a_value_is_gathered_once_for_all_its_readers():
    class Readers(nn.Module):
        def forward(self, x):
            q = x.unflatten(-1, (2, 4)).transpose(1, 2)
            y = F.scaled_dot_product_attention(q * 2, q * 3, q * 4).transpose(1, 2).flatten(2)
            return y.cumsum(1), y.flip(1), y.sort(1).values

    nodes = emitted(Readers(), (torch.randn(1, 16, 8),), ring=2)
    assert count(nodes, gather) == 1


def test_a_batch_of_sequences_is_cut_inside_the_product():
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.proj = nn.Linear(8, 8)

        def forward(self, x):
            y = self.proj(x.flatten(0, 1)).view(x.shape)
            q = y.unflatten(-1, (2, 4)).transpose(1, 2)
            y = F.scaled_dot_product_attention(q * 2, q * 3, q * 4).transpose(1, 2).flatten(2)
            return y.flatten(0, 1) * 2

    torch.manual_seed(0)
    for mesh in MESHES[:2] + [(1, 3)]:
        assert verify(Flat(), (torch.randn(3, 13, 8),), ulysses=mesh[0], ring=mesh[1]).ok


def test_random_numbers_are_refused_with_the_users_line():
    class Dropout(nn.Module):
        def forward(self, x):
            q = x.unflatten(-1, (2, 4)).transpose(1, 2)
            return F.scaled_dot_product_attention(q * 2, q * 3, q * 4, dropout_p=0.5)

    class Noise(nn.Module):
        def forward(self, x):
            q = (x + torch.rand_like(x)).unflatten(-1, (2, 4)).transpose(1, 2)
            return F.scaled_dot_product_attention(q * 2, q * 3, q * 4)

    for model, line in ((Dropout(), "dropout_p=0.5"), (Noise(), "rand_like")):
        traced = trace(model, (torch.randn(1, 16, 8),), {}, dynamic=False)
        with pytest.raises(UnsupportedError, match=line):
            partition(traced, ulysses=2).program(0)


@pytest.mark.parametrize("layer", [nn.GRU(8, 8, dropout=0.5, num_layers=2), nn.LSTM(8, 8), nn.Dropout(0.0).train(), nn.RReLU()])
def test_operators_that_draw_nothing_are_not_refused(layer):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x):
            y = self.layer(x)
            q = (y[0] if isinstance(y, tuple) else y).unflatten(-1, (2, 4)).transpose(1, 2)
            return F.scaled_dot_product_attention(q * 2, q * 3, q * 4)

    mode = layer.training and isinstance(layer, nn.Dropout)
    torch.manual_seed(0)
    assert verify(Model().train(mode), (torch.randn(2, 13, 8),), ulysses=2).ok


def test_a_first_wrong_node_is_named():
    """The verification itself: a program with a planted error is reported, with the node where it starts."""
    torch.manual_seed(0)
    traced = trace(Block(), (torch.randn(2, 5, 8), torch.randn(2, 24, 8)), {}, dynamic=False)
    partitioned = partition(traced, ulysses=2)
    program = partitioned.program(1)
    linear = next(n for n in program.graph.nodes if n.target is aten.linear.default)
    linear.update_arg(2, None)
    program.recompile()
    from seqpar.verification import find_divergence

    assert "linear" in find_divergence(partitioned, [traced.call.leaves[i] for i in traced.input_positions])
    assert verify_traced(traced, ulysses=2, ring=1).ok


class Joint(nn.Module):
    """A text too short to be divided, computed beside an image in uneven parts."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, text, image):
        x = torch.cat([text, image], 1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x[:, : text.shape[1]], x[:, text.shape[1] :]


@pytest.mark.parametrize("mesh", [(4, 1), (2, 2), (1, 4)])
def test_an_output_whose_bits_may_differ_is_the_first_ranks(mesh):
    for rank in (0, 3):
        nodes = emitted(Joint().eval(), (torch.randn(1, 2, 16), torch.randn(1, 13, 16)), *mesh, rank=rank)
        assert nodes[-1].args[0][0].target in (first_rank, finish_first_rank)
