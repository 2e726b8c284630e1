"""What else the solver could have said, and what it would have cost: other strategies of an attention, the opposite label of a value.

Every answer is a minimum cut like the solver's own, with one thing changed, so its price is that of the best program with that change.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass

from torch.fx import Node

from seqpar.partitioner.candidates import origin
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.labels import Degrees, LabelProblem
from seqpar.partitioner.solve import Solution, calls, cannot_exchange, is_cross


@dataclass(frozen=True)
class Alternative:
    """One choice for a class of attentions. cost: floating-point operations of one rank for the whole program, as `Labels.cost`."""

    strategy: str
    cost: float


@dataclass(frozen=True)
class Forced:
    """The opposite label for one value. sharded: the label it was given; cost: of the program with the opposite one, infinite if there is none.

    work_sharded, work_whole: what producing it costs one rank, with either label; gather: the price of making it whole once for all its
    readers. All in floating-point operations of one rank.
    """

    sharded: bool
    cost: float
    work_sharded: float
    work_whole: float
    gather: float


def problem_of(inference: Inference, solution: Solution) -> LabelProblem:
    """The label problem that the solution solves, built anew."""
    problem = LabelProblem(inference, solution.degrees, solution.prices, set(solution.labels.exchanged), solution.local, solution.prefer)
    problem.build()
    return problem


def mesh_name(degrees: Degrees) -> str:
    """How plans call attention over this mesh."""
    return "+".join(name for name, degree in (("ulysses", degrees.ulysses), ("ring", degrees.ring)) if degree > 1)


def other_meshes(inference: Inference, solution: Solution) -> list[Alternative]:
    """The attentions over the mesh exchanged otherwise by the same ranks: heads only, or around a ring only."""
    ranks, exchanged = solution.degrees.ranks, solution.labels.exchanged
    found = []
    for degrees in (Degrees(ranks, 1), Degrees(1, ranks)):
        if degrees == solution.degrees or not exchanged or any(cannot_exchange(n, inference.relations[n], inference, degrees) for n in exchanged):
            continue
        labels = LabelProblem(inference, degrees, solution.prices, set(exchanged), solution.local, solution.prefer).solve()
        found.append(Alternative(f"{mesh_name(degrees)} {ranks}", labels.cost))
    return found


def other_placement(inference: Inference, solution: Solution, members: Set[Node]) -> Alternative | None:
    """These attentions attending locally if they use the mesh, and over the mesh if they do not; None if they cannot."""
    relations = {n: inference.relations[n] for n in members}
    if members <= solution.labels.exchanged:
        crossing = {n for n, r in relations.items() if is_cross(r, inference)}
        labels = LabelProblem(inference, solution.degrees, solution.prices, solution.labels.exchanged - members, solution.local | crossing, solution.prefer).solve()
        return Alternative("local", labels.cost)
    if any(cannot_exchange(n, r, inference, solution.degrees) for n, r in relations.items()):
        return None
    prefer = {n: atoms for n, atoms in solution.prefer.items() if n not in members} if members & solution.along_batch else solution.prefer
    labels = LabelProblem(inference, solution.degrees, solution.prices, solution.labels.exchanged | members, solution.local - members, prefer).solve()
    # As in `solve`: collectives that local attention does without must be worth their price.
    call = solution.prices.keys if members <= solution.local else solution.prices.call
    return Alternative(mesh_name(solution.degrees), labels.cost + calls(solution.degrees) * call * len(members))


def force(problem: LabelProblem, solution: Solution, node: Node) -> Forced | None:
    """The price of giving `node`'s result the opposite label; None if no label was to be chosen: it can only be whole.

    problem: of `problem_of`; it is left as it was.
    """
    node = origin(node)
    dim = problem.candidate(node)
    vertices = {a: v for a in (problem.atoms(node, dim) if dim is not None else ()) if (v := problem.vertices.get((node, dim, a))) is not None}  # type: ignore[arg-type]
    if not vertices:
        return None
    cut, own = problem.problem, list(vertices.values())
    sharded = any((node, dim, a) in solution.labels.sharded for a in vertices)
    yes, no = (sum(costs[v] for v in own) for costs in (cut.yes_cost, cut.no_cost))
    gather = sum(cut.edges.get((v, problem.gathers[key]), 0.0) for key in problem.gathers if (v := vertices.get(key[2])) is not None and origin(key[0]) is node)
    costs, opposite = (cut.yes_cost, cut.no_cost) if sharded else (cut.no_cost, cut.yes_cost)
    if any(math.isinf(opposite[v]) for v in own):
        return Forced(sharded, math.inf, yes, no, gather)
    before = [costs[v] for v in own]
    for v in own:
        costs[v] = math.inf
    cost, _ = cut.solve()
    for v, price in zip(own, before, strict=True):
        costs[v] = price
    return Forced(sharded, cost + problem.base, yes, no, gather)
