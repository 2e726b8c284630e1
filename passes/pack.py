"""Gathers that follow one another without needing one another become one collective.

Before: %k = gather(%k_r, 2, …, group="sp"); %k_h = aten.expand(%k, …); %v = gather(%v_r, 2, …, group="sp"); %v_h = aten.expand(%v, …)
After:  %kv = gather_many([%k_r, %v_r], [2, 2], …, group="sp"); %k = getitem(%kv, 0); %v = getitem(%kv, 1); %k_h = …; %v_h = …

What reads an earlier one moves behind the last; no collective passes another, so all ranks keep one order.
"""

from __future__ import annotations

import operator

from torch.fx import Graph, Node

from seqpar.runtime.layout import gather, gather_many

META = ("stack_trace", "nn_module_stack", "seqpar_source")


def pack_gathers(graph: Graph) -> None:
    """Join neighbouring gathers of one dtype, in place. One walk over the graph."""
    together: list[Node] = []
    readers: dict[Node, None] = {}  # what needs one of them, in order
    for node in list(graph.nodes):
        needs = any(n in readers or n in together for n in node.all_input_nodes)
        if "group" not in node.kwargs:
            if needs and node.op == "call_function":
                readers[node] = None
            continue
        fits = node.target is gather and not needs and (not together or _kind(node) == _kind(together[0]))
        if not fits:
            _join(graph, together, readers)
            together, readers = [], {}
        if node.target is gather:
            together.append(node)
    _join(graph, together, readers)
    graph.lint()


def _kind(node: Node) -> object:
    return node.meta["seqpar_dtype"], node.kwargs["group"]


def _join(graph: Graph, gathers: list[Node], readers: dict[Node, None]) -> None:
    """One call in the place of the last of `gathers`; what reads them comes after it."""
    if len(gathers) < 2:
        return
    last = gathers[-1]
    with graph.inserting_before(last):
        joined = graph.call_function(gather_many, tuple([g.args[i] for g in gathers] for i in range(3)), dict(last.kwargs))
    joined.meta.update({key: last.meta[key] for key in META if key in last.meta})
    place = joined
    for i, old in enumerate(gathers):
        with graph.inserting_after(place):
            part = place = graph.call_function(operator.getitem, (joined, i))
        part.meta.update(old.meta)
        old.replace_all_uses_with(part)
    before = {n for n in readers if n < last}
    for node in (n for n in readers if n in before):
        place.append(node)
        place = node
    for old in gathers:
        graph.erase_node(old)
