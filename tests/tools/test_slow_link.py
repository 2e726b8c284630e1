"""Collectives over a slow link: the same results, later, and without the processor."""

import time

import pytest
import torch
import torch.distributed as dist

from seqpar.runtime.groups import all_reduce, start_all_gather, start_all_to_all, start_ring_exchange, wait
from seqpar.tools.slow_link import slow_gloo

LATENCY, BANDWIDTH = 0.05, 1e6


def results(group, me, size):
    name = group.group_name
    parts = [torch.empty(2) for _ in range(size)]
    dist.all_gather(parts, torch.full((2,), float(me)), group=group)
    total, said = torch.ones(3) * me, [None] * size
    dist.all_reduce(total, group=group)
    dist.all_gather_object(said, {"rank": me}, group=group)
    there = torch.empty(1)
    neighbours = [dist.P2POp(dist.irecv, there, dist.get_global_rank(group, (me - 1) % size), group), dist.P2POp(dist.isend, torch.ones(1) * me, dist.get_global_rank(group, (me + 1) % size), group)]
    for work in dist.batch_isend_irecv(neighbours):
        work.wait()
    dist.barrier(group=group)
    flat = torch.arange(float(sum(range(1, size + 1)))) + 100 * me
    return [
        torch.stack(parts), total, torch.tensor([x["rank"] for x in said]), there,
        wait(start_all_to_all(flat, [me + 1] * size, list(range(1, size + 1)), name)),
        wait(start_ring_exchange(torch.ones(me) * me, (me - 1) % size, name)),
        wait(start_all_gather(torch.ones(2) * me, name)),
        all_reduce(torch.ones(2) * me, "sum", name),
    ]  # fmt: skip


def on_a_rank():
    size, me = dist.get_world_size(), dist.get_rank()
    plain = dist.new_group(backend="gloo")
    slow = dist.new_group(backend=slow_gloo(latency_s=LATENCY, bytes_per_s=BANDWIDTH))
    same = [torch.equal(a, b) for a, b in zip(results(plain, me, size), results(slow, me, size), strict=True)]
    dist.barrier(group=plain)
    clock, cpu = time.monotonic(), time.process_time()
    n = 50_000 // (size - 1)  # 0.2 s to and from the others
    flat = torch.ones(n * size)
    pending = start_all_to_all(flat, [n] * size, [n] * size, slow.group_name)
    started = time.monotonic() - clock
    again = start_all_to_all(flat, [n] * size, [n] * size, slow.group_name)  # waits for the link, not for the first one to arrive
    right = wait(pending).sum().item() == n * size
    first = time.monotonic() - clock
    wait(again)
    return all(same), right, started, first, time.monotonic() - clock, time.process_time() - cpu


def test_the_same_results_after_the_stated_time(two_ranks):
    for same, right, started, first, both, cpu in two_ranks.run(on_a_rank):
        assert same and right
        assert started < 0.5 * LATENCY, "a start returns at once"
        assert 0.25 <= first < 0.25 + 0.15 and 0.45 <= both < 0.45 + 0.2
        assert cpu < 0.1, "waiting takes no processor time"


def test_a_link_is_checked():
    with pytest.raises(ValueError, match="bytes_per_s > 0"):
        slow_gloo(latency_s=0, bytes_per_s=0, name="no_link")
    with pytest.raises(ValueError, match="exists already"):
        slow_gloo(latency_s=0, bytes_per_s=1, name="gloo")
