"""Attention written out in any of the usual ways uses the mesh."""

import math

import pytest
import torch
from torch import Tensor, nn

from seqpar.passes.einsum import as_matrix_product
from seqpar.passes.recognise import recognise_attention
from seqpar.passes.trace import trace
from seqpar.verification import verify_traced

HEADS, DIM = 4, 8


def plain(q, k, v, mask):
    return (q @ k.transpose(-1, -2) / math.sqrt(DIM)).softmax(-1) @ v


def added_mask_in_float32(q, k, v, mask):
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -30.0)[:, None, None, :]
    scores = torch.matmul(q, k.transpose(2, 3)) * DIM**-0.5 + bias
    return torch.softmax(scores.float(), dim=-1).type_as(q) @ v


def filled(q, k, v, mask):
    return ((q @ k.mT) * DIM**-0.5).masked_fill(~mask[:, None, None, :], float("-inf")).softmax(-1) @ v


def batched(q, k, v, mask):
    batch, length = q.shape[0], q.shape[2]
    q, k, v = (x.reshape(batch * HEADS, length, DIM) for x in (q, k, v))
    scores = torch.baddbmm(torch.empty(batch * HEADS, length, length), q, k.transpose(1, 2), beta=0, alpha=DIM**-0.5)
    return torch.bmm(scores.softmax(-1), v).view(batch, HEADS, length, DIM)


def einsums(q, k, v, mask):
    scores = torch.einsum("bhsd,bhtd->bhst", q, k).mul(DIM**-0.5)
    return torch.einsum("bhst,bhtd->bhsd", scores.softmax(-1), v)


def einsums_with_an_ellipsis(q, k, v, mask):
    scores = torch.einsum("...sd,...td->...st", q, k).mul(DIM**-0.5)
    return torch.einsum("...st,...td->...sd", scores.softmax(-1), v)


def distances_added_to_merged_heads(q, k, v, mask):
    """ALiBi by baddbmm on [batch * heads], the mask on [batch, heads], as Bloom has it."""
    batch, length = q.shape[0], q.shape[2]
    places = torch.arange(length, dtype=q.dtype)
    slopes = 0.5 ** torch.arange(1, HEADS + 1, dtype=q.dtype)
    alibi = (slopes[None, :, None, None] * places).expand(batch, -1, -1, -1).reshape(batch * HEADS, 1, length)
    q, k, v = (x.reshape(batch * HEADS, length, DIM) for x in (q, k, v))
    scores = alibi.baddbmm(q, k.transpose(1, 2), beta=1.0, alpha=DIM**-0.5).view(batch, HEADS, length, length)
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, torch.finfo(q.dtype).min)[:, None, None, :]
    weights = torch.softmax(scores + bias, dim=-1).view(batch * HEADS, length, length)
    return torch.bmm(weights, v).view(batch, HEADS, length, DIM)


def kept_where_visible(q, k, v, mask):
    length = q.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool).tril()
    lowest = torch.full([], torch.finfo(q.dtype).min)
    scores = torch.where(visible, q @ k.mT, lowest)
    return (torch.where(mask[:, None, None, :], scores, lowest) / math.sqrt(DIM)).softmax(-1) @ v


def added_before_scaling(q, k, v, mask):
    bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -3.0)[:, None, None, :]
    return ((q @ k.mT + bias) / math.sqrt(DIM)).softmax(-1) @ v


def rows_that_see_nothing(q, k, v, mask):
    """Padding queries see no key, filled with a finite number: every key weighs the same."""
    visible = mask[:, None, :, None] & mask[:, None, None, :]
    return (q @ k.mT).masked_fill(~visible, torch.finfo(q.dtype).min).softmax(-1) @ v


def rows_hidden_twice(q, k, v, mask):
    """A fill replaces what an earlier one left: with the lowest number twice, such a row sees every key evenly, not only those hidden once."""
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(-1)
    lowest = torch.finfo(q.dtype).min
    return (q @ k.mT).masked_fill(~mask[:, None, None, :], lowest).masked_fill(later, lowest).softmax(-1) @ v


def fills_over_an_added_mask(q, k, v, mask):
    """The number is on the left of `where`, and becomes infinite when it is multiplied: what is filled with it later weighs more."""
    later = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril(-1)
    lowest = torch.finfo(q.dtype).min
    scores = 2 * torch.where(later, lowest, q @ k.mT + torch.linspace(0, 2, q.shape[2]))
    return scores.masked_fill(~mask[:, None, None, :], lowest).softmax(-1) @ v


