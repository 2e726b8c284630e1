"""A plan as a picture: the emitted program of one rank, folded. `draw_dot.py` and `draw_html.py` write what is put together here.

Before: 4,000 nodes
After:  stages (a block of the model, equal ones in a row folded to one with a count), in each a few boxes (operators of one module between
        two exchanges, attentions, exchanges) with edges
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.fx import Node

from seqpar.compat import pytree
from seqpar.passes.count import CountInterpreter, Counts, counting_groups, to_meta
from seqpar.passes.localise import source_line
from seqpar.passes.memory import peak_bytes, weight_bytes
from seqpar.passes.text import short
from seqpar.runtime.counting import CountingGroup
from seqpar.runtime.head_shares import causal_rows
from seqpar.runtime.layout import first_rank, gather, gather_many, shard
from seqpar.runtime.ring import ring_attention, split_kv_attention
from seqpar.runtime.zigzag import zigzag_attention

if TYPE_CHECKING:
    from seqpar.passes.pipeline import Partitioned

aten = torch.ops.aten
ATTENTION = (aten.scaled_dot_product_attention.default, ring_attention, split_kv_attention, zigzag_attention, causal_rows)
WHOLE = (gather, gather_many, first_rank)
MAX_PERIOD = 6  # of blocks of different kinds that repeat together


@dataclass(frozen=True)
class Op:
    """One node. layout: of its result, dims with sharded parts divided by the ranks, "" if it is a reshard. received: bytes from other ranks."""

    name: str
    call: str
    module: str
    shape: str
    layout: str
    source: str
    received: int
    flops: int


@dataclass(frozen=True)
class Box:
    """Operators of one kind: "compute", "attention", "collective", "input" or "output". sharded: each rank holds a part of the results."""

    kind: str
    sharded: bool
    module: str
    ops: tuple[Op, ...]

    @property
    def received(self) -> int:
        return sum(op.received for op in self.ops)

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.ops)

    @property
    def title(self) -> str:
        """What it is, in a few words."""
        if len(self.ops) == 1 or self.kind in ("attention", "collective"):
            return self.ops[0].call
        return f"{len(self.ops)} operators" if self.kind == "compute" else f"{len(self.ops)} {self.kind}s"

    @property
    def common(self) -> str:
        """The most frequent operators."""
        counted = Counter(op.call for op in self.ops)
        return ", ".join(f"{n} {call}" if n > 1 else call for call, n in counted.most_common(3))


@dataclass(frozen=True)
class Stage:
    """A block of the model, or what lies between two. names: of the equal blocks folded here; edges: (box, box) by index."""

    names: tuple[str, ...]
    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]

    @property
    def title(self) -> str:
        first, last = self.names[0], self.names[-1]
        return first if len(self.names) == 1 else f"{first} … {last}"

    @property
    def received(self) -> int:
        """Bytes of one of the equal blocks."""
        return sum(box.received for box in self.boxes)

    @property
    def signature(self) -> object:
        """Equal for stages that do the same."""
        return tuple((b.kind, b.sharded, tuple(replace(op, name="", source="", module=relative(op.module)) for op in b.ops)) for b in self.boxes), self.edges


@dataclass(frozen=True)
class RankUse:
    """Of one rank: operations and received bytes of a call, bytes of weights, inputs and of activations at their peak."""

    rank: int
    flops: int
    received: int
    weights: int
    inputs: int
    activations: int


@dataclass(frozen=True)
class Drawing:
    """All that a picture shows. `ranks`: one entry per rank; `alone`: one process that runs the whole model."""

    ulysses: int
    ring: int
    stages: tuple[Stage, ...]
    repeats: tuple[int, ...]  # per stage, how often it runs
    ranks: tuple[RankUse, ...]
    alone: RankUse


# ---- measuring -----------------------------------------------------------------------------------


@dataclass
class Seen:
    """What a run on meta tensors showed, per node name."""

    shapes: dict[str, str] = field(default_factory=dict)
    received: dict[str, int] = field(default_factory=dict)


class Watcher(CountInterpreter):
    """Runs a program on meta tensors; notes shapes and bytes received of every node."""

    def __init__(self, gm: fx.GraphModule, groups: dict[str, CountingGroup], counts: Counts) -> None:
        super().__init__(gm, groups, counts)
        self.seen = Seen()

    def run_node(self, n: Node) -> Any:
        before = sum(self.counts.traffic.bytes.values())
        result = super().run_node(n)
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self.seen.received[n.name] = sum(self.counts.traffic.bytes.values()) - before
        self.seen.shapes[n.name] = ", ".join(str(list(tensor.shape)) for tensor in tensors)
        return result


def watch(gm: fx.GraphModule, scheduled: fx.GraphModule, example: Sequence[Tensor], ulysses: int, ring: int, rank: int) -> tuple[Seen, Counts, RankUse]:
    """Run the program of one rank on meta tensors. scheduled: the same in the order that ranks run it in, whose memory counts."""
    counts = Counts()
    watcher = Watcher(gm, counting_groups(ulysses, ring, rank, counts.traffic), counts)
    with torch.no_grad():
        watcher.run(*[to_meta(x) for x in example])
    inputs = sum(x.numel() * x.element_size() for x in example)
    activations = peak_bytes(scheduled, example, ulysses=ulysses, ring=ring, rank=rank)
    return watcher.seen, counts, RankUse(rank, counts.total_flops, sum(counts.traffic.bytes.values()), weight_bytes(gm), inputs, activations)


# ---- folding -------------------------------------------------------------------------------------


def drawing(partitioned: Partitioned) -> Drawing:
    """The drawing of rank 0's program, with the use of every rank.

    Drawn as it was emitted, block after block: the order in which exchanges are put behind other blocks' work is a matter of time, which a picture
    of the flow of data does not show (`readable.py` does).
    """
    degrees, gm = partitioned.solution.degrees, partitioned.emitted(0)
    hint = partitioned.inference.table.sizes.hint
    values = [n.meta["val"] for n in partitioned.traced.gm.graph.nodes if n.op == "placeholder"]
    sizes = [[hint(s.node.expr) if isinstance(s, torch.SymInt) else int(s) for s in v.shape] for v in values]
    example = [torch.empty(shape, dtype=value.dtype, device="meta") for shape, value in zip(sizes, values, strict=True)]
    same = [next(r for r in range(degrees.ranks) if partitioned.counts[r] is own) for own in partitioned.counts]  # ranks with parts of equal sizes
    runs = {rank: watch(partitioned.emitted(rank), partitioned.program(rank), example, degrees.ulysses, degrees.ring, rank) for rank in sorted(set(same))}
    uses = tuple(replace(runs[like][2], rank=rank) for rank, like in enumerate(same))
    seen, counts, _ = runs[0]
    alone = uses[0] if degrees.ranks == 1 else watch(partitioned.traced.gm, partitioned.traced.gm, example, 1, 1, 0)[2]
    stages, repeats = folded(stages_of(gm.graph, Describer(partitioned, seen, counts)))
    return Drawing(degrees.ulysses, degrees.ring, stages, repeats, uses, alone)


class Describer:
    """Says of every node what it is, where it belongs and whether its result is sharded."""

    def __init__(self, partitioned: Partitioned, seen: Seen, counts: Counts) -> None:
        self.seen, self.counts = seen, counts
        self.view = partitioned.view
        self.sources = {node.name: node for node in partitioned.traced.gm.graph.nodes}
        self.is_sharded: dict[Node, bool] = {}
        self.block = ""

    def kind(self, node: Node) -> str:
        if node.op in ("placeholder", "output"):
            return "input" if node.op == "placeholder" else "output"
        if node.target in ATTENTION:
            return "attention"
        return "collective" if "group" in node.kwargs else "compute"

    def sharded(self, node: Node) -> bool:
        if "seqpar_value" in node.meta:
            found = any(node.meta["seqpar_value"][1])
        elif node.target in WHOLE or node.op in ("placeholder", "get_attr", "output"):
            found = False
        else:
            over_mesh = node.target is shard or self.kind(node) in ("collective", "attention")
            found = over_mesh and len(self.seen.received) > 0 and self.view.ranks > 1 or any(self.is_sharded.get(n, False) for n in node.all_input_nodes)
        self.is_sharded[node] = found
        return found

    def module(self, node: Node) -> str:
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return str(stack[-1][0]) if stack else ""

    def op(self, node: Node) -> Op:
        value = node.meta.get("seqpar_value")
        source = self.sources.get(value[0] if value else node.name)
        layout = value[1] if value else None
        if layout is None and source is not None and source in self.view.inference.axes and self.view.ranks == 1:
            layout = self.view.produced(source)
        text = self.view.text(source, layout) if source is not None and layout is not None and source in self.view.inference.axes else ""
        call = str(node.target) if node.op == "placeholder" else getattr(node.target, "__name__", str(node.target)).split(".")[0]
        call += f" over {node.kwargs['group']}" if "group" in node.kwargs else ""
        return Op(node.name, call, self.module(node), self.seen.shapes[node.name], text, where(node), self.seen.received[node.name], self.counts.flops.get(node.name, 0))


def where(node: Node) -> str:
    """`package/x.py:12 in forward: return self.proj(x)`, the user's own line."""
    found = re.match(r'File "([^"]+)", line (\d+), in (\S+) ?(.*)', " ".join(source_line(node).split()))
    if found is None:
        return ""
    path, line, function, code = found.groups()
    return f"{short(path)}:{line} in {function}" + (f": {code}" if code else "")


