"""Values that a model reads by stride are those it would read in one process, whatever strides the parts have."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import seqpar
from seqpar.errors import UnsupportedError
from seqpar.passes.strided import strides_in_rows
from seqpar.passes.trace import trace

LENGTH, HEADS, WIDTH = 128, 4, 8


def chunks(x: Tensor) -> Tensor:
    """[B, S, C] -> overlapping chunks [H, n, 32, D] of a view in another order: the strides are those that the view happens to have."""
    q = x.unflatten(-1, (HEADS, WIDTH)).permute(2, 0, 1, 3)[:, 0].unflatten(1, (-1, 32))
    size, stride = list(q.size()), list(q.stride())
    return q.as_strided([size[0], 2 * size[1] - 1, *size[2:]], [stride[0], stride[1] // 2, *stride[2:]])


class Windows(nn.Module):
    """Attention over all, then over chunks of it (as LED's, of transformers)."""

    def __init__(self, read=chunks) -> None:
        super().__init__()
        self.mix, self.read = nn.Linear(HEADS * WIDTH, HEADS * WIDTH), read

    def forward(self, x: Tensor) -> Tensor:
        q = self.mix(x).unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)
        x = x + F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
        return self.read(x).tanh()


def written(x: Tensor) -> Tensor:
    y = x.transpose(1, 2).exp()
    y.as_strided((3, 4), (7, 64), 5).mul_(2)
    return y


def behind(x: Tensor) -> Tensor:
    return x[:, :-16].as_strided((7, 32, 32), (512, 32, 1))


def before(x: Tensor) -> Tensor:
    return x[:, 16:].as_strided((6, 32, 32), (512, 32, 1), 0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("read", [chunks, written])
def test_equals_one_process(read, dynamic: bool) -> None:
    report = seqpar.verify(Windows(read), (torch.randn(1, LENGTH, HEADS * WIDTH),), ulysses=2, ring=2, dynamic=dynamic)
    assert report.ok and report.plan.attention[0].strategy != "replicated", report


@pytest.mark.parametrize("read", [behind, before])
def test_memory_around_a_value_is_refused(read) -> None:
    with pytest.raises(UnsupportedError, match=r"as_strided[\s\S]*test_strided.py[\s\S]*contiguous\(\)"):
        seqpar.plan(Windows(read), (torch.randn(1, LENGTH, HEADS * WIDTH),), ulysses=2)


@pytest.mark.parametrize(
    "run",
    [
        lambda x: x.permute(2, 0, 1).as_strided((5, 3), (2, 7), 4),
        lambda x: x[1:].as_strided((2, 2), (1, 3)),
        lambda x: x[:, None].transpose(0, 3).as_strided((4,), (9,), 1),
        lambda x: x.transpose(0, 1).contiguous().as_strided((3, 4), (1, 1)),
    ],
)
def test_a_row_holds_what_the_view_holds(run) -> None:
    class Program(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return run(x)

    x = torch.randn(3, 4, 6)
    changed = strides_in_rows(trace(Program(), (x,), {}, dynamic=False).gm)
    assert torch.equal(changed(x)[0], run(x))
    assert not any("as_strided" in str(node.target) for node in changed.graph.nodes)
    assert strides_in_rows(changed) is changed


def on_ranks() -> float:
    torch.manual_seed(0)
    model, x = Windows().eval(), torch.randn(1, LENGTH, HEADS * WIDTH)
    fast = seqpar.sp_compile(model, (x,), ulysses=2, backend="aot_eager")
    with torch.no_grad():
        return (fast(x) - model(x)).abs().max().item()


def test_compiled(two_ranks) -> None:
    assert max(two_ranks.run(on_ranks)) < 1e-5
