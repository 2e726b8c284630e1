"""Random attention models on random meshes, with some optional steps of `partition` left out, equal the model in one process.

A failure shrinks to a printed script. `SEQPAR_FUZZ=5000` tries more models, `SEQPAR_FUZZ_SEED=7` others.
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, fields
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from seqpar.partitioner.cost import Machine
from seqpar.passes.options import Options
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

sys.path.append(str(Path(__file__).parent))  # test files are no package
import programs  # noqa: E402

GROUP_BY = ("share",)
SHARES = 10
EXAMPLES = int(os.environ.get("SEQPAR_FUZZ", "80"))
SEED = int(os.environ.get("SEQPAR_FUZZ_SEED", "0"))
MESHES = ((2, 1), (1, 2), (2, 2), (3, 1), (1, 3), (4, 1), (1, 4), (3, 2))
# Where moving is free, causal rings are balanced and heads shared; at the real rates of a slow link, keys or their input are gathered.
MACHINES = (Machine(), Machine(comm_share=0.0, call_share=0.0), Machine(1e12, 1e10, latency_s=1e-9).at_real_rates())


@st.composite
def cases(draw: st.DrawFn):
    heads = draw(st.integers(1, 6))
    kv_heads = draw(st.sampled_from([h for h in range(1, heads + 1) if heads % h == 0]))
    steps = draw(st.lists(st.tuples(st.sampled_from(programs.STEPS), st.integers(0, 5)), min_size=1, max_size=5))
    steps = draw(st.sampled_from([steps, steps, steps[:2] * 6]))  # also blocks that are alike (`partitioner/repeats.py`)
    image, text = draw(st.integers(1, 24)), draw(st.integers(1, 8))
    program = programs.Program(
        image=image,
        text=text,
        extra=draw(st.one_of(st.sampled_from([image, text]), st.integers(1, 12))),
        batch=draw(st.integers(1, 3)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 8])),
        steps=tuple(steps),
        dtype=draw(st.sampled_from(["float32", "float32", "float32", "bfloat16"])),
        seed=draw(st.integers(0, 20)),
    )
    mesh = draw(st.sampled_from([m for m in MESHES if m[0] <= heads]))
    left_out = draw(st.sets(st.sampled_from([field.name for field in fields(Options)])))
    return program, mesh, draw(st.sampled_from(MACHINES)), Options(**dict.fromkeys(sorted(left_out), False))


def check(program, ulysses: int, ring: int, machine: Machine, options: Options) -> None:
    model = programs.RandomModel(program).eval()
    inputs = programs.inputs(program)
    with torch.no_grad():
        image, text = model(*inputs)
    assert all(a.isfinite().all() and a.dtype == b.dtype and a.shape == b.shape for a, b in zip((image, text), inputs, strict=False))
    left_out = ", ".join(f"{name}=False" for name, taken in asdict(options).items() if not taken)
    script = programs.source(program, ulysses, ring, left_out, repr(machine))
    try:
        report = verify_traced(trace(model, inputs, {}, dynamic=False), ulysses=ulysses, ring=ring, machine=machine, options=options)
    except Exception as error:
        error.add_note(f"with the model\n{script}")
        raise
    assert report.ok, f"{report}\n{script}"


@pytest.mark.parametrize("share", range(SHARES))
def test_random_program(share) -> None:
    @seed(1000 * SEED + share)
    @settings(max_examples=-(-EXAMPLES // SHARES), deadline=None, database=None, suppress_health_check=list(HealthCheck), phases=set(Phase) - {Phase.explain})
    @given(cases())
    def random_program(case) -> None:
        program, mesh, machine, options = case
        check(program, *mesh, machine, options)

    random_program()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", programs.STEPS)
def test_every_variant_of_a_step(name, dtype) -> None:
    """Right on a mesh in float32; models in bfloat16 keep their dtype."""
    steps = tuple((name, variant) for variant in range(6))
    program = programs.Program(image=12, text=5, extra=12, batch=2, heads=4, kv_heads=2, head_dim=4, steps=(*steps, ("joint", 0)), dtype=dtype)
    if dtype == "float32":
        check(program, 2, 2, Machine(), Options())
    else:
        with torch.no_grad():
            assert all(out.dtype == torch.bfloat16 for out in programs.RandomModel(program)(*programs.inputs(program)))


def test_the_printed_script_is_the_model(capsys) -> None:
    program = programs.Program(image=9, text=3, extra=3, batch=1, heads=4, kv_heads=2, head_dim=4, steps=tuple((name, 3) for name in programs.STEPS))
    found: dict[str, object] = {}
    script = programs.source(program, 2, 1, "recognise=False")
    exec(compile(script.rpartition("report =")[0], "script", "exec"), found)
    with torch.no_grad():
        for mine, printed in zip(programs.RandomModel(program)(*programs.inputs(program)), found["model"](*found["inputs"](program)), strict=True):
            assert torch.equal(mine, printed)
    short = programs.Program(image=9, text=3, extra=3, batch=1, heads=2, kv_heads=1, head_dim=4, steps=(("joint", 1),))
    script = programs.source(short, 2, 1, "recognise=False")
    exec(compile(script, "script", "exec"), {})
    assert "ok: relative error" in capsys.readouterr().out and script.count("def step_") == 1