def padding_seen_by_merged_heads(q, k, v, mask):
    """Scores of [batch * heads] are viewed as [batch, heads] for the mask alone, as in ESM."""
    batch, length = q.shape[0], q.shape[2]
    q, k, v = (x.reshape(batch * HEADS, length, DIM) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)).view(batch, HEADS, length, length)
    scores = scores.masked_fill(~mask[:, None, None, :], float("-inf")).view(batch * HEADS, length, length)
    return torch.bmm(scores.softmax(-1), v).view(batch, HEADS, length, DIM)


def one_head_of_keys(q, k, v, mask):
    scores = torch.einsum("b h i d, b j d -> b h i j", q, k[:, 0]).masked_fill(~mask[:, None, None, :], -1e9)
    return torch.einsum("b h i j, b j d -> b h i d", scores.softmax(-1), v[:, 0])


def keys_first_and_one_head_of_values(q, k, v, mask):
    scores = torch.einsum("bhjd,bhid->bhij", k, q)
    return torch.einsum("bjd,bhij->bihd", v[:, 0], scores.softmax(-1)).transpose(1, 2)


def groups_of_heads(q, k, v, mask):
    """Every two heads share keys and values; rows of queries lie before the heads."""
    q = q.unflatten(1, (2, 2)).permute(0, 3, 1, 2, 4)
    scores = torch.einsum("bighd,bgjd->bghij", q, k[:, :2]) + torch.zeros(mask.shape).masked_fill(~mask, -1e9)[:, None, None, None, :]
    return torch.einsum("bghij,bgjd->bighd", scores.softmax(-1), v[:, :2]).flatten(2, 3).transpose(1, 2)


def groups_beside_a_bias_of_their_heads(q, k, v, mask):
    bias = torch.linspace(0, 1, HEADS)[:, None, None] * torch.arange(q.shape[2])
    scores = q.unflatten(1, (2, 2)) @ k[:, :2, None].mT + bias.unflatten(0, (2, 2))
    return (scores.softmax(-1) @ v[:, :2, None]).flatten(1, 2)


class Model(nn.Module):
    def __init__(self, attend) -> None:
        super().__init__()
        self.attend = attend
        self.qkv, self.out = nn.Linear(HEADS * DIM, 3 * HEADS * DIM), nn.Linear(HEADS * DIM, HEADS * DIM)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        return self.out(self.attend(q, k, v, mask).transpose(1, 2).flatten(2))


def example(length: int = 13) -> tuple[Tensor, Tensor]:
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[1, 9:] = False
    return torch.randn(2, length, HEADS * DIM, generator=torch.Generator().manual_seed(0)), mask


USES = [plain, added_mask_in_float32, filled, batched, einsums, einsums_with_an_ellipsis, distances_added_to_merged_heads, kept_where_visible, added_before_scaling, rows_that_see_nothing, rows_hidden_twice, fills_over_an_added_mask]
USES += [padding_seen_by_merged_heads, one_head_of_keys, keys_first_and_one_head_of_values, groups_of_heads, groups_beside_a_bias_of_their_heads]


@pytest.mark.parametrize("attend", USES)
def test_uses_the_mesh(attend) -> None:
    torch.manual_seed(0)
    model = Model(attend).eval()
    traced, expected = trace(model, example(), {}, dynamic=False), [model(*example())]
    for ulysses, ring in ((2, 1), (1, 3), (2, 2)):
        report = verify_traced(traced, ulysses=ulysses, ring=ring, expected=expected)
        assert report.ok, report
        strategies = [a.strategy for a in report.plan.attention]
        assert strategies == ["+".join(n for n, d in (("ulysses", ulysses), ("ring", ring)) if d > 1)]


def probabilities_kept(q, k, v, mask):
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return weights @ v + weights.sum(-1, keepdim=True)


def softmax_over_heads(q, k, v, mask):
    return (q @ k.transpose(-1, -2)).softmax(1) @ v


def softmax_over_rows_of_a_transposed_product(q, k, v, mask):
    return (k @ q.mT).softmax(-2).mT @ v


def sigmoids(q, k, v, mask):
    return torch.sigmoid(q @ k.mT * DIM**-0.5 - math.log(q.shape[2])) @ v


def softmax_plus_one(q, k, v, mask):
    weights = (q @ k.mT * DIM**-0.5).exp()
    return weights @ v / (1 + weights.sum(-1, keepdim=True))


