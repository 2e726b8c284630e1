"""The sequence-parallel mesh: ulysses x ring ranks, own or taken from a mesh of the user's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqpar.errors import MeshError

DIMS = ("ring", "ulysses")


@dataclass(frozen=True)
class SequenceMesh:
    """One rank's place among the ulysses * ring ranks that share a sequence.

    `groups` maps "ring", "ulysses" and "sp" (all of them) to process-group names; it is empty for a single rank,
    and lacks an axis of degree 1 that the user's own mesh does not have.

    Invariants: rank == ring index * ulysses + ulysses index, and is this rank's index in the "sp" group.
    """

    ulysses: int
    ring: int
    rank: int
    groups: Mapping[str, str]
    device_mesh: DeviceMesh | None

    def __post_init__(self) -> None:
        assert 0 <= self.rank < self.size, f"rank {self.rank} in a mesh of {self.size}"

    @property
    def size(self) -> int:
        """How many ranks share a sequence."""
        return self.ulysses * self.ring


def check_degrees(**degrees: Any) -> None:
    """Raise MeshError unless all are positive integers; the text has the caller's name of the degree: `check_degrees(ulysses=2, ring=1)`."""
    for name, degree in degrees.items():
        if not isinstance(degree, int) or isinstance(degree, bool) or degree < 1:
            raise MeshError(f"{name} must be an integer >= 1, not {degree!r}")


def build_mesh(ulysses: int, ring: int, mesh: DeviceMesh | None = None, device_type: str | None = None) -> SequenceMesh:
    """The mesh of this rank; collective (every rank of the world calls it, in the same order).

    Without `mesh`, consecutive ranks form groups of ulysses * ring; a larger world is several independent groups.
    `mesh` may have other dims; it needs "ring" before "ulysses", except for one whose degree is 1.
    A single rank (ulysses = ring = 1) needs no process group. Raises MeshError.
    """
    check_degrees(ulysses=ulysses, ring=ring)
    if ulysses * ring == 1:
        return SequenceMesh(1, 1, 0, {}, None)
    if not (dist.is_available() and dist.is_initialized()):
        raise MeshError(
            f"ulysses={ulysses}, ring={ring} needs {ulysses * ring} processes, but no process group is initialised. "
            f"Launch the script with `torchrun --nproc-per-node {ulysses * ring} script.py`, and call "
            f"torch.distributed.init_process_group() before compiling"
        )
    mesh = _new_mesh(ulysses, ring, device_type) if mesh is None else mesh
    _check_mesh(mesh, ulysses, ring)
    names = mesh.mesh_dim_names or ()
    present = tuple(dim for dim in DIMS if dim in names)
    both = mesh[present]
    order = both.mesh.flatten().tolist()
    if order != sorted(order):  # a process group numbers its members by global rank
        raise MeshError(f"the ranks along {present} of the mesh must ascend (ring outer, ulysses inner), got {order}")
    groups = {dim: mesh[dim].get_group().group_name for dim in present}
    groups["sp"] = groups[present[0]] if len(present) == 1 else both._flatten("seqpar_sp").get_group().group_name
    return SequenceMesh(ulysses, ring, order.index(dist.get_rank()), groups, mesh)


def _new_mesh(ulysses: int, ring: int, device_type: str | None) -> DeviceMesh:
    world, size = dist.get_world_size(), ulysses * ring
    if world % size:
        raise MeshError(
            f"the world of {world} processes is not a multiple of ulysses * ring = {ulysses} * {ring} = {size}: "
            f"launch {size} (or a multiple) processes, or choose degrees whose product divides {world}"
        )
    device_type = device_type or _device_type()
    if world == size:
        return init_device_mesh(device_type, (ring, ulysses), mesh_dim_names=DIMS)
    return init_device_mesh(device_type, (world // size, ring, ulysses), mesh_dim_names=("replica", *DIMS))


def _check_mesh(mesh: DeviceMesh, ulysses: int, ring: int) -> None:
    names = mesh.mesh_dim_names or ()
    for dim, degree in (("ring", ring), ("ulysses", ulysses)):
        if dim not in names and degree > 1:
            raise MeshError(f"{dim}={degree} needs a mesh dim named {dim!r}; the mesh has {names or 'unnamed dims'}")
        if dim in names and mesh.size(names.index(dim)) != degree:
            raise MeshError(f"{dim}={degree}, but the mesh dim {dim!r} has size {mesh.size(names.index(dim))}")
    if all(dim in names for dim in DIMS) and names.index("ring") > names.index("ulysses"):
        raise MeshError(f"the mesh dim 'ring' must come before 'ulysses', got {names}")
    if mesh.get_coordinate() is None:
        raise MeshError(f"rank {dist.get_rank()} is not in the mesh {mesh}")


def _device_type() -> str:
    accelerator = torch.accelerator.current_accelerator()
    return "cpu" if accelerator is None or dist.get_backend() == "gloo" else accelerator.type
