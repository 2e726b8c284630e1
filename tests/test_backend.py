"""torch.compile(model, backend="seqpar")."""

import subprocess
import sys

import pytest
import torch
import torch._dynamo
from torch import nn

from seqpar.backend import Options
from seqpar.errors import MeshError, SeqparError
from seqpar.models import registry
from seqpar.models.randomise import randomise


class Attention(nn.Module):
    def __init__(self, broken=False):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.register_buffer("calls", torch.zeros(()))
        self.broken = broken

    def forward(self, x):
        self.calls.add_(1)
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        if self.broken:
            torch._dynamo.graph_break()
        return self.out(y) + x, self.calls * 2


def x_of(length):
    return torch.randn(2, length, 16, generator=torch.Generator().manual_seed(length))


def compiled(model, fullgraph=True, dynamic=None, **options):
    torch._dynamo.reset()
    return torch.compile(model, backend="seqpar", fullgraph=fullgraph, dynamic=dynamic, options=options)


def over_ranks(ulysses, ring, backend, *, broken=False, dynamic=None, lengths=(9, 16, 17), grad=False):
    torch.manual_seed(0)
    model = randomise(Attention(broken)).eval()
    reference = randomise(Attention(broken)).eval()
    fast = compiled(model, not broken, dynamic, ulysses=ulysses, ring=ring, backend=backend)
    worst = 0.0
    with torch.set_grad_enabled(grad):
        for length in lengths:
            (y, calls), (expected, expected_calls) = fast(x_of(length)), reference(x_of(length))
            assert calls == expected_calls and model.calls == reference.calls
            worst = max(worst, (y - expected).abs().max().item())
    return worst


def family_over_ranks(name, ulysses, ring, fullgraph, steps):
    """A denoising loop, other latents and timesteps at every step: (relative error of the first and the last result, graphs that Dynamo compiled)."""
    family = registry.get(name)
    config = family.tiny_config(4, 1)
    model = randomise(family.build(config))
    fast = compiled(model, fullgraph, ulysses=ulysses, ring=ring, backend="eager")
    inputs = family.grid_inputs(config, rows=4, columns=4, text_len=5)
    errors, leaves = [], torch.utils._pytree.tree_leaves
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        for step in range(steps):
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                actual = leaves(fast(**inputs))
            if step in (0, steps - 1):
                errors += [((a - b).norm() / b.norm()).item() for a, b in zip(actual, leaves(model(**inputs)), strict=True)]
            if steps > 1:
                inputs |= {"timestep": 0.95 * inputs["timestep"], "hidden_states": 0.9 * inputs["hidden_states"] + 0.1 * actual[0]}
    return max(errors), torch._dynamo.utils.counters["stats"]["unique_graphs"]


def backward_is_refused():
    fast = compiled(randomise(Attention()).eval(), ulysses=2, ring=2, backend="eager")
    try:
        fast(x_of(8))[0].sum().backward()
    except SeqparError as error:
        return str(error)
    return ""


def test_listed_without_importing_seqpar():
    code = "import sys, torch._dynamo as d; assert 'seqpar' in d.list_backends(); assert 'seqpar' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_rank_is_the_inner_backend():
    model = randomise(Attention()).eval()
    with torch.no_grad():
        assert torch.allclose(compiled(model, backend="eager")(x_of(8))[0], model(x_of(8))[0])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ulises": 2}, SeqparError, "ulises"),
        ({"ulysses": 0}, MeshError, "ulysses"),
        ({"backend": "seqpar"}, SeqparError, "inductor"),
        ({"sp_plan": "model"}, SeqparError, r"no option sp_plan.*seqpar.sp_compile\(model, example_inputs, sp_plan=.*sp_shard"),
    ],
)
def test_options_are_checked(options, error, message):
    with pytest.raises(error, match=message):
        Options.read(options, {})


def test_no_process_group_says_how_to_launch():
    with pytest.raises(Exception, match="torchrun"), torch.no_grad():
        compiled(randomise(Attention()).eval(), ulysses=2, backend="eager")(x_of(8))


@pytest.mark.parametrize(("ulysses", "ring"), [(2, 2), (4, 1), (1, 4)])
def test_ranks_agree_with_the_model(ranks, ulysses, ring):
    assert max(ranks.run(over_ranks, ulysses, ring, "eager", timeout=300)) < 1e-5


def test_graph_breaks(ranks):
    assert max(ranks.run(over_ranks, 2, 2, "eager", broken=True, timeout=300)) < 1e-5


def test_symbolic_sizes_are_specialised(ranks):
    assert max(ranks.run(over_ranks, 2, 2, "aot_eager", dynamic=True, timeout=300)) < 1e-5


def test_with_gradients_enabled_the_forward_works_and_backward_is_refused(ranks):
    assert max(ranks.run(over_ranks, 2, 2, "aot_eager", lengths=(8,), grad=True, timeout=300)) < 1e-5
    assert all("gradients" in message for message in ranks.run(backward_is_refused, timeout=300))


def test_inductor(ranks):
    assert max(ranks.run(over_ranks, 2, 2, "inductor", lengths=(9,), timeout=500)) < 1e-5


@pytest.mark.parametrize(("name", "fullgraph", "steps"), [("flux", True, 5), ("z-image", False, 1)])
def test_real_models(ranks, name, fullgraph, steps):
    for error, graphs in ranks.run(family_over_ranks, name, 2, 2, fullgraph, steps, timeout=300):
        assert error < 1e-5 and (graphs == 1 or not fullgraph)
