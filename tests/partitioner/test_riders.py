"""Short ends of causal sequences stay where they would have been without the cut; programs with them are right, and as balanced as without."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.partitioner.cost import Machine
from seqpar.partitioner.infer import infer
from seqpar.partitioner.lengths import Sizes
from seqpar.partitioner.riders import riders_of
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

HEADS, DIM, WORDS = 4, 8, 13
FREE = Machine(comm_share=0.0, call_share=0.0)


class Language(nn.Module):
    """Two causal layers with positions that are turned into angles, and what `use(logits, labels)` makes of the logits."""

    def __init__(self, use, causal=True):
        super().__init__()
        width = HEADS * DIM
        self.use, self.causal = use, causal
        self.words, self.head = nn.Embedding(WORDS, width), nn.Linear(width, WORDS)
        self.layers = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "out": nn.Linear(width, width)}) for _ in range(2))

    def forward(self, ids, labels):
        x = self.words(ids)
        angles = torch.arange(ids.shape[1], device=ids.device)[:, None, None] * torch.logspace(0, -2, DIM)
        for layer in self.layers:
            q, k, v = (t.unflatten(-1, (HEADS, DIM)) for t in layer["qkv"](F.layer_norm(x, x.shape[-1:])).chunk(3, -1))
            q, k = (t * angles.cos() + t.flip(-1) * angles.sin() for t in (q, k))
            o = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), is_causal=self.causal)
            x = x + layer["out"](o.transpose(1, 2).flatten(2))
        return self.use(self.head(x), labels)


def loss(logits, labels):
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten())


USES = {
    "sliced": lambda logits, labels: loss(logits[:, :-1], labels[:, 1:]),
    "padded": lambda logits, labels: loss(logits, F.pad(labels, (0, 1), value=-100)[:, 1:]),
    "sliced, and all logits": lambda logits, labels: (loss(logits[:, :-1], labels[:, 1:]), logits),
    "two tokens ahead": lambda logits, labels: loss(logits[:, :-1], labels[:, 1:]) + loss(logits[:, :-2].tanh(), labels[:, 2:]),
    "the last by itself": lambda logits, labels: (loss(logits[:, :-1], labels[:, 1:]), logits[:, -1:].amax(1).softmax(-1)),
    "a prompt is left out": lambda logits, labels: logits[:, 7:].softmax(-1) + 1,
    "without the first": lambda logits, labels: logits[:, 1:].softmax(-1) + 1,
}


def traced(use, length=19, dynamic=False, **options):
    torch.manual_seed(0)
    ids = torch.randint(WORDS, (2, 2, length))
    return trace(Language(USES[use], **options).eval(), tuple(ids), {}, dynamic=dynamic)


@pytest.mark.parametrize(("use", "mesh"), [(use, mesh) for use in USES for mesh in ((1, 4), (2, 2))] + [("sliced", (1, 2)), ("two tokens ahead", (1, 3))])
def test_right_and_in_zigzag_order(use, mesh):
    report = verify_traced(traced(use), ulysses=mesh[0], ring=mesh[1], machine=FREE)
    assert report.ok, report
    assert {a.strategy for a in report.plan.attention} == {"ring (zigzag)" if mesh[0] == 1 else "ulysses+ring (zigzag)"}


@pytest.mark.parametrize("use", ["sliced", "padded"])
def test_balanced(use):
    """The busiest rank does an even share, and nothing but attention and the loss's sum is communicated."""
    found = traced(use, length=1024)
    for ulysses, ring in ((1, 4), (2, 2)):
        plan = partition(found, ulysses=ulysses, ring=ring, machine=FREE).plan
        assert max(plan.flops_per_rank) <= 1.02 * plan.flops_total / 4
        assert plan.comm_calls["all_gather"] == 0 and plan.comm_calls["all_to_all"] == 2 * 2 * (1 + (ulysses > 1)) and plan.comm_calls["ring"] == 2 * (ring - 1)


def test_symbolic_lengths():
    found = traced("sliced", dynamic=True)
    report = verify_traced(found, ulysses=2, ring=2, machine=FREE)
    assert report.ok and {a.strategy for a in report.plan.attention} == {"ulysses+ring (zigzag)"}, report


def test_a_program_serves_lengths_whose_last_part_carries_the_riders():
    conditions = partition(traced("two tokens ahead", dynamic=True), ring=4, machine=FREE).conditions
    (length,) = set().union(*(c.free_symbols for c in conditions))
    served = {n: all(c.subs(length, n) == True for c in conditions) for n in (7, 8, 19, 64)}  # noqa: E712  (sympy's own truth)
    assert served == {7: False, 8: True, 19: True, 64: True}


def read(found, ranks, ring):
    inference = infer(found.gm.graph, Sizes())
    return inference, riders_of(inference, ranks, ring)


def test_parts_are_those_of_the_sequence_that_was_not_cut():
    inference, riders = read(traced("two tokens ahead"), 4, 4)  # [17 | 1 | 1]
    ((host, run),) = riders.runs.items()
    lengths = [inference.table.length(a) for a in run]
    assert lengths == [17, 1, 1] and run[0] == host and riders.hosts == {run[1]: host, run[2]: host}
    parts = [[riders.part(a, n, r, inference) for r in range(4)] for a, n in zip(run, lengths, strict=True)]
    assert parts == [[5, 5, 5, 2], [0, 0, 0, 1], [0, 0, 0, 1]]
    assert riders.is_one_stretch(run) and riders.is_one_stretch(run[:1]) and not riders.is_one_stretch(run[:2])
    assert riders.rides(run[1], run) and not riders.rides(run[1], run[1:]) and not riders.rides(host, run)
    inference, riders = read(traced("without the first"), 2, 2)  # [1 | 18]
    ((host, run),) = riders.runs.items()
    assert [[riders.part(a, inference.table.length(a), r, inference) for r in range(2)] for a in run] == [[1, 0], [9, 9]]


def test_nobody_rides_where_it_does_not_help():
    short = traced("two tokens ahead", 7)
    for found, ranks, ring in ((short, 4, 1), (traced("sliced", 7, causal=False), 4, 4), (short, 4, 4)):  # no ring; no triangle; two do not fit into a last part of one
        assert not read(found, ranks, ring)[1].runs
