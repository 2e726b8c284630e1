"""A user's own pass over the program of a compiled module takes effect in the next call."""

import pytest
import torch
from torch import nn

import seqpar
from seqpar.errors import UnsupportedError
from seqpar.models.patterns import Block


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return torch.relu(self.linear(x))


def relu_to_tanh(gm):
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.relu.default:
            node.target = torch.ops.aten.tanh.default
    gm.graph.lint()
    gm.recompile()


@pytest.mark.parametrize("backend", [None, "aot_eager"])
def test_a_pass_that_replaces_an_operator(backend):
    torch.manual_seed(0)
    model, x = Model().eval(), torch.randn(3, 4)
    fast = seqpar.sp_compile(model, (x,), backend=backend, dynamic=False)
    with torch.no_grad():
        assert torch.equal(fast(x), model(x))
        relu_to_tanh(fast.graph_module)
        expected = torch.tanh(model.linear(x))
        torch.testing.assert_close(fast(x), expected)
        assert not torch.equal(expected, model(x)) and "aten.tanh" in fast.print_readable(print_output=False)
        model.linear.weight.mul_(2.0)  # weights are still the model's
        torch.testing.assert_close(fast(x), torch.tanh(model.linear(x)))
    with pytest.raises(UnsupportedError):
        fast.plan.why("tanhh")


def on_every_rank():
    torch.manual_seed(0)
    layer, x = Block(16, 2).eval(), torch.randn(1, 8, 16)
    fast = seqpar.sp_compile(layer, (x,), ulysses=2, ring=2, dynamic=False)
    with torch.no_grad():
        before = (fast(x) - layer(x)).abs().max().item()
        for node in fast.graph_module.graph.nodes:
            if node.target is torch.ops.aten.gelu.default:
                node.target, node.kwargs = torch.ops.aten.relu.default, {}
        fast.graph_module.recompile()
        layer.mlp[1] = nn.ReLU()
        return before, (fast(x) - layer(x)).abs().max().item(), fast.print_readable(print_output=False)


def test_a_pass_over_the_program_of_each_rank(ranks):
    for rank, (before, after, text) in enumerate(ranks.run(on_every_rank)):
        assert before < 1e-5 and after < 1e-5
        assert text.startswith(f"# rank {rank} of 4 (ulysses 2 x ring 2)") and "f32[1, 8, 64] -> f32[1, 2, 64] | 1 8/4 64" in text
