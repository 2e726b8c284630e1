"""Random weights: reproducible, and no part of the model is idle."""

import pytest
import torch
from torch import nn

from seqpar.models import registry
from seqpar.models.family import output_tensors
from seqpar.models.randomise import randomise


def _flat(model, inputs):
    with torch.no_grad():
        return output_tensors(model(**inputs))[0]


def _change_first_token(inputs):
    """The same inputs with the first image token moved, and where the last token sits in the output."""
    changed = dict(inputs)
    key = next(key for key in ("x", "x_t", "hidden_states") if key in inputs)
    value = changed[key][0].clone() if isinstance(changed[key], list) else changed[key].clone()
    channels_last = value.dim() == 2 or (value.dim() == 3 and key == "hidden_states")
    if channels_last:
        (value[0] if value.dim() == 2 else value[:, 0]).add_(1)
    else:
        value[..., :2, :2] += 1
    changed[key] = [value, *inputs[key][1:]] if isinstance(inputs[key], list) else value
    last = (lambda out: out[..., -1, :]) if channels_last else (lambda out: out[..., -2:, -2:])
    return changed, last


@pytest.mark.parametrize("name", registry.names())
@pytest.mark.parametrize("rows, columns", [(5, 7), (16, 16)])
def test_output_is_alive_and_far_tokens_matter(name, rows, columns):
    family = registry.get(name)
    model = randomise(family.build())
    inputs = family.grid_inputs(rows=rows, columns=columns)
    changed, last = _change_first_token(inputs)
    out, moved = _flat(model, inputs), _flat(model, changed)
    assert 0.5 < out.std() < 3
    assert (last(moved) - last(out)).norm() / last(out).norm() > 1e-3


# The last block's text stream ends where nobody reads it; BAGEL's markers likewise.
NEVER_READ = {
    "qwen-image": ("transformer_blocks.1.attn.add_q", "transformer_blocks.1.attn.norm_added_q", "transformer_blocks.1.attn.to_add_out", "transformer_blocks.1.txt_mlp"),
    "sd3": ("transformer_blocks.1.attn.add_q", "transformer_blocks.1.attn.norm_added_q"),
    "bagel": ("layers.1.und.q_", "layers.1.und.o_proj", "layers.1.und.mlp", "norm_und"),
}


@pytest.mark.parametrize("name", registry.names())
def test_every_parameter_matters(name):
    family = registry.get(name)
    model = randomise(family.build()).requires_grad_(True)
    times = 2 if family.frames_per_token > 1 else 1
    inputs = family.grid_inputs(rows=3, columns=5, times=times)
    sum(out.square().sum() for out in output_tensors(model(**inputs))).backward()
    idle = {key for key, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert not {key for key in idle if not key.startswith(NEVER_READ.get(name, ()))}


def test_values_depend_on_name_and_seed_only():
    class One(nn.Module):
        def __init__(self, extra: bool) -> None:
            super().__init__()
            if extra:
                self.before = nn.Linear(3, 3)
            self.linear = nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)

    first, second, other = randomise(One(True), 1), randomise(One(False), 1), randomise(One(False), 2)
    assert torch.equal(first.linear.weight, second.linear.weight)
    assert not torch.equal(first.linear.weight, other.linear.weight)
    assert (first.norm.weight - 1).abs().max() < 0.6
    assert randomise(nn.Linear(2, 2, device="meta")).weight.is_meta