def capped(q, k, v, mask):
    scores = torch.tanh((q @ k.mT) * DIM**-0.5 / 5) * 5
    return scores.masked_fill(~mask[:, None, None, :], float("-inf")).softmax(-1) @ v


def filled_with_a_number_that_matters(q, k, v, mask):
    visible = mask[:, None, :, None] & mask[:, None, None, :]
    return (q @ k.mT).masked_fill(~visible, -1e4).softmax(-1) @ v


def filled_before_scaling(q, k, v, mask):
    """A row in which all is hidden is seen evenly."""
    scores = (q @ k.mT).masked_fill(~(mask & (mask.sum(1, keepdim=True) == mask.shape[1]))[:, None, None, :], -1e5) * DIM**-0.5
    return scores.softmax(-1) @ v


def filled_with_a_small_number(q, k, v, mask):
    return (q @ k.mT).masked_fill(~mask[:, None, None, :], -5.0).softmax(-1) @ v


def with_a_sink(q, k, v, mask):
    scores = q @ k.mT * DIM**-0.5
    sink = torch.zeros(1, HEADS, 1, 1).expand(q.shape[0], -1, q.shape[2], -1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1] @ v


WITHOUT_SOFTMAX_OF_ROWS = (softmax_over_heads, softmax_over_rows_of_a_transposed_product, sigmoids, softmax_plus_one)


@pytest.mark.parametrize("attend", [probabilities_kept, capped, filled_with_a_number_that_matters, filled_before_scaling, filled_with_a_small_number, with_a_sink, *WITHOUT_SOFTMAX_OF_ROWS])
def test_a_form_of_its_own_is_divided_by_rows(attend) -> None:
    """No scaled dot product: rows are divided, keys and values whole."""
    torch.manual_seed(0)
    traced = trace(Model(attend).eval(), example(41), {}, dynamic=False)
    for ulysses, ring in ((2, 1), (1, 3)):
        report = verify_traced(traced, ulysses=ulysses, ring=ring)
        assert report.ok, report
        assert [a.strategy for a in report.plan.attention] == ["local"] and report.plan.sharded_flop_fraction > 0.8


@pytest.mark.parametrize("equation", ["bij,bjk->bik", "bqhd,bkhd->bhqk", "ij,kj->ik", "abij,abkj->baik", "bkhd,bqhd->bhqk"])
def test_einsum_as_matmul(equation: str) -> None:
    product = as_matrix_product(equation)
    assert product is not None
    generator = torch.Generator().manual_seed(0)
    sizes = {letter: n + 2 for n, letter in enumerate(sorted(set(equation) - set(",->")))}
    a, b = (torch.randn([sizes[x] for x in side], generator=generator) for side in (product.left, product.right))
    left, right, out = product.orders
    torch.testing.assert_close((a.permute(left) @ b.permute(right)).permute(out), torch.einsum(equation, *((b, a) if product.swapped else (a, b))))


@pytest.mark.parametrize("equation", ["bij,bjk", "...ij,jk->...ik", "i...,...j->i...j", "bii,bij->bj", "bi,bi->b", "bijk,bk->bij"])
def test_other_einsums_are_no_matmul(equation: str) -> None:
    assert as_matrix_product(equation) is None


@pytest.mark.parametrize(
    ("equation", "weights", "rows"),
    [("bhid,bjd->bhij", None, "i"), ("bighd,bjgd->bghij", None, "i"), ("bghij,bgjd->bighd", 0, "i"), ("bjd,bhij->bhid", 1, "i")],
)
def test_einsum_of_shared_heads(equation: str, weights: int | None, rows: str) -> None:
    assert as_matrix_product(equation) is None
    product = as_matrix_product(equation, weights=weights, spread=True)
    assert product is not None and product.m == rows and product.spread == "h"


def test_an_einsum_without_a_softmax_keeps_its_letters() -> None:
    def projection(q, k, v, mask):
        return torch.einsum("bhid,bde->bhie", q, k[:, 0].mT @ v[:, 0])

    traced = trace(Model(projection).eval(), example(), {}, dynamic=False)
    assert any(n.target is torch.ops.aten.einsum.default for n in recognise_attention(traced.gm).graph.nodes)


def test_a_repeated_contracted_dim_is_no_matmul() -> None:
    class Repeated(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.einsum("bid,bjd->bij", x, x.sum(-1, keepdim=True)).softmax(-1) @ x

    assert verify_traced(trace(Repeated(), example()[:1], {}, dynamic=False), ulysses=1, ring=2).ok
