"""The code of an emitted program, with what every line computes beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from seqpar.partitioner.op import shape_of
from seqpar.passes.count import CountInterpreter, Counts, counting_groups, to_meta
from seqpar.passes.inspector import Inspector
from seqpar.passes.localise import one_line
from seqpar.passes.plan_of import example_of
from seqpar.passes.stages import stage_of
from seqpar.passes.text import short

ASSIGNMENT = re.compile(r"^\s*(\w+)\s*(?::[^=]*)?= ")
DTYPES = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c"}


class ShapeInterpreter(CountInterpreter):
    """Runs one rank's program on meta tensors and keeps the shape of every value."""

    def __init__(self, gm: fx.GraphModule, groups: Mapping[str, Any]) -> None:
        super().__init__(gm, dict(groups), Counts())
        self.shapes: dict[str, str] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.shapes[n.name] = f"{dtype_text(value.dtype)}{list(value.shape)}"
        return value


def readable(gm: fx.GraphModule, inspector: Inspector | None, rank: int) -> str:
    """The code of `gm`, the program of `rank`; a comment ends every line: global shape -> local shape, layout, stage, source line.

    Values inside an exchange have a local shape only. Local shapes are those of the example, global ones are symbolic if the program is.
    Without an inspector (a loaded program) there are stages and source lines only.
    """
    notes = {node.name: " | ".join(filter(None, [stage_of(node), short(one_line(node))])) for node in gm.graph.nodes}
    header = []
    if inspector is not None:
        found = inspector.partitioned
        degrees = found.solution.degrees
        header = [f"# rank {rank} of {degrees.ranks} (ulysses {degrees.ulysses} x ring {degrees.ring}): global shape -> local shape | layout | stage | source line"]
        notes = {name: " | ".join(filter(None, [text, notes[name]])) for name, text in _shapes(gm, inspector, rank).items()}
    lines = []
    for line in gm.code.strip("\n").splitlines():
        match = ASSIGNMENT.match(line)
        note = notes.get(match[1]) if match else None
        lines.append(f"{line}  # {note}" if note else line)
        if line.startswith("def forward("):
            lines += [f"    # {node.name}: {notes[node.name]}" for node in gm.graph.nodes if node.op == "placeholder" and notes.get(node.name)]
    return "\n".join([*header, *lines])


def _shapes(gm: fx.GraphModule, inspector: Inspector, rank: int) -> dict[str, str]:
    """Node name -> shapes and layout. A node that a user's pass added has none."""
    found = inspector.partitioned
    local = local_shapes(inspector, rank)
    view = found.view.for_rank(rank)
    source = {node.name: node for node in found.traced.gm.graph.nodes}
    as_traced = found.program(rank).graph is found.traced.gm.graph  # one rank: names are those of the trace
    notes = {}
    for node in gm.graph.nodes:
        name, layout = node.meta.get("seqpar_layout", (None, None))
        own = source.get(name) if name is not None else source.get(node.name) if as_traced else None
        here = local.get(node.name, "")
        if own is None or not isinstance(own.meta.get("val"), Tensor):
            notes[node.name] = f"-> {here}" if here else ""
            continue
        held = view.produced(own) if layout is None else layout
        text = f"{dtype_text(own.meta['val'].dtype)}{list(shape_of(own.meta['val']))}"
        notes[node.name] = " | ".join([f"{text} -> {here}" if here else text, view.text(own, held)])
    return notes


def local_shapes(inspector: Inspector, rank: int) -> dict[str, str]:
    """Node name -> dtype and shape of its value in the program of `rank`, for the example's sizes."""
    found = inspector.partitioned
    degrees = found.solution.degrees
    interpreter = ShapeInterpreter(found.program(rank), counting_groups(degrees.ulysses, degrees.ring, rank, Counts().traffic))
    with torch.no_grad():
        interpreter.run(*[to_meta(x) for x in example_of(found)])
    return interpreter.shapes


def dtype_text(dtype: torch.dtype) -> str:
    """`f32`, `bf16`, `i64`, `bool`."""
    name = str(dtype).removeprefix("torch.")
    match = re.fullmatch(r"([a-z]+)(\d+)", name)
    return f"{DTYPES.get(match[1], match[1])}{match[2]}" if match else name
