"""Ranks that run by turns in this process: their kernels are the real ones, and what is predicted comes from what was counted."""

import dataclasses
import logging

import pytest
import torch

from seqpar.errors import UnsupportedError
from seqpar.models import registry
from seqpar.partitioner.machines import MACHINES
from seqpar.passes.estimate import transfer_seconds
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.runtime.simulate import SimulatedWorld
from seqpar.tools.bench.emulate import emulate, program, representatives
from seqpar.tools.bench.progress import log
from seqpar.tools.bench.stand_in import bind_stand_ins


@pytest.fixture(scope="module")
def case():
    family = registry.get("pattern-rope")
    model = family.build(family.tiny_config(heads=2, layers=1))
    inputs = family.grid_inputs(family.tiny_config(heads=2, layers=1), rows=5, columns=5)
    return model, inputs, trace(model, (), inputs, dynamic=False)


def test_a_bound_program_is_the_program(case):
    """With groups that really exchange, the module that is timed computes what the model computes."""
    model, inputs, traced = case
    leaves = [traced.call.leaves[i].contiguous() for i in traced.input_positions]
    partitioned = partition(traced, ulysses=2, ring=2)
    run = [lambda groups, r=r: bind_stand_ins(partitioned.program(r), groups)(*leaves) for r in range(4)]
    with torch.no_grad():
        expected = model(**inputs)
        for outputs in SimulatedWorld(2, 2).run(run):
            torch.testing.assert_close(outputs[0], expected)


def test_a_program_runs_alone(case):
    model, inputs, traced = case
    leaves = [traced.call.leaves[i].contiguous() for i in traced.input_positions]
    with torch.no_grad():
        outputs = program(partition(traced, ulysses=1, ring=2), 1, leaves, None).call()
    assert outputs[0].shape == model(**inputs).shape


def test_a_compiled_program_has_no_graph_break(case):
    """Stand-in groups are looked through, and their results are there before: nothing is compiled twice."""
    _, _, traced = case
    leaves = [traced.call.leaves[i].contiguous() for i in traced.input_positions]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        entry = program(partition(traced, ulysses=1, ring=2), 0, leaves, "eager")
        for _ in range(2):
            assert [out.shape for out in entry.call()] == [out.shape for out in entry.plain()]
    assert not torch._dynamo.utils.counters["graph_break"] and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_what_is_measured_and_what_is_predicted(case, caplog, monkeypatch):
    model, inputs, traced = case
    monkeypatch.setattr(log, "propagate", True)
    monkeypatch.setattr(log, "handlers", [])  # pytest puts its own on loggers that do not propagate
    caplog.set_level(logging.DEBUG, "seqpar.bench")
    machine = dataclasses.replace(MACHINES["L40"], latency_s=1.0)
    found, refused = emulate(model, inputs, [2, 4], machine, rounds=2)
    assert not refused and [(row.ulysses, row.ring) for row in found.slowest()] == [(2, 1), (4, 1)]
    said = [record.getMessage().strip() for record in caplog.records if record.name == "seqpar.bench"]
    assert said[:2] == [f"tracing {type(model).__name__}", "ulysses 2 x ring 1: writing programs"]
    assert said.count("rank 0") == 2 and said[-5:] == ["2 rounds of 7 programs", "warmed up", "warmed up", "round 1 of 2", "round 2 of 2"]
    partitioned = partition(traced, ulysses=2, ring=1)
    assert sum(row.alike for row in found.rows) == 6 and len(representatives(partitioned)) == 2  # 13 and 12 tokens
    first = found.rows[0]
    counts = partitioned.counts[0]
    assert first.received == sum(counts.traffic.bytes.values()) and first.peak > 0 and len(first.milliseconds) == 2
    on_the_wire = 1e3 * transfer_seconds(first.received, first.calls, machine)
    assert first.collectives_ms + first.hidden_ms == pytest.approx(on_the_wire) and 0 <= first.hidden_ms <= first.median
    assert first.predicted_ms == first.median + first.collectives_ms > 1000 * first.calls


def refusing(*_, **mesh):
    raise UnsupportedError("not this one")


def test_a_mesh_that_does_not_fit_is_told(case, monkeypatch):
    model, inputs, _ = case
    monkeypatch.setattr("seqpar.tools.bench.emulate.partition", refusing)
    found, refused = emulate(model, inputs, [4], MACHINES["H100"], meshes=[(4, 1)], rounds=1)
    assert not found.rows and refused == ["ulysses 4 x ring 1: not this one"]
