"""Slices written one after another into the same value are written in one call, which allocates once.

Before: %t = aten.empty_like(%x); %u = aten.slice_scatter(%t, %even, 3, 0, 64, 2); %v = aten.slice_scatter(%u, %odd, 3, 1, 64, 2)
After:  %v = write_slices(%x, [%even, %odd], [(3, 0, 64, 2), (3, 1, 64, 2)], new=True)

`out[..., 0::2] = a; out[..., 1::2] = b` in a model's code comes out of functionalisation as two copies of the whole.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from seqpar.partitioner.op import bind_arguments
from seqpar.runtime.strided import write_slices

aten = torch.ops.aten
META = ("stack_trace", "nn_module_stack", "seqpar_source", "val", "seqpar_dtype")


def join_writes(graph: Graph) -> None:
    """Join chains of writes, in place. One walk over the graph."""
    writes = {node: bind_arguments(node) for node in graph.nodes if node.target is aten.slice_scatter.default}
    followed = {bound["self"] for bound in writes.values() if _only_reader(bound["self"])}
    for last in [node for node in writes if node not in followed]:
        chain = [last]
        while (base := writes[chain[-1]]["self"]) in writes and base in followed:
            chain.append(base)
        new = base.target is aten.empty_like.default and _only_reader(base) and _keeps_dtype(base)
        if len(chain) < 2 and not new:
            continue
        places = [tuple(writes[node][key] for key in ("dim", "start", "end", "step")) for node in reversed(chain)]
        with graph.inserting_before(last):
            joined = graph.call_function(write_slices, (base.args[0] if new else base, [writes[node]["src"] for node in reversed(chain)], places, new))
        joined.meta.update({key: last.meta[key] for key in META if key in last.meta})
        last.replace_all_uses_with(joined)
        for node in (*chain, *((base,) if new else ())):
            graph.erase_node(node)


def _only_reader(node: Any) -> bool:
    """Whether one node reads the value, in one place."""
    return isinstance(node, Node) and len(node.users) == 1 and next(iter(node.users)).all_input_nodes.count(node) == 1


def _keeps_dtype(empty: Node) -> bool:
    """Whether an `empty_like` is of the dtype, device and format of its operand."""
    return not any(value is not None for key, value in empty.kwargs.items() if key != "pin_memory")
