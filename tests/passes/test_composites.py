"""Operators that PyTorch writes in terms of others keep the sequence divided; what has many parts stays whole and is named."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqpar
from seqpar.compat import FakeTensor
from seqpar.partitioner.cost import Machine
from seqpar.passes import composites
from seqpar.passes.composites import composites_apart
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

WIDTH = 32
FREE_CALLS = Machine(call_share=0.0)


class Model(nn.Module):
    """Attention, then a step on the tokens [B, S, WIDTH]."""

    def __init__(self, step):
        super().__init__()
        self.step = step
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return self.out(self.step(x))


STEPS = {
    "concatenate": lambda x: torch.concatenate([x[..., 8:], x[..., :8]], -1),
    "aliases": lambda x: torch.divide(torch.subtract(torch.multiply(x, 2.0), 1.0), torch.absolute(x) + torch.greater(x, 0.0)),
    "stacks": lambda x: torch.column_stack([x[:, :10], torch.hstack([x[:, 10:20], x[:, 20:]])]),
    "tile": lambda x: torch.tile(x, (1, 1, 2))[..., :WIDTH],
    "similarity": lambda x: F.cosine_similarity(x, x.roll(1, -1), dim=-1).unsqueeze(-1) * x,
    "tensordot": lambda x: torch.tensordot(torch.inner(x, torch.eye(WIDTH).flip(0)), torch.eye(WIDTH).flip(1), 1),
    "activations": lambda x: F.prelu(F.hardswish(F.logsigmoid(x)), torch.tensor([0.2])),
    "moments": lambda x: torch.std_mean(x, -1, keepdim=True)[0] * x,
    "chunks": lambda x: torch.cat(torch.tensor_split(x, 3, -1)[::-1], -1),
    "difference": lambda x: F.pad(x.diff(dim=-1), (1, 0)),
    "taken": lambda x: torch.take_along_dim(x, x.argsort(-1), -1),
}


@pytest.mark.parametrize("dynamic", [False, None])
@pytest.mark.parametrize("name", STEPS)
def test_tokens_stay_where_they_are(name, dynamic):
    torch.manual_seed(0)
    traced = trace(Model(STEPS[name]).eval(), (torch.randn(2, 101, WIDTH),), {}, dynamic=dynamic)
    report = verify_traced(traced, ulysses=2, ring=1, machine=FREE_CALLS)
    assert report.ok and report.plan.comm_calls["all_gather"] == 1, report
    assert not [op for op in report.plan.replicated_ops if "no rule" in op.reason]


class Recurrent(Model):
    def __init__(self):
        super().__init__(lambda x: self.recurrent(x)[0])
        self.recurrent = nn.LSTM(WIDTH, WIDTH, batch_first=True)


def test_what_has_many_parts_stays_whole():
    torch.manual_seed(0)
    traced = trace(Recurrent().eval(), (torch.randn(2, 101, WIDTH),), {}, dynamic=False)
    assert composites_apart(traced.gm) is traced.gm
    plan = partition(traced, ulysses=2, machine=FREE_CALLS).plan
    assert [op.op for op in plan.replicated_ops if "no rule" in op.reason] == ["aten.lstm.input"]


# ---- operators of other libraries, written in Python

TABLES: dict = {}


@functools.lru_cache
def table(width):
    return torch.arange(width, dtype=torch.float32)


@torch.library.custom_op("seqpar_tests::weighted", mutates_args=())
def weighted(x: torch.Tensor, shift: torch.Tensor | None = None) -> list[torch.Tensor]:
    """It keeps tables, and returns two tensors."""
    TABLES.setdefault("bias", torch.ones(WIDTH) / 2)
    y = x * table(WIDTH) + TABLES["bias"]
    return [y if shift is None else y + shift, y.mean(1, keepdim=True)]


@weighted.register_fake
def _(x, shift=None):
    return [torch.empty_like(x), x.new_empty(x.shape[0], 1, x.shape[2])]


def step_of(x):
    y, mean = weighted(x, x.flip(1))
    return y - mean


def test_operators_in_python_are_taken_apart():
    torch.manual_seed(0)
    model, x = Model(step_of).eval(), torch.randn(2, 101, WIDTH)
    traced = trace(model, (x,), {}, dynamic=False)
    TABLES.clear()
    table.cache_clear()
    report = verify_traced(traced, ulysses=2, ring=1, machine=FREE_CALLS)
    assert report.ok and not [op for op in report.plan.replicated_ops if "no rule" in op.reason]
    assert not isinstance(TABLES["bias"], FakeTensor)
    assert not isinstance(table(WIDTH), FakeTensor) and torch.equal(weighted(x)[0], x * torch.arange(WIDTH) + 0.5)


def data_of(x):
    """What code that is no Python asks for."""
    x.data_ptr()
    return x.clone()


def one_more(x):
    return torch.cat([x, x[:, :1]], 1)


@pytest.mark.parametrize("kernel", [data_of, one_more, lambda x: x * x.max().item() if x.max() > 0 else x.clone()], ids=["pointer", "other shape", "value"])
def test_what_cannot_be_seen_stays_whole(kernel):
    with torch.library._scoped_library("seqpar_tests", "FRAGMENT") as library:
        library.define("unseen(Tensor x) -> Tensor")
        library.impl("unseen", kernel, "CPU")
        library.impl("unseen", torch.empty_like, "Meta")
        torch.manual_seed(0)
        traced = trace(Model(lambda x: torch.ops.seqpar_tests.unseen(x)).eval(), (torch.randn(2, 101, WIDTH),), {}, dynamic=False, warm=False)
        assert composites_apart(traced.gm) is traced.gm
        assert [op.op for op in partition(traced, ulysses=2, machine=FREE_CALLS).plan.replicated_ops if "no rule" in op.reason] == ["seqpar_tests.unseen.default"]


@torch.library.custom_op("seqpar_tests::attended", mutates_args=())
def attended(x: torch.Tensor) -> torch.Tensor:
    q = x.unflatten(-1, (4, -1)).transpose(1, 2)
    return F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)


@torch.library.custom_op("seqpar_tests::scores", mutates_args=())
def scores(x: torch.Tensor) -> torch.Tensor:
    q = x.unflatten(-1, (4, -1)).transpose(1, 2)
    return ((q @ q.transpose(-1, -2) / 3).softmax(-1) @ q).transpose(1, 2).flatten(2)


@torch.library.custom_op("seqpar_tests::outer", mutates_args=())
def outer(x: torch.Tensor) -> torch.Tensor:
    return attended(x) * 2


@torch.library.custom_op("seqpar_tests::projected", mutates_args=())
def projected(x: torch.Tensor) -> torch.Tensor:
    return F.linear(x, torch.eye(WIDTH) / 3).to(x.dtype)


for operator in (attended, scores, outer, projected):
    operator.register_fake(torch.empty_like)


def in_autocast(x):
    with torch.autocast("cpu", torch.bfloat16):
        return projected(x)


@pytest.mark.parametrize(("step", "attentions"), [(attended, 2), (scores, 1), (outer, 2), (in_autocast, 1)])
def test_kernels_of_many_kinds(step, attentions):
    torch.manual_seed(0)
    report = seqpar.verify(Model(step).eval(), (torch.randn(2, 101, WIDTH),), ulysses=2)
    assert report.ok and len(report.plan.attention) == attentions, report
    assert report.plan.sharded_flop_fraction > 0.98 and not [op for op in report.plan.replicated_ops if "no rule" in op.reason]


@torch.library.custom_op("seqpar_tests::product", mutates_args=())
def product(a: torch.Tensor, b: torch.Tensor, scale: float) -> torch.Tensor:
    return a * b * scale


product.register_fake(lambda a, b, scale: torch.empty_like(a))


def test_equal_calls_are_opened_once(monkeypatch):
    opened, real = [], composites._opened
    monkeypatch.setattr(composites, "_opened", lambda *call: opened.append(call) or real(*call))
    torch.manual_seed(0)
    traced = trace(Model(lambda x: product(product(product(product(x, x + 1, 2.0), x, 2.0), x, 3.0), x.mT.contiguous().mT, 2.0)).eval(), (torch.randn(2, 101, WIDTH),), {}, dynamic=False)
    assert composites_apart(traced.gm) is not traced.gm
    assert len(opened) == 2 * 3, "each twice; the first two are equal, then another number, then other strides"
    assert verify_traced(traced, ulysses=2, ring=1).ok


class Calls:
    count = 0


@torch.library.custom_op("seqpar_tests::counting", mutates_args=())
def counting(x: torch.Tensor) -> torch.Tensor:
    Calls.count += 1
    return x * Calls.count


counting.register_fake(torch.empty_like)


def test_a_kernel_that_counts_stays_whole():
    torch.manual_seed(0)
    traced = trace(Model(counting).eval(), (torch.randn(2, 101, WIDTH),), {}, dynamic=False)
    assert composites_apart(traced.gm) is traced.gm
