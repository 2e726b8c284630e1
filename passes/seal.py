"""Before a program is compiled, its exchanges of pieces with symbolic lengths become one operator each (`runtime/sealed.py` says why).

Before: %wire = start_seq_to_pieces((%q, %k, %v), …, group="7"); …; %p = finish_seq_to_pieces(%wire, (%q, %k, %v), …, group="7")
After:  %p = seqpar.sealed((%q, %k, %v), (%n, …), '{"function": "seq_to_pieces", …}'); …

Work that was put behind such an exchange is no longer behind it. A compiler keeps the order of the collectives it knows; so that it keeps that of a sealed one
and its neighbours, too, on all ranks, one of them depends on the other:

Before: %a = seqpar.sealed((%x,), …); %wire = start_gather(%y, …)
After:  %a = seqpar.sealed((%x,), …); %y_1 = seqpar.after(%y, %a[0]); %wire = start_gather(%y_1, …)
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch.fx import Node

from seqpar.passes.schedule import FINISHES, WHOLES, communicates
from seqpar.passes.share import copied, with_graph
from seqpar.runtime.sealed import AFTER, SEALABLE, SEALED, written
from seqpar.runtime.zigzag import zigzag_attention


def sealed_program(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a bound program in which such exchanges are one operator each; `gm` itself if it has none."""
    graph, changed = copied(gm.graph), False
    for node in list(graph.nodes):
        name, arguments = _sealed(node)
        if name is None:
            continue
        with graph.inserting_before(node):
            results = graph.call_function(SEALED, arguments)
            result = results if name == "seq_to_pieces" else graph.call_function(operator.getitem, (results, 0))
        users = [user for user in node.users if user.target in FINISHES] or [node]
        for old in users:
            old.replace_all_uses_with(result)
        for old in dict.fromkeys([*users, node]):
            graph.erase_node(old)
        changed = True
    if not changed:
        return gm
    _keep_order(graph)
    return with_graph(gm, graph, compiled=True)


def _keep_order(graph: fx.Graph) -> None:
    """Whatever communicates next to a sealed exchange depends on it, or it on that."""
    reached: dict[Node, int] = {}  # the last communicating node that a node depends on, itself included; they are counted
    last: Node | None = None
    for node in list(graph.nodes):
        reached[node] = max((reached[x] for x in node.all_input_nodes), default=0)
        if node.target is not SEALED and not communicates(node):
            continue
        if last is not None and SEALED in (node.target, last.target) and reached[node] < reached[last]:
            _put_after(graph, node, last)
        reached[node] = 1 if last is None else reached[last] + 1
        last = node


def _put_after(graph: fx.Graph, node: Node, last: Node) -> None:
    first = node.all_input_nodes[0]
    several = any(user.target is operator.getitem for user in last.users)
    with graph.inserting_before(node):
        begun = graph.call_function(operator.getitem, (last, 0)) if several else last
        node.replace_input_with(first, graph.call_function(AFTER, (first, begun)))


def _sealed(node: Node) -> tuple[str | None, tuple[Any, ...]]:
    """The name in SEALABLE of what a node calls or starts, and the arguments of the operator; None if no symbolic lengths are compared."""
    whole = WHOLES.get(node.target, node.target)
    name = getattr(whole, "__name__", "") if node.op == "call_function" else ""
    one_stretch = whole is zigzag_attention and len(node.kwargs["query_segments"]) == 1  # type: ignore[arg-type]
    if name not in SEALABLE or one_stretch:  # which moves in whole chunks
        return None, ()
    arguments = written(name, node.args, node.kwargs, Node)
    return (name, arguments) if arguments[1] else (None, ())
