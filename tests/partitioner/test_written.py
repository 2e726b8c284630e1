"""Models whose only attention is one of its own form are divided along their tokens: right, and really."""

import pytest
import torch
from torch import Tensor, nn

import seqpar
from seqpar.models.randomise import randomise
from seqpar.partitioner.infer import Inference, infer
from seqpar.partitioner.lengths import Sizes
from seqpar.passes.recognise import recognise_attention
from seqpar.passes.trace import trace

HEADS, WIDTH, LENGTH = 4, 32, 203


def softmax_over_keys(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Efficient attention (Shen et al. 2021)."""
    return q.softmax(-1) @ (k.softmax(-2).mT @ v)


def transposed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """EfficientViT: channels first, a row of ones for the sum of the weights."""
    q, k, v = q.mT.relu(), k.mT.relu(), nn.functional.pad(v.mT, (0, 0, 0, 1), value=1.0)
    out = (v @ k.mT) @ q
    return (out[..., :-1, :] / (out[..., -1:, :] + 1e-3)).mT


def scaled_state(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Performer's order of products: the state is normalised before it is read."""
    k = k.exp()
    state = torch.einsum("bhnd,bhne->bhde", k, v) / k.sum(2, keepdim=True).mT
    return torch.einsum("...nd,...de->...ne", q, state)


def three_operands(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Performer (Choromanski et al. 2021), as performer-pytorch has it."""
    q, k = q.relu() + 1e-3, k.relu() + 1e-3
    context = torch.einsum("...nd,...ne->...de", k, v)
    weight = 1.0 / torch.einsum("...nd,...d->...n", q, k.sum(-2))
    return torch.einsum("...de,...nd,...n->...ne", context, q, weight)


def scores_without_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).relu().square() @ v / LENGTH


def weights_that_two_products_read(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The first of them has the weights on its right: it is the other whose rows they weigh."""
    weights = (8 * (q @ k.mT / 8).tanh()).softmax(-1)
    mixed = (q.mT @ weights).mT
    return weights @ v + mixed


class Model(nn.Module):
    def __init__(self, attend) -> None:
        super().__init__()
        self.attend = attend
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x_BSD: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x_BSD).chunk(3, -1))
        x_BSD = x_BSD + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return x_BSD + self.mlp(x_BSD)


def read(attend) -> tuple[Inference, set[int]]:
    """What is inferred, and the atoms of the model's tokens."""
    graph = recognise_attention(trace(Model(attend).eval(), (torch.randn(2, LENGTH, WIDTH),), {}, dynamic=False).gm).graph
    inference = infer(graph, Sizes())
    return inference, inference.table.roots(inference.axis(next(n for n in graph.nodes if n.op == "placeholder"), 1))


FORMS = [softmax_over_keys, transposed, scaled_state, three_operands, scores_without_softmax, weights_that_two_products_read]


@pytest.mark.parametrize("attend", FORMS)
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (3, 2)])
def test_its_tokens_are_divided(attend, ulysses, ring):
    report = seqpar.verify(randomise(Model(attend)).eval(), (torch.randn(2, LENGTH, WIDTH),), ulysses=ulysses, ring=ring)
    assert report.ok, report
    assert report.plan.sharded_flop_fraction > 0.95


def test_of_any_length():
    model = randomise(Model(scaled_state)).eval()
    assert seqpar.verify(model, (torch.randn(2, LENGTH, WIDTH),), ulysses=2, dynamic=True).ok


@pytest.mark.parametrize("attend", FORMS)
def test_tokens_are_the_only_sequence(attend):
    inference, tokens = read(attend)
    assert inference.sequences.keys() == tokens


def test_rows_of_tokens_without_projections_stay_rows():
    """Scores of x with itself are no state of its channels."""
    inference, tokens = read(lambda q, k, v: (q @ q.mT) @ q)
    assert tokens <= inference.sequences.keys()
