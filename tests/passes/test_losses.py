"""Losses of tokens are computed where the tokens are; their logits are not gathered."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import seqpar
from seqpar.passes.losses import LOSS, losses_by_token
from seqpar.passes.trace import trace


class Loss(nn.Module):
    def __init__(self, **options: object) -> None:
        super().__init__()
        self.options = options

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(logits, target, **self.options)


class Language(nn.Module):
    """A causal language model that returns its loss, with the shift written as a cut or as padded labels."""

    def __init__(self, cut: bool) -> None:
        super().__init__()
        self.cut = cut
        self.embed, self.qkv, self.out, self.head = nn.Embedding(300, 32), nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 300)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        logits = self.head(x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)))
        if self.cut:
            return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return F.cross_entropy(logits.flatten(0, 1), F.pad(labels, (0, 1), value=-100)[:, 1:].flatten())


@pytest.mark.parametrize("options", [{}, {"reduction": "sum"}, {"reduction": "none"}, {"ignore_index": 3}])
@pytest.mark.parametrize("shape", [(10, 7), (2, 7, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_the_operator(options: dict[str, object], shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(shape, dtype=dtype), torch.randint(7, (shape[0], *shape[2:]))
    target[0] = options.get("ignore_index", -100)
    gm = losses_by_token(trace(Loss(**options), (logits, target), {}, dynamic=False).gm)
    assert all(node.target is not LOSS for node in gm.graph.nodes)
    torch.testing.assert_close(gm(logits, target)[0], F.cross_entropy(logits, target, **options))


def test_nothing_but_ignored_targets_is_nan_as_it_is() -> None:
    logits, target = torch.randn(4, 7), torch.full((4,), -100)
    gm = losses_by_token(trace(Loss(), (logits, target), {}, dynamic=False).gm)
    assert gm(logits, target)[0].isnan() and F.cross_entropy(logits, target).isnan()


@pytest.mark.parametrize("options", [{"label_smoothing": 0.1}, {"weight": torch.rand(7)}])
def test_other_forms_stay(options: dict[str, object]) -> None:
    gm = trace(Loss(**options), (torch.randn(4, 7), torch.randint(7, (4,))), {}, dynamic=False).gm
    assert losses_by_token(gm) is gm


def test_probabilities_stay() -> None:
    gm = trace(Loss(), (torch.randn(4, 7), torch.rand(4, 7)), {}, dynamic=False).gm
    assert losses_by_token(gm) is gm


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize(("ulysses", "ring"), [(2, 1), (1, 2), (3, 1)])
def test_logits_are_not_gathered(cut: bool, ulysses: int, ring: int) -> None:
    torch.manual_seed(0)
    model, ids = Language(cut).eval(), torch.randint(300, (2, 65))
    inputs = (ids, ids.masked_fill(ids % 5 == 0, -100))
    assert seqpar.verify(model, inputs, ulysses=ulysses, ring=ring).ok
    plan = seqpar.plan(model, inputs, ulysses=ulysses, ring=ring)
    assert plan.comm_bytes_per_rank["all_gather"] < 4 * ids.numel(), "labels or nothing"
    assert all(op.op != str(LOSS) for op in plan.replicated_ops)
