"""The marker: an identity that says which value crosses a module's boundary, and whether it is pinned there.

    %x = boundary(%h, "blocks.0 input hidden_states …", split=1)      dim 1 is sharded from here on
    %y = boundary(%o, "proj_out output 0 …", gather=1)                whole on every rank from here on
    %z = boundary(%h, "blocks.1 input hidden_states …")               neither: it only names the value

`passes/boundary.py` puts markers into a graph while it is traced; emitted programs have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node


@torch.library.custom_op("seqpar::boundary", mutates_args=(), schema="(Tensor x, str key, int? split=None, int? gather=None, SymInt? keep=None) -> Tensor")
def boundary(x: Tensor, key: str, split: int | None = None, gather: int | None = None, keep: int | None = None) -> Tensor:
    """Identity, same shape. keep: that many first positions of dim `split` stay whole. A copy: an operator may not return its input."""
    return x.clone()


@boundary.register_fake
def _(x: Tensor, key: str, split: int | None = None, gather: int | None = None, keep: int | None = None) -> Tensor:
    # The strides of `x`, whatever they are: what follows must be traced as if the marker were not there.
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)


BOUNDARY = torch.ops.seqpar.boundary.default


@dataclass(frozen=True)
class Pin:
    """What a marker says. Invariants: not both `split` and `gather`; `keep` (an int or a node that is one) only with `split`."""

    key: str
    split: int | None = None
    gather: int | None = None
    keep: Any = None

    def __post_init__(self) -> None:
        assert self.split is None or self.gather is None
        assert self.keep is None or self.split is not None

    @property
    def pinned(self) -> bool:
        """False for a marker that only names a value."""
        return self.split is not None or self.gather is not None


def is_marker(node: Node) -> bool:
    return node.op == "call_function" and node.target is BOUNDARY


def pin_of(node: Node) -> Pin:
    """What a marker node says; dims counted from the front."""
    names = ("key", "split", "gather", "keep")
    given: dict[str, Any] = {**dict(zip(names, node.args[1:], strict=False)), **{k: v for k, v in node.kwargs.items() if k in names}}
    rank = node.meta["val"].dim()
    for name in ("split", "gather"):
        if given.get(name) is not None:
            given[name] = given[name] % rank
    return Pin(**given)


def unmarked(node: Node) -> Node:
    """The value that a chain of markers names."""
    while is_marker(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def graph_line(node: Node) -> str:
    """A node as text; of a marker without its key, which names files of this machine."""
    if not is_marker(node):
        return str(node.format_node())
    pin = pin_of(node)
    return f"%{node.name} = marker({node.args[0]}, split={pin.split}, gather={pin.gather}, keep={pin.keep})"
