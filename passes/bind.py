"""Give the communicating calls of a program their process groups.

Before: %o = heads_to_seq(%x, ..., group="ulysses")
After:  %o = heads_to_seq(%x, ..., group="7")           (the c10d name of this rank's group)
"""

from collections.abc import Mapping
from typing import Protocol

from torch import fx

from seqpar.errors import MeshError
from seqpar.passes.share import copied, with_graph

AXES = ("ulysses", "ring", "sp")


class HasGroups(Protocol):
    """What binding needs of a `seqpar.runtime.mesh.SequenceMesh`."""

    @property
    def groups(self) -> Mapping[str, str]:
        """Axis name -> process group name."""


def bind_groups(gm: fx.GraphModule, mesh: HasGroups | None) -> fx.GraphModule:
    """A copy of `gm`, ready to run, in which every keyword `group` that is an axis name is this rank's process group name.

    It has nodes of its own, so whoever changes it (torch.compile, a user's pass) leaves the unbound program alone. Without a mesh (one rank, or a program that nobody runs here)
    groups keep their names.

    Raises:
        MeshError: the mesh has no group for an axis the program communicates over.
    """
    graph = copied(gm.graph)
    if mesh is None:
        return with_graph(gm, graph, compiled=True)
    for node in graph.nodes:
        axis = node.kwargs.get("group")
        if node.op != "call_function" or axis not in AXES:
            continue
        if axis not in mesh.groups:
            raise MeshError(f"the program communicates over {axis!r} ({node.name}), but the mesh has only {sorted(mesh.groups)}")
        node.update_kwarg("group", mesh.groups[axis])
    return with_graph(gm, graph, compiled=True)


def axes_used(gm: fx.GraphModule) -> frozenset[str]:
    """The axis names an unbound program communicates over."""
    return frozenset(node.kwargs["group"] for node in gm.graph.nodes if node.op == "call_function" and node.kwargs.get("group") in AXES)
