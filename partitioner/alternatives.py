"""What else the solver could have said, and what it would have cost: other strategies of an attention, the opposite label of a value.

Every answer is a minimum cut like the solver's own, with one thing changed, so its price is that of the best program with that change.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass, replace

from torch.fx import Node

from seqpar.partitioner.balance import EXCHANGES
from seqpar.partitioner.candidates import origin
from seqpar.partitioner.cost import Machine, node_work
from seqpar.partitioner.division import Degrees
from seqpar.partitioner.exchange_bytes import ExchangeBytes
from seqpar.partitioner.execution import Execution, execution_of, mesh_name
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.key_sources import KeySources
from seqpar.partitioner.label_problem import LabelProblem
from seqpar.partitioner.layout import LayoutView
from seqpar.partitioner.riders import riders_of
from seqpar.partitioner.solve import Solution, calls, cannot_exchange, is_cross, keys_price
from seqpar.partitioner.split_keys import can_split


@dataclass(frozen=True)
class Alternative:
    """One strategy for an attention, as plans call it. seconds: predicted, of one such attention and what it moves; received: bytes per rank.

    cost: what the solver prices the whole program at, in floating-point operations of one rank, as `Labels.cost`; None where the mesh
    decides, which the user chose.
    """

    strategy: str
    seconds: float
    cost: float | None = None
    received: float = 0.0


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
    """The label problem that the solution solves, built anew, with labels for every block: what is asked is about one value."""
    labels = solution.labels
    problem = LabelProblem(inference, solution.degrees, solution.prices, set(labels.exchanged), solution.local, solution.prefer, labels.split, apart=True)
    problem.build()
    return problem


def alternatives(inference: Inference, solution: Solution, members: Set[Node], machine: Machine) -> list[Alternative]:
    """What else the members, equal attentions, could do: exchange over another mesh of the same ranks, attend locally, split their keys, or over the mesh; fastest first."""
    node, ranks = next(iter(members)), solution.degrees.ranks
    found = [other_placement(inference, solution, members, machine), split_placement(inference, solution, members, machine)]
    for degrees in (Degrees(ranks, 1), Degrees(1, ranks)) if members <= solution.labels.exchanged else ():
        if degrees != solution.degrees and not cannot_exchange(node, inference.relations[node], inference, degrees):
            seconds = attention_seconds(inference, solution, node, degrees, machine)
            found.append(Alternative(f"{mesh_name(degrees)} {ranks}", seconds, received=attention_bytes(inference, solution, node, degrees)))
    return sorted((a for a in found if a is not None), key=lambda a: a.seconds)


def other_placement(inference: Inference, solution: Solution, members: Set[Node], machine: Machine) -> Alternative | None:
    """These attentions over the mesh if they do not use it and can; else locally. None if neither is another one."""
    relations = {n: inference.relations[n] for n in members}
    node = next(iter(members))
    if not members <= solution.labels.exchanged and not any(cannot_exchange(n, r, inference, solution.degrees) for n, r in relations.items()):
        prefer = {n: atoms for n, atoms in solution.prefer.items() if n not in members} if members & solution.along_batch else solution.prefer
        trial = _resolved(inference, replace(solution, prefer=prefer), members, exchanged=True)
        # As in `solve`: collectives that local attention does without must be worth their price.
        call = keys_price(members, inference, solution.prices) if members <= solution.local else solution.prices.call
        cost = trial.labels.cost + calls(solution.degrees) * call * len(members)
        received = attention_bytes(inference, trial, node, solution.degrees)
        return Alternative(mesh_name(solution.degrees), attention_seconds(inference, trial, node, solution.degrees, machine), cost, received)
    if not members <= solution.labels.exchanged | solution.labels.split:
        return None
    crossing = {n for n, r in relations.items() if is_cross(r, inference)}
    return _where_its_queries_are(inference, _resolved(inference, solution, members, local=crossing), node, machine)


def split_placement(inference: Inference, solution: Solution, members: Set[Node], machine: Machine) -> Alternative | None:
    """These attentions divided along their keys, where that is another one that may pay."""
    if members & solution.labels.split or not all(can_split(inference, inference.relations[n], solution.degrees.ranks) for n in members):
        return None
    trial = _resolved(inference, solution, members, split=members)
    return _where_its_queries_are(inference, trial, next(iter(members)), machine) if members <= trial.labels.split else None


def _resolved(inference: Inference, solution: Solution, members: Set[Node], exchanged: bool = False, local: Set[Node] = frozenset(), split: Set[Node] = frozenset()) -> Solution:
    """The solution with other strategies for the members."""
    labels = solution.labels
    over, beside = (labels.exchanged | members if exchanged else labels.exchanged - members), solution.local - members | local
    problem = LabelProblem(inference, solution.degrees, solution.prices, over, beside, solution.prefer, labels.split - members | split)
    return replace(solution, labels=problem.solve())


def _where_its_queries_are(inference: Inference, trial: Solution, node: Node, machine: Machine) -> Alternative:
    source = KeySources(LayoutView(inference, trial, 0)).of(node)
    return Alternative(source.strategy, attention_seconds(inference, trial, node, None, machine), trial.labels.cost, source.received)


def attention_seconds(inference: Inference, solution: Solution, node: Node, degrees: Degrees | None, machine: Machine, sources: KeySources | None = None) -> float:
    """Predicted time of one attention whose operands are laid out as the solution has them: over a mesh of all ranks, or (None) without one.

    sources: of this solution, where it is at hand. Exact for parts and heads of equal sizes. A ring travels behind the attention of the block before.
    """
    attend = node_work(node, inference.table.sizes) / solution.degrees.ranks / machine.flops_per_s
    if degrees is None:
        source = (sources or KeySources(LayoutView(inference, solution, 0))).of(node)
        return attend + _wire(source.received, bool(source.values), machine)
    run = execution_of(inference, replace(solution, degrees=degrees), node)
    u, r = run.division.degrees.ulysses, run.division.degrees.ring
    exchanged, travels = _mesh_bytes(inference, solution, node, degrees, run)
    exchange = _wire(exchanged, 2 * (u > 1) + EXCHANGES * run.zigzag, machine)
    around = _wire(travels, r - 1, machine)
    return attend * run.division.uneven + exchange + max(0.0, around - attend * (r - 1) / r) - run.turns.saved / machine.flops_per_s


def attention_bytes(inference: Inference, solution: Solution, node: Node, degrees: Degrees | None) -> float:
    """Bytes that the busiest rank receives for one attention: over a mesh of all ranks, or (None) without one; the latter for parts of equal sizes."""
    if degrees is None:
        return KeySources(LayoutView(inference, solution, 0)).of(node).received
    return sum(_mesh_bytes(inference, solution, node, degrees, execution_of(inference, replace(solution, degrees=degrees), node)))


def _mesh_bytes(inference: Inference, solution: Solution, node: Node, degrees: Degrees, run: Execution) -> tuple[float, float]:
    """By all-to-all, around the ring; with operands and result laid out as the solution has them."""
    counted = ExchangeBytes(inference, node, run.division, riders_of(inference, degrees.ranks, degrees.ring))
    relation, view = inference.relations[node], LayoutView(inference, solution, 0)
    spec = relation.attention
    known = node in solution.labels.exchanged
    cut = [(i, (view.required(node, relation, i) if known else view.produced(relation.operands[i]))[-2]) for i in (spec.q, spec.k, spec.v)]
    return counted.total(cut, view.produced(node)[-2], run.zigzag)


def _wire(received: float, count: int, machine: Machine) -> float:
    return received / machine.bytes_per_s + count * machine.latency_s


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
    return Forced(sharded, cost, yes, no, gather)
