"""What models do with a sequence besides attending: each mechanism alone, beside one self-attention, right and really sharded."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from seqpar.partitioner.cost import Machine
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

HEADS, WIDTH = 4, 32
ROWS, COLS = 6, 4
LENGTH = ROWS * COLS


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x_BSD: Tensor, bias: Tensor | None = None) -> Tensor:
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x_BSD).chunk(3, -1))
        return x_BSD + self.out(F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2))


class Mechanism(nn.Module):
    """One attention, then what a subclass does with the tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Attention()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def mlp(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.up(x)))

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self.mlp(self.step(self.attention(x_BSD)))

    def step(self, x: Tensor) -> Tensor:
        raise NotImplementedError


class LinearAttention(Mechanism):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def step(self, x):
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        q, k = q.relu(), k.relu()
        out = q @ (k.transpose(-1, -2) @ v) / (q @ k.sum(2, keepdim=True).transpose(-1, -2) + 1)
        return x + out.transpose(1, 2).flatten(2)


class MeanPooling(Mechanism):
    def step(self, x):
        return x * (1 + x.mean(1, keepdim=True))


class Statistics(Mechanism):
    def step(self, x):
        return (x - x.mean(1, keepdim=True)) * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-5) + x.amax(1, keepdim=True)


class Picture(Mechanism):
    """A 3 x 3 convolution over the tokens laid out as a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x_BSD):
        picture = x_BSD.transpose(1, 2)[..., None].expand(-1, -1, -1, COLS).sin()  # [B, D, rows, cols]: S is the number of rows here
        x = self.attention(picture.flatten(2).transpose(1, 2))
        grid = x.transpose(1, 2).unflatten(2, (-1, COLS))
        return self.mlp(x + self.conv(grid).flatten(2).transpose(1, 2))


class Deformable(Mechanism):
    """Every token looks at four places among all tokens, as Deformable DETR does; here they form a picture one column wide."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.weights = nn.Linear(WIDTH, 8), nn.Linear(WIDTH, 4)

    def step(self, x):
        picture, places = x.mT.unsqueeze(-1), self.places(x).tanh().unflatten(-1, (4, 2))
        seen = F.grid_sample(picture, places, align_corners=False)
        return x + (seen * self.weights(x).softmax(-1)[:, None]).sum(-1).mT


class TemporalConvolution(Mechanism):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)

    def step(self, x):
        return x + self.conv(x.transpose(1, 2)).transpose(1, 2)


class KnownStatistics(Mechanism):
    """A convolution that is told to keep the length, then a batch norm in evaluation (every conformer has both)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(WIDTH, WIDTH, 5, padding="same", dilation=2, groups=WIDTH), nn.BatchNorm1d(WIDTH)
        nn.init.normal_(self.norm.running_mean)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)

    def step(self, x):
        return x + self.norm(self.conv(x.mT)).mT


class CausalConvolutions(Mechanism):
    """Zeros in front only, then more on one side than on the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv1d(WIDTH, WIDTH, 4), nn.Conv1d(WIDTH, WIDTH, 3, dilation=2, groups=WIDTH)

    def step(self, x):
        y = self.first(F.pad(x.transpose(1, 2), (3, 0)))
        return x + self.second(F.pad(F.silu(y), (1, 3))).transpose(1, 2)


class Enlarged(Mechanism):
    """Twice as many positions, a convolution over them, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 5)

    def step(self, x):
        y = self.conv(F.pad(F.interpolate(x.transpose(1, 2), scale_factor=2, mode="nearest"), (2, 2)))
        return x + y.unflatten(2, (-1, 2)).amax(3).transpose(1, 2)


class Shortened(Mechanism):
    """A convolution with a stride makes one token of two before the attention."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1)

    def forward(self, x_BSD):
        return self.mlp(self.attention(self.conv(x_BSD.transpose(1, 2)).transpose(1, 2)))


