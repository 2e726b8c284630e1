"""A drawing in the language of graphviz.

Before: Drawing
After:  digraph plan { subgraph cluster_1 { label="transformer_blocks.0"; b1_0 [label="3 operators"]; … } b0_0 -> b1_0; … }
"""

from __future__ import annotations

from seqpar.passes.drawing import Box, Drawing
from seqpar.passes.report import amount

COLOURS = {"compute": "#dbe9f6", "attention": "#cfe8cf", "collective": "#f6d5c3", "input": "#eeeeee", "output": "#eeeeee"}
WHOLE = "#f4f0d8"


def to_dot(drawing: Drawing) -> str:
    """One cluster per stage; `dot -Tsvg` draws it."""
    lines = ["digraph plan {", "  compound=true;", "  node [shape=box, style=filled, fontsize=10];", f"  label={quoted(f'ulysses {drawing.ulysses} x ring {drawing.ring}')};"]
    for i, (stage, count) in enumerate(zip(drawing.stages, drawing.repeats, strict=True)):
        title = stage.title + (f"  x {count}" if count > 1 else "")
        lines += [f"  subgraph cluster_{i} {{", f"    label={quoted(title)};"]
        for j, box in enumerate(stage.boxes):
            lines.append(f"    b{i}_{j} [label={quoted(label(box))}, fillcolor={quoted(colour(box))}, tooltip={quoted(box.ops[0].source)}];")
        lines += [f"    b{i}_{a} -> b{i}_{b};" for a, b in stage.edges]
        lines.append("  }")
    for i, (one, two) in enumerate(zip(drawing.stages, drawing.stages[1:], strict=False)):
        lines.append(f"  b{i}_{len(one.boxes) - 1} -> b{i + 1}_0 [ltail=cluster_{i}, lhead=cluster_{i + 1}, style=bold];" if one.boxes and two.boxes else "")
    return "\n".join([*filter(None, lines), "}", ""])


def label(box: Box) -> str:
    received = f"\n{amount(box.received)}B" if box.received else ""
    return f"{box.title}{f' ({box.module})' if box.module else ''}\n{box.common if len(box.ops) > 1 else box.ops[0].layout or box.ops[0].shape}{received}"


def colour(box: Box) -> str:
    return WHOLE if box.kind == "compute" and not box.sharded else COLOURS[box.kind]


def quoted(text: str) -> str:
    """A string of the language: only quotes, backslashes and ends of lines mean something in it."""
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
