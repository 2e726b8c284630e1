"""Minimum s-t cut over integer vertices: the solver's engine. It knows costs only, no layouts and no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

_FINITE_TOTAL = 2**29  # finite capacities are scaled to add up to this: scipy's flows are 32-bit


@dataclass
class CutProblem:
    """Vertices are numbered from 0; each ends on the source side ("yes") or on the sink side ("no").

    `no_cost` / `yes_cost` accumulate the price of each answer (float, any unit; `math.inf` forbids it);
    an edge a -> b with a price is paid if a says yes and b says no. `paid`: whatever the answers are. `times`: how often prices count that are given from now on.
    """

    no_cost: list[float] = field(default_factory=list)
    yes_cost: list[float] = field(default_factory=list)
    edges: dict[tuple[int, int], float] = field(default_factory=dict)
    paid: float = 0.0
    times: float = 1

    def vertex(self, yes: float = 0.0, no: float = 0.0) -> int:
        self.yes_cost.append(yes * self.times)
        self.no_cost.append(no * self.times)
        return len(self.yes_cost) - 1

    def pay(self, price: float) -> None:
        self.paid += price * self.times

    def add(self, vertex: int, yes: float) -> None:
        """Let a "yes" cost more."""
        self.yes_cost[vertex] += yes * self.times

    def edge(self, a: int, b: int, price: float, times: float | None = None) -> None:
        self.edges[(a, b)] = self.edges.get((a, b), 0.0) + price * (self.times if times is None else times)

    def tie(self, a: int, b: int) -> None:
        """Both get the same answer."""
        self.edge(a, b, math.inf)
        self.edge(b, a, math.inf)

    def solve(self) -> tuple[float, list[bool]]:
        """Least total price, and the answer of every vertex (as many "yes" as an optimal solution allows)."""
        count = len(self.yes_cost)
        source, sink = count, count + 1
        arcs: list[tuple[int, int, float]] = [(a, b, w) for (a, b), w in self.edges.items()]
        base = self.paid
        for v in range(count):
            yes, no = self.yes_cost[v], self.no_cost[v]
            common = min(yes, no)
            if math.isinf(common):
                raise AssertionError(f"vertex {v} may answer neither yes nor no")
            base += common
            if no > common:
                arcs.append((source, v, no - common))
            if yes > common:
                arcs.append((v, sink, yes - common))
        answers = self._cut(arcs, count, source, sink)
        return base + self._price(answers, arcs, source, sink), answers

    def _cut(self, arcs: list[tuple[int, int, float]], count: int, source: int, sink: int) -> list[bool]:
        finite = sum(w for _, _, w in arcs if not math.isinf(w))
        scale = _FINITE_TOTAL / finite if finite else 1.0
        capacity = np.array([2**30 if math.isinf(w) else max(1, round(w * scale)) if w > 0 else 0 for _, _, w in arcs], dtype=np.int32)
        heads = np.array([a for a, _, _ in arcs], dtype=np.int32)
        tails = np.array([b for _, b, _ in arcs], dtype=np.int32)
        graph = csr_matrix((capacity, (heads, tails)), shape=(count + 2, count + 2))
        flow = maximum_flow(graph, source, sink).flow
        residual = graph - flow
        residual.data[residual.data < 0] = 0
        residual.eliminate_zeros()
        reaches_sink = breadth_first_order(residual.T.tocsr(), sink, directed=True, return_predecessors=False)
        answers = np.ones(count + 2, dtype=bool)
        answers[reaches_sink] = False
        return [bool(x) for x in answers[:count]]

    @staticmethod
    def _price(answers: list[bool], arcs: list[tuple[int, int, float]], source: int, sink: int) -> float:
        def yes(v: int) -> bool:
            return v == source or (v != sink and answers[v])

        return sum(w for a, b, w in arcs if yes(a) and not yes(b))
