"""Choose the strategy of every attention and the labels of every value.

For fixed strategies the labels are an exact minimum cut. An attention whose keys are among its queries (self, joint, prefix)
uses the mesh the user asked for. One whose keys are other positions (cross-attention) may also attend locally, with keys computed on
every rank: tried class by class of equal attentions, and kept unless that repeats more work than the collectives it saves are worth.
At real rates (hardware that the user named) the others may attend locally too, with keys gathered at the cheapest place of their chain: as keys
and values, or before their projections. Prices do not know what of this travels behind work, so labels that cost little more are kept besides the cheapest.
One of few queries to many keys may be divided along its keys (`split_keys`): tried like a cross-attention, whatever its keys are.
Last, attentions whose batch holds another sequence are tried along their batch, with the cut switching between the two (`phases`).
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, field, replace

from torch.fx import Node

from seqpar.partitioner.candidates import heaviest_factor
from seqpar.partitioner.cost import Machine, Prices, is_contraction, nbytes, node_work, prices
from seqpar.partitioner.division import Degrees, are_groups, division, head_counts, mesh_bytes
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.label_problem import LabelProblem
from seqpar.partitioner.labels import Labels
from seqpar.partitioner.op import outputs_of, shape_of
from seqpar.partitioner.phases import choose_phases
from seqpar.partitioner.relation import Relation
from seqpar.partitioner.split_keys import can_split

MAX_TRIALS = 4  # of classes of attentions that are tried with gathered, and with split keys
CLOSE = 1.25  # times the price of the cheapest labels: overlap may make up for that


@dataclass
class Solution:
    """Labels plus, for every attention node, why it attends as it does. `along_batch`: attentions divided along their batch.

    `local`, `prefer`: the other arguments of the `LabelProblem` that was solved, so that it can be asked again (`alternatives`).
    `close`: at real rates, other solutions that cost little more.
    """

    labels: Labels
    degrees: Degrees
    prices: Prices
    reasons: dict[Node, str] = field(default_factory=dict)
    along_batch: frozenset[Node] = frozenset()
    local: frozenset[Node] = frozenset()
    prefer: Mapping[Node, Set[int]] = field(default_factory=dict)
    close: tuple[Solution, ...] = ()


def solve(
    inference: Inference, degrees: Degrees, machine: Machine | None = None, *, local_keys: bool = True, phases: bool = True, split_keys: bool = True
) -> Solution:
    """Cheapest labels and strategies. With one rank, or without attention, nothing is sharded.

    local_keys: whether a cross-attention may attend locally. phases: whether the cut may switch between two axes. split_keys: whether an
    attention may be divided along its keys.
    """
    attentions = {n: r for n, r in inference.relations.items() if r.attention is not None}
    price = _prices(inference, attentions, degrees, machine or Machine())
    if degrees.ranks == 1 or not inference.sequences:
        return Solution(Labels(), degrees, price)
    reasons = {n: why for n, r in attentions.items() if (why := cannot_exchange(n, r, inference, degrees))}
    exchanged = set(attentions) - set(reasons)
    best = LabelProblem(inference, degrees, price, exchanged).solve()
    local: set[Node] = set()
    crossing = {n: r for n, r in attentions.items() if local_keys and n in exchanged and is_cross(r, inference)}
    for members in classes(crossing, inference):
        trial = LabelProblem(inference, degrees, price, best.exchanged - members, local | members).solve()
        if trial.cost < best.cost + calls(degrees) * keys_price(members, inference, price) * len(members):
            best = trial
            local |= members
            reasons |= {n: "attending locally costs less than exchanging" for n in members}
    best = _splitting(inference, degrees, price, best, attentions if split_keys else {}, local)
    reasons = {n: why for n, why in reasons.items() if n not in best.split}
    single = exchanged - crossing.keys() - best.split
    alone = {n for n in single if price.real or _rows_are_even(n, attentions[n], inference, degrees) or _takes_scores(attentions[n], inference)}
    tried = _gathering(inference, degrees, price, best, alone, local)

    def solution(labels: Labels) -> Solution:
        uneven = _heads_that_do_not_divide(inference, degrees, best.exchanged - labels.exchanged)
        return Solution(labels, degrees, price, reasons | uneven, local=frozenset(local))

    cheapest = solution(tried[0])
    found = choose_phases(inference, degrees, price, exchanged) if phases else None
    if found is not None:
        kept = cheapest.labels
        trial = LabelProblem(inference, degrees, price, kept.exchanged - found.along_batch, local, found.prefer, kept.split - found.along_batch).solve()
        spared = len(found.along_batch & kept.exchanged) * calls(degrees) * price.call
        if trial.cost < kept.cost + spared:
            return replace(cheapest, labels=trial, along_batch=found.along_batch, prefer=found.prefer)
    return replace(cheapest, close=tuple(solution(labels) for labels in tried[1:] if price.real and labels.cost <= CLOSE * tried[0].cost))


def _splitting(inference: Inference, degrees: Degrees, price: Prices, best: Labels, attentions: dict[Node, Relation], local: set[Node]) -> Labels:
    """Classes of attentions of few queries, the heaviest first, that attend the keys where they are; `local` is left without those that do."""
    few = {n: r for n, r in attentions.items() if can_split(inference, r, degrees.ranks)}
    for members in _heaviest(classes(few, inference), inference):
        trial = LabelProblem(inference, degrees, price, best.exchanged - members, local - members, split=best.split | members).solve()
        if trial.split & members and trial.cost < best.cost + calls(degrees) * price.call * len(members & best.exchanged):
            best = trial
            local -= members
    return best


def _heaviest(groups: list[set[Node]], inference: Inference) -> list[set[Node]]:
    """The classes that are tried, those with the most work first."""
    return sorted(groups, key=lambda g: -sum(node_work(n, inference.table.sizes) for n in g))[:MAX_TRIALS]


def _heads_that_do_not_divide(inference: Inference, degrees: Degrees, gathering: Set[Node]) -> dict[Node, str]:
    """Of these, which gather keys instead of exchanging: why."""
    spans = ((n, inference.relations[n]) for n in gathering)
    heads = {n: inference.table.example_length(r.operand_axes[r.attention.q][1]) for n, r in spans}
    return {n: f"cheaper than exchanging its {h} heads, which {degrees.ulysses} ranks do not divide" for n, h in heads.items() if h % degrees.ulysses}


def _gathering(inference: Inference, degrees: Degrees, price: Prices, best: Labels, candidates: Set[Node], local: Set[Node]) -> list[Labels]:
    """Classes of attentions, the heaviest first, that keep their rows and gather keys instead of exchanging where that takes less time.

    The labels that cost least, and all others that were tried.
    """
    tried = [best]
    for members in _heaviest(classes({n: r for n, r in inference.relations.items() if n in candidates}, inference), inference):
        trial = LabelProblem(inference, degrees, price, best.exchanged - members, local, split=best.split).solve()
        mesh = division(inference, degrees, price, next(iter(members))).degrees
        tried.append(trial)
        if trial.cost < best.cost + calls(mesh) * price.call * len(members):
            best = trial
    return [best, *(labels for labels in tried if labels is not best)]


def is_cross(relation: Relation, inference: Inference) -> bool:
    """Queries and keys have no positions in common."""
    queries, keys = (inference.table.roots(relation.operand_axes[i][-2]) for i in (relation.attention.q, relation.attention.k))
    return not queries & keys


def keys_price(members: Set[Node], inference: Inference, price: Prices) -> float:
    """Per collective that equal cross-attentions do without where they attend locally."""
    relation = inference.relations[next(iter(members))]
    return price.serving(max((inference.sequences.get(a, 0) for a in inference.table.roots(relation.operand_axes[relation.attention.k][-2])), default=0))


def _rows_are_even(node: Node, relation: Relation, inference: Inference, degrees: Degrees) -> bool:
    """Its heads are not evenly divided, and its rows would be: keeping the rows and gathering keys is an alternative whatever the rates."""
    heads = inference.table.example_length(relation.operand_axes[relation.attention.q][1])
    return heads % degrees.ulysses > 0 and not relation.attention.is_causal


def _takes_scores(relation: Relation, inference: Inference) -> bool:
    """Its mask is made of activations, by head (scores of the layer before): exchanging heads moves that, too."""
    index = relation.attention.mask
    mask = None if index is None else relation.operands[index]
    if mask not in inference.input_dependent or len(shape := shape_of(mask.meta["val"])) < 3 or any(n == 1 for n in shape[-3:]):
        return False
    found, seen = [mask], {mask}
    while found:
        node = found.pop()
        if is_contraction(node.target) and node in inference.input_dependent:
            return True
        new = [n for n in node.all_input_nodes if n not in seen]
        seen.update(new)
        found += new
    return False


def calls(degrees: Degrees) -> int:
    """Collectives of one attention over the mesh: there and back, and around."""
    return 2 * (degrees.ulysses > 1) + (degrees.ring - 1)


def _prices(inference: Inference, attentions: dict[Node, Relation], degrees: Degrees, machine: Machine) -> Prices:
    sizes = inference.table.sizes
    work = sum(node_work(n, sizes) for n in inference.relations)
    moved = 0.0
    u, r = degrees.ulysses, degrees.ring
    for node, relation in attentions.items():
        spec = relation.attention
        out = nbytes(outputs_of(node)[0], sizes)
        heads = inference.table.example_length(relation.operand_axes[spec.q][1])
        k, v = (nbytes(relation.operands[i].meta["val"], sizes) for i in (spec.k, spec.v))
        over_mesh = (2 * out + k + v) / r * (u - 1) / u / u + (k + v) / u * (r - 1) / r
        if heads % u and cannot_exchange(node, relation, inference, degrees) is None:
            over_mesh = mesh_bytes(inference, degrees, node, division(inference, degrees, Prices(0.0, 0.0, 0.0, 0.0), node))
        # What dividing an attention costs does not vanish because its keys are few: at least an exchange of its rows.
        moved += max(over_mesh, (2 * out + k + v) * (u * r - 1) / (u * r) ** 2)
    moved += sum(_mixed_bytes(n, rel, inference) for n, rel in inference.relations.items()) * (1 - 1 / degrees.ranks)
    return prices(machine, work, moved, len(attentions) + len(inference.written), degrees.ranks)


def _mixed_bytes(node: Node, relation: Relation, inference: Inference) -> int:
    """What dividing a product of two values over the sequence (scores, pairs of positions) has to move: the smaller one, to every rank."""
    if relation.attention is not None or not is_contraction(node.target):
        return 0
    held = [
        nbytes(n.meta["val"], inference.table.sizes)
        for n, axes in zip(relation.operands, relation.operand_axes, strict=True)
        if n in inference.input_dependent and any(inference.table.roots(a) & inference.sequences.keys() for a in axes)
    ]
    return min(held) if len(held) > 1 else 0


def cannot_exchange(node: Node, relation: Relation, inference: Inference, degrees: Degrees) -> str | None:
    """Why an attention cannot use the mesh, or None."""
    spec = relation.attention
    table = inference.table
    if not spec.plain:
        return "queries, keys and values do not all have four dims and one batch size"
    heads, key_heads, value_heads = head_counts(inference, relation)
    if not are_groups(heads, key_heads, value_heads):
        return f"its {heads} query, {key_heads} key and {value_heads} value heads are no groups"
    queries, keys = (table.expand_axis(relation.operand_axes[i][-2]) for i in (spec.q, spec.k))
    if not queries or not keys:
        return "it has one query or one key"
    if table.expand_axis(relation.out_axes[0][-2]) != queries:
        return "its mask's rows are laid out unlike its queries"
    if spec.is_causal and any(a in inference.sequences for axis in (queries, keys) for f in axis[1:] for a in f):
        return "it is causal, and the cut factor of its sequence is not the outermost"
    longest = max((table.sizes.hint(table.length(a)) for a in heaviest_factor(inference, queries)), default=0)
    if longest < degrees.ranks:
        return f"its longest query part has {longest} positions, fewer than {degrees.ranks} ranks"
    return None


def classes(attentions: dict[Node, Relation], inference: Inference) -> list[set[Node]]:
    """Attentions of equal shapes whose sequences are the same: one choice for all of them."""
    table = inference.table
    groups: dict[object, set[Node]] = {}
    for node, relation in attentions.items():
        spec = relation.attention
        rows = tuple(table.expand_axis(relation.operand_axes[i][-2]) for i in (spec.q, spec.k))
        shape = shape_of(node.meta["val"])[:2]
        groups.setdefault((rows, shape, spec.mask is None), set()).add(node)
    return list(groups.values())