class ShortenedTwice(Mechanism):
    """Convolutions of overlapping windows, with strides (encoders of audio have some), and a mean of every two positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv1d(WIDTH, WIDTH, 3, padding=1), nn.Conv1d(WIDTH, WIDTH, 3, stride=2, padding=1), nn.Conv1d(WIDTH, WIDTH, 4, stride=2)

    def forward(self, x_BSD):
        x = F.gelu(self.second(F.gelu(self.first(F.avg_pool1d(self.mlp(x_BSD).transpose(1, 2), 2)))))
        return self.mlp(self.attention(self.third(F.pad(x, (0, 2))).transpose(1, 2)))


class Positions(Mechanism):
    """Tables by position: embedding, index, gather; positions by arange and linspace."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(64, WIDTH)

    def step(self, x):
        length = x.shape[1]
        places = torch.arange(length, device=x.device)
        ramp = torch.linspace(0, 1, length, device=x.device)[:, None]
        columns = torch.arange(WIDTH - 1, -1, -1, device=x.device).expand_as(x)
        return x + self.table(places) + self.table.weight[places % 7] * ramp + x.gather(2, columns)


class Experts(Mechanism):
    """Token-wise mixture of experts: top-2 of 4 by softmax, one-hot dispatch."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def step(self, x):
        weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        share = (F.one_hot(chosen, 4).to(x.dtype) * weights[..., None]).sum(-2)
        return x + sum(share[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


class Scattered(Mechanism):
    """Weights written to every token's own row, and sorting along the width."""

    def step(self, x):
        values, places = x.sort(dim=-1)
        spread = torch.zeros_like(x).scatter(-1, places[..., :4], values[..., -4:])
        return x + spread + x.argsort(-1).to(x.dtype) / WIDTH


class InPlace(Mechanism):
    def step(self, x):
        y = x.clone()
        y[:, 1:3] = 0.5
        y[:, 4:] += x[:, 4:]
        y.mul_(1.5).add_(x)
        return y


class Autocast(Mechanism):
    def step(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            y = self.up(x)
        with torch.autocast("cpu", enabled=False):
            return x + self.down(y.float())


class PairBias(Mechanism):
    """A value with two sequence dims: distances between tokens bias a second attention; one of the dims is sharded."""

    def __init__(self) -> None:
        super().__init__()
        self.second = Attention()
        self.left, self.right = nn.Linear(WIDTH, HEADS), nn.Linear(WIDTH, HEADS)

    def step(self, x):
        pair = self.left(x)[:, :, None] - self.right(x)[:, None]
        return self.second(x, pair.square().neg().permute(0, 3, 1, 2))


class EqualLengths(Mechanism):
    """A codebook that happens to have as many entries as there are tokens is not the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.book = nn.Parameter(torch.randn(LENGTH, WIDTH))

    def step(self, x):
        nearest = (x @ self.book.T).softmax(-1)
        return x + nearest @ self.book


class Buffer(Mechanism):
    """A running mean that the model keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(WIDTH))

    def step(self, x):
        self.seen.mul_(0.9).add_(0.1 * x.mean((0, 1)))
        return x + self.seen


class Grouped(Mechanism):
    """Group norm over the tokens of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(4, WIDTH)

    def step(self, x):
        return x + self.norm(x.transpose(1, 2)).transpose(1, 2)


class RepeatedKeys(Mechanism):
    """Grouped queries written by repeating keys and values."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def step(self, x):
        q = self.q(x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2).repeat_interleave(2, 1) for y in self.kv(x).chunk(2, -1))
        return x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class ScoresOfTheLayerBefore(Mechanism):
    """Scores are added to those of the next attention (RealFormer): exchanging its heads would move them, keeping its rows does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 3 * WIDTH)

    def step(self, x):
        before = None
        for layer in (self.first, self.second):
            q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in layer(x).chunk(3, -1))
            scores = q @ k.mT / 3 if before is None else q @ k.mT / 3 + before
            before = scores
            x = x + (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        return x


class Samples(Mechanism):
    """The samples of a batch lie one after another, and each attends alone."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)

    def step(self, x):
        count, length = x.shape[:2]
        packed = self.qkv(x).flatten(0, 1).unflatten(-1, (3, HEADS, -1))
        samples = [packed[n * length : (n + 1) * length].permute(1, 2, 0, 3)[:, None] for n in range(count)]
        out = torch.cat([F.scaled_dot_product_attention(*sample)[0].transpose(0, 1) for sample in samples])
        return x + out.unflatten(0, (count, length)).flatten(2)


