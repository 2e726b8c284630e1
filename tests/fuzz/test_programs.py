"""Random attention models on random meshes equal the model in one process. Failures shrink to a printed `Program`."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from seqpar.partitioner.cost import Machine
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

_spec = importlib.util.spec_from_file_location("programs", Path(__file__).with_name("programs.py"))
assert _spec is not None and _spec.loader is not None
programs = importlib.util.module_from_spec(_spec)
import sys  # noqa: E402

sys.modules["programs"] = programs
_spec.loader.exec_module(programs)

EXAMPLES = int(os.environ.get("SEQPAR_FUZZ", "80"))
MESHES = ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (4, 1), (1, 4), (3, 2))

MACHINES = (Machine(), Machine(comm_share=0.0, call_share=0.0))  # where moving is free, causal rings are balanced


@st.composite
def cases(draw: st.DrawFn):
    heads = draw(st.integers(1, 6))
    kv_heads = draw(st.sampled_from([h for h in range(1, heads + 1) if heads % h == 0]))
    steps = draw(st.lists(st.tuples(st.sampled_from(programs.STEPS), st.integers(0, 5)), min_size=1, max_size=5))
    program = programs.Program(
        image=draw(st.integers(1, 17)),
        text=draw(st.integers(1, 8)),
        batch=draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8])),
        steps=tuple(steps),
        seed=draw(st.integers(0, 20)),
    )
    mesh = draw(st.sampled_from([m for m in MESHES if m[0] <= heads]))
    return program, mesh, draw(st.sampled_from(MACHINES))


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(cases())
def test_random_program(case) -> None:
    program, (ulysses, ring), machine = case
    model = programs.RandomModel(program).eval()
    inputs = programs.inputs(program)
    with torch.no_grad():
        image, text = model(*inputs)
    assert torch.isfinite(image).all() and torch.isfinite(text).all()
    report = verify_traced(trace(model, inputs, {}, dynamic=False), ulysses=ulysses, ring=ring, machine=machine)
    assert report.ok, f"{program} on ulysses {ulysses} x ring {ring}, {machine}: {report}"
