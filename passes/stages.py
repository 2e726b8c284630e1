"""The stages of a model (its blocks and what is around them), and what each costs one rank.

A stage is a submodule: the outermost entry of a list of modules (`blocks.7`), else a child of the model; what the model does itself is a stage
of its own. Entries of one list with the same work, communication and layouts are folded: `blocks.0-18`, 19 times.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from torch.fx import Graph, Node

from seqpar.compat import NO_MODULE
from seqpar.partitioner.candidates import origin
from seqpar.partitioner.cost import Machine, nbytes
from seqpar.partitioner.layout import LayoutView
from seqpar.partitioner.op import outputs_of
from seqpar.passes.count import Counts
from seqpar.passes.timeline import timeline
from seqpar.runtime.counting import KINDS

if TYPE_CHECKING:
    from seqpar.passes.pipeline import Partitioned

ITSELF = "(the model itself)"
MAX_RESULTS = 2


@dataclass(frozen=True)
class Stage:
    """One stage, or `repeats` equal ones; every number is of one of them.

    flops_alone: contractions of one process; flops: of the rank. received, calls: by kind of collective. seconds: predicted, computing and waiting
    (the mean, where equal stages have more or less work around them to wait behind). results: layouts, in text form, of the largest values that other stages read.
    """

    name: str
    repeats: int
    flops_alone: int
    flops: int
    received: Mapping[str, int]
    calls: Mapping[str, int]
    seconds: float
    results: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Bytes received, of all kinds."""
        return sum(self.received.values())


def stage_of(node: Node) -> str:
    """Path of the submodule whose stage a node belongs to, "" for the model itself."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path, _ = list(stack.values())[-1]
    if path == NO_MODULE:
        return ""
    parts = re.sub(r"@\d+", "", path).split(".")
    entry = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: entry + 1])


def stages_of(partitioned: Partitioned, rank: int, flops_alone: Mapping[str, int], machine: Machine) -> tuple[Stage, ...]:
    """All stages in order of first execution, the model itself last, equal ones folded, as `rank` executes them."""
    counts, view = partitioned.counts[rank], partitioned.view.for_rank(rank)
    source, program = partitioned.traced.gm.graph, partitioned.program(rank).graph
    alone, own, results = _by_stage(source), _by_stage(program), _results(source, view)
    spent = timeline(program.nodes, counts, machine).spent
    found = [
        _stage(path, sum(flops_alone.get(n, 0) for n in alone.get(path, ())), own.get(path, ()), results.get(path, ()), counts, spent)
        for path in sorted(dict.fromkeys([*alone, *own]), key=lambda path: not path)  # what the model does itself, here and there, comes last
    ]
    return tuple(_folded(s for s in found if s.flops_alone or s.flops or s.bytes))


def _by_stage(graph: Graph) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for node in graph.nodes:
        if node.op == "call_function":
            found.setdefault(stage_of(node), []).append(node.name)
    return found


def _stage(path: str, alone: int, nodes: Iterable[str], results: tuple[str, ...], counts: Counts, spent: Mapping[str, float]) -> Stage:
    nodes = list(nodes)
    traffic = [counts.received[n] for n in nodes if n in counts.received]
    received, calls = ({k: sum(getattr(t, what)[k] for t in traffic) for k in KINDS} for what in ("bytes", "calls"))
    flops = sum(counts.flops.get(n, 0) for n in nodes)
    return Stage(path, 1, alone, flops, received, calls, sum(spent.get(n, 0.0) for n in nodes), results)


def _results(graph: Graph, view: LayoutView) -> dict[str, tuple[str, ...]]:
    """Layouts of the largest values that leave each stage."""
    sizes = view.inference.table.sizes
    leaving: dict[str, dict[str, int]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node not in view.inference.axes or not outputs_of(node) or node not in view.inference.input_dependent:
            continue
        path = stage_of(origin(node))
        if isinstance(node.meta["val"], (tuple, list)) or all(user.op != "output" and stage_of(user) == path for user in node.users):
            continue
        text = view.text(node, view.produced(node))
        size = nbytes(node.meta["val"], sizes)
        known = leaving.setdefault(path, {})
        known[text] = max(size, known.get(text, 0))
    return {path: tuple(sorted(known, key=lambda text: -known[text])[:MAX_RESULTS]) for path, known in leaving.items()}


def _folded(stages: Iterable[Stage]) -> list[Stage]:
    groups: list[list[Stage]] = []
    for stage in stages:
        same = next((g for g in groups if _alike(g[0], stage)), None)
        if same is None:
            groups.append([stage])
        else:
            same.append(stage)
    return [_fold(members) for members in groups]


def _alike(a: Stage, b: Stage) -> bool:
    """Entries of one list with equal numbers; the last one may hand on less."""
    parents = [stage.name.rpartition(".") for stage in (a, b)]
    if parents[0][0] != parents[1][0] or not all(entry.isdigit() for _, _, entry in parents):
        return False
    return (a.flops_alone, a.flops, a.received, a.calls) == (b.flops_alone, b.flops, b.received, b.calls) and set(b.results) <= set(a.results)


def _fold(members: list[Stage]) -> Stage:
    first = members[0]
    if len(members) == 1:
        return Stage(**{**vars(first), "name": first.name or ITSELF})
    parent, _, _ = first.name.rpartition(".")
    numbers = ranges(int(m.name.rpartition(".")[2]) for m in members)
    return Stage(**{**vars(first), "name": f"{parent}.{numbers}" if parent else numbers, "repeats": len(members), "seconds": fmean(m.seconds for m in members)})


def ranges(numbers: Iterable[int]) -> str:
    """`0-2,5`: ascending numbers, neighbours joined."""
    found: list[list[int]] = []
    for n in sorted(numbers):
        if found and n == found[-1][1] + 1:
            found[-1][1] = n
        else:
            found.append([n, n])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
