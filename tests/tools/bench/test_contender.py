"""Peers get the model's own weights, in modules of their own."""

import torch

from seqpar.tools.bench.contender import compiled, copied


def test_a_copy_has_the_same_weights_and_other_modules():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2))
    other = copied(model)
    assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert all(a is b for a, b in zip(model.buffers(), other.buffers(), strict=True))
    assert not {id(m) for m in model.modules()} & {id(m) for m in other.modules()}


def test_without_a_backend_nothing_is_compiled():
    model = torch.nn.Linear(2, 2)
    assert compiled(model, None) is model
    assert compiled(model, "eager") is not model
