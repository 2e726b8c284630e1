"""What of a value may be sharded at all: one factor of one dim, where it comes from one place; and which values only keys are made of."""

from __future__ import annotations

import math
import operator
from collections.abc import Set

import sympy
from torch.fx import Node

from seqpar.partitioner.atoms import AtomTable, Axis
from seqpar.partitioner.infer import Inference
from seqpar.partitioner.relation import Relation


def origin(node: Node) -> Node:
    """The node whose outputs `node` is: itself, or the multi-output call behind a getitem."""
    while node.op == "call_function" and node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    return node


def key_side(inference: Inference, local: Set[Node]) -> set[Node]:
    """Values that serve nothing but the keys and values of these attentions."""
    found: set[Node] = set()
    for node in reversed(inference.axes):
        if node.op == "call_function" and node.users and all(user in found or _reads_as_key(inference, user, node, local) for user in node.users):
            found.add(node)
    return found


def _reads_as_key(inference: Inference, user: Node, node: Node, local: Set[Node]) -> bool:
    if user not in local:
        return False
    relation = inference.relations[user]
    spec = relation.attention
    return node is not relation.operands[spec.q] and node in (relation.operands[spec.k], relation.operands[spec.v])


def weight(inference: Inference, atom: int, prefer: Set[int]) -> tuple[bool, float]:
    """What decides between sequence atoms: preferred ones first, then the heaviest."""
    return atom in prefer, inference.sequences[atom]


def heaviest_factor(inference: Inference, axis: Axis, prefer: Set[int] = frozenset()) -> list[int]:
    """Sequence atoms of the one factor of a product that may be sharded: cut in two factors, a dim would lose what is off the diagonal.

    That with an atom of `prefer`, else the heaviest.
    """
    factors = inference.table.expand_axis(axis)
    found = [[a for a in f if a in inference.sequences and sum(a in g for g in factors) == 1] for f in factors]
    return max(found, key=lambda atoms: max((weight(inference, a, prefer) for a in atoms), default=(False, -math.inf)), default=[])


def flowing(table: AtomTable, relation: Relation, dim: int) -> set[int]:
    """Atoms that reach an output dim from one place of each operand; two places would leave open which one is cut."""
    found: set[int] = set()
    unclear: set[int] = set()
    for i in range(len(relation.operands)):
        factors = [set(f) for (j, d), outs in relation.flows.items() if j == i and dim in outs for f in table.expand_axis(relation.operand_axes[i][d])]
        for k, factor in enumerate(factors):
            unclear |= {a for a in factor if any(a in other for other in factors[k + 1 :])}
            found |= factor
    return found - unclear


def share_of(table: AtomTable, axis: Axis, atom: int) -> float:
    """Part of a dim's positions that belongs to an atom."""
    for factor in table.expand_axis(axis):
        if atom in factor:
            length = table.sizes.hint(table.factor_length(factor))
            return factor.count(atom) * table.sizes.hint(table.length(atom)) / max(length, 1)
    return 0.0


def reaches(table: AtomTable, ranks: int, relation: Relation, dim: int, atom: int) -> bool:
    """Parts are long enough to serve their neighbours' halos; only a dim whose outermost factor is one atom has neighbours, and one that is an atom windows, at fixed places.

    Statistics count every position once: nothing beside the atom may be whole on every rank.
    """
    axis = table.expand_axis(relation.out_axes[0][dim])
    if dim in relation.pooled:
        return (atom,) in axis
    if dim in relation.windows:
        return axis == ((atom,),)
    if dim not in relation.halo:
        return True
    around, inner = relation.halo[dim], table.axis_length(table.expand_axis(relation.operand_axes[0][dim])[1:])  # positions for each of the atom's
    needed = -(-max(around.before, around.after) // (inner if isinstance(inner, int) else 1)) * ranks
    length = table.length(atom)
    if axis[0] != (atom,) or table.sizes.hint(length) < needed:
        return False
    if not isinstance(length, int):
        table.sizes.assume(sympy.Ge(length, needed), (atom,))
    return True
