"""A link in words, and in place of the ranks' own."""

import importlib.util
import sys
import time

import pytest
import torch
import torch.distributed as dist

from seqpar.errors import SeqparError
from seqpar.runtime.mesh import build_mesh
from seqpar.tools.bench.link import linked, parse_link


@pytest.mark.parametrize(
    ("text", "rate", "delay"), [("1Gbit:50us", 1e9, 50e-6), ("100Mbit", 1e8, 0), ("2.5Gbit:1ms", 2.5e9, 1e-3), ("8kbit:0.5s", 8e3, 0.5), ("9bit:10ns", 9, 1e-8)]
)
def test_rates_and_delays(text, rate, delay):
    assert parse_link(text) == pytest.approx((rate, delay))


@pytest.mark.parametrize("text", ["", "1", "1Gbit:", "1Gbit:50", "0Gbit", "-1Gbit", "1GB:50us", "1Gbit:50us:1"])
def test_others_are_refused(text):
    with pytest.raises(SeqparError, match="1Gbit:50us"):
        parse_link(text)


def exchange_twice():
    before = dist.get_backend()
    with linked((8e6, 0.05)):  # a megabyte per second
        group = build_mesh(2, 1, device_type="cpu").groups["ulysses"]
        x = torch.arange(4.0) + 10 * dist.get_rank()
        dist.barrier()
        started = time.monotonic()
        received = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_to_all_single(x, [2, 2], [2, 2], group))
        small = time.monotonic() - started
        started = time.monotonic()
        dist.all_gather([torch.empty(50_000) for _ in range(2)], torch.zeros(50_000))
        large = time.monotonic() - started
    total = torch.ones(1)
    dist.all_reduce(total)
    return received.tolist(), small, large, total.item(), before == dist.get_backend()


@pytest.mark.skipif(importlib.util.find_spec("seqpar.tools.slow_link") is None, reason="seqpar.tools.slow_link is not there")
def test_collectives_of_the_block_take_their_time(two_ranks):
    for rank, (received, small, large, total, same) in enumerate(two_ranks.run(exchange_twice)):
        assert received == [2.0 * rank, 2.0 * rank + 1, 10.0 + 2 * rank, 11.0 + 2 * rank]
        assert small >= 0.05 and large >= 0.05 + 0.2 and total == 2 and same


def test_without_a_link_nothing_changes():
    with linked(None):
        assert not dist.is_initialized()


def test_a_link_that_is_not_to_be_had_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "seqpar.tools.slow_link", None)
    with pytest.raises(SeqparError, match="needs seqpar.tools.slow_link"), linked((1e9, 0.0)):
        pass
