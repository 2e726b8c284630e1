"""Before a program is compiled, its exchanges of pieces with symbolic lengths become one operator each (`runtime/sealed.py` says why).

Before: %wire = start_seq_to_pieces((%q, %k, %v), …, group="7"); …; %p = finish_seq_to_pieces(%wire, (%q, %k, %v), …, group="7")
After:  %p = seqpar.sealed((%q, %k, %v), (%n, …), '{"function": "seq_to_pieces", …}'); …

Collectives keep their order; work that was put behind such an exchange is no longer behind it.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.fx import Node

from seqpar.passes.schedule import HALVES
from seqpar.passes.share import copied, with_graph
from seqpar.runtime.sealed import SEALABLE, SEALED, written
from seqpar.runtime.zigzag import zigzag_attention


def sealed_program(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a bound program in which such exchanges are one operator each; `gm` itself if it has none."""
    if not any(map(_name, gm.graph.nodes)):
        return gm
    graph = copied(gm.graph)
    finishes = {finish for _, finish in HALVES.values()}
    for node in list(graph.nodes):
        name = _name(node)
        if name is None:
            continue
        with graph.inserting_before(node):
            results = graph.call_function(SEALED, written(name, node.args, node.kwargs, Node))
            result = results if name == "seq_to_pieces" else graph.call_function(operator.getitem, (results, 0))
        users = [user for user in node.users if user.target in finishes] or [node]
        for old in users:
            old.replace_all_uses_with(result)
        for old in dict.fromkeys([*users, node]):
            graph.erase_node(old)
    return with_graph(gm, graph, compiled=True)


def _name(node: Node) -> str | None:
    """The name in SEALABLE of what a node calls or starts, if it has symbolic lengths to compare."""
    if node.op != "call_function":
        return None
    wholes: dict[Any, Any] = {start: whole for whole, (start, _) in HALVES.items()}
    name = getattr(wholes.get(node.target, node.target), "__name__", "")
    if name not in SEALABLE or not written(name, node.args, node.kwargs, Node)[1]:
        return None
    one_stretch = node.target is zigzag_attention and len(node.kwargs["query_segments"]) == 1  # type: ignore[arg-type]
    return None if one_stretch else name  # it moves in whole chunks
