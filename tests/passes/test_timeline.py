"""Predicted seconds by hand: a clock for computing, one link for what travels."""

import math

import pytest
import torch
from torch import fx, nn

from seqpar.partitioner.cost import Machine
from seqpar.passes.count import Counts, count
from seqpar.passes.schedule import schedule
from seqpar.passes.timeline import timeline
from seqpar.runtime.counting import KINDS, Traffic
from seqpar.runtime.layout import finish_gather, gather, start_gather
from seqpar.runtime.ring import ring_attention

aten = torch.ops.aten
MACHINE = Machine(flops_per_s=100.0, bytes_per_s=10.0, latency_s=0.5)


def traffic(**kinds):
    """Of (bytes, calls) by kind."""
    return Traffic(*({kind: kinds.get(kind, (0, 0))[i] for kind in KINDS} for i in (0, 1)))


def program(*lines):
    """The nodes of a made-up program: "work"s, whole "call"s, "start"s and "finish"es of calls, by name."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    started = {}
    for kind, name in (line.split() for line in lines):
        if kind == "start":
            started[name] = graph.create_node("call_function", start_gather, (x, 0, ()), {"group": "sp"}, name=f"{name}_wire")
        elif kind == "finish":
            graph.create_node("call_function", finish_gather, (started[name], x, 0, ()), {"group": "sp"}, name=name)
        else:
            target = {"work": aten.relu.default, "call": gather, "ring": ring_attention}[kind]
            graph.create_node("call_function", target, (x,), {}, name=name)
    graph.output(x)
    return graph.nodes


def test_what_is_behind_work_is_not_waited_for():
    counts = Counts(flops={"before": 200, "between": 300, "after": 100}, received={"moved": traffic(all_to_all=(45, 1))})  # 5 s on the wire
    partly = timeline(program("work before", "start moved", "work between", "finish moved", "work after"), counts, MACHINE)
    assert (partly.total, partly.compute) == (2 + 5 + 1, 6.0) and partly.wire["all_to_all"] == 5.0
    assert partly.exposed["all_to_all"] == 2.0 and partly.hidden == {**dict.fromkeys(KINDS, 0.0), "all_to_all": 3.0}
    assert partly.spent == {"before": 2.0, "between": 3.0, "moved": 2.0, "after": 1.0}
    assert partly.to_dict() == {"compute": 6.0, **dict.fromkeys(KINDS, 0.0), "all_to_all": 5.0, "hidden": 3.0, "total": 8.0}
    counts.flops["between"] = 700
    fully = timeline(program("work before", "start moved", "work between", "finish moved", "work after"), counts, MACHINE)
    assert fully.total == fully.compute == 10.0 and fully.hidden["all_to_all"] == 5.0 and not any(fully.exposed.values())


def test_without_work_in_between_nothing_is_hidden():
    counts = Counts(flops={"before": 200, "after": 300}, received={"moved": traffic(all_to_all=(45, 1)), "more": traffic(all_gather=(30, 2))})
    for lines in (("call moved", "call more"), ("start moved", "finish moved", "start more", "finish more")):
        found = timeline(program("work before", *lines, "work after"), counts, MACHINE)
        assert found.total == 2 + 5 + 4 + 3 and found.exposed == found.wire and not any(found.hidden.values())


def test_there_is_one_link():
    """The second of two that start together is sent behind the first; whichever is finished first, waiting for it is waiting for the first as well."""
    counts = Counts(flops={"between": 100}, received={"one": traffic(all_to_all=(15, 1)), "two": traffic(all_gather=(25, 1))})  # 2 s and 3 s
    for last in (("finish one", "finish two"), ("finish two", "finish one")):
        found = timeline(program("start one", "start two", "work between", *last), counts, MACHINE)
        assert found.total == 5.0 and found.exposed == {**dict.fromkeys(KINDS, 0.0), "all_to_all": 1.0, "all_gather": 3.0}


def test_blocks_of_a_ring_travel_behind_attention():
    counts = Counts(flops={"ring": 400}, received={"ring": traffic(ring=(20, 1))})
    found = timeline(program("ring ring"), counts, MACHINE)
    assert found.wire["ring"] == 2.5 and found.hidden["ring"] == 2.0  # of two blocks, the attention of one (half of 4 s) covers the journey of the other
    assert found.total == pytest.approx(2.5 + 2.0) and found.spent == {"ring": found.total}
    counts = Counts(flops={"ring": 4000}, received={"ring": traffic(ring=(20, 3))})
    found = timeline(program("ring ring"), counts, MACHINE)
    assert found.hidden["ring"] == pytest.approx(3.5) and found.total == pytest.approx(40.0)
    # What dealing the positions out takes is before the ring, and nothing is behind it; an exchange in flight keeps the first block waiting.
    counts = Counts(flops={"ring": 400}, received={"ring": traffic(ring=(20, 1), all_to_all=(10, 2)), "moved": traffic(all_gather=(35, 1))})
    assert timeline(program("ring ring"), counts, MACHINE).total == pytest.approx(2.0 + 4.5)
    assert timeline(program("start moved", "ring ring", "finish moved"), counts, MACHINE).total == pytest.approx(4.0 + 2.0 + 4.5)


class Chain(nn.Module):
    """A gathered product, and products that do not need it."""

    def __init__(self, behind):
        super().__init__()
        graph = fx.Graph()
        x, w = graph.placeholder("x"), graph.placeholder("w")
        x = graph.call_function(aten.slice.Tensor, (graph.call_function(aten.repeat.default, (x, [64, 1])), 0, 0, 8))  # memory beside which buffers are small
        first = graph.call_function(aten.mm.default, (x, w))
        whole = graph.call_function(gather, (first, 0, ((8, 8),)), {"group": "sp"})
        other = x
        for _ in range(behind):
            other = graph.call_function(aten.mm.default, (other, w))
        graph.output((graph.call_function(aten.mm.default, (whole, w)), other))
        self.gm = fx.GraphModule(self, graph)


@pytest.mark.parametrize(("behind", "hidden"), [(0, 0.0), (1, 2.0), (2, 4.0), (3, 4.0)])
def test_a_scheduled_chain(behind, hidden):
    """x [8, 4] @ w [4, 4] of 4 bytes: 256 operations, 2 s each; 128 bytes received, 3 s and 1 s of delay."""
    machine = Machine(flops_per_s=128.0, bytes_per_s=128 / 3, latency_s=1.0)
    gm = Chain(behind).gm
    counts = count(gm, [torch.ones(8, 4), torch.ones(4, 4)], ulysses=2, ring=1, rank=0)
    scheduled = schedule(gm, counts, machine)
    assert (scheduled is gm) == (not behind)
    found = timeline(scheduled.graph.nodes, counts, machine)
    assert sum(found.hidden.values()) == pytest.approx(hidden)
    assert found.compute == 2.0 * (1 + behind + 2) and found.total == pytest.approx(found.compute + 4.0 - hidden)
    assert sum(found.spent.values()) == pytest.approx(found.total)


def test_a_perfect_link_costs_nothing():
    machine = Machine(flops_per_s=128.0, bytes_per_s=math.inf, latency_s=0.0)
    gm = Chain(2).gm
    counts = count(gm, [torch.ones(8, 4), torch.ones(4, 4)], ulysses=2, ring=1, rank=0)
    for one in (gm, schedule(gm, counts, MACHINE)):
        found = timeline(one.graph.nodes, counts, machine)
        assert found.total == found.compute == 10.0 and not any((*found.wire.values(), *found.exposed.values(), *found.hidden.values()))
