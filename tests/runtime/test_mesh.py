import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from seqpar.errors import MeshError
from seqpar.runtime.groups import rank_of, size_of
from seqpar.runtime.mesh import build_mesh, check_degrees


def places(ulysses, ring, shape=None, names=None, ranks=None):
    """This rank's place: rank, and (size, rank) and members per axis."""
    mesh = None
    if shape is not None:
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
    if ranks is not None:
        mesh = DeviceMesh("cpu", torch.tensor(ranks), mesh_dim_names=names)
    built = build_mesh(ulysses, ring, mesh)
    members = {
        axis: dist.get_process_group_ranks(dist.distributed_c10d._resolve_process_group(name))
        for axis, name in built.groups.items()
    }
    return built.rank, {axis: (size_of(name), rank_of(name)) for axis, name in built.groups.items()}, members


def test_a_single_rank_needs_no_process_group():
    mesh = build_mesh(1, 1)
    assert (mesh.size, mesh.rank, mesh.groups, mesh.device_mesh) == (1, 0, {}, None)


@pytest.mark.parametrize(("ulysses", "ring", "said"), [(0, 1, "ulysses must be an integer >= 1, not 0"), (1, -2, "ring must be an integer >= 1, not -2"), (2.0, 1, "ulysses .* not 2.0"), (True, 2, "ulysses .* not True")])
def test_degrees_that_are_no_positive_integers(ulysses, ring, said):
    with pytest.raises(MeshError, match=said):
        build_mesh(ulysses, ring)
    with pytest.raises(ValueError, match="ulysses_degree must be an integer >= 1, not '2'"):
        check_degrees(ulysses_degree="2")


def test_without_process_group_it_says_how_to_launch():
    with pytest.raises(MeshError, match="torchrun --nproc-per-node 4"):
        build_mesh(2, 2)


def test_two_by_two(ranks):
    results = ranks.run(places, 2, 2)
    assert [rank for rank, _, _ in results] == [0, 1, 2, 3]
    assert results[2][1] == {"ring": (2, 1), "ulysses": (2, 0), "sp": (4, 2)}
    assert results[2][2] == {"ring": [0, 2], "ulysses": [2, 3], "sp": [0, 1, 2, 3]}


@pytest.mark.parametrize(("ulysses", "ring"), [(4, 1), (1, 4)])
def test_one_axis(ranks, ulysses, ring):
    for rank, (own, sizes, _) in enumerate(ranks.run(places, ulysses, ring)):
        assert own == rank and sizes["sp"] == (4, rank)
        assert (sizes["ulysses"][0], sizes["ring"][0]) == (ulysses, ring)


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2)])
def test_larger_world_is_independent_groups(ranks, ulysses, ring):
    results = ranks.run(places, ulysses, ring)
    assert [rank for rank, _, _ in results] == [0, 1, 0, 1]
    assert [members["sp"] for _, _, members in results] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_own_mesh_with_other_dims(ranks):
    results = ranks.run(places, 2, 1, (2, 2), ("ulysses", "tp"))
    assert [members for _, _, members in results][1] == {"ulysses": [1, 3], "sp": [1, 3]}
    assert [rank for rank, _, _ in results] == [0, 0, 1, 1]
    results = ranks.run(places, 2, 2, (1, 2, 2), ("cfg", "ring", "ulysses"))
    assert [rank for rank, _, _ in results] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("degrees", "mesh", "words"),
    [
        ((3, 1), {}, "not a multiple"),
        ((2, 2), {"shape": (4,), "names": ("ring",)}, "named 'ulysses'|has size 4"),
        ((2, 1), {"shape": (4,), "names": ("tp",)}, "named 'ulysses'"),
        ((4, 1), {"shape": (2, 2), "names": ("ring", "ulysses")}, "has size 2"),
        ((2, 2), {"shape": (2, 2), "names": ("ulysses", "ring")}, "before"),
        ((2, 2), {"ranks": [[0, 2], [1, 3]], "names": ("ring", "ulysses")}, "ascend"),
        ((2, 1), {"ranks": [0, 1], "names": ("ulysses",)}, None),
    ],
)
def test_meshes_that_do_not_fit(ranks, degrees, mesh, words):
    outcomes = ranks.outcomes(places, *degrees, **mesh)
    if words is None:
        assert [isinstance(outcome, MeshError) for outcome in outcomes] == [False, False, True, True]
        assert "is not in the mesh" in str(outcomes[3])
        return
    for outcome in outcomes:
        with pytest.raises(MeshError, match=words):
            raise outcome
