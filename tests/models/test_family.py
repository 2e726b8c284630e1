"""Configurations and inputs of every family: they run, at every size, in every precision, and on meta at full size."""

import pytest
import torch

from seqpar.models import registry
from seqpar.models.family import Request, output_tensors
from seqpar.models.randomise import randomise

# Billions of parameters of the published transformers (BAGEL: without its ViT and language head).
PUBLISHED_SIZE = {
    "flux": 11.90,
    "qwen-image": 20.43,
    "wan": 14.29,
    "wan-ti2v": 5.00,
    "z-image": 6.15,
    "longcat-image": 6.27,
    "sd3": 8.06,
    "ltx-video": 1.92,
    "hunyuan-video": 12.82,
    "bagel": 13.63,
}
MASKS = {"qwen-image": "encoder_hidden_states_mask", "ltx-video": "encoder_attention_mask", "hunyuan-video": "encoder_attention_mask"}


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("heads", [3, 4, 6])
def test_tiny_models_run_with_any_head_count_at_odd_and_even_lengths(name, heads):
    family = registry.get(name)
    config = family.tiny_config(heads=heads, layers=1)
    model = randomise(family.build(config))
    times = 3 if family.frames_per_token > 1 else 1
    for size in (dict(rows=2, columns=4), dict(rows=3, columns=5, times=times, batch=2, text_len=9, pad_text=3)):
        inputs = family.grid_inputs(config, **size)
        with torch.no_grad():
            first, second = (output_tensors(model(**inputs)) for _ in range(2))
        assert all(out.isfinite().all() and torch.equal(out, again) for out, again in zip(first, second, strict=True))


@pytest.mark.parametrize("name", registry.names())
def test_low_precision_and_1024_tokens(name):
    family = registry.get(name)
    model = randomise(family.build(dtype=torch.bfloat16))
    with torch.no_grad():
        out = output_tensors(model(**family.grid_inputs(rows=32, columns=32, dtype=torch.bfloat16)))
    assert all(tensor.dtype == torch.bfloat16 and tensor.isfinite().all() for tensor in out)


@pytest.mark.parametrize("name", registry.names())
def test_full_size_runs_on_meta_at_native_resolution(name):
    family = registry.get(name)
    model = family.build(family.full, device="meta", dtype=torch.bfloat16)
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert billions == pytest.approx(PUBLISHED_SIZE.get(name, billions), abs=0.01)
    with torch.no_grad():
        out = output_tensors(model(**family.native_inputs(device="meta", dtype=torch.bfloat16)))
    assert all(tensor.device.type == "meta" for tensor in out)


@pytest.mark.parametrize("name", sorted(MASKS))
def test_masked_text_positions_do_not_matter(name):
    family = registry.get(name)
    model = randomise(family.build())
    inputs = family.grid_inputs(rows=2, columns=3, text_len=8, pad_text=3)
    assert inputs[MASKS[name]].sum() == 5
    changed = {**inputs, "encoder_hidden_states": inputs["encoder_hidden_states"].clone()}
    changed["encoder_hidden_states"][:, 5:] += 1
    with torch.no_grad():
        torch.testing.assert_close(model(**changed)[0], model(**inputs)[0])


def test_inputs_repeat_with_the_seed_and_differ_without():
    family = registry.get("flux")
    one, same, other = (family.grid_inputs(rows=2, columns=2, seed=seed)["hidden_states"] for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_layers_keep_the_published_proportion():
    flux = registry.get("flux")
    config = flux.with_layers(flux.full, 57)
    assert (config["num_layers"], config["num_single_layers"]) == (19, 38)
    assert registry.get("wan").with_layers({"num_layers": 40}, 10) == {"num_layers": 10}


def test_return_dict_gives_the_models_own_output_type():
    family = registry.get("flux")
    out = family.build()(**family.grid_inputs(rows=2, columns=2, return_dict=True))
    assert out.sample is output_tensors(out)[0]


def test_precision_exceptions_of_a_class_are_kept():
    model = registry.get("wan").build(dtype=torch.bfloat16)
    assert model.scale_shift_table.dtype == torch.float32
    assert model.proj_out.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("wrong", [dict(height=40, width=32), dict(height=32, width=32, frames=3)])
def test_sizes_that_no_token_grid_covers_are_refused(wrong):
    with pytest.raises(ValueError, match="multiple"):
        registry.get("wan").example_inputs(**wrong)


def test_request_refuses_nonsense():
    with pytest.raises(ValueError, match="sizes must be >= 1"):
        Request(height=16, width=16, batch=0)
    with pytest.raises(ValueError, match="pad_text"):
        Request(height=16, width=16, text_len=4, pad_text=4)
