"""Short ends of a causal sequence stay with the long part beside them, so that every rank holds one contiguous stretch.

A loss that predicts the next token cuts `logits[:, :-1]`: the sequence consists of two atoms then, `[S - 1 | 1]`. An atom with fewer positions than
ranks is whole on every rank: work on it is repeated, and what is computed of both is gathered or cut at every turn. As a *rider* the
short atom is held where the sequence would have been cut without it: `S` is divided evenly, the last rank's part ends with the rider (the first
rank's begins with it), and the long atom, the *host*, has what remains:

    ranks         0    1    2    3
    S = 2048    512  512  512  512
    2047        512  512  512  511
       1          0    0    0    1
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import sympy
from torch.fx import Node

from seqpar.partitioner.atoms import Factor
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.lengths import Length, minus, part, total
from seqpar.partitioner.relation import Relation


@dataclass(frozen=True)
class Riders:
    """Which atoms ride with which, for a number of ranks. runs: host -> the whole stretch, hosts: rider -> its host.

    Invariants: riders have known lengths, are shorter than the ranks, and the first (last) rank's part of the stretch holds those before (behind) the host.
    """

    ranks: int
    runs: dict[int, Factor] = field(default_factory=dict)
    hosts: dict[int, int] = field(default_factory=dict)

    def rides(self, atom: int, among: Sequence[int]) -> bool:
        """Whether an atom is a rider, with its host among these."""
        return self.hosts.get(atom) in among

    def rides_in_all(self, inference: Inference, node: Node, dim: int, atom: int) -> bool:
        """The same in this dim of all results of a node."""
        factors = [f for axes in inference.axes[node] if dim < len(axes) for f in inference.table.expand_axis(axes[dim]) if atom in f]
        return atom in self.hosts and all(self.rides(atom, f) for f in factors)

    def is_one_stretch(self, factor: Factor) -> bool:
        """Whether a rank's parts of these atoms, all sharded, are contiguous."""
        return len(factor) == 1 or any(self.runs.get(atom) == factor for atom in factor)

    def part(self, atom: int, length: Length, rank: int, inference: Inference) -> Length:
        """How many positions of a sharded atom a rank holds."""
        host = self.hosts.get(atom, atom)
        run = self.runs.get(host)
        if run is None:
            return part(length, rank, self.ranks)
        at = run.index(host)
        first, last = rank == 0, rank == self.ranks - 1
        if atom != host:
            return length if (first if run.index(atom) < at else last) else 0
        lengths = [inference.table.length(a) for a in run]
        return minus(part(total(lengths), rank, self.ranks), total([*(lengths[:at] if first else ()), *(lengths[at + 1 :] if last else ())]))


def riders_of(inference: Inference, ranks: int, ring: int) -> Riders:
    """The riders of all causal attentions around a ring; those of the first one where two disagree."""
    return inference.answer((Riders, ranks, ring), lambda: _read_riders(inference, ranks, ring))


def _read_riders(inference: Inference, ranks: int, ring: int) -> Riders:
    found = Riders(ranks)
    for relation in inference.attentions if ring > 1 else ():
        run = _stretch(inference, relation)
        host = _host(inference, run, ranks)
        if host is not None and not any(a in found.hosts or a in found.runs for a in run):
            found.runs[host] = run
            found.hosts.update({a: host for a in run if a != host})
    return found


def _stretch(inference: Inference, relation: Relation) -> Factor:
    """The atoms of the outermost factor of a causal self-attention's sequence."""
    spec = relation.attention
    if not spec.is_causal or spec.mask is not None:
        return ()
    queries, keys = (inference.table.expand_axis(relation.operand_axes[i][-2]) for i in (spec.q, spec.k))
    return queries[0] if queries and queries == keys else ()


def _host(inference: Inference, run: Factor, ranks: int) -> int | None:
    """The one long atom among short ones that fit into the parts at its ends; None if it is not so, or there is nobody to carry."""
    table, sizes = inference.table, inference.table.sizes
    long = [a for a in run if sizes.hint(table.length(a)) >= ranks]
    short = [table.length(a) for a in run if a not in long]
    if len(long) != 1 or not short or len(set(run)) < len(run) or not all(isinstance(n, int) for n in short):
        return None
    at, whole = run.index(long[0]), table.factor_length(run)
    needed = ranks * max(sizes.hint(total(table.length(a) for a in end)) for end in (run[:at], run[at + 1 :]))
    if sizes.hint(whole) < needed:
        return None
    if not isinstance(whole, int):
        sizes.assume(sympy.Ge(whole, needed), (long[0],))
    return long[0]
