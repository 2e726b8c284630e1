"""Heads that ranks share and zigzag rings are compiled with symbolic lengths in seconds, once for all lengths, and equal the model."""

import itertools

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

import seqpar
from seqpar.compat import FakeTensorMode
from seqpar.passes.pipeline import partition
from seqpar.passes.seal import sealed_program
from seqpar.passes.trace import trace
from seqpar.runtime.sealed import SEALED


class Attention(nn.Module):
    """[text | image] attends itself."""

    def __init__(self, heads, causal):
        super().__init__()
        self.heads, self.causal = heads, causal
        self.qkv, self.out = nn.Linear(16, 3 * 8 * heads), nn.Linear(8 * heads, 16)

    def forward(self, text, image):
        x = torch.cat([text, image], 1)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        return x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2))


class Beside(nn.Module):
    """Two attentions that do not need each other, whole heads in the one and shared ones in the other."""

    def __init__(self, first, second):
        super().__init__()
        self.first, self.second = Attention(first, False), Attention(second, False)

    def forward(self, text, image):
        return self.first(text, image) * self.second(text, image)


class Checked(fx.Interpreter):
    """Runs a program, and compares shapes and strides of sealed operators with what the compiler is told of them."""

    def call_function(self, target, args, kwargs):
        found = super().call_function(target, args, kwargs)
        if target is SEALED:
            with FakeTensorMode() as mode:
                told = target([mode.from_tensor(x) for x in args[0]], *args[1:])
            assert [(x.shape, x.stride(), x.dtype) for x in found] == [(x.shape, x.stride(), x.dtype) for x in told]
        return found


def over_ranks(heads, causal, ulysses, ring, comm_dtype=None):
    torch.manual_seed(0)
    model = (Beside(*heads) if isinstance(heads, tuple) else Attention(heads, causal)).eval()
    draws = [(torch.randn(2, text, 16), torch.randn(2, image, 16)) for text, image in ((9, 250), (11, 301), (23, 64))]
    fast = seqpar.sp_compile(model, draws[0], ulysses=ulysses, ring=ring, dynamic=True, backend="aot_eager", comm_dtype=comm_dtype)
    errors, spread = [], []
    with torch.no_grad():
        for step, draw in enumerate(draws):
            with torch._dynamo.config.patch(error_on_recompile=step > 0):
                out = fast(*draw)
            errors.append((out - model(*draw)).abs().max().item())
            spread.append(out.std().item())
    compiled = sealed_program(fast.graph_module)
    Checked(compiled).run(*draws[1])
    return max(errors), min(spread), fast.plan.attention[0].strategy, [n.target is SEALED for n in compiled.graph.nodes].count(True)


@pytest.mark.parametrize(
    ("heads", "causal", "mesh", "comm_dtype", "strategy", "count", "bound"),
    [
        (6, False, (4, 1), torch.bfloat16, "ulysses (shared heads)", {2}, 2e-2),
        (6, True, (4, 1), None, "ulysses (shared heads)", {2, 3}, 1e-5),  # two exchanges; on some ranks the last rows of a head
        (4, True, (2, 2), None, "ulysses+ring (zigzag)", {1}, 1e-5),
        ((4, 3), False, (4, 1), None, "ulysses", {2}, 1e-5),
    ],
)
def test_compiled_once_for_all_lengths(ranks, heads, causal, mesh, comm_dtype, strategy, count, bound):
    found = ranks.run(over_ranks, heads, causal, *mesh, comm_dtype, timeout=120)
    for error, spread, chosen, _ in found:
        assert (error > 1e-4 or comm_dtype is None) and error < bound and spread > 0.1
        assert chosen == strategy
    assert {sealed for *_, sealed in found} == count


@pytest.mark.parametrize("heads", [(4, 3), (3, 4), (3, 3)])
def test_a_sealed_exchange_and_its_neighbours_depend_on_each_other(heads):
    """A compiler may swap what is independent, and another on another rank: both would wait."""
    inputs = (torch.randn(1, 9, 16), torch.randn(1, 250, 16))
    traced = trace(Beside(*heads), inputs, {}, dynamic=True)
    graph = sealed_program(partition(traced, ulysses=4).program(0)).graph
    nodes = [node for node in graph.nodes if node.target is SEALED or "group" in node.kwargs and not node.target.__name__.startswith("finish")]
    needed = {node: set() for node in graph.nodes}
    for node in graph.nodes:
        needed[node].update(node.all_input_nodes, *(needed[x] for x in node.all_input_nodes))
    pairs = [(a, b) for a, b in itertools.pairwise(nodes) if SEALED in (a.target, b.target)]
    assert len(pairs) >= 2 and all(a in needed[b] for a, b in pairs)
