"""A drawing as one page that needs nothing else (pictures of the stages, bars per rank, a search, details of every box), or as SVG.

The boxes are placed by networkx, the page is put together by jinja2 from `plan.html.jinja`, the SVG from `plan.svg.jinja`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib import resources
from itertools import pairwise
from typing import Any

import networkx as nx

from seqpar.passes.drawing import Box, Drawing, Stage
from seqpar.passes.report import amount

WIDTH, HEIGHT = 176, 46  # of a box, in pixels
GAP_X, GAP_Y = 18, 26
LANE = 9  # between ways beside the boxes
OPENED = 2  # stages that are open at first


@dataclass(frozen=True)
class Placed:
    """A box and where its upper left corner is; number: of its element and its details."""

    box: Box
    x: float
    y: float
    number: str

    @property
    def colour(self) -> str:
        """The class that colours it."""
        return self.box.kind if self.box.kind != "compute" else "sharded" if self.box.sharded else "whole"

    @property
    def title(self) -> str:
        """Its first line."""
        return f"{self.box.title} · {self.box.module}" if self.box.module and self.box.kind == "compute" else self.box.title

    @property
    def subtitle(self) -> str:
        """Its second line: bytes of an exchange, the operators, or the layout of a single one."""
        last = self.box.ops[-1]
        return f"{amount(self.box.received)}B" if self.box.received else self.box.common if len(self.box.ops) > 1 else last.layout or last.shape


@dataclass(frozen=True)
class Line:
    """An edge. path: of SVG; moved: what goes through an exchange, into it or out of it; label: the bytes a rank receives, at (x, y)."""

    path: str
    moved: bool = False
    label: str = ""
    x: float = 0.0
    y: float = 0.0


@dataclass(frozen=True)
class Picture:
    """A stage with all positions. lines: one per edge."""

    stage: Stage
    count: int
    placed: tuple[Placed, ...]
    lines: tuple[Line, ...]
    width: float
    height: float

    @property
    def computing(self) -> list[Box]:
        return [box for box in self.stage.boxes if box.kind in ("compute", "attention")]

    @property
    def operators(self) -> int:
        return sum(len(box.ops) for box in self.stage.boxes)

    @property
    def share(self) -> float:
        """Of this rank's work, what is done on parts; of operators where none of them is a contraction."""
        total, of_parts = (sum(box.flops for box in boxes) for boxes in (self.computing, [box for box in self.computing if box.sharded]))
        if not total:
            total, of_parts = (sum(len(box.ops) for box in boxes) for boxes in (self.computing, [box for box in self.computing if box.sharded]))
        return of_parts / total if total else 0.0

    @property
    def kind(self) -> str:
        """How it is coloured in the overview."""
        return "plain" if not self.computing else "sharded" if self.share == 1 else "mixed" if self.share else "whole"


def to_html(drawing: Drawing, title: str) -> str:
    """The page."""
    pictures = [picture(i, stage, count) for i, (stage, count) in enumerate(zip(drawing.stages, drawing.repeats, strict=True))]
    opened = [i for i, stage in enumerate(drawing.stages) if stage.received and any(box.kind == "attention" for box in stage.boxes)][:OPENED]
    details = {placed.number: [asdict(op) for op in placed.box.ops] for one in pictures for placed in one.placed}
    everyone = (*drawing.ranks, drawing.alone)
    return render(
        "plan.html.jinja",
        title=title,
        drawing=drawing,
        everyone=everyone,
        opened=opened,
        pictures=pictures,
        # A script of data ends at "</": that must not be in it.
        details=json.dumps(details, separators=(",", ":")).replace("<", "\\u003c"),
        amount=amount,
        width=WIDTH,
        height=HEIGHT,
        most_memory=max(1, *(use.weights + use.inputs + use.activations for use in everyone)),
        most_received=max(1, *(use.received for use in everyone)),
        most_flops=max(1, *(use.flops for use in everyone)),
    )


def to_svg(drawing: Drawing, title: str, *, only: str = "") -> str:
    """The pictures of the stages, one below the other; `only` those with this in their name."""
    chosen = [(stage, count) for stage, count in zip(drawing.stages, drawing.repeats, strict=True) if only in stage.title]
    pictures = [picture(i, stage, count) for i, (stage, count) in enumerate(chosen)]
    tops, top = [], 32.0
    for one in pictures:
        tops.append(top)
        top += one.height + 32
    width = max((one.width for one in pictures), default=200.0) + 16
    return render(
        "plan.svg.jinja", title=title, width=width, height=top + 4, pictures=list(zip(pictures, tops, strict=True)), box_width=WIDTH, box_height=HEIGHT
    )


