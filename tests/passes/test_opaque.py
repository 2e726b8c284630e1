"""Modules whose control flow depends on activations run as they are, whole on every rank, as one node of the program."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqpar.compile import sp_compile
from seqpar.errors import SeqparError, TraceError
from seqpar.models.randomise import randomise
from seqpar.passes.read_guard import ActivationRead
from seqpar.passes.trace import trace
from seqpar.planning import plan
from seqpar.verification import verify_traced

C, HEADS, EXPERTS, TOP = 16, 4, 3, 2


class Experts(nn.Module):
    """Tokens sorted by expert, one matrix product per expert that has any; the counts are read through numpy."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(C, EXPERTS)
        self.experts = nn.ModuleList(nn.Linear(C, C) for _ in range(EXPERTS))

    def forward(self, x):
        return self.route(x.view(-1, C)).view(x.shape)

    def route(self, x):
        weight, chosen = self.gate(x).softmax(-1).topk(TOP)
        order = chosen.flatten().argsort()
        ends = chosen.flatten().bincount(minlength=EXPERTS).cpu().numpy().cumsum(0)
        y = torch.zeros_like(x)
        for i, end in enumerate(ends):
            mine = order[ends[i - 1] if i else 0 : end]
            if len(mine) == 0:
                continue
            out = self.experts[i](x[mine // TOP]) * weight.flatten()[mine, None]
            y.scatter_reduce_(0, (mine // TOP)[:, None].repeat(1, C), out, reduce="sum")
        return y


class Indexed(Experts):
    """The same, with boolean indices."""

    def route(self, x):
        weight, chosen = self.gate(x).softmax(-1).topk(TOP)
        y = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            token, place = torch.where(chosen == i)
            y.index_add_(0, token, expert(x[token]) * weight[token, place, None])
        return y


class Counted(Experts):
    """How many experts there are is told by a tensor, which torch reads where no Python function is seen."""

    def route(self, x):
        chosen = self.gate(x).argmax(-1)
        mine = F.one_hot(chosen, torch.maximum(chosen.max() + 1, torch.tensor(EXPERTS)))[:, :EXPERTS].to(x.dtype)
        return torch.stack([expert(x) * mine[:, i, None] for i, expert in enumerate(self.experts)]).sum(0)


class Block(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.qkv, self.out, self.mlp = nn.Linear(C, 3 * C), nn.Linear(C, C), mlp

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, kind=Experts, depth=1, **options):
        super().__init__()
        self.blocks = nn.ModuleList(Block(kind(**options)) for _ in range(depth))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def x_of(length=12, seed=0, batch=1):
    return torch.randn(batch, length, C, generator=torch.Generator().manual_seed(seed))


def traced_model(kind=Experts, length=12, dynamic=False, **options):
    torch.manual_seed(0)
    model = randomise(Model(kind, **options)).eval()
    return model, trace(model, (x_of(length),), {}, dynamic=dynamic)


def outputs(traced, x):
    return traced.gm(x)[0]


@pytest.mark.parametrize("kind", [Experts, Indexed, Counted])
def test_a_routing_module_is_one_node_that_routes_anew_in_every_call(kind):
    model, traced = traced_model(kind, depth=2)
    assert [call.name for call in traced.opaque] == ["blocks.0.mlp", "blocks.1.mlp"] and not traced.reads
    with torch.no_grad():
        for seed in range(4):
            assert torch.equal(outputs(traced, x_of(seed=seed)), model(x_of(seed=seed)))


@pytest.mark.parametrize("length", [12, 13])
def test_ranks_give_the_same_as_the_model(length):
    model, traced = traced_model(length=length)
    with torch.no_grad():
        expected = [model(x_of(length))]
    for ulysses, ring in ((2, 1), (1, 2), (2, 2)):
        report = verify_traced(traced, ulysses=ulysses, ring=ring, expected=expected)
        assert report.ok, report


def test_the_plan_names_the_module_and_counts_its_work_as_replicated():
    model = randomise(Model()).eval()
    made = plan(model, (x_of(64),), ulysses=2)
    whole = {op.op: op for op in made.replicated_ops}
    op = whole["blocks.0.mlp (Experts)"]
    assert op.flops == 2 * 64 * C * (EXPERTS + TOP * C) and "runs whole on every rank" in op.reason and "test_opaque.py" in op.source
    assert made.flops_total - max(made.flops_per_rank) == pytest.approx((made.flops_total - op.flops) / 2, rel=0.01)
    assert "blocks.0.mlp (Experts)" in made.explain() and "bincount" in made.explain()


def test_parameters_stay_the_models_own():
    model = randomise(Model(Indexed)).eval()
    with torch.no_grad():
        fast = sp_compile(model, (x_of(),), dynamic=False)
        assert torch.equal(fast(x_of(seed=1)), model(x_of(seed=1)))
        model.blocks[0].mlp.gate.weight.neg_()
        model.blocks[0].mlp.experts[1] = nn.Linear(C, C)
        assert torch.equal(fast(x_of(seed=1)), model(x_of(seed=1)))
    fast(x_of()).sum().backward()
    assert model.blocks[0].mlp.gate.weight.grad is not None


def test_other_lengths_make_other_programs_and_symbols_are_refused():
    model = randomise(Model()).eval()
    assert trace(model, (x_of(),), {}).shape_env is None
    with pytest.raises(TraceError, match=r"dynamic=True.*blocks\.0\.mlp"):
        trace(model, (x_of(),), {}, dynamic=True)


class Shared(nn.Module):
    """One routing module called twice, with keyword and constant arguments, which returns a tuple."""

    class Router(Experts):
        def forward(self, x, scale, *, bias=None):
            y = super().forward(x) * scale
            return {"y": y if bias is None else y + bias, "none": None, "norm": y.norm(dim=-1)}

    def __init__(self):
        super().__init__()
        self.attention, self.router = Block(nn.Identity()), self.Router()

    def forward(self, x):
        first = self.router(self.attention(x), 2.0)
        second = self.router(first["y"], 0.5, bias=x)
        return second["y"] * second["norm"][..., None]


def test_a_module_called_twice_with_other_arguments():
    model = randomise(Shared()).eval()
    traced = trace(model, (x_of(),), {}, dynamic=False)
    assert [call.name for call in traced.opaque] == ["router", "router"]
    with torch.no_grad():
        assert torch.equal(outputs(traced, x_of(seed=3)), model(x_of(seed=3)))
    assert verify_traced(traced, ulysses=2, ring=1).ok


class Counting(Experts):
    def __init__(self, where):
        super().__init__()
        self.register_buffer("used", torch.zeros(EXPERTS))
        self.where, self.calls, self.last = where, 0, None

    def route(self, x):
        if self.where == "buffer":
            self.used += 1
        elif self.where == "attribute":
            self.calls += 1
        elif self.where == "tensor":
            self.last = self.gate(x).mean()
        elif self.where == "input":
            x.mul_(2)
        elif self.where == "random":
            x = x + torch.rand_like(x)
        return super().route(x)


@pytest.mark.parametrize(
    ("where", "words"),
    [("buffer", "used"), ("attribute", "calls"), ("tensor", "last"), ("input", "writes to its input"), ("random", "random numbers")],
)
def test_a_module_with_effects_beside_its_result_is_refused(where, words):
    with pytest.raises(ActivationRead, match=rf"(?s)bincount.*blocks\.0\.mlp.*{words}"):
        traced_model(Counting, where=where)


class Noting(Experts):
    """Notes the same shape in each call, and works in the precision around it."""

    def forward(self, x):
        self.shape = (x.shape, x.dtype)
        return self.experts[int(self.gate(x).mean() > 0)](x)


class Autocast(Model):
    def forward(self, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = super().forward(x)
        return y


def test_autocast_around_the_module_and_attributes_that_stay_equal():
    model = randomise(Autocast(Noting)).eval()
    traced = trace(model, (x_of(),), {}, dynamic=False)
    assert [call.autocast for call in traced.opaque] == [(True, torch.bfloat16)]
    with torch.no_grad():
        assert torch.equal(outputs(traced, x_of(seed=1)), model(x_of(seed=1)))


class Told(nn.Module):
    """The routing module reads what its parent left on it."""

    def __init__(self):
        super().__init__()
        self.block = Block(Experts())
        self.route = Experts.route

    def forward(self, x):
        self.block.mlp.offset = x.mean()
        self.block.mlp.route = lambda y: Experts.route(self.block.mlp, y + self.block.mlp.offset)
        return self.block(x)


def test_state_left_on_the_module_during_the_call_is_refused():
    with pytest.raises(ActivationRead, match=r"(?s)offset"):
        trace(randomise(Told()).eval(), (x_of(),), {}, dynamic=False)


class Inner(nn.Module):
    """Takes something that is no tensor: the module around it is the one to run whole."""

    class Tokens:
        def __init__(self, x):
            self.x = x

    class Sorted(Experts):
        def forward(self, tokens):
            return super().forward(tokens.x)

    def __init__(self):
        super().__init__()
        self.inner = self.Sorted()

    def forward(self, x):
        return self.inner(self.Tokens(x))


def test_the_next_module_around_it_runs_whole_where_arguments_are_no_tensors(monkeypatch):
    monkeypatch.setattr("seqpar.passes.trace.MAX_CHOICES", 2)  # whatever the number of blocks
    model, traced = traced_model(Inner, depth=2)
    assert [call.name for call in traced.opaque] == ["blocks.0.mlp", "blocks.1.mlp"]
    with torch.no_grad():
        assert torch.equal(outputs(traced, x_of(seed=2)), model(x_of(seed=2)))


class Positions(nn.Module):
    """Which tokens an expert takes: as many as it likes."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(C, 1)

    def forward(self, x):
        return torch.nonzero(self.gate(x).flatten() > 0).flatten()


class Selecting(nn.Module):
    def __init__(self):
        super().__init__()
        self.positions, self.expert = Positions(), nn.Linear(C, C)

    def forward(self, x):
        flat, token = x.flatten(0, 1), self.positions(x)
        return torch.zeros_like(flat).index_add(0, token, self.expert(flat[token])).view(x.shape)


def test_a_module_whose_result_has_any_length_is_run_within_the_one_that_uses_it():
    model, traced = traced_model(Selecting)
    assert [call.name for call in traced.opaque] == ["blocks.0.mlp"]
    with torch.no_grad():
        assert torch.equal(outputs(traced, x_of(seed=1)), model(x_of(seed=1)))


class Cutting(Experts):
    def forward(self, x):
        return super().forward(x)[:, : 5 if self.gate(x).abs().max() < 1e6 else 4]


class CuttingModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.cut = Block(nn.Identity()), Cutting()

    def forward(self, x):
        return self.cut(self.block(x))


def test_another_shape_of_a_result_is_an_error():
    model = randomise(CuttingModel()).eval()
    with torch.no_grad():
        fast = sp_compile(model, (x_of(),), dynamic=False)
        assert torch.equal(fast(x_of(seed=1)), model(x_of(seed=1)))
        with pytest.raises(SeqparError, match=r"(?s)cut \(Cutting\) returned \[1, 4, 16\].*\[1, 5, 16\]"):
            fast(x_of() * 1e9)


def test_the_outermost_module_is_not_run_whole():
    with pytest.raises(ActivationRead, match="bincount"):
        trace(randomise(Experts()).eval(), (x_of(),), {}, dynamic=False)


def test_other_compilers_run_the_program_around_the_module():
    model = randomise(Model()).eval()
    with torch.no_grad():
        fast = sp_compile(model, (x_of(),), backend="eager", dynamic=False)
        for seed in range(3):
            assert torch.equal(fast(x_of(seed=seed)), model(x_of(seed=seed)))


def test_reads_of_masks_beside_it_are_guarded_as_ever():
    class Masked(Model):
        def forward(self, x, mask):
            x = super().forward(x)
            return x[:, mask] if mask.any() else x

    model = randomise(Masked()).eval()
    masks = [torch.arange(12) < n for n in (7, 9, 7)]
    with torch.no_grad():
        fast = sp_compile(model, (x_of(), masks[0]), dynamic=False)
        for seed, mask in enumerate(masks):
            assert torch.equal(fast(x_of(seed=seed), mask), model(x_of(seed=seed), mask))
    assert fast._current.program.traced.reads and fast._current.program.traced.opaque


def on_ranks(ulysses, ring):
    torch.manual_seed(0)
    model = randomise(Model()).eval()
    with torch.no_grad():
        compiled = torch.compile(model, backend="seqpar", options={"ulysses": ulysses, "ring": ring, "backend": "eager"})  # breaks the graph there
        assert torch.allclose(compiled(x_of(13, 1)), model(x_of(13, 1)), atol=1e-5)
        fast = sp_compile(model, (x_of(13),), ulysses=ulysses, ring=ring, dynamic=False)
        return max((fast(x_of(13, seed)) - model(x_of(13, seed))).abs().max().item() for seed in range(3))


def test_real_ranks(two_ranks):
    assert max(two_ranks.run(on_ranks, 1, 2)) < 1e-5
