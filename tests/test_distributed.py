"""Real diffusers models on four real gloo ranks: what every rank returns is what one process returns.

Functions below run on every rank (see tests/rank_pool.py) and return what the test checks.
"""

import pytest
import torch
import torch._dynamo
import torch.distributed as dist

import seqpar
from seqpar.models import registry
from seqpar.models.family import output_tensors
from seqpar.models.randomise import randomise
from seqpar.partitioner.cost import Machine

CASES = [
    # name, ulysses, ring, heads, rows, columns, text length, batch
    ("flux", 2, 2, 5, 3, 5, 7, 2),
    ("wan", 1, 4, 4, 3, 5, 7, 1),
    ("z-image", 2, 1, 4, 3, 5, 7, 2),
]


def make(name, heads, rows, columns, text_len, batch, seed=0):
    """(model, a call of it); the call asks for the model's own output type where it has one."""
    family = registry.get(name)
    config = family.tiny_config(heads, 1)
    model = randomise(family.build(config))
    sizes = {"rows": rows, "columns": columns, "times": 1 if family.frames_per_token == 1 else 2}
    return model, family.grid_inputs(config, **sizes, text_len=text_len, batch=batch, seed=seed, return_dict=True)


def error_between(actual, expected):
    """Largest relative error over all tensors of two outputs of one type and structure."""
    assert type(actual) is type(expected), (type(actual), type(expected))
    pairs = list(zip(output_tensors(actual), output_tensors(expected), strict=True))
    assert pairs and all(a.shape == b.shape and a.dtype == b.dtype for a, b in pairs)
    return max(((a - b).norm() / b.norm()).item() for a, b in pairs)


def compile_and_compare(name, ulysses, ring, *sizes):
    group = dist.get_rank() // (ulysses * ring)  # independent groups work on inputs of their own
    model, inputs = make(name, *sizes, seed=group)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fast = seqpar.sp_compile(model, inputs, ulysses=ulysses, ring=ring, dynamic=False)
    found = {"rank": dist.get_rank()}
    with torch.no_grad():
        outputs = fast(**inputs)
        found["error"] = error_between(outputs, model(**inputs))
        found["outputs"] = output_tensors(outputs)
    found["state dict"] = list(fast.state_dict()) == list(before) and all(torch.equal(fast.state_dict()[k], v) for k, v in before.items())
    found["shared"] = all(a is b for a, b in zip(fast.parameters(), model.parameters(), strict=True))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.25)
        changed = fast(**inputs)
        found["updated error"] = error_between(changed, model(**inputs))
        found["update seen"] = error_between(changed, outputs) > 1e-3
    found["world"], found["fraction"] = fast.plan.world_size, fast.plan.sharded_flop_fraction
    found["strategies"] = sorted({attention.strategy for attention in fast.plan.attention})
    found["text"] = fast.explain()
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_every_rank_returns_what_one_process_returns(ranks, case):
    name, ulysses, ring = case[:3]
    results = ranks.run(compile_and_compare, *case, timeout=300)
    for found in results:
        assert max(found["error"], found["updated error"]) <= 1e-5
        assert found["state dict"] and found["shared"] and found["update seen"]
        assert found["world"] == ulysses * ring and found["fraction"] > 0.7
        assert f"ulysses {ulysses} x ring {ring}" in found["text"]
    wanted = "+".join(kind for kind, degree in (("ulysses", ulysses), ("ring", ring)) if degree > 1)
    assert all(wanted in found["strategies"] for found in results)
    groups = {}
    for found in results:
        groups.setdefault(found["rank"] // (ulysses * ring), []).append(found["outputs"])
    for first, *others in groups.values():
        assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
    if len(groups) > 1:
        assert not torch.equal(groups[0][0][0], groups[1][0][0])


SLOW = {"flops_per_s": 1e12, "bytes_per_s": 1e9, "latency_s": 1e-9}
FAST = {"flops_per_s": 1e9, "bytes_per_s": 1e12, "latency_s": 1e-9}


def compile_for_hardware_and_compare(heads, hardware, backend):
    model, inputs = make("pattern-standard", heads, 5, 7, 1, 1)
    fast = seqpar.sp_compile(model, inputs, ulysses=4, dynamic=False, backend=backend, hardware=Machine(**hardware))
    with torch.no_grad():
        error = error_between(fast(**inputs), model(**inputs))
    return error, [a.strategy for a in fast.plan.attention]


@pytest.mark.parametrize(("heads", "hardware", "strategy"), [(6, FAST, "ulysses (shared heads)"), (4, SLOW, "gather")])
def test_other_strategies_on_real_ranks_and_compiled(ranks, heads, hardware, strategy):
    for backend in (None, "aot_eager"):
        for error, found in ranks.run(compile_for_hardware_and_compare, heads, hardware, backend, timeout=300):
            assert error <= 1e-5 and all(strategy in s or s == "local" for s in found), found


class Attention(torch.nn.Module):
    """Self-attention of grouped heads; x [B, S, 8]."""

    def __init__(self, heads, kv_heads, is_causal):
        super().__init__()
        self.q, self.kv, self.out = torch.nn.Linear(8, heads * 8), torch.nn.Linear(8, kv_heads * 16), torch.nn.Linear(heads * 8, 8)
        self.options = {"is_causal": is_causal, "enable_gqa": heads != kv_heads}

    def forward(self, x):
        q = self.q(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        k, v = (t.unflatten(-1, (-1, 8)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        return self.out(torch.nn.functional.scaled_dot_product_attention(q, k, v, **self.options).transpose(1, 2).flatten(2))


def share_heads_and_compare(*shapes):
    torch.manual_seed(0)
    found = []
    for heads, kv_heads, is_causal, ulysses, ring in shapes:
        model, x = Attention(heads, kv_heads, is_causal).eval(), torch.randn(2, 133, 8)
        fast = seqpar.sp_compile(model, (x,), ulysses=ulysses, ring=ring, dynamic=False)
        with torch.no_grad():
            error = error_between(fast(x), model(x))
        found.append((error, fast.plan.attention[0].strategy, max(fast.plan.flops_per_rank) / fast.plan.flops_total))
    return found


def test_fewer_heads_than_ranks_grouped_and_causal_ones_on_real_ranks(ranks):
    shapes = [(2, 2, False, 4, 1), (6, 2, True, 4, 1), (3, 1, True, 2, 2)]
    for rank in ranks.run(share_heads_and_compare, *shapes):
        assert all(error <= 1e-5 and busiest <= 1.05 / 4 for error, _, busiest in rank), rank
        assert [strategy for _, strategy, _ in rank] == ["local", "ulysses (shared heads)", "ulysses (shared heads)"]


def dynamo_and_compare(name, ulysses, ring, backend, *sizes):
    torch._dynamo.reset()
    model, inputs = make(name, *sizes)
    inputs["return_dict"] = False
    fast = torch.compile(model, backend="seqpar", fullgraph=True, dynamic=False, options={"ulysses": ulysses, "ring": ring, "backend": backend})
    with torch.no_grad():
        first = error_between(fast(**inputs), model(**inputs))
        for parameter in model.parameters():
            parameter.mul_(1.25)
        return max(first, error_between(fast(**inputs), model(**inputs)))


@pytest.mark.parametrize(
    ("name", "ulysses", "ring", "backend"),
    [("flux", 2, 2, "eager"), ("qwen-image", 4, 1, "aot_eager")],
)
def test_torch_compile(ranks, name, ulysses, ring, backend):
    assert max(ranks.run(dynamo_and_compare, name, ulysses, ring, backend, 4, 3, 5, 7, 1, timeout=400)) <= 1e-5