MECHANISMS = Mechanism.__subclasses__()
REDUCED = {LinearAttention: 2, MeanPooling: 1, Statistics: 3, Buffer: 1, Grouped: 2}
HALOS = {Picture: 1, TemporalConvolution: 1, KnownStatistics: 1, CausalConvolutions: 2, Enlarged: 1, ShortenedTwice: 3}
GATHERED = {Deformable: 1, PairBias: 1, ScoresOfTheLayerBefore: 2}  # the picture; one number per token and head, of which every rank makes the pairs; keys and values, twice
FREE_CALLS = Machine(call_share=0.0)  # these models are so small that computing twice would often be worth a call


def traced(mechanism: type[Mechanism], batch: int, length: int):
    torch.manual_seed(0)
    model = mechanism().eval()
    return trace(model, (torch.randn(batch, length, WIDTH),), {}, dynamic=False)


@pytest.mark.parametrize("mesh", [(2, 2), (1, 3)])
@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_equals_one_process(mechanism, mesh):
    batch, length = (1, LENGTH) if mechanism is EqualLengths else (2, 13)
    report = verify_traced(traced(mechanism, batch, length), ulysses=mesh[0], ring=mesh[1])
    assert report.ok, report


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_really_sharded(mechanism):
    """The work is done on divided tokens, statistics of the sequence by all-reduces of partial results; only the answer is gathered."""
    length = LENGTH if mechanism is EqualLengths else 10 * LENGTH
    plan = partition(traced(mechanism, 1, length), ulysses=2, machine=FREE_CALLS).plan
    assert plan.sharded_flop_fraction >= 0.99, plan.replicated_ops
    assert plan.comm_calls["all_to_all"] == 2 * sum(a.strategy == "ulysses" for a in plan.attention) + HALOS.get(mechanism, 0)
    assert plan.comm_calls["all_reduce"] == REDUCED.get(mechanism, 0)
    assert plan.comm_calls["all_gather"] == 1 + GATHERED.get(mechanism, 0)


@pytest.mark.parametrize("dynamic", [False, None])
def test_samples_of_a_batch_one_after_another(dynamic):
    torch.manual_seed(0)
    found = trace(Samples().eval(), (torch.randn(3, 10 * LENGTH, WIDTH),), {}, dynamic=dynamic)
    report = verify_traced(found, ulysses=2, ring=1, machine=FREE_CALLS)
    assert report.ok and report.plan.sharded_flop_fraction >= 0.99, report
    assert report.plan.comm_calls["all_gather"] == 1 and len(report.plan.attention) == 4


class ShortenedTail(Shortened):
    """Only what comes after the first three of the shortened sequence attends: where it is cut, its positions lie in two places."""

    def forward(self, x_BSD):
        y = self.conv(x_BSD.transpose(1, 2)).transpose(1, 2)
        return torch.cat([y[:, :3], self.mlp(self.attention(y[:, 3:]))], 1)


def test_a_shortened_sequence_that_is_cut_in_two_is_right():
    report = verify_traced(traced(ShortenedTail, 2, 41), ulysses=2, ring=1, machine=FREE_CALLS)
    assert report.ok, report


class Tiled(Enlarged):
    """The sequence twice, one after the other: the neighbours of a part lie in the other copy."""

    def step(self, x):
        return x + self.conv(F.pad(x.transpose(1, 2).repeat(1, 1, 2), (2, 2))).unflatten(2, (2, -1)).amax(2).transpose(1, 2)


def test_a_convolution_over_copies_is_right():
    report = verify_traced(traced(Tiled, 2, 41), ulysses=2, ring=1, machine=FREE_CALLS)
    assert report.ok, report


class GroupedBesideWhole(Grouped):
    """Group norm over tokens of which the first two, fewer than the ranks, are on every rank: statistics must count them once."""

    def step(self, x):
        return super().step(torch.cat([3 + x[:, :2], x[:, 2:]], 1))


def test_statistics_count_what_every_rank_has_once():
    report = verify_traced(traced(GroupedBesideWhole, 1, 41), ulysses=3, ring=1, machine=FREE_CALLS)
    assert report.ok, report


def test_scores_of_the_layer_before_do_not_travel():
    plan = partition(traced(ScoresOfTheLayerBefore, 1, 10 * LENGTH), ulysses=2).plan
    scores = HEADS * (10 * LENGTH) ** 2 * 4
    assert plan.attention[-1].strategy == "local" and sum(plan.comm_bytes_per_rank.values()) < scores / 4
