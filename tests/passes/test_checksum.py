"""No change of a weight goes unnoticed."""

import pytest
import torch
from torch import nn

from seqpar.passes.checksum import WORDS, weights_checksum


def module(tensor):
    made = nn.Module()
    made.register_buffer("weight", tensor)
    return made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.bool, torch.complex64, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 8 * WORDS + 3])
def test_one_entry(dtype, size):
    weight = torch.randn(size, generator=torch.Generator().manual_seed(0)).mul(9).to(dtype)
    before = weights_checksum(module(weight))
    assert weights_checksum(module(weight.clone())) == before
    for place in {0, size // 2, size - 1}:
        changed = weight.clone()
        changed[place] = ~changed[place] if dtype == torch.bool else changed[place] + 1
        assert weights_checksum(module(changed)) != before


def test_order_shape_and_place():
    weight = torch.randn(6, 10)
    sums = {weights_checksum(module(w)) for w in (weight, weight.flip(0), weight.t(), weight.flatten(), weight.half(), torch.cat([weight, torch.zeros(1, 10)]))}
    assert len(sums) == 6
    assert weights_checksum(module(weight.t().contiguous().t())) == weights_checksum(module(weight))  # strides are no content
    assert weights_checksum(nn.Module()) == weights_checksum(module(torch.empty(3, device="meta"))) != weights_checksum(module(weight))
    one, two = nn.Linear(4, 4), nn.Linear(4, 4)
    assert weights_checksum(nn.ModuleList([one, two])) != weights_checksum(nn.ModuleList([two, one]))
