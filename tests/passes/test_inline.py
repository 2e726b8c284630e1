"""A function of single positions, inlined on tensors that broadcast, is the function at every position."""

import pytest
import torch
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from seqpar.compat import FakeTensorMode
from seqpar.passes.build import Builder
from seqpar.passes.inline import Inliner, NotUnderstood, Plain, Spread

SIZES = (2, 3, 5, 4)
TABLE = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
aten = torch.ops.aten

FUNCTIONS = {
    "compare": lambda b, h, i, j, t: (i >= j) | (h == 1),
    "arithmetic": lambda b, h, i, j, t: (i - j).abs() // 2 + 0.5 * h,
    "look up": lambda b, h, i, j, t: aten.index.Tensor(t, [b, h, i, j]) > 0,
    "look up in turn": lambda b, h, i, j, t: aten.index.Tensor(aten.index.Tensor(aten.index.Tensor(t, [b]), [h, i]), [j]),
    "look up at a number": lambda b, h, i, j, t: aten.index.Tensor(aten.select.int(aten.index.Tensor(t, [b]), 0, 1), [i, j]),
    "computed table": lambda b, h, i, j, t: aten.index.Tensor(t.sum((1, 2)).cumsum(-1), [b, j]),
    "one number": lambda b, h, i, j, t: t.sum() + b,
    "types promote": lambda b, h, i, j, t: t.sum().double() * (h + 0.5),
    "constant": lambda b, h, i, j, t: torch.where(i > j, torch.full((), 2.0, dtype=torch.float64), b.new_zeros((), dtype=torch.float64)),
}


def traced(function):
    return make_fx(function, tracing_mode="fake")(*(torch.tensor(0) for _ in SIZES), TABLE)


def inlined(function):
    """The inlined function run on TABLE."""
    graph, mode = Graph(), FakeTensorMode()
    table = graph.placeholder("table")
    table.meta["val"] = mode.from_tensor(TABLE)
    build = Builder(graph, table)
    lines = [build.call(aten.arange.default, n, device=torch.device("cpu")) for n in SIZES]
    places = [build.call(aten.view.default, line, [n if d == e else 1 for e in range(4)]) for d, (line, n) in enumerate(zip(lines, SIZES, strict=True))]
    inliner = Inliner(build, torch.device("cpu"))
    graph.output(inliner.node(inliner.run(traced(function), [*map(Spread, places), Plain(table)])))
    return GraphModule(torch.nn.Module(), graph)(TABLE)


@pytest.mark.parametrize("kind", FUNCTIONS)
def test_every_position(kind) -> None:
    function = FUNCTIONS[kind]
    found = inlined(function).expand(SIZES)
    expected = torch.stack([function(*map(torch.tensor, place), TABLE) for place in torch.cartesian_prod(*map(torch.arange, SIZES)).tolist()])
    torch.testing.assert_close(found, expected.reshape(SIZES))


@pytest.mark.parametrize(
    "function",
    [
        lambda b, h, i, j, t: aten.index.Tensor(t, [b, h]) > 0,  # dims are left
        lambda b, h, i, j, t: aten.index.Tensor(t, [b, h, i]).sum(),
        lambda b, h, i, j, t: (t > i).any(),  # all of a tensor at every position
        lambda b, h, i, j, t: aten.index.Tensor(t, [None, h, i, j]).sum(),
    ],
)
def test_not_understood(function) -> None:
    with pytest.raises(NotUnderstood):
        inlined(function)
