"""What only the keys of cross-attentions are made of: computed on every rank while it is little, divided and gathered once where it is much."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import seqpar

WIDTH, HEADS = 64, 4


def heads_of(x):
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Layer(nn.Module):
    """Attention of x to y, and an MLP."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm, self.mlp = nn.LayerNorm(WIDTH), nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x, y):
        found = F.scaled_dot_product_attention(heads_of(self.q(x)), heads_of(self.k(y)), heads_of(self.v(y)))
        x = self.norm(x + self.out(found.transpose(1, 2).flatten(2)))
        return x + self.mlp(x)


class EncoderDecoder(nn.Module):
    """The last layer of the encoder is read by every layer of the decoder, and by nothing else."""

    def __init__(self, depth=3):
        super().__init__()
        self.encoder, self.decoder, self.cross = (nn.ModuleList(Layer() for _ in range(depth)) for _ in range(3))

    def forward(self, source, target):
        for layer in self.encoder:
            source = layer(source, source)
        for layer, cross in zip(self.decoder, self.cross, strict=True):
            target = cross(layer(target, target), source)
        return target


class Induced(nn.Module):
    """Set Transformer: a few points read all positions, and all positions read those."""

    def __init__(self, depth=2, points=8):
        super().__init__()
        self.points = nn.ParameterList(nn.Parameter(torch.randn(points, WIDTH)) for _ in range(depth))
        self.read, self.write = (nn.ModuleList(Layer() for _ in range(depth)) for _ in range(2))

    def forward(self, x):
        for points, read, write in zip(self.points, self.read, self.write, strict=True):
            x = write(x, read(points.expand(len(x), -1, -1), x))
        return x


class Prompted(nn.Module):
    """A few words are projected, and read by every layer of a long sequence."""

    def __init__(self, depth=2):
        super().__init__()
        self.embed, self.layers, self.cross = nn.Linear(WIDTH, WIDTH), *(nn.ModuleList(Layer() for _ in range(depth)) for _ in range(2))

    def forward(self, x, words):
        words = self.embed(words)
        for layer, cross in zip(self.layers, self.cross, strict=True):
            x = cross(layer(x, x), words)
        return x


def verified(model, *lengths, ulysses=2, ring=1):
    torch.manual_seed(0)
    report = seqpar.verify(model().eval(), tuple(torch.randn(2, n, WIDTH) for n in lengths), ulysses=ulysses, ring=ring)
    assert report.ok, report
    return report.plan


@pytest.mark.parametrize(
    ("lengths", "mesh", "least", "strategy", "gathers"),
    [
        ((1024, 1024), (2, 1), 0.98, "gather input", 2),
        ((1024, 1024), (4, 1), 0.98, "gather input", 2),
        ((1024, 1024), (4, 2), 0.999, "ulysses+ring", 1),  # of the work of eight ranks, what each does for itself is a larger part
        ((255, 256), (2, 1), 0.96, "gather input", 2),
        ((255, 256), (4, 1), 0.999, "ulysses", 1),
        ((255, 256), (2, 2), 0.999, "gather K/V", 4),
        ((511, 14), (2, 1), 0.99, "split K/V", 7),
        ((511, 14), (4, 1), 0.99, "split K/V", 7),
        ((511, 14), (2, 2), 0.99, "split K/V", 7),
    ],
)
def test_an_encoder_is_divided(lengths, mesh, least, strategy, gathers):
    plan = verified(EncoderDecoder, *lengths, ulysses=mesh[0], ring=mesh[1])
    assert plan.sharded_flop_fraction > least, plan.explain()
    assert {a.strategy for a in plan.attention[4::2]} == {strategy}
    assert plan.comm_calls["all_gather"] <= gathers  # one of them for the answer


@pytest.mark.parametrize("mesh", [(2, 1), (2, 2)])
def test_an_encoder_of_a_shorter_sequence_is_divided(mesh):
    plan = verified(EncoderDecoder, 129, 512, ulysses=mesh[0], ring=mesh[1])
    assert plan.sharded_flop_fraction > 0.94, plan.explain()
    assert {a.strategy for a in plan.attention[4::2]} <= {"gather input", "local"}


@pytest.mark.parametrize("mesh", [(2, 1), (4, 1), (1, 3)])
def test_what_few_points_read_is_divided(mesh):
    plan = verified(Induced, 1021, ulysses=mesh[0], ring=mesh[1])
    assert plan.sharded_flop_fraction > 0.98, plan.explain()
    assert [a.strategy for a in plan.attention] == ["split K/V", "local"] * 2


def test_a_few_words_are_projected_on_every_rank():
    plan = verified(Prompted, 509, 16, ulysses=4)
    assert [a.strategy for a in plan.attention] == ["ulysses", "local"] * 2
    assert plan.comm_calls == {"all_to_all": 4, "ring": 0, "all_gather": 1, "all_reduce": 0}
    words = str(plan.why("linear"))
    assert "it serves only the keys of attentions that attend where their queries are" in words
