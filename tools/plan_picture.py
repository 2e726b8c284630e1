"""Draw a plan: the emitted program of one rank, folded to what it computes between two collectives.

    python -m seqpar.tools.plan_picture --model flux --ulysses 2 --ring 2 --output docs/plan.svg
"""

from __future__ import annotations

import argparse
import operator
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import networkx as nx
import torch
from torch.fx import Graph, Node

from seqpar.models import registry
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.runtime.ring import ring_attention
from seqpar.runtime.zigzag import zigzag_attention

ATTENTION = (torch.ops.aten.scaled_dot_product_attention.default, ring_attention, zigzag_attention)
COLOURS = {"compute": "#dbe9f6", "attention": "#cfe8cf", "collective": "#f6d5c3"}


@dataclass
class Stage:
    """One box: a collective, an attention, or the operators between two of them."""

    kind: str
    names: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        if self.kind != "compute":
            return next(iter(self.names))
        total = sum(self.names.values())
        return f"{total} operators\n" + ", ".join(f"{n} {name}" for name, n in self.names.most_common(3))


def kind_of(node: Node) -> str:
    if "group" in node.kwargs and node.target not in ATTENTION:
        return "collective"
    return "attention" if node.target in ATTENTION else "compute"


def short_name(node: Node) -> str:
    name = getattr(node.target, "__name__", str(node.target)).split(".")[0]
    group = f" over {node.kwargs['group']}" if "group" in node.kwargs else ""
    return name + group


def stages(graph: Graph) -> list[Stage]:
    """Boxes in program order; a node belongs to the stage after the last collective or attention on any path to it."""
    depth: dict[Node, int] = {}
    found: dict[int, Stage] = {}
    for node in graph.nodes:
        before = max((depth[n] for n in node.all_input_nodes), default=0)
        kind = kind_of(node) if node.op == "call_function" else "compute"
        # even depths compute, odd depths communicate or attend
        depth[node] = before if kind == "compute" and before % 2 == 0 else before + 1 + (kind != "compute" and before % 2 == 1)
        if node.op == "call_function" and node.target is not operator.getitem:
            found.setdefault(depth[node], Stage(kind)).names[short_name(node)] += 1
    return [found[d] for d in sorted(found)]


def draw(boxes: list[Stage], title: str, path: Path) -> None:
    """One column of boxes, laid out by networkx."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chain = nx.DiGraph()
    for i, _ in enumerate(boxes):
        chain.add_node(i, layer=i)
        if i:
            chain.add_edge(i - 1, i)
    positions = nx.multipartite_layout(chain, subset_key="layer", align="horizontal", scale=-1)
    figure, axes = plt.subplots(figsize=(6.4, 0.72 * len(boxes) + 0.6))
    nx.draw_networkx_edges(chain, positions, ax=axes, node_size=1800, arrowsize=9, edge_color="#666666")
    for i, box in enumerate(boxes):
        x, y = positions[i]
        axes.text(x, y, box.text(), ha="center", va="center", fontsize=8, bbox={"boxstyle": "round", "fc": COLOURS[box.kind], "ec": "#888888"})
    axes.set_title(title, fontsize=9)
    axes.axis("off")
    figure.savefig(path, bbox_inches="tight")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="flux", choices=registry.names())
    parser.add_argument("--ulysses", type=int, default=2)
    parser.add_argument("--ring", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("plan.svg"))
    options = parser.parse_args(arguments)
    family = registry.get(options.model)
    config = family.tiny_config(heads=4, layers=1)
    model = family.build(config, device="meta")
    inputs = family.grid_inputs(config, rows=8, columns=8, text_len=16, device="meta")
    partitioned = partition(trace(model, (), inputs, dynamic=False), ulysses=options.ulysses, ring=options.ring)
    title = f"{options.model}, one block of each kind, 64 + 16 tokens\nrank 0 of ulysses {options.ulysses} x ring {options.ring}"
    draw(stages(partitioned.program(0).graph), title, options.output)
    print(options.output)


if __name__ == "__main__":
    main()
