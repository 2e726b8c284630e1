"""diffusers' hooks on simulated ranks: right plans reproduce the model, wrong ones do not, and the model stays as it was."""

import pytest
import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput
from torch import nn

from seqpar.errors import UnsupportedError
from seqpar.hooked import _attend, _attend_over, has_context_parallelism, run_hooked, twin, without_constants
from seqpar.runtime.simulate import SimulatedWorld
from seqpar.tools.coverage_cases import all_cases
from seqpar.verification import difference


@pytest.fixture(scope="module")
def flux():
    case = next(case for case in all_cases() if case.name == "FluxTransformer2DModel")
    model, inputs = case.build(), case.inputs("even")
    with torch.no_grad():
        return model, inputs, model(**inputs)[0]


@pytest.mark.parametrize("degrees", [{"ulysses": 2}, {"ring": 2}, {"ulysses": 2, "ring": 2}])
def test_the_plan_a_class_ships_reproduces_it(flux, degrees):
    model, inputs, expected = flux
    for (out,) in run_hooked(model, (), inputs, model._cp_plan, **degrees):
        assert difference(out, expected)[1] < 1e-5
    assert expected.std() > 0.01


def test_a_plan_that_forgets_positions_fails(flux):
    model, inputs, _ = flux
    plan = {**model._cp_plan, "": {k: v for k, v in model._cp_plan[""].items() if k != "img_ids"}}
    with pytest.raises(RuntimeError, match="must match the size"):
        run_hooked(model, (), inputs, plan, ulysses=2)


def test_a_plan_that_leaves_text_whole_computes_something_else(flux):
    model, inputs, expected = flux
    plan = {**model._cp_plan, "": {k: v for k, v in model._cp_plan[""].items() if k in ("hidden_states", "img_ids")}}
    (out,), _ = run_hooked(model, (), inputs, plan, ulysses=2)
    assert out.shape == expected.shape and difference(out, expected)[1] > 1e-3


def test_the_model_is_left_as_it_was(flux):
    model, inputs, expected = flux
    with torch.no_grad():
        assert torch.equal(model(**inputs)[0], expected)
    assert model._parallel_config is None
    assert not any(hasattr(module, "_diffusers_hook") for module in model.modules())


def test_lengths_and_shapes_are_checked_on_meta(flux):
    model, inputs, expected = flux
    meta = {k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    (out,), _ = run_hooked(twin(model).to("meta"), (), meta, model._cp_plan, ulysses=2)
    assert out.device.type == "meta" and out.shape == expected.shape
    with pytest.raises(AssertionError, match="8 of .* over 3"):
        run_hooked(model, (), inputs, {"": {"encoder_hidden_states": ContextParallelInput(1)}, "proj_out": ContextParallelOutput(1)}, ring=3)


def exchange(mask=None, ranks=2, **degrees):
    """`_attend_over` on parts of 8 positions, beside attention on the whole."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 1, 8, 4, 6).unbind()

    def work(rank):
        def part(x, dim):
            return x.chunk(ranks, dim)[rank]

        own = None if mask is None else part(mask, mask.dim() - 1)
        return lambda groups: _attend_over(groups, degrees.get("ulysses", 1), degrees.get("ring", 1), part(q, 1), part(k, 1), part(v, 1), own)

    found = torch.cat(SimulatedWorld(degrees.get("ulysses", 1), degrees.get("ring", 1)).run([work(r) for r in range(ranks)]), 1)
    return found, _attend(q, k, v, mask)


def test_masks_of_one_row_are_gathered():
    found, expected = exchange(torch.tensor([[[[True] * 5 + [False] * 3]]]), ulysses=2)
    assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("mask", "degrees", "words"),
    [(torch.ones(1, 1, 1, 8, dtype=torch.bool), {"ring": 2}, "no masks"), (torch.ones(1, 4, 1, 8, dtype=torch.bool), {"ulysses": 2}, "4 heads does not fit"), (None, {"ulysses": 3}, "not divided by ulysses=3")],
)
def test_what_diffusers_refuses_is_refused(mask, degrees, words):
    with pytest.raises(UnsupportedError, match=words):
        exchange(mask, ranks=max(degrees.values()), **degrees)


def test_constant_parameters_are_random_in_a_comparison():
    model = nn.LayerNorm(8)
    other = without_constants(model)
    assert other.weight.std() > 0.03 and other.bias.std() > 0.03
    assert bool((model.weight == 1).all())
    assert twin(model).weight is model.weight and not has_context_parallelism(model)
