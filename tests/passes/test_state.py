"""Objects that hold tensors, as arguments: what the model assigns to them is assigned, after the program ran."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from seqpar.compile import sp_compile
from seqpar.errors import SignatureError
from seqpar.models.randomise import randomise
from seqpar.passes.state import Opened, assign, close_state, is_state, open_state
from seqpar.passes.trace import trace
from seqpar.tools.coverage_cases import all_cases
from seqpar.verification import verify_traced


class Layer:
    def __init__(self):
        self.key = self.value = None
        self.used = 0


class Cache:
    def __init__(self, layers):
        self.layers = [Layer() for _ in range(layers)]


class Cached(nn.Module):
    """Attends to what the cache holds and to its own tokens; writes its keys and values."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.qkv, self.heads = nn.Linear(width, 3 * width), heads

    def forward(self, x, cache, write=True):
        for layer in cache.layers:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            if layer.key is not None:
                k, v = torch.cat([layer.key, k], dim=2), torch.cat([layer.value, v], dim=2)
            if write:
                layer.key, layer.value, layer.used = k, v, layer.used + 1
            x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x


def x_of(length, seed=0):
    return torch.randn(1, length, 16, generator=torch.Generator().manual_seed(seed))


def state_of(cache):
    return tree_leaves(open_state(cache))


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in zip(a, b, strict=True))


def test_a_cache_is_filled_and_read_like_by_the_model():
    model = randomise(Cached()).eval()
    actual, expected = Cache(2), Cache(2)
    layers = list(actual.layers)
    fast = sp_compile(model, (x_of(8), actual), dynamic=False)
    assert all(layer.key is None and layer.used == 0 for layer in actual.layers), "compiling must not write"
    with torch.no_grad():
        for length, write in ((8, True), (4, True), (4, False), (4, False)):
            x = x_of(length, seed=length)
            assert torch.equal(fast(x, actual, write=write), model(x, expected, write=write))
            assert same(state_of(actual), state_of(expected))
    assert all(a is b for a, b in zip(actual.layers, layers, strict=True)) and actual.layers[0].key.shape[2] == 12


@pytest.mark.parametrize("degrees", [(2, 1), (1, 2)])
def test_partitioned(degrees):
    model, cache = randomise(Cached()).eval(), Cache(2)
    first = trace(model, (x_of(9), cache), {}, dynamic=False)
    assert len(first.states) == 1 and first.states[0].argument == "cache" and len(first.input_positions) == 1
    assert verify_traced(first, ulysses=degrees[0], ring=degrees[1]).ok
    with torch.no_grad():
        model(x_of(9), cache)
    second = trace(model, (x_of(5), cache, False), {}, dynamic=False)
    assert second.states == () and len(second.input_positions) == 5
    assert verify_traced(second, ulysses=degrees[0], ring=degrees[1]).ok


def test_open_and_close():
    cache = Cache(2)
    cache.layers[0].key = torch.ones(2)
    opened = open_state({"c": [cache, 1]})
    assert isinstance(opened["c"][0], Opened) and opened["c"][1] == 1
    closed = close_state(opened)["c"][0]
    assert type(closed) is Cache and closed is not cache and closed.layers[0] is not cache.layers[0] and closed.layers[0].key is cache.layers[0].key
    closed.layers.append(Layer())
    closed.layers[1].value = torch.zeros(1)
    kept = cache.layers[1]
    assign(cache, open_state(closed))
    assert len(cache.layers) == 3 and cache.layers[1] is kept and torch.equal(kept.value, torch.zeros(1))


class Slotted:
    __slots__ = ("key",)


class Unreadable:
    def __init__(self):
        self.iterator = iter(())


@pytest.mark.parametrize("value", [3, "a", None, torch.ones(1), nn.Linear(1, 1), Slotted(), Unreadable(), [Layer()], len, torch.float32])
def test_what_is_no_state(value):
    assert not is_state(value)


def test_an_object_that_cannot_be_read_is_refused():
    with pytest.raises(SignatureError, match="Unreadable"):
        sp_compile(randomise(Cached()).eval(), (x_of(8), Unreadable()))


def test_a_published_cache():
    case = next(case for case in all_cases() if case.name == "WanAnimate2Transformer3DModel")
    model, inputs, twin = case.build(), case.inputs("even"), case.inputs("even")
    fast = sp_compile(model, inputs, dynamic=False)
    with torch.no_grad():
        assert same(tree_leaves(fast(**inputs)), tree_leaves(model(**twin)))
    written, expected = state_of(inputs["kv_cache"]), state_of(twin["kv_cache"])
    assert sum(isinstance(leaf, torch.Tensor) for leaf in written) == 4 and same(written, expected)
