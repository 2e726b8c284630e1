"""Models whose weights are made where they are used."""

import pytest
import torch

from seqpar.errors import SeqparError
from seqpar.models import registry
from seqpar.tools.bench.weights import build_full, full_case, parameters_on_meta


def test_parameters_take_no_memory_until_they_are_filled():
    with parameters_on_meta():
        layer = torch.nn.Linear(4, 4)
        norm = torch.nn.BatchNorm1d(4)
        layer.bias = layer.weight  # tied
    assert layer.weight.is_meta and not norm.running_mean.is_meta and layer.bias is layer.weight
    assert not torch.nn.Linear(4, 4).weight.is_meta


def test_a_model_has_all_its_weights_in_the_wanted_dtype():
    family = registry.get("pattern-rope")
    model = build_full(family, family.tiny, torch.device("cpu"), torch.bfloat16)
    plain = family.build(dtype=torch.bfloat16)
    assert {n: (p.shape, p.dtype, p.device) for n, p in model.named_parameters()} == {n: (p.shape, p.dtype, p.device) for n, p in plain.named_parameters()}
    assert all(p.float().std() > 0 for p in model.parameters() if p.numel() > 1)


def test_a_case_by_name():
    title, model, inputs = full_case("tiny:pattern-rope", "64x128", torch.device("cpu"), torch.float32)
    assert title == "tiny:pattern-rope at 64x128" and not model.training
    with torch.no_grad():
        assert torch.isfinite(model(**inputs)).all() and inputs["hidden_states"].shape[1] == 32
    with pytest.raises(SeqparError, match="full:NAME or tiny:NAME"):
        full_case("flux", None, torch.device("cpu"), torch.float32)
    with pytest.raises(SeqparError, match="multiples of"):
        full_case("tiny:pattern-rope", "65x64", torch.device("cpu"), torch.float32)