def stages_of(graph: fx.Graph, describer: Describer) -> list[Stage]:
    """Runs of nodes of one block, in program order."""
    runs: list[tuple[str, list[Node]]] = []
    for node in graph.nodes:
        describer.sharded(node)
        if node.op == "get_attr" or node.target is operator.getitem or (node.op == "call_function" and not describer.seen.shapes[node.name]):
            continue
        name = {"placeholder": "inputs", "output": "outputs"}.get(node.op) or block_of(describer.module(node))
        if not runs or runs[-1][0] != name:
            runs.append((name, []))
        runs[-1][1].append(node)
    return [stage(name, nodes, describer) for name, nodes in runs]


def block_of(module: str) -> str:
    """`transformer_blocks.0.attn.to_q` -> `transformer_blocks.0`; without a number the first part."""
    parts = module.split(".")
    end = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: end + 1]) or "the model itself"


def relative(module: str) -> str:
    """A module within its block."""
    return module.removeprefix(block_of(module)).removeprefix(".")


def stage(name: str, nodes: Sequence[Node], describer: Describer) -> Stage:
    """Boxes of one stage: a node joins the last box of its kind, module and state that it reads or that is as deep as it would be, so that
    branches stay apart, unless that would make a circle of boxes."""
    boxes: list[tuple[tuple[str, bool, str], list[Node]]] = []
    home: dict[Node, int] = {}
    reach: list[set[int]] = []  # boxes each one depends on
    depth: list[int] = []
    edges: set[tuple[int, int]] = set()
    for node in nodes:
        kind = describer.kind(node)
        key = (kind, describer.is_sharded[node], ".".join(relative(describer.module(node)).split(".")[:1]))
        before = {home[n] for n in inputs_of(node, home)}
        behind = before.union(*(reach[b] for b in before))
        level = 1 + max((depth[b] for b in before), default=0)
        near = [i for i in reversed(range(len(boxes))) if boxes[i][0] == key and (i in before or depth[i] == level)]
        place = next((i for i in near if not depends(behind - {i}, i, reach)), None)
        if place is None or kind in ("attention", "collective"):
            place = len(boxes)
            boxes.append((key, []))
            reach.append(set())
            depth.append(level)
        boxes[place][1].append(node)
        home[node] = place
        reach[place] |= behind - {place}
        for later in range(len(boxes)):  # those that depend on this box depend on what it now does
            if place in reach[later]:
                reach[later] |= reach[place]
        edges |= {(b, place) for b in before if b != place}
    made = tuple(Box(kind, sharded, module, tuple(map(describer.op, members))) for (kind, sharded, module), members in boxes)
    return Stage((name,), made, tuple(sorted(edges)))


