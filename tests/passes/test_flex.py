"""`flex_attention` uses the mesh wherever its two functions are a scale and a mask."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from seqpar.passes.flex import is_flex
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

HEADS, DIM = 4, 16
MESHES = ((2, 1), (1, 2), (2, 2))
aten = torch.ops.aten


def everything(b, h, i, j):
    return b.new_ones((), dtype=torch.bool)


def unchanged(s, b, h, i, j):
    return s


@dataclass(frozen=True)
class Use:
    """How a model attends. captures: makes the tensors that the functions capture, from (k, mask)."""

    mask_mod: Any = everything
    score_mod: Any = unchanged
    mask_captures: Any = lambda k, mask: ()
    score_captures: Any = lambda k, mask: ()
    key_heads: int = HEADS
    layers: int = 1
    lse: bool = False


def window(b, h, i, j):
    return (i >= j) & (i - j < 5)


def same_document(b, h, i, j, document):
    return document[i] == document[j]


def documents(k, mask):
    return (torch.arange(k.shape[2]) // 5,)


def not_padding(b, h, i, j, mask):
    return mask[b, i] & mask[b][j] & (i >= j)  # queries that are padding see nothing at all


def strong(b, h, i, j, strength):
    return (strength[b, j] > 0) | (i == j)


def sloped(s, b, h, i, j, slopes):
    return s * 0.5 + slopes[h] * (j - i)


def slopes(k, mask):
    return (torch.tensor([0.5, 0.25, 0.125, 0.0625]),)


def hidden(s, b, h, i, j, mask):
    return torch.where(mask[b, j] & (i != 3), s - 0.1, -float("inf"))  # row 3 sees nothing


UNDERSTOOD = {
    "plain": Use(),
    "causal": Use(lambda b, h, i, j: i >= j),
    "documents": Use(same_document, mask_captures=documents),
    "padding": Use(not_padding, mask_captures=lambda k, mask: (mask,), key_heads=2),
    "from activations": Use(strong, mask_captures=lambda k, mask: (k.mean((1, 3)),)),
    "heads differ": Use(lambda b, h, i, j: i >= j, sloped, score_captures=slopes),
    "hidden by the score": Use(window, hidden, score_captures=lambda k, mask: (mask,), key_heads=1),
    "half dark": Use(lambda b, h, i, j, mask: mask[b, i], mask_captures=lambda k, mask: (mask,)),
}
BY_ROWS = {
    "softcap": Use(score_mod=lambda s, b, h, i, j: 2 * torch.tanh(s / 2)),
    "negated": Use(score_mod=lambda s, b, h, i, j: -s),
    "times a tensor": Use(score_mod=lambda s, b, h, i, j: s * (1 + 0.1 * h)),
    "log-sum-exp": Use(lse=True),
}


def attend(use: Use, q: Tensor, k: Tensor, v: Tensor, *captures: tuple[Tensor, ...]) -> Tensor:
    """The operator itself, as tracing `flex_attention` leaves it; the lists of blocks play no part."""
    counts = torch.ones(1, 1, 1, dtype=torch.int32)
    blocks = (q.shape[2], k.shape[2], counts, counts[None], *[None] * 8, 128, 128, use.mask_mod)
    out, lse, _ = torch.ops.higher_order.flex_attention(q, k, v, use.score_mod, blocks, 0.2, {}, *captures)
    return out + lse.unsqueeze(-1) if use.lse else out


class Model(nn.Module):
    def __init__(self, use: Use, attend=attend) -> None:
        super().__init__()
        self.use, self.attend = use, attend
        self.q, self.kv = nn.Linear(HEADS * DIM, HEADS * DIM), nn.Linear(HEADS * DIM, 2 * use.key_heads * DIM)
        self.out = nn.Linear(HEADS * DIM, HEADS * DIM)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2)
        k, v = (t.unflatten(-1, (self.use.key_heads, DIM)).transpose(1, 2) for t in self.kv(x).chunk(2, dim=-1))
        captures = self.use.score_captures(k, mask), self.use.mask_captures(k, mask)
        for _ in range(self.use.layers):
            q = self.attend(self.use, q, k, v, *captures)
        return self.out(q.transpose(1, 2).flatten(2))


def traced_model(use: Use, attend=attend, dynamic: bool = False):
    torch.manual_seed(0)
    mask = torch.ones(2, 13, dtype=torch.bool)
    mask[1, 9:] = False
    return trace(Model(use, attend).eval(), (torch.randn(2, 13, HEADS * DIM), mask), {}, dynamic=dynamic)


def check_uses_the_mesh(traced, meshes=MESHES) -> None:
    assert any(is_flex(n) for n in traced.gm.graph.nodes)
    for ulysses, ring in meshes:
        report = verify_traced(traced, ulysses=ulysses, ring=ring)
        assert report.ok, report
        expected = "+".join(n for n, d in (("ulysses", ulysses), ("ring", ring)) if d > 1)
        assert [a.strategy.split(" ")[0] for a in report.plan.attention] == [expected]
        assert report.plan.sharded_flop_fraction > 0.85  # 13 positions are not even


@pytest.mark.parametrize("kind", UNDERSTOOD)
def test_uses_the_mesh(kind) -> None:
    check_uses_the_mesh(traced_model(UNDERSTOOD[kind]))


def test_as_models_call_it() -> None:
    """Dynamo traces the two functions and finds what they capture."""

    def public(use, q, k, v, _, captures):
        document, mask = captures
        block = create_block_mask(lambda b, h, i, j: (document[i] == document[j]) & mask[b, j], 2, None, q.shape[2], k.shape[2], device="cpu")
        return flex_attention(q, k, v, block_mask=block, enable_gqa=True)

    traced = traced_model(Use(mask_captures=lambda k, mask: (*documents(k, mask), mask), key_heads=2), public)
    check_uses_the_mesh(traced, MESHES[2:])
    kept = [str(n.target) for n in partition(traced, ulysses=2).traced.gm.graph.nodes]
    assert not any("sum" in target or "argsort" in target for target in kept)  # nobody asks for the lists of blocks


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("kind", BY_ROWS)
def test_other_forms_are_divided_by_rows(kind, dynamic) -> None:
    """Keys are whole; both functions see the places of the queries in the whole sequence."""
    for ulysses, ring in MESHES:
        report = verify_traced(traced_model(BY_ROWS[kind], dynamic=dynamic), ulysses=ulysses, ring=ring)
        assert report.ok, report
        assert [a.strategy for a in report.plan.attention] == ["local"]
        assert report.plan.sharded_flop_fraction > 0.6  # 13 positions, and keys and values of all of them


def test_captured_tensors_and_masks_of_rows() -> None:
    slopes = torch.linspace(0.1, 1, HEADS)
    use = Use(mask_mod=lambda b, h, i, j, document, seen: (document[i] == document[j]) | (i - j < 3), score_mod=lambda s, b, h, i, j, slope: torch.tanh(s + slope[h] * (j - i)), mask_captures=lambda k, mask: (*documents(k, mask), mask), score_captures=lambda k, mask: (slopes,))
    report = verify_traced(traced_model(use), ulysses=2, ring=2)
    assert report.ok and [a.queries for a in report.plan.attention] == ["13/4"], report


def attentions(use: Use):
    graph = partition(traced_model(use), ulysses=2).traced.gm.graph
    return [n for n in graph.nodes if n.target is aten.scaled_dot_product_attention.default]


def test_a_lower_triangle_needs_no_mask() -> None:
    assert [n.args[3:] for n in attentions(UNDERSTOOD["causal"])] == [(None, 0.0, True)]
    assert attentions(Use(lambda b, h, i, j: everything(b, h, i, j) & (j + 0 <= i)))[0].args[5]
    assert not attentions(Use(lambda b, h, i, j: j >= i))[0].args[5]


def test_layers_share_one_mask() -> None:
    first, second = (n.args[3] for n in attentions(Use(same_document, mask_captures=documents, layers=2)))
    assert first is second and tuple(first.meta["val"].shape) == (1, 1, 13, 13)


def test_dims_that_a_mask_does_not_depend_on_stay_one() -> None:
    (attention,) = attentions(UNDERSTOOD["half dark"])
    assert tuple(attention.args[3].meta["val"].shape) == (2, 1, 13, 1)


@pytest.mark.parametrize("kind", ["padding", "heads differ"])
def test_symbolic_lengths(kind) -> None:
    check_uses_the_mesh(traced_model(UNDERSTOOD[kind], dynamic=True), MESHES[1:])
