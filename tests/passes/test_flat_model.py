"""A model that is run more than once in one trace is the same in each run."""

import functools

import pytest
import torch
from torch import nn

from seqpar.passes.flat_model import BufferAssigned, unchanging

tables = {"kept": 1}


class Rotary:
    """A plain object that is called, and keeps its table."""

    table = None

    def __call__(self, n):
        self.table = torch.arange(n) if self.table is None else self.table
        return self.table


class Remembers(nn.Module):
    shared = [1]

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.inner = nn.Module()
        self.inner.tables, self.inner.names = {"a": 1}, {"a"}
        self.rotary = Rotary()

    @functools.lru_cache(None)  # noqa: B019
    def table(self, n):
        return torch.arange(n)


def test_what_a_run_leaves_is_put_back():
    model = Remembers()
    before = model.table(3)
    with unchanging(model):
        assert model.table(3) is before
    assert model.table(3) is before, "nothing new was remembered"
    with unchanging(model):
        model.inner.tables["b"], model.inner.other, tables["new"] = 2, 3, 4
        model.inner.names.add("b")
        model.shared.append(2)
        model.table(4)
        model.rotary(5)
    assert model.rotary.table is None
    assert model.inner.tables == {"a": 1} and not hasattr(model.inner, "other") and tables == {"kept": 1} and model.inner.names == {"a"} and model.shared == [1]
    assert model.table.cache_info().currsize == 0


def test_an_assigned_buffer_is_an_answer():
    model = Remembers()
    before = model.calls
    with pytest.raises(BufferAssigned), unchanging(model):
        model.calls = model.calls + 1
    assert model.calls is before
    with unchanging(model):
        model.calls.add_(1)
