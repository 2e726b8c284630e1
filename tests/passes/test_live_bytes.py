"""Bytes alive at once."""

import torch

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
