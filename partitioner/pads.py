"""What a node puts around a value: zeros, or the positions at its edges."""

from __future__ import annotations

from types import MappingProxyType

import torch
from torch.fx import Node

from seqpar.partitioner.op import bind_arguments

aten = torch.ops.aten
MODES = MappingProxyType(
    {
        aten.pad.default: "",  # says it itself
        aten.constant_pad_nd.default: "constant",
        **dict.fromkeys((aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default), "replicate"),
    }
)


def around(node: Node, mode: str) -> list[tuple[int, int]]:
    """How many positions before and after, last dim first; empty if the node does something else, or the numbers depend on a length.

    mode: "constant" for zeros, "replicate" for the edges. The value and the numbers are the node's first arguments.
    """
    if node.op != "call_function" or node.target not in MODES:
        return []
    bound, pad = bind_arguments(node), node.args[1]
    if (MODES[node.target] or bound["mode"]) != mode or bound.get("value") or not all(isinstance(n, int) for n in pad):  # type: ignore[index, union-attr]
        return []
    return list(zip(pad[::2], pad[1::2], strict=True))  # type: ignore[index, arg-type]
