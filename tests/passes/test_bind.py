"""Bound programs have their own nodes and this rank's groups."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from seqpar.errors import MeshError
from seqpar.passes.bind import axes_used, bind_groups
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2) * 5.5


def program(ulysses):
    torch.manual_seed(0)
    return partition(trace(Attention(), (torch.randn(1, 64, 8),), {}, dynamic=False), ulysses=ulysses).program(0)


@pytest.mark.parametrize(("ulysses", "mesh"), [(1, None), (2, SimpleNamespace(groups={"ulysses": "7", "sp": "8"}))])
def test_changes_leave_the_unbound_program_alone(ulysses, mesh):
    unbound = program(ulysses)
    before = [str(n.format_node()) for n in unbound.graph.nodes]
    bound = bind_groups(unbound, mesh)
    assert [n.name for n in bound.graph.nodes] == [n.name for n in unbound.graph.nodes] and not set(bound.graph.nodes) & set(unbound.graph.nodes)
    (doubling,) = (n for n in bound.graph.nodes if 5.5 in n.args)
    doubling.update_arg(1, 11.0)
    assert [str(n.format_node()) for n in unbound.graph.nodes] == before
    if mesh is None:
        bound.recompile()
        x = torch.randn(1, 64, 8)
        torch.testing.assert_close(bound(x)[0], unbound(x)[0] * 2)


def test_groups_are_those_of_the_mesh():
    unbound = program(2)
    bound = bind_groups(unbound, SimpleNamespace(groups={"ulysses": "7", "sp": "8", "ring": "9"}))
    assert axes_used(unbound) == {"ulysses"} and axes_used(bound) == frozenset()
    assert {n.kwargs["group"] for n in bound.graph.nodes if "group" in n.kwargs} == {"7"}


def test_no_group_is_an_error():
    with pytest.raises(MeshError, match="communicates over 'ulysses'"):
        bind_groups(program(2), SimpleNamespace(groups={"sp": "8"}))


def test_without_a_mesh_axes_keep_their_names():
    unbound = program(2)
    bound = bind_groups(unbound, None)
    assert axes_used(bound) == axes_used(unbound) == {"ulysses"} and not set(bound.graph.nodes) & set(unbound.graph.nodes)
