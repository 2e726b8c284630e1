"""A model whose result depends on earlier calls is refused; one that keeps something to look at, or a table, is not."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import seqpar
from seqpar.errors import TraceError


class Model(nn.Module):
    def __init__(self, step):
        super().__init__()
        self.step = step
        self.qkv = nn.Linear(16, 48)
        self.register_buffer("mean", torch.zeros(16))
        self.calls, self.seen, self.table = 0, None, {}

    def forward(self, x):
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return self.step(self, x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def average(model, y):
    model.mean = model.mean * 0.9 + y.mean((0, 1))
    return y + model.mean


def count(model, y):
    model.calls += 1
    return y * model.calls


def remember(model, y):
    model.seen, before = y, model.seen
    return y if before is None else y + before


class Holder:
    """An object of a library, with others in it."""

    def __init__(self, **held):
        self.__dict__.update(held)


def count_deep_inside(model, y):
    """Where hooks of diffusers keep their state: in an object of a registry's."""
    if not hasattr(model, "registry"):
        model.registry = Holder(hooks={"a": Holder(state=Holder(calls=0))})
    state = model.registry.hooks["a"].state
    state.calls += 1
    return y * state.calls


def exchange_weight(model, y):
    kept, model.qkv.weight.data = model.qkv.weight.data, model.qkv.weight.data * 2
    y = y + model.qkv(y)[..., :16]
    model.qkv.weight.data = kept
    return y


def average_in_place(model, y):
    model.mean.mul_(0.9).add_(y.mean((0, 1)))
    return y + model.mean


def look(model, y):
    model.seen, model.calls = y, model.calls + 1
    return y


def tabulate(model, y):
    if y.shape[1] not in model.table:
        model.table[y.shape[1]] = torch.arange(y.shape[1])[:, None] / 7
    model.seen = model.table[y.shape[1]]
    return y + model.seen


@pytest.mark.parametrize(("step", "attribute"), [(average, "mean"), (count, "calls"), (remember, "seen"), (count_deep_inside, "calls")])
def test_what_the_next_call_reads_is_refused(step, attribute):
    torch.manual_seed(0)
    with pytest.raises(TraceError, match=f"Model keeps state from one call to the next: .* changes the attribute {attribute}"):
        seqpar.verify(Model(step).eval(), (torch.randn(2, 37, 16),), ulysses=2)


@pytest.mark.parametrize("step", [average_in_place, look, tabulate])
def test_what_changes_no_result_is_not(step):
    torch.manual_seed(0)
    assert seqpar.verify(Model(step).eval(), (torch.randn(2, 37, 16),), ulysses=2).ok


def test_weights_exchanged_while_the_model_runs_are_refused():
    """The tracer does not see it: the program would use the weights as they are."""
    with pytest.raises(TraceError, match=r"exchanges the content of a tensor of shape \(48, 16\) by `.data = …` at .*test_kept_state.py"):
        seqpar.verify(Model(exchange_weight).eval(), (torch.randn(2, 37, 16),), ulysses=2)