def depends(boxes: set[int], on: int, reach: Sequence[set[int]]) -> bool:
    """True if one of `boxes` depends on the box `on`."""
    return any(on in reach[b] for b in boxes)


def inputs_of(node: Node, known: dict[Node, int]) -> list[Node]:
    """The nodes in this stage that a node reads, through entries of tuples."""
    found = []
    for n in node.all_input_nodes:
        while n.target is operator.getitem and n not in known:
            n = n.args[0]  # type: ignore[assignment]
        if n in known:
            found.append(n)
    return found


def folded(stages: Sequence[Stage]) -> tuple[tuple[Stage, ...], tuple[int, ...]]:
    """Equal stages in a row as one, also where a few of them repeat together; and how often each runs."""
    signatures = [s.signature for s in stages]
    found: list[Stage] = []
    repeats: list[int] = []
    i = 0
    while i < len(stages):
        period, count = 1, 1
        for p in range(1, MAX_PERIOD + 1):
            n = 1
            while signatures[i + n * p : i + (n + 1) * p] == signatures[i : i + p] and len(signatures[i : i + p]) == p:
                n += 1
            if (n - 1) * p > (count - 1) * period:
                period, count = p, n
        for j in range(i, i + period):
            found.append(replace(stages[j], names=tuple(stages[k].names[0] for k in range(j, j + count * period, period))))
            repeats.append(count)
        i += period * count
    return tuple(found), tuple(repeats)
