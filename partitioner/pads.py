"""What a node puts around a value: zeros, or the positions at its edges."""

from __future__ import annotations

import torch
from torch.fx import Node

from seqpar.partitioner.op import bind_arguments

aten = torch.ops.aten
ZEROS = (aten.constant_pad_nd.default, aten.pad.default)
EDGES = (aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default, aten.pad.default)
Pairs = list[tuple[int, int]]
"""How many positions before and after, last dim first."""


def zeros_around(node: Node) -> Pairs:
    """Empty if the node does something else, or the numbers depend on a length. The value is its first argument."""
    if node.op != "call_function" or node.target not in ZEROS:
        return []
    bound = bind_arguments(node)
    return _pairs(bound["pad"]) if bound.get("mode", "constant") == "constant" and not bound["value"] else []


def edges_around(node: Node) -> Pairs:
    """The same for a node that repeats the first and the last positions."""
    if node.op != "call_function" or node.target not in EDGES:
        return []
    bound = bind_arguments(node)
    return _pairs(bound["pad" if "pad" in bound else "padding"]) if bound.get("mode", "replicate") == "replicate" else []


def _pairs(pad: list[int]) -> Pairs:
    return list(zip(pad[::2], pad[1::2], strict=True)) if all(isinstance(n, int) for n in pad) else []
