"""The annotated program."""

import re

import pytest
import torch

import seqpar
from seqpar.models import registry
from seqpar.passes.pipeline import partition
from seqpar.passes.readable import readable
from seqpar.passes.trace import trace

LINE = re.compile(r"^    (\w+) = .*  # (.*)$")


@pytest.fixture(scope="module")
def partitioned():
    family = registry.get("pattern-rope")
    config = family.tiny_config(heads=4, layers=1)
    model = family.build(config)
    inputs = family.grid_inputs(config, rows=5, columns=5)
    return partition(trace(model, (), inputs, dynamic=False), ulysses=2, ring=2)


def notes(partitioned, rank):
    text = readable(partitioned.program(rank), partitioned.plan.inspector, rank)
    return text, {m[1]: m[2] for m in map(LINE.match, text.splitlines()) if m}


@pytest.mark.parametrize("rank", [0, 3])
def test_every_line_says_what_it_computes(partitioned, rank):
    text, found = notes(partitioned, rank)
    own = 7 if rank == 0 else 6  # 25 tokens over 4 ranks
    assert text.startswith(f"# rank {rank} of 4 (ulysses 2 x ring 2)")
    assert "    # hidden_states: f32[1, 25, 8] -> f32[1, 25, 8] | 1 25 8" in text
    embed = next(note for name, note in found.items() if "embed" in note and name.startswith("linear"))
    assert embed.startswith(f"f32[1, 25, 64] -> f32[1, {own}, 64] | 1 25/4 64 | embed | ") and re.search(r"patterns\.py:\d+$", embed)
    gathered = next(note for name, note in found.items() if name.startswith("gather"))
    assert gathered.startswith("f32[1, 25, 8] -> f32[1, 25, 8] | 1 25 8")
    ring = next(note for name, note in found.items() if name.startswith("ring_attention"))
    assert ring.startswith(f"-> f32[1, 2, {13 if rank == 3 - 3 else 12}, 16] | blocks.0 | ")
    calls = [n for n in partitioned.program(rank).graph.nodes if n.op in ("call_function", "get_attr")]
    assert set(found) == {n.name for n in calls}


def test_a_loaded_program_has_source_lines_only(partitioned):
    text = readable(partitioned.program(0), None, 0)
    assert "->" not in text.replace("-> ", "->", 0).split("# ", 1)[0] and re.search(r"# embed \| .*patterns\.py:\d+", text) and "f32" not in text


def test_what_a_compiled_module_prints(capsys):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4)).eval()
    fast = seqpar.sp_compile(model, (torch.randn(2, 4),), dynamic=False)
    text = fast.print_readable()
    assert capsys.readouterr().out == text + "\n" and "f32[2, 4] -> f32[2, 4] | 2 4 | 0" in text
    assert fast.print_readable(print_output=False) == text and capsys.readouterr().out == ""
    symbolic = seqpar.sp_compile(model, (torch.randn(2, 4),), dynamic=True).print_readable(print_output=False)
    assert re.search(r"f32\[s\d+, 4\] -> f32\[2, 4\]", symbolic)
