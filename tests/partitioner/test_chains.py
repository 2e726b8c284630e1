"""Programs of several operators, each atom of each declared a sequence in turn: where single rules are right and their meeting is not."""

import itertools

import pytest
import torch
from torch import nn

from seqpar.partitioner.division import Degrees
from seqpar.partitioner.infer import infer
from seqpar.partitioner.label_problem import LabelProblem
from seqpar.partitioner.lengths import Sizes
from seqpar.passes.trace import trace
from seqpar.tools.check_rules import FREE, fault, run_ranks
from seqpar.tools.rule_samples import Sample


class Program(nn.Module):
    def __init__(self, fn):
        super().__init__()
        self.fn = fn

    def forward(self, *args):
        return self.fn(*args)


def f(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def cut_and_join(x):
    return torch.cat([x[:, 5:], x[:, :5]], 1) * 2


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1) + x


def in_place(x, y):
    out = torch.empty_like(x)
    out[:, :5] = y * 2
    out[:, 5:] = x[:, 5:]
    return out + x


def products(x):
    y = x.reshape(x.shape[0] * x.shape[1], x.shape[2]) * 3
    return y.view(x.shape).sum(1), y.mean(0)


def image_grid(x, w):
    rows = x.view(2, 4, 6, 3).permute(0, 2, 1, 3)
    return rows.reshape(2, 24, 3).softmax(-1) @ w


PROGRAMS = {
    "shifted difference": (lambda x: x[:, 1:] - x[:, :-1], f(2, 12, 3)),
    "cut and join": (cut_and_join, f(2, 12, 3)),
    "twice the same part": (lambda x: torch.cat([x, x], 1).sum(1), f(2, 7, 3)),
    "pairs": (lambda x: (x[:, :, None] * x[:, None, :]).sum((1, 2)), f(2, 8)),
    "pairs flattened": (lambda x: (x[:, :, None] * x[:, None, :]).flatten(1) + 1, f(2, 8)),
    "scores": (lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x, f(2, 8, 3)),
    "gram": (lambda x: x.transpose(1, 2) @ x, f(2, 9, 3)),
    "trace of a product": (lambda x, y: torch.einsum("ab,ba->", x, y), f(8, 12), f(12, 8)),
    "statistics": (lambda x: (x - x.mean((0, 1), True)) / (x.square().mean((0, 1), True) + 1).sqrt(), f(4, 12, 3)),
    "moments": (lambda x: ((x - x.mean(1, True)) / x.std(1, keepdim=True), torch.var_mean(x, (0, 1)), x.norm(dim=1)), f(4, 12, 3)),
    "maximum": (lambda x: (x - x.amax(1, keepdim=True)).exp().sum(1), f(2, 12)),
    "rotate half": (rotate_half, f(2, 12, 8)),
    "written in place": (in_place, f(2, 12, 3), f(2, 5, 3)),
    "products": (products, f(4, 6, 3)),
    "image grid": (image_grid, f(2, 24, 3), f(3, 5)),
    "pad, cut, reduce": (lambda x: torch.nn.functional.pad(x, (0, 0, 3, 4))[:, 2:-3].mean(1), f(2, 12, 3)),
    "pad twice": (lambda x: torch.nn.functional.pad(torch.nn.functional.pad(x, (0, 5)), (4, 0)).cumsum(0), f(3, 7)),
    "repeat": (lambda x: x.repeat(1, 3, 1) + torch.cat([x, x * 2, x], 1), f(2, 7, 3)),
    "repeat interleave": (lambda x: x.repeat_interleave(4, 1).view(2, 7, 4, 3).sum(2), f(2, 7, 3)),
    "broadcast rows": (lambda x, y: x.unsqueeze(1) + y.unsqueeze(2).expand(-1, -1, x.shape[1], -1), f(2, 7, 3), f(2, 5, 3)),
    "squeeze": (lambda x: x.unsqueeze(1).squeeze().sum(0), f(4, 7)),
    "look up": (lambda t, i: t[i] * t[: i.shape[0]], f(12, 3), torch.tensor([3, 3, 0, 11, 5, 2, 7])),
    "top": (lambda x: x.topk(3, -1).values + x.topk(3, -1).indices, f(7, 8)),
    "indices of the top rows": (lambda x: torch.gather(x, 1, x.argsort(1)), f(7, 8)),
    "promotion": (lambda x: (x.to(torch.bfloat16) + x.long()).float().sum(1), f(2, 12)),
    "positions": (lambda x: x + torch.arange(x.shape[1])[:, None] * torch.ones(x.shape[1], 1), f(2, 12, 3)),
    "constants": (lambda x: torch.cat([torch.zeros(2, 5, 3), x], 1) * torch.full((12, 1), 2.0), f(2, 7, 3)),
    "statistics of parts": (lambda x: torch.stack([p.mean(1) for p in x.split([3, 9], 1)], 1), f(2, 12, 3)),
    "contraction over a grid": (lambda x: (x.flatten(1, 2).mT @ x.flatten(1, 2).relu(), x.flatten(1, 2).mean(1)), f(2, 5, 6, 3)),
    "empty parts": (lambda x: torch.cat([x[:, 12:], x * 2, x[:, :0], torch.zeros(2, 0, 3)], 1) + x, f(2, 12, 3)),
    "transposed product": (lambda x: x.permute(2, 1, 0).reshape(3, -1).view(3, 12, 2).sum(1), f(2, 12, 3)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_choice_of_sequences_is_right(name):
    fn, *inputs = PROGRAMS[name]
    traced = trace(Program(fn), tuple(inputs), {}, dynamic=False)
    expected = traced.gm(*inputs)
    inference = infer(traced.gm.graph, Sizes())
    table = inference.table
    atoms = sorted({a for axes in inference.axes.values() for axis in axes[0] for a in table.roots(axis) if table.sizes.hint(table.length(a)) > 3})
    choices = [(a,) for a in atoms] + list(itertools.combinations(atoms, 2))[:6] + [tuple(atoms)]
    sharded = 0
    for choice, ranks in itertools.product(choices, (2, 3)):
        inference.sequences = {a: 1 + (a == choice[-1]) for a in choice}
        problem = LabelProblem(inference, Degrees(ranks, 1), FREE, set())
        problem.divisible = set(inference.axes)  # constants too
        labels = problem.solve()
        sharded += bool(labels.sharded)
        outputs = run_ranks(traced.gm.graph, inference, labels, ranks, inputs, traced.constants)
        assert fault(Sample(None, (), {}), expected, outputs, exact=False, slack=10) is None, [table.length(a) for a in choice]
    assert sharded
