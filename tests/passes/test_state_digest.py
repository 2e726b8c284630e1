"""The digest of a model changes with all that decides its program, and with nothing else."""

import functools
import logging
import sys
import types

import pytest
import torch

from seqpar.passes.state_digest import Digest, Unknown, code_text, own_code, replaced_in_torch, torch_settings

CODE = """
import os, functools, torch
from other_blocks_of_a_test import helper, Base
FACTOR, UNUSED, TABLE = 2, 3, {"relu": torch.relu}
RAMP = torch.arange(4)

class Settings:
    def __init__(self):
        self.shift = 7

SETTINGS = Settings()

def scaled(x):
    # said
    return helper(x) * FACTOR + RAMP + SETTINGS.shift

def unused(x):
    return x + UNUSED

def twice(function):
    @functools.wraps(function)
    def run(*args):
        return function(*args)
    return run

class Block(Base):
    WIDTH = 4

    def __init__(self):
        super().__init__()
        self.proj = torch.nn.Linear(4, 4)
        self.options = {"eps": 1e-6, "names": {"a", "b"}}
        self._defaults = ["a", "b"]
        self.act = functools.partial(torch.nn.functional.gelu, approximate="tanh")

    @twice
    def forward(self, x):
        return self.inner(TABLE["relu"](x)) if os.environ.get("BLOCK_MODE") else scaled(x)

    def inner(self, x):
        return x * self.WIDTH

    def save_everything(self):
        return 1
"""
OTHER = """
import torch

def helper(x):
    return x - 1

class Base(torch.nn.Module):
    def shifted(self, x):
        return x + 1
"""


def built(code=CODE, other=OTHER):
    """A model from source text."""
    for name, text in (("other_blocks_of_a_test", other), ("blocks_of_a_test", code)):
        sys.modules[name] = module = types.ModuleType(name)
        exec(text, vars(module))  # noqa: S102
    torch.manual_seed(0)
    return sys.modules["blocks_of_a_test"].Block()


def of(model):
    digest = Digest()
    digest.value(model, "model")
    return digest.finish()


@pytest.fixture(scope="module")
def first():
    return of(built())


@pytest.mark.parametrize(
    ("old", "new"),
    [("FACTOR, UNUSED, TABLE = 2", "FACTOR, UNUSED, TABLE = 4"), ("helper(x) * FACTOR", "helper(x) + FACTOR"), ("function(*args)", "function(*args) * 2"), ("torch.relu", "torch.tanh"),
     ("x * self.WIDTH", "x + self.WIDTH"), ("WIDTH = 4", "WIDTH = 5"), ("1e-6", "1e-5"), ('"a", "b"}', '"a", "c"}'), ('["a", "b"]', '["a"]'), ("tanh", "none"), ("Linear(4", "Linear(5"),
     ("arange(4)", "arange(4) + 1"), ("shift = 7", "shift = 8")],
)  # fmt: skip
def test_what_counts(old, new, first):
    assert old in CODE and of(built(CODE.replace(old, new))) != first


@pytest.mark.parametrize(("old", "new"), [("# said", "# or not"), ("UNUSED, TABLE = 2, 3", "UNUSED, TABLE = 2, 5"), ("return 1", "return 2"), ('["a", "b"]', '["b", "a"]'), ("x + UNUSED", "x - UNUSED")])
def test_what_does_not(old, new, first):
    assert old in CODE and of(built(CODE.replace(old, new))) == first


def test_code_of_other_files_and_the_environment(first, monkeypatch):
    assert of(built(other=OTHER.replace("x - 1", "x - 2"))) != first
    assert of(built(other=OTHER.replace("x + 1", "x + 2"))) == first, "nothing names it"
    monkeypatch.setenv("BLOCK_MODE", "1")
    assert of(built()) != first


def changes():
    def hook(module, args, output):
        return output

    def closing_over(number):
        return lambda module, args, output: output * number

    yield lambda m: m.proj.register_forward_hook(hook)
    yield lambda m: m.proj.register_forward_hook(closing_over(2))
    yield lambda m: m.proj.register_forward_hook(closing_over(3))
    yield lambda m: m.register_buffer("seen", torch.zeros(1))
    yield lambda m: setattr(m, "table", torch.zeros(2))
    yield lambda m: setattr(m, "table", torch.ones(2))
    yield lambda m: m.eval()
    yield lambda m: m.double()
    yield lambda m: setattr(m.proj, "weight", torch.nn.Parameter(m.proj.weight.T))
    yield lambda m: setattr(m, "device", torch.device("cuda:1"))
    yield lambda m: setattr(m, "act", m.inner)
    yield lambda m: setattr(type(m), "inner", lambda self, x: x)


def test_changes_of_an_object(first):
    found = [first]
    for change in changes():
        change(model := built())
        found.append(of(model))
    assert len(set(found)) == len(found)


def test_what_is_equal(first):
    model = built()
    with torch.no_grad():
        model.proj.weight.add_(1)
    assert of(model) == first, "weights do not count"
    model.proj.register_forward_hook(len).remove()
    model.proj.register_forward_hook(len)
    other = built()
    other.proj.register_forward_hook(len)
    assert of(other) == of(model), "nor do the numbers of hooks"
    model.device, other.device = torch.device("cuda:0"), torch.device("cuda:1")
    assert of(other) == of(model), "nor the index of a device"
    model.log = logging.getLogger("a")
    model.me = model
    assert of(model) == of(model)


@pytest.mark.parametrize("value", [torch.Generator(), iter([1]), [object()]])
def test_what_nothing_tells_apart(value):
    model = built()
    model.proj.thing = value
    with pytest.raises(Unknown, match="model._modules.proj.thing"):
        of(model)


def test_torch_and_this_package(monkeypatch):
    known = replaced_in_torch()  # transformers puts a function of its own into torch.nn.Module
    assert len(own_code()) == 64
    before = torch_settings("cpu")
    with torch.autocast("cpu", torch.bfloat16):
        assert torch_settings("cpu") != before
    monkeypatch.setattr(torch.nn.functional, "linear", changes)
    assert len(replaced_in_torch()) == len(known) + 1 and torch_settings("cpu") != before


def test_where_code_stands_does_not_count():
    one, two = (compile(f"{lines}def f(x): return x in {{1, 2}}", "file", "exec") for lines in ("", "\n\n"))
    assert code_text(one) == code_text(two)


@functools.lru_cache(None)
def cached(x):
    return x


def test_kinds_of_functions():
    digests = set()
    for value in (cached, cached.__wrapped__, functools.partial(cached, 1), functools.partial(cached, 2), torch.ops.aten.add.Tensor, torch.relu, [].append, [1].append, built().inner, Digest, torch):
        digest = Digest()
        digest.value(value, "value")
        digests.add(digest.finish())
    assert len(digests) == 11 - 1, "a cache is its function"


def test_class_attributes_that_are_written_in_c():
    class Layer(torch.nn.Linear):
        forward = torch.Tensor.add  # a method without a file
        shape_of = staticmethod(torch.Tensor.size)

    digest = Digest()
    digest.value(Layer(1, 1), "layer")
    assert any("Tensor.add" in fact or "TensorBase.add" in fact for fact in digest.code.text())
