"""Modules that route by activations and are declared to treat every token alone run on the tokens of a rank."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqpar
from seqpar.errors import PlanError
from seqpar.models.randomise import randomise
from seqpar.sp_plan import ByToken

WIDTH, EXPERTS, LENGTH = 16, 4, 61


class Experts(nn.Module):
    """Every expert on the tokens that chose it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(EXPERTS))

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.view(-1, WIDTH)
        weight, chosen = self.gate(x_TD).softmax(-1).topk(2)
        out_TD = torch.zeros_like(x_TD)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            if len(token):
                out_TD.index_add_(0, token, expert(x_TD[token]) * weight[token, place, None])
        return out_TD.view(x_BSD.shape)


class Full(Experts):
    """Experts take the first few tokens only: whether one is dropped depends on the others."""

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_TD = x_BSD.view(-1, WIDTH)
        chosen = self.gate(x_TD).argmax(-1)
        out_TD = torch.zeros_like(x_TD)
        for i, expert in enumerate(self.experts):
            token = torch.where(chosen == i)[0][-3:]
            out_TD.index_add_(0, token, expert(x_TD[token]))
        return out_TD.view(x_BSD.shape)


class Balanced(Experts):
    """Returns a number for all tokens, too."""

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, Tensor]:
        return super().forward(x_BSD), self.gate(x_BSD).softmax(-1).square().mean()[None]


class Model(nn.Module):
    def __init__(self, kind: type[Experts] = Experts) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"qkv": nn.Linear(WIDTH, 3 * WIDTH), "moe": kind()}) for _ in range(2))

    def forward(self, x_BSD: Tensor) -> Tensor:
        for block in self.blocks:
            q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in block["qkv"](x_BSD).chunk(3, -1))
            x_BSD = x_BSD + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            out = block["moe"](x_BSD)
            x_BSD = x_BSD + (out if isinstance(out, Tensor) else out[0] * out[1])
        return x_BSD


def model_of(kind: type[Experts] = Experts) -> Model:
    torch.manual_seed(0)
    return randomise(Model(kind)).eval()


def tokens(batch: int = 2) -> Tensor:
    return torch.randn(batch, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


PLAN = {"blocks.*.moe": ByToken()}


@pytest.mark.parametrize("mesh", [(2, 1), (1, 3), (2, 2)])
def test_experts_run_on_the_tokens_of_a_rank(mesh) -> None:
    model = model_of()
    divided, whole = (seqpar.verify(model, (tokens(),), ulysses=mesh[0], ring=mesh[1], sp_plan=plan) for plan in (PLAN, None))
    assert divided.ok and whole.ok, divided
    assert divided.plan.sharded_flop_fraction > 0.95 > 0.5 > whole.plan.sharded_flop_fraction
    assert divided.plan.comm_calls["all_gather"] == 1 and "moe" not in divided.plan.explain().partition("replicated")[2]


def test_one_rank_and_a_call_with_other_tokens() -> None:
    model = model_of()
    fast = seqpar.sp_compile(model, (tokens(),), sp_plan=PLAN)
    other = 3 * tokens().flip(1)
    with torch.no_grad():
        torch.testing.assert_close(fast(other), model(other))


def test_tokens_that_are_not_treated_alone_are_refused() -> None:
    with pytest.raises(PlanError, match=r"blocks.0.moe \(Full\) is declared ByToken, and its result for the first half of the tokens is not half of its result"):
        seqpar.plan(model_of(Full), (tokens(),), ulysses=2, sp_plan=PLAN)


def test_a_result_without_tokens_is_refused() -> None:
    with pytest.raises(PlanError, match=r"blocks.0.moe \(Balanced\) is declared ByToken, and returns \[2, 61, 16\], \[1\] for \[2, 61, 16\]"):
        seqpar.plan(model_of(Balanced), (tokens(),), ulysses=2, sp_plan=PLAN)


def test_a_module_that_does_not_exist() -> None:
    with pytest.raises(PlanError, match=r"plan\['blocks.\*.mlp'\]: blocks.0 \(ModuleDict\) has no submodule 'mlp'"):
        seqpar.plan(model_of(), (tokens(),), ulysses=2, sp_plan={"blocks.*.mlp": ByToken()})


def test_a_module_that_can_be_traced_needs_no_entry() -> None:
    model = model_of()
    plan = seqpar.plan(model, (tokens(),), ulysses=2, sp_plan=PLAN | {"blocks.*.qkv": ByToken()})
    assert plan.sharded_flop_fraction > 0.95


def test_saved_programs_keep_it(tmp_path) -> None:
    model = model_of()
    fast = seqpar.sp_compile(model, (tokens(),), sp_plan=PLAN)
    fast.save(tmp_path / "program")
    again = seqpar.load(tmp_path / "program", model)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens()), model(tokens()))
