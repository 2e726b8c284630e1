"""Emit nodes into a graph that is being rewritten, with the fake values that the rules read."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, Node

from seqpar.partitioner.op import outputs_of

ORIGIN = ("stack_trace", "helper_lines", "inner_line", "nn_module_stack")


class Builder:
    """Emits nodes before (and with the source lines of) the node that they replace."""

    def __init__(self, graph: Graph, at: Node) -> None:
        self.graph, self.at = graph, at
        self.mode = outputs_of(at)[0].fake_mode  # type: ignore[attr-defined]

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, kwargs)
        node.meta.update({k: v for k, v in self.at.meta.items() if k in ORIGIN})
        values = torch.fx.map_arg((args, kwargs), lambda n: n.meta["val"])
        with self.mode, torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        return node

    def permute(self, x: Node, order: list[int]) -> Node:
        return x if order == list(range(len(order))) else self.call(torch.ops.aten.permute.default, x, order)

    def size(self, x: Node, dim: int) -> Any:
        """A size as an int, or as a node where it is symbolic."""
        size = x.meta["val"].shape[dim]
        return size if isinstance(size, int) else self.call(torch.ops.aten.sym_size.int, x, dim)
