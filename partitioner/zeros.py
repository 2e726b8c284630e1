"""Zeros that a node puts around a value."""

from __future__ import annotations

import torch
from torch.fx import Node

from seqpar.partitioner.op import bind_arguments

aten = torch.ops.aten
PADS = (aten.constant_pad_nd.default, aten.pad.default)


def zeros_around(node: Node) -> list[tuple[int, int]]:
    """How many before and after, last dim first; empty if the node does something else, or their numbers depend on a length. The value is its first argument."""
    if node.op != "call_function" or node.target not in PADS:
        return []
    bound = bind_arguments(node)
    if bound.get("mode", "constant") != "constant" or bound["value"] or not all(isinstance(n, int) for n in bound["pad"]):
        return []
    return list(zip(bound["pad"][::2], bound["pad"][1::2], strict=True))
