"""A model inside a pipeline: compiled per structure of its calls, again when it changed, and put in place without replacing it."""

import inspect
from types import SimpleNamespace

import pytest
import torch

from seqpar.denoiser import Denoiser, forward_replaced, refuse_offloaded_parts, state_of
from seqpar.errors import UnsupportedError


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.scaling = {"adapter": 1.0}
        self.table = torch.zeros(3)

    def forward(self, x, guidance=None, sizes=(), return_dict=True, **kwargs):
        y = self.linear(x[0] if isinstance(x, list) else x) * self.scaling["adapter"]
        return y if guidance is None else y + guidance


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def denoiser(model):
    """A denoiser, the inputs of each compilation, and a function that calls it."""
    calls = []

    def compile_model(given, inputs):
        assert given is model
        calls.append(inputs)
        return given

    made = Denoiser(model, compile_model)
    return SimpleNamespace(it=made, compiled=calls, call=lambda *args, **kwargs: made.run(made.bind(args, kwargs)))


def test_compiles_once_per_structure(denoiser, model):
    x = torch.randn(2, 4)
    assert torch.equal(denoiser.call(x, return_dict=False), model(x))
    denoiser.call(x=torch.randn(7, 4), return_dict=True)  # another length, another value: the program's own business
    assert len(denoiser.compiled) == 1 and list(denoiser.compiled[0]) == ["x", "guidance", "sizes", "return_dict"]
    denoiser.call(x, guidance=torch.ones(1), return_dict=False)
    assert len(denoiser.compiled) == 2
    denoiser.call(x, guidance=None)  # a default, given or not, is the same
    assert len(denoiser.compiled) == 2
    denoiser.call([x], return_dict=False)
    denoiser.call([x, x], return_dict=False)
    denoiser.call([x], return_dict=False)
    assert len(denoiser.compiled) == 4 == len(denoiser.it.programs)


def test_var_keywords_are_flattened_and_wrong_arguments_refused(denoiser):
    denoiser.call(torch.zeros(1, 4), extra=3)
    assert denoiser.compiled[0]["extra"] == 3 and "kwargs" not in denoiser.compiled[0]
    with pytest.raises(TypeError, match="missing"):
        denoiser.call()


def change_scale(model):
    model.scaling["adapter"] = 0.5


def add_layer(model):
    model.linear = torch.nn.Sequential(model.linear, torch.nn.Identity())


def replace_weight(model):
    model.linear.weight = torch.nn.Parameter(torch.zeros(4, 4))


def train(model):
    model.train(not model.training)


@pytest.mark.parametrize("change", [change_scale, add_layer, replace_weight, train])
def test_a_changed_model_is_compiled_again(denoiser, model, change):
    x = torch.ones(1, 4)
    denoiser.call(x)
    model.linear.weight.data.mul_(2)  # values of weights are read at every call
    denoiser.call(x)
    assert len(denoiser.compiled) == 1
    change(model)
    assert torch.equal(denoiser.call(x), model(x))
    assert len(denoiser.compiled) == 2 and len(denoiser.it.programs) == 1


def test_what_compiling_leaves_on_the_model_is_no_change(model):
    def compile_model(given, inputs):
        given.length_seen = 7
        return given

    denoiser = Denoiser(model, compile_model)
    denoiser.run({"x": torch.ones(1, 4)})
    (program,) = denoiser.programs
    denoiser.run({"x": torch.ones(2, 4)})
    assert denoiser.programs == [program]
    assert state_of(model) == denoiser._state


def test_forward_is_replaced_in_place_and_put_back(model):
    def make(plain):
        return lambda *args, **kwargs: -plain(*args, **kwargs)

    x = torch.ones(1, 4)
    expected, signature = model(x), inspect.signature(model.forward)
    with forward_replaced(model, make):
        assert torch.equal(model(x), -expected)
        with forward_replaced(model, make):
            assert torch.equal(model(x), expected)
        assert torch.equal(model(x), -expected)
    assert torch.equal(model(x), expected) and "forward" not in vars(model) and inspect.signature(model.forward) == signature


def test_within_an_offloading_hook(model):
    hooks = pytest.importorskip("accelerate.hooks")

    class AddOne(hooks.ModelHook):
        def post_forward(self, module, output):
            return output + 1

    x = torch.ones(1, 4)
    expected = model(x)
    hooks.add_hook_to_module(model, AddOne())
    refuse_offloaded_parts(model)
    with forward_replaced(model, lambda plain: lambda *args, **kwargs: -plain(*args, **kwargs)):
        assert torch.allclose(model(x), 1 - expected)
    assert torch.allclose(model(x), 1 + expected)
    hooks.add_hook_to_module(model.linear, AddOne())
    with pytest.raises(UnsupportedError, match="linear.*enable_model_cpu_offload"):
        refuse_offloaded_parts(model)
