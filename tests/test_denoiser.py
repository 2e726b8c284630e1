"""The stand-in for a model inside a pipeline."""

import contextlib

import pytest
import torch

from seqpar.tools.compile_on_first_call import CompileOnFirstCall


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        self.config = {"in_channels": 4}
        self.contexts = []

    @property
    def dtype(self):
        return self.linear.weight.dtype

    @contextlib.contextmanager
    def cache_context(self, name):
        self.contexts.append(name)
        yield

    def forward(self, x, guidance=None, sizes=(), return_dict=True, **kwargs):
        y = self.linear(x[0] if isinstance(x, list) else x)
        return y if guidance is None else y + guidance


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def compiled(model):
    """The stand-in, and the inputs of each compilation."""
    calls = []

    def compile_model(given, inputs):
        assert given is model
        calls.append(inputs)
        return given

    return CompileOnFirstCall(model, compile_model), calls


def test_compiles_once_per_structure(compiled, model):
    stand_in, calls = compiled
    x = torch.randn(2, 4)
    assert torch.equal(stand_in(x, return_dict=False), model(x))
    stand_in(x=torch.randn(7, 4), return_dict=True)  # another length, another value: the program's own business
    assert len(calls) == 1 and list(calls[0]) == ["x", "guidance", "sizes", "return_dict"]
    stand_in(x, guidance=torch.ones(1), return_dict=False)
    assert len(calls) == 2
    stand_in(x, guidance=None)  # a default, given or not, is the same
    assert len(calls) == 2
    stand_in([x], return_dict=False)
    stand_in([x, x], return_dict=False)
    stand_in([x], return_dict=False)
    assert len(calls) == 4 == len(stand_in.programs)


def test_var_keywords_are_flattened_and_wrong_arguments_refused(compiled):
    stand_in, calls = compiled
    stand_in(torch.zeros(1, 4), extra=3)
    assert calls[0]["extra"] == 3 and "kwargs" not in calls[0]
    with pytest.raises(TypeError, match="missing"):
        stand_in()


def test_everything_else_is_the_models(compiled, model):
    stand_in, _ = compiled
    assert stand_in.config is model.config and stand_in.dtype == torch.float32
    with stand_in.cache_context("cond"):
        pass
    assert model.contexts == ["cond"]
    assert stand_in.state_dict().keys() == model.state_dict().keys()
    assert [name for name, _ in stand_in.named_parameters()] == ["linear.weight", "linear.bias"]
    stand_in.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    with pytest.raises(AttributeError, match="nonsense"):
        _ = stand_in.nonsense
