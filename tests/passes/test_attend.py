"""Attention over the mesh: every strategy, mask, causality and grouping against the model itself."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.partitioner.attention_heads import divide_heads
from seqpar.partitioner.division import Degrees
from seqpar.partitioner.infer import infer
from seqpar.partitioner.lengths import Sizes
from seqpar.partitioner.solve import solve
from seqpar.passes.pipeline import Partitioned, partition
from seqpar.passes.trace import trace
from seqpar.runtime.attention import select_heads
from seqpar.runtime.ring import ring_attention
from seqpar.runtime.ulysses import seq_to_heads
from seqpar.verification import difference, simulate, verify, verify_traced

MESHES = [(2, 1), (1, 2), (3, 1), (1, 3), (2, 2)]
aten = torch.ops.aten


class Attention(nn.Module):
    """[text | image] attends itself, or to a context; `options` go to scaled_dot_product_attention."""

    def __init__(self, heads=6, kv_heads=6, **options):
        super().__init__()
        self.q, self.kv = nn.Linear(8, heads * 4), nn.Linear(8, kv_heads * 8)
        self.options = options

    def forward(self, text, image, mask=None, context=None):
        x = torch.cat([text, image], 1)
        q = self.q(x).unflatten(-1, (-1, 4)).transpose(1, 2)
        k, v = (t.unflatten(-1, (-1, 4)).transpose(1, 2) for t in self.kv(x if context is None else context).chunk(2, -1))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.options)
        return out.transpose(1, 2).flatten(2)[:, text.shape[1] :]


def check(model, *inputs, meshes=MESHES):
    traced = trace(model, inputs, {}, dynamic=False)
    for ulysses, ring in meshes:
        report = verify_traced(traced, ulysses=ulysses, ring=ring)
        assert report.ok, (ulysses, ring, str(report))


def streams(text=5, image=14):
    torch.manual_seed(0)
    return torch.randn(2, text, 8), torch.randn(2, image, 8)


@pytest.mark.parametrize("text", [1, 5, 9])
def test_plain(text):
    check(Attention(), *streams(text))
    check(Attention(scale=0.2), *streams(text), meshes=[(2, 2)])


@pytest.mark.parametrize("heads", [5, 7])
def test_heads_that_do_not_divide(heads):
    check(Attention(heads, heads), *streams())


@pytest.mark.parametrize(("heads", "kv_heads"), [(6, 2), (6, 3), (6, 1), (10, 5)])
def test_grouped_heads(heads, kv_heads):
    check(Attention(heads, kv_heads, enable_gqa=True), *streams())


def test_unaligned_groups_select_their_heads(monkeypatch):
    monkeypatch.setattr("seqpar.partitioner.division.node_work", lambda *_: 0.0)  # nothing is saved by sharing heads, so they stay whole
    traced = trace(Attention(10, 2, enable_gqa=True), streams(), {}, dynamic=False)
    partitioned = partition(traced, ulysses=4)
    selects = [sum(n.target is select_heads for n in partitioned.program(r).graph.nodes) for r in range(4)]
    assert selects == [2 * (index is not None) for index in divide_heads(10, 2, 4).expansion] and any(selects)
    assert verify_traced(traced, ulysses=4, ring=1).ok


@pytest.mark.parametrize("shape", [(1, 1, 1, 19), (2, 1, 1, 19), (2, 6, 19, 19), (19, 19), (1, 6, 1, 19), (2, 1, 19, 19), (6, 19, 19), (6, 1, 19)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks(shape, kind):
    torch.manual_seed(1)
    mask = torch.rand(shape) < 0.7 if kind == "bool" else torch.randn(shape)
    if kind == "bool":
        mask[..., 0] = True
    check(Attention(), *streams(), mask)


def test_causal():
    check(Attention(is_causal=True), *streams())


def test_causal_rows_cut_beside_whole_keys():
    class Local(nn.Module):
        """Three dims: heads cannot be exchanged, so rows are cut and keys are whole."""

        def forward(self, x):
            return F.scaled_dot_product_attention(x * 2, x * 3, x * 4, is_causal=True) + 1

    torch.manual_seed(0)
    for ring in (2, 3):
        assert verify(Local(), (torch.randn(4, 13, 8),), ring=ring).ok


@pytest.mark.parametrize("keys", [3, 16])
def test_cross_attention(keys):
    torch.manual_seed(2)
    check(Attention(), *streams(), None, torch.randn(2, keys, 8))


def test_two_attentions_in_a_row():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = Attention(2, 2), Attention(2, 2)

        def forward(self, text, image):
            image = self.a(text, image)
            return self.b(text, image)

    check(Twice(), *streams(4, 12), meshes=[(2, 1), (1, 2), (2, 2), (1, 3)])


class Grid(nn.Module):
    """Frames x rows x columns attend each other, flattened; `mask` is for the flattened positions."""

    def __init__(self, is_causal=False):
        super().__init__()
        self.is_causal = is_causal

    def forward(self, x, mask=None):
        q, k, v = (t.flatten(1, 3).unflatten(-1, (3, 4)).transpose(1, 2) for t in (x * 2, x.sin(), x + 1))
        mask = mask.flatten(0, 2) if mask is not None and mask.shape[-2] > 1 else mask  # one row per position of the grid
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.is_causal).transpose(1, 2).flatten(2).view(x.shape)


def grid_outputs(model, inputs, mesh, cut):
    """(result of the model, the ranks' results, the solution) with sequences cut in factor `cut`."""
    traced = trace(model, tuple(inputs), {}, dynamic=False)
    inference = infer(traced.gm.graph, Sizes(), cut=cut)
    solution = solve(inference, Degrees(*mesh))
    outputs = simulate(Partitioned(traced, inference, solution, {}), inputs)
    return traced.gm(*inputs)[0], [out for (out,) in outputs], solution


@pytest.mark.parametrize(
    ("cut", "mesh", "mask_shape"),
    [(1, (2, 1), (2, 1, 1, 30)), (2, (3, 1), (3, 2, 5, 30)), (1, (1, 2), None), (2, (1, 2), (3, 2, 5, 30)), (2, (2, 2), (2, 1, 1, 30)), (1, (2, 2), (3, 5, 2, 30))],
)
def test_an_inner_factor_of_a_grid_is_cut(cut, mesh, mask_shape):
    """Exchanged with that factor outermost: rows, keys and mask change places alike, and the result goes back."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, 3, *((5, 2), (2, 5))[cut - 1], 12)]
    if mask_shape:
        inputs.append(torch.randn(mask_shape))
    expected, outputs, solution = grid_outputs(Grid(), inputs, mesh, cut)
    assert solution.labels.exchanged and all(difference(out, expected)[1] < 1e-6 for out in outputs)


@pytest.mark.parametrize("cut", [0, 1])
def test_causal_over_a_grid(cut):
    """Exchanged if the outermost factor is cut; else rows of several stretches see what comes before them."""
    torch.manual_seed(0)
    expected, outputs, solution = grid_outputs(Grid(is_causal=True), [torch.randn(1, 4, 5, 2, 12)], (2, 1), cut)
    assert bool(solution.labels.exchanged) == (cut == 0) and solution.labels.sharded
    assert all(difference(out, expected)[1] < 1e-6 for out in outputs)


def test_one_tensor_in_several_parts():
    class Same(nn.Module):
        def forward(self, x):
            q = x.unflatten(-1, (2, 4)).transpose(1, 2)
            return F.scaled_dot_product_attention(q, q, q) + F.scaled_dot_product_attention(q, q * 2, q * 2)

    torch.manual_seed(0)
    assert verify(Same(), (torch.randn(1, 16, 8),), ulysses=2).ok
    assert verify(Same(), (torch.randn(1, 16, 8),), ring=2).ok


def test_segments_in_the_program():
    """Order of the exchanged sequence is global, text first; a short text is whole."""
    partitioned = partition(trace(Attention(), streams(3, 16), {}, dynamic=False), ulysses=2, ring=2)
    nodes = {n.target: n for n in partitioned.program(0).graph.nodes}
    assert nodes[ring_attention].kwargs["key_segments"] == (3, (8, 8)) or nodes[ring_attention].kwargs["key_segments"][1] == (8, 8)
    assert nodes[seq_to_heads].args[1][1][1] == (4, 4)
    assert nodes[seq_to_heads].args[2] == [((0, 3), (3, 6))] * 3
