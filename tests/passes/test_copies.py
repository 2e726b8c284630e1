"""Copies that only cost time are left out; those that somebody could tell from the original stay."""

import pytest
import torch
from torch import Tensor, nn

import seqpar
from seqpar.passes.copies import drop_copies
from seqpar.passes.trace import trace

aten = torch.ops.aten


class Dropped(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x * 2, 0.1, self.training) @ x.mT


class Interleaved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        out[..., 0::2] = x[..., 1::2] * 2
        out[..., 1::2] = x[..., 0::2] + 1
        return out * 3


class ProjectedInterleaved(Interleaved):
    """The width is that of a weight, hence no symbol."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.proj(x))


class Flattened(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2) + 1


class OwnCopy(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x * 2
        return y, y.clone().view(-1)


class InputCopied(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.clone().transpose(0, 1)


class Strided(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, ::2].clone().view(torch.int32) + 1


class Written(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = (x * 2).clone()
        y += 1
        return y.to(torch.float64).copy_(x) * 2


def tidied(model: nn.Module, x: Tensor) -> tuple[torch.fx.GraphModule, torch.fx.GraphModule]:
    gm = trace(model.eval(), (x,), {}, dynamic=False).gm
    return gm, drop_copies(gm)


def count(gm: torch.fx.GraphModule, *targets: object) -> int:
    return sum(node.target in targets for node in gm.graph.nodes)


@pytest.mark.parametrize(("model", "before", "after"), [(Dropped(), 1, 0), (Interleaved(), 2, 0), (Flattened(), 1, 0), (OwnCopy(), 1, 1), (InputCopied(), 1, 1), (Strided(), 1, 1)])
def test_copies_left(model: nn.Module, before: int, after: int) -> None:
    x = torch.randn(2, 6, 4, 8) if isinstance(model, Flattened) else torch.randn(2, 6, 8)
    gm, tidy = tidied(model, x)
    assert (count(gm, aten.clone.default, aten.copy.default), count(tidy, aten.clone.default, aten.copy.default)) == (before, after)
    for a, b in zip(gm(x), tidy(x), strict=True):
        assert torch.equal(a, b)


def test_a_copy_into_another_dtype_stays() -> None:
    x = torch.randn(2, 6, 8)
    gm, tidy = tidied(Written(), x)
    assert count(tidy, aten.copy.default) == 1
    assert torch.equal(gm(x)[0], tidy(x)[0])


def test_a_program_without_copies_is_left_alone() -> None:
    gm, tidy = tidied(nn.Linear(8, 8), torch.randn(2, 8))
    assert tidy is gm


def test_symbolic_lengths_are_not_guarded() -> None:
    traced = trace(ProjectedInterleaved(), (torch.randn(2, 6, 8),), {}, dynamic=True)
    guards = len(traced.shape_env.guards) if traced.shape_env else None
    tidy = drop_copies(traced.gm)
    assert count(tidy, aten.copy.default) == 0
    assert guards is None or len(traced.shape_env.guards) == guards


def test_output_of_a_compiled_model_is_not_its_input(two_ranks):
    assert two_ranks.run(own_memory) == [True, True]


def own_memory() -> bool:
    x = torch.randn(2, 6, 8)
    y = seqpar.sp_compile(InputCopied(), (x,), ulysses=2)(x)
    return y.data_ptr() != x.data_ptr() and torch.equal(y, x.transpose(0, 1))
