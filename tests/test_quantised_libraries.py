"""Checkpoints that diffusers loads quantised, by the libraries that are installed: `pip install torchao optimum-quanto gguf bitsandbytes`."""

import importlib

import numpy as np
import pytest
import torch
from torch import nn

import seqpar
from seqpar.models import registry
from seqpar.models.randomise import randomise


def config_of(kind):
    from diffusers import QuantoConfig, TorchAoConfig

    def torchao(name):
        return TorchAoConfig(getattr(importlib.import_module("torchao.quantization"), name)())

    return {
        "torchao int8": lambda: torchao("Int8WeightOnlyConfig"),
        "torchao float8": lambda: torchao("Float8WeightOnlyConfig"),
        "torchao int8, activations too": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
        "quanto int8": lambda: QuantoConfig("int8"),
        "quanto float8": lambda: QuantoConfig("float8"),
        "quanto int4": lambda: QuantoConfig("int4"),
    }[kind]()


KINDS = ("torchao int8", "torchao float8", "torchao int8, activations too", "quanto int8", "quanto float8", "quanto int4")


def plain():
    torch.manual_seed(0)
    return randomise(registry.get("flux").build()).eval()


def check(model, rounds=False):
    """Right on 4 ranks, and as parallel as the model in float32; returns the report. rounds: the library rounds activations, so that their last bits may decide more."""
    inputs = registry.get("flux").example_inputs(height=64, width=64)
    with torch.no_grad():
        assert model(**inputs)[0].std() > 1e-3
    report = seqpar.verify(model, inputs, ulysses=2, ring=2)
    assert report.plan.sharded_flop_fraction == pytest.approx(seqpar.plan(plain(), inputs, ulysses=2, ring=2).sharded_flop_fraction)
    assert report.ok or (rounds and report.max_rel_err < 3 * report.rounding < 0.05), report
    return report


@pytest.mark.parametrize("kind", KINDS)
def test_from_pretrained(kind, tmp_path):
    pytest.importorskip("torchao" if "torchao" in kind else "optimum.quanto")
    model = plain()
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, quantization_config=config_of(kind), torch_dtype=torch.float32).eval()
    report = check(loaded, rounds="activations" in kind)
    assert report.plan.inspector.memory.parameters < 0.7 * seqpar.plan(model, registry.get("flux").example_inputs(height=64, width=64), ulysses=2).inspector.memory.parameters


@pytest.mark.parametrize("quantisation", ["Q8_0", "Q4_0", "Q5_1"])
def test_gguf(quantisation):
    gguf = pytest.importorskip("gguf")
    from diffusers.quantizers.gguf.utils import GGUFParameter, _replace_with_gguf_linear

    kind = gguf.GGMLQuantizationType[quantisation]
    model = plain()
    weights = {f"{path}.weight": layer.weight for path, layer in model.named_modules() if isinstance(layer, nn.Linear) and layer.in_features % 32 == 0}
    packed = {path: GGUFParameter(torch.from_numpy(np.ascontiguousarray(gguf.quants.quantize(weight.detach().numpy(), kind))), quant_type=kind) for path, weight in weights.items()}
    rest = {path: weight for path, weight in model.state_dict().items() if path not in packed}
    _replace_with_gguf_linear(model, torch.float32, {**rest, **packed})
    for path, weight in packed.items():
        model.get_submodule(path.removesuffix(".weight")).weight = weight
    model.load_state_dict({path: weight for path, weight in rest.items()}, strict=False, assign=True)
    assert len(packed) > 20
    check(model)


def with_layers_of(make):
    """The model with layers of bitsandbytes in its blocks; its own loading needs a GPU."""
    model = plain()
    for path, layer in [item for item in model.named_modules() if isinstance(item[1], nn.Linear) and "blocks" in item[0]]:
        new = make(layer)
        new.load_state_dict(layer.state_dict())
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new.to("cpu"))
    return model.eval()


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes(nested):
    layers = pytest.importorskip("bitsandbytes").nn
    check(with_layers_of(lambda layer: layers.Linear4bit(layer.in_features, layer.out_features, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=nested)), rounds=True)


def test_weights_that_are_exchanged_in_a_call_are_refused():
    layers = pytest.importorskip("bitsandbytes").nn
    model = with_layers_of(lambda layer: layers.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=False))
    with pytest.raises(seqpar.SeqparError, match=r"\.data = "):
        seqpar.plan(model, registry.get("flux").example_inputs(height=64, width=64), ulysses=2)
