"""What the solver answers: which atoms of which dims are sharded, and which attentions do not attend locally."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch.fx import Node

REDUCED = -1  # stands for the dim of a vertex that is a reduction over an atom
QUERY, KEYS = -2, -3  # operands of an attention whose heads or blocks are exchanged, or whose keys are split

Key = tuple[Node, int, int]  # node, dim (or REDUCED / QUERY / KEYS), atom


@dataclass
class Labels:
    """The answer: which atoms are sharded, per value and per attention operand.

    `exchanged`: attention nodes that use the mesh (Ulysses, ring or both); `split`: that attend all queries to the keys of each rank; all others attend
    locally. `floor`: the part of `cost` that would be left if everything were divided and nothing but those attentions communicated.
    """

    sharded: set[Key] = field(default_factory=set)
    exchanged: set[Node] = field(default_factory=set)
    split: set[Node] = field(default_factory=set)
    cost: float = 0.0
    floor: float = 0.0
