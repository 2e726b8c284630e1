"""Bytes alive at once."""

import torch
from torch.testing._internal.two_tensor import TwoTensor

from seqpar.passes.live_bytes import LiveBytes


def test_live_bytes_sees_what_is_alive_at_once():
    weight = torch.zeros(1000)
    with LiveBytes([weight]) as live:
        view = weight[:10]
        a = weight + 1
        b = a + 1
        del a
        c = b + view.sum()
        del b, c
        d = weight + 1
        assert d.shape == (1000,)
    assert 8000 <= live.peak <= 8100


def test_tensors_that_wrap_others_are_seen_by_what_they_wrap():
    pair = TwoTensor(torch.zeros(1000), torch.zeros(1000))
    with LiveBytes([pair.a, pair.b]) as live:
        result = pair + 1
        assert result.shape == (1000,)
    assert live.peak == 8000