def render(template: str, **values: Any) -> str:
    """A template of this folder with values; all text in it is escaped."""
    import jinja2

    text = resources.files("seqpar.passes").joinpath(template).read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(text).render(**values)


def picture(number: int, stage: Stage, count: int) -> Picture:
    """Place the boxes of a stage in layers; an edge that others imply is left out."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(stage.boxes)))
    graph.add_edges_from(stage.edges)
    graph = nx.transitive_reduction(graph)
    for layer, members in enumerate(nx.topological_generations(graph)):
        for member in members:
            graph.nodes[member]["layer"] = layer
    places = nx.multipartite_layout(graph, subset_key="layer", align="horizontal")
    columns, rows = (sorted({round(float(place[axis]), 6) for place in places.values()}) for axis in (0, 1))
    step = min((b - a for values in (columns, rows) for a, b in pairwise(values)), default=1.0)
    wide = min((b - a for layer in layers(graph) for a, b in pairwise(sorted(float(places[m][0]) for m in layer))), default=step)
    placed = []
    for i, box in enumerate(stage.boxes):
        column, row = float(places[i][0]) - columns[0], rows.index(round(float(places[i][1]), 6))
        placed.append(Placed(box, 8 + column / wide * (WIDTH + GAP_X), 8 + row * (HEIGHT + GAP_Y), f"{number}-{i}"))
    labelled = {min(graph.successors(i)): i for i, box in enumerate(stage.boxes) if box.received and graph.out_degree(i)}
    lines, lanes = [], [0.0]
    for a, b in sorted(graph.edges):
        between = [p for p in placed if placed[a].y < p.y < placed[b].y]
        if between:
            lanes.append(lane(placed[a], placed[b], between, lanes))
        lines.append(line(placed[a], placed[b], labelled.get(b) == a, lanes[-1] if between else None))
    right, bottom = max((p.x for p in placed), default=0) + WIDTH, max((p.y for p in placed), default=0)
    return Picture(stage, count, tuple(placed), tuple(lines), max(right, *lanes) + 8, bottom + HEIGHT + 8)


def layers(graph: nx.DiGraph) -> list[list[int]]:
    """The boxes of each layer."""
    found: dict[int, list[int]] = {}
    for node, layer in graph.nodes(data="layer"):
        found.setdefault(layer, []).append(node)
    return list(found.values())


def lane(one: Placed, two: Placed, between: Sequence[Placed], taken: Sequence[float]) -> float:
    """Where an edge goes down beside the boxes between its ends, on the nearer side if there is room, and not where another does."""
    left, right = min(p.x for p in between) - LANE, max(p.x for p in between) + WIDTH + LANE
    while any(abs(left - other) < LANE for other in taken):
        left -= LANE
    while any(abs(right - other) < LANE for other in taken):
        right += LANE
    middle = (one.x + two.x + WIDTH) / 2
    return left if left >= LANE and middle - left <= right - middle else right


def line(one: Placed, two: Placed, labelled: bool, way: float | None) -> Line:
    """From the lower edge of a box to the upper edge of another, down at `way` if boxes are between them; labelled: with the bytes of the exchange it leaves."""
    x1, y1, x2, y2 = one.x + WIDTH / 2, one.y + HEIGHT, two.x + WIDTH / 2, two.y - 2
    moved = "collective" in (one.box.kind, two.box.kind)
    label = f"{amount(one.box.received)}B" if labelled else ""
    if way is None:
        return Line(f"M{x1:.1f},{y1:.1f} {curve(x1, y1, x2, y2)}", moved, label, (x1 + x2) / 2 + 6, (y1 + y2) / 2 + 4)
    top, bottom = y1 + GAP_Y, two.y - GAP_Y
    path = f"M{x1:.1f},{y1:.1f} {curve(x1, y1, way, top)} V{bottom:.1f} {curve(way, bottom, x2, y2)}"
    return Line(path, moved, label, way + 6, (top + bottom) / 2)


def curve(x1: float, y1: float, x2: float, y2: float) -> str:
    """From a point down to another, upright at both; the path is at the first."""
    middle = (y1 + y2) / 2
    return f"C{x1:.1f},{middle:.1f} {x2:.1f},{middle:.1f} {x2:.1f},{y2:.1f}"
