"""The module sp_compile returns is the model for everybody who looks at it, and reuses programs when it may."""

import copy
import functools
import inspect
import logging
import pickle
import sys
import time
import warnings

import pytest
import torch
from torch import nn

from seqpar.compile import sp_compile
from seqpar.errors import DisagreementError, MeshError, SeqparError, SignatureError, TraceError, UnsupportedError
from seqpar.models import registry
from seqpar.models.randomise import randomise


class Attention(nn.Module):
    """A small attention model that fixes no size."""

    def __init__(self, width=16, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.register_buffer("offset", torch.zeros(width), persistent=False)
        self.config = {"width": width}

    def forward(self, x, scale: float = 1.0, return_dict: bool = True):
        q, k, v = self.qkv(x + self.offset).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.out(y) * scale
        return {"y": y} if return_dict else (y,)

    def load_adapter(self):
        self.out.weight.data.add_(1)


class Pointwise(nn.Module):
    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(16, 16)

    def forward(self, x):
        return self.proj(x)


def x_of(length, batch=2):
    return torch.randn(batch, length, 16, generator=torch.Generator().manual_seed(length))


@pytest.fixture
def model():
    return randomise(Attention()).eval()


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_three_resolutions_one_program(name, caplog):
    family = registry.get(name)
    config = family.tiny_config(2, 1)
    network = randomise(family.build(config))
    calls = [family.grid_inputs(config, rows=r, columns=c, text_len=t, return_dict=True) for r, c, t in ((4, 4, 5), (6, 4, 9), (3, 5, 7))]
    with caplog.at_level(logging.INFO, "seqpar.compile"), torch.no_grad():
        fast = sp_compile(network, calls[0])
        for inputs in calls:
            actual, expected = fast(**inputs), network(**inputs)
            assert type(actual) is type(expected) and torch.equal(actual.sample, expected.sample)
    assert [record.message.split(": ")[1].split(" for ")[0][:36] for record in caplog.records] == [
        "a program (symbolic) was compiled in"[:36],
        "the symbolic program is reused",
        "the symbolic program is reused",
    ]


def test_models_with_fixed_sizes_get_a_program_each(caplog):
    family = registry.get("qwen-image")
    config = family.tiny_config(2, 1)
    network = randomise(family.build(config))
    calls = [family.grid_inputs(config, rows=4, columns=4, text_len=t) for t in (5, 7)]
    with caplog.at_level(logging.INFO, "seqpar.compile"), torch.no_grad():
        fast = sp_compile(network, calls[0])
        for inputs in (*calls, *calls):
            assert torch.equal(fast(**inputs)[0], network(**inputs)[0])
    assert len(caplog.records) == 2 and "encoder_hidden_states" in caplog.records[1].message and "fixed" in caplog.records[1].message


def test_it_looks_like_the_model(model):
    fast = sp_compile(model, (x_of(8),))
    assert inspect.signature(fast.forward) == inspect.signature(model.forward)
    assert fast.config is model.config and fast.heads == 4
    assert list(fast.state_dict()) == list(model.state_dict()) and dict(fast.named_parameters()).keys() == dict(model.named_parameters()).keys()
    assert fast.qkv.weight is model.qkv.weight and "Attention" in repr(fast)
    assert isinstance(fast.graph_module, torch.fx.GraphModule) and isinstance(fast.explain(), str) and fast.plan is not None
    fast.note = 1
    assert model.note == 1
    with pytest.raises(AttributeError, match="nonsense"):
        fast.nonsense  # noqa: B018


def test_weights_are_shared_and_conversions_followed(model):
    fast = sp_compile(model, (x_of(8),))
    x = x_of(8)

    def same(x=x):
        with torch.no_grad():
            return torch.equal(fast(x)["y"], model(x)["y"])

    assert same()
    with torch.no_grad():
        model.qkv.weight.mul_(1.5)
    assert same()
    fast.load_state_dict(randomise(Attention(), 1).state_dict())
    assert same()
    model.load_state_dict(randomise(Attention(), 2).state_dict(), assign=True)
    assert same()
    model.offset = torch.ones(16)
    assert same()
    model.out = nn.Linear(16, 16)
    assert same()
    fast.to(torch.float64)
    assert model.qkv.weight.dtype == torch.float64 and same(x.double())
    model.to(torch.bfloat16)  # behind its back
    assert same(x.bfloat16())
    fast.float().load_adapter()
    assert same()


def test_train_and_eval_are_the_models(model):
    fast = sp_compile(model, (x_of(8),))
    assert not fast.training
    fast.train()
    assert model.training and fast.training and model.qkv.training
    fast(x_of(8))
    model.eval()
    assert not fast.training


def test_values_and_dtypes_make_programs_and_structures_are_refused(model):
    fast = sp_compile(model, {"x": x_of(8)})
    with torch.no_grad():
        assert torch.equal(fast(x_of(8), 2.0)["y"], model(x_of(8), 2.0)["y"])
        assert torch.equal(fast(x_of(8), return_dict=False)[0], model(x_of(8))["y"])
        # a transposed view, and the same tensor as another kind of argument
        assert torch.equal(fast(x_of(16).transpose(1, 2))["y"], model(x_of(16).transpose(1, 2))["y"])
    with pytest.raises(SignatureError, match="x is a list"):
        fast([x_of(8)])
    with pytest.raises(SignatureError, match="unexpected keyword argument 'z'"):
        fast(x_of(8), z=1)
    with pytest.raises(SignatureError, match="missing a required argument"):
        fast()


def test_the_cache_is_bounded(model):
    fast = sp_compile(model, (x_of(8),), dynamic=False)
    fast.__dict__["_max_programs"] = 2
    for length in (8, 9, 10, 9, 8):
        with torch.no_grad():
            assert torch.equal(fast(x_of(length))["y"], model(x_of(length))["y"])
    assert len(fast._programs) == 2 and len(fast._fast) <= 2


def test_autograd_inference_mode_and_autocast(model):
    fast = sp_compile(model, (x_of(8),))
    x = x_of(8).requires_grad_()
    ours, theirs = (torch.autograd.grad(program(x)["y"].sum(), x)[0] for program in (fast, model))
    assert torch.allclose(ours, theirs)
    with torch.inference_mode():
        assert torch.equal(fast(x_of(9))["y"], model(x_of(9))["y"])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(fast(x_of(8))["y"], model(x_of(8))["y"])


def test_a_program_made_under_autocast_is_not_used_outside_of_it(model):
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            fast = sp_compile(model, (x_of(8),))
            assert torch.equal(fast(x_of(8))["y"], model(x_of(8))["y"])
        assert torch.equal(fast(x_of(8))["y"], model(x_of(8))["y"])


def test_calls_cost_little(model):
    fast = sp_compile(model, (x_of(8),))
    inputs = {"x": x_of(8), "scale": 1.0, "return_dict": False}
    with torch.no_grad():
        result = fast(**inputs)
        object.__setattr__(fast._current.program, "run", lambda *tensors: result)
        times = []
        for _ in range(300):
            start = time.perf_counter()
            fast(**inputs)
            times.append(time.perf_counter() - start)
    assert min(times) < 50e-6


def python_calls(run):
    """How many Python functions a call of `run` calls."""
    calls = 0

    def seen(frame, event, argument):
        nonlocal calls
        calls += event == "call"

    before = sys.getprofile()
    sys.setprofile(seen)
    try:
        run()
    finally:
        sys.setprofile(before)
    return calls


class ManyArguments(nn.Module):
    def forward(self, x, a=None, b=None, c=None, d=None, e=None, f=None):
        return sum((t for t in (a, b, c, d, e, f) if t is not None), x * 2)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_call_makes_few_python_calls_more_than_the_program_itself(mode):
    """What a time on a busy machine cannot show: no signature is bound, no guard is evaluated twice. A few calls for all, one more per argument."""
    added = []
    for names in ("", "abcdef"):
        inputs = {name: torch.randn(3) for name in ("x", *names)}
        fast = sp_compile(ManyArguments().eval(), inputs, dynamic=False)
        with mode():
            fast(**inputs)
            added.append(python_calls(functools.partial(fast, **inputs)) - python_calls(functools.partial(fast.graph_module.forward, *inputs.values())))
    assert 0 < added[0] <= 16 and added[1] - added[0] <= 6, added



@pytest.mark.parametrize("degrees", [{"ulysses": 0}, {"ring": -1}, {"ulysses": 1.5}, {"ulysses": True}])
def test_degrees_are_checked(model, degrees):
    with pytest.raises(MeshError, match=">= 1"):
        sp_compile(model, (x_of(8),), **degrees)


def test_errors_before_any_work(model):
    with pytest.raises(MeshError, match="torchrun"):
        sp_compile(model, (x_of(8),), ulysses=2)
    with pytest.raises(SignatureError, match="tuple"):
        sp_compile(model, x_of(8))
    with pytest.raises(SignatureError, match="wrong"):
        sp_compile(model, {"x": x_of(8), "wrong": 1})


def compare_over_ranks(ulysses, ring, backend=None, dynamic=False):
    model = randomise(Attention()).eval()
    with torch.no_grad():
        fast = sp_compile(model, (x_of(9),), ulysses=ulysses, ring=ring, backend=backend, dynamic=dynamic)
        return max((fast(x_of(n))["y"] - model(x_of(n))["y"]).abs().max().item() for n in (9, 16, 9))


def nothing_to_shard():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = Pointwise()
        fast = sp_compile(model, (x_of(8),), ulysses=4)
        return [str(w.message) for w in caught if "seqpar" in str(w.filename) or "nothing" in str(w.message)], torch.equal(fast(x_of(8)), model(x_of(8)))


def backward_of_a_split_program():
    fast = sp_compile(randomise(Attention()).eval(), (x_of(8),), ulysses=2, ring=2, dynamic=False)
    out = fast(x_of(8))["y"]
    assert out.requires_grad
    out.sum().backward()


def disagree(what):
    rank = torch.distributed.get_rank()
    model = randomise(Attention()).eval()
    if what == "model" and rank == 1:
        model.extra = nn.Linear(3, 5)
    if what == "heads" and rank == 1:
        model.heads = 2
    if what == "trace" and rank == 2:
        model.out.forward = lambda x: x @ x
    sp_compile(model, (torch.ones(1, 9 if what == "shape" and rank == 3 else 8, 16),), ulysses=2, ring=2, dynamic=False)


def test_four_ranks_agree_with_one(ranks):
    for degrees in ((4, 1), (1, 4), (2, 2)):
        assert max(ranks.run(compare_over_ranks, *degrees)) < 1e-5
    assert max(ranks.run(compare_over_ranks, 2, 2, None, True)) < 1e-5
    assert max(ranks.run(compare_over_ranks, 2, 2, "aot_eager", True, timeout=300)) < 1e-5


def test_nothing_to_shard_is_a_warning(ranks):
    for messages, same in ranks.run(nothing_to_shard):
        assert same and any("nothing to shard" in message for message in messages)


def test_backward_through_a_split_program_is_refused(ranks):
    assert all(isinstance(outcome, UnsupportedError) for outcome in ranks.outcomes(backward_of_a_split_program))


@pytest.mark.parametrize(("what", "text"), [("model", "extra.weight: (5, 3)"), ("shape", "x: (1, 9, 16)"), ("heads", "traced graph"), ("trace", "failed: TraceError")])
def test_different_ranks_are_an_error_everywhere(ranks, what, text):
    start = time.monotonic()
    outcomes = ranks.outcomes(disagree, what)
    assert time.monotonic() - start < 60
    assert all(isinstance(outcome, SeqparError) for outcome in outcomes)
    assert any(isinstance(outcome, DisagreementError) for outcome in outcomes)
    assert any(text in str(outcome) for outcome in outcomes)
    assert what != "trace" or isinstance(outcomes[2], TraceError)


def test_a_compiled_module_says_how_to_copy_it():
    fast = sp_compile(Attention().eval(), (x_of(8),))
    assert copy.copy(fast)(x_of(8))["y"].shape == fast(x_of(8))["y"].shape
    with pytest.raises(UnsupportedError, match="copy the model before compiling it"):
        copy.deepcopy(fast)
    with pytest.raises(UnsupportedError, match="use `seqpar.save`"):
        pickle.dumps(fast)
    for again in (fast, nn.Sequential(fast)):
        with pytest.raises(UnsupportedError, match="compile the model itself, once"):
            sp_compile(again, (x_of(8),))


class WritesToInput(nn.Module):
    def forward(self, x, y):
        x.add_(1)
        return x * y


def test_an_input_that_is_written_to_may_not_be_another_input_too():
    whole = torch.arange(12.0)
    fast = sp_compile(WritesToInput(), (torch.ones(4), torch.ones(4)), dynamic=False)
    apart = whole.clone()
    assert torch.equal(fast(apart[:4], apart[4:8]), (whole[:4] + 1) * whole[4:8]) and torch.equal(apart[:4], whole[:4] + 1)
    for x, y in ((whole[:4], whole[:4]), (whole[2:6], whole[4:8])):
        with pytest.raises(UnsupportedError, match="shares its memory with another input"):
            fast(x, y)


class Rotates(nn.Module):
    def forward(self, x, turns):
        return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * turns).flatten(-2) + turns.imag.sum()


@pytest.mark.parametrize("example", [False, True], ids=["call", "example"])
def test_inputs_that_are_conjugated_when_they_are_read(example):
    x, turns = torch.randn(3, 8), torch.polar(torch.ones(3, 4), torch.randn(3, 4))
    lazy = turns.conj()
    fast = sp_compile(Rotates(), (x, lazy if example else turns), dynamic=False)
    assert lazy.is_conj()
    for given in (lazy, turns):
        torch.testing.assert_close(fast(x, given), Rotates()(x, given))
