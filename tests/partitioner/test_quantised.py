"""Products of quantised numbers whose scales no CPU has a kernel for."""

import pytest
import torch
from torch import fx

from seqpar.compat import FakeTensorMode
from seqpar.partitioner.infer import infer
from seqpar.partitioner.lengths import Sizes

aten = torch.ops.aten


@pytest.mark.parametrize(("scale", "divided"), [((), True), ((1,), True), ((256, 1), True), ((2, 1), False), ((2, 2), False), ((512,), False)], ids=str)
def test_rows_stay_where_their_scales_can(scale, divided):
    graph = fx.Graph()
    with FakeTensorMode():
        values = [torch.empty(256, 256, dtype=torch.float8_e4m3fn), torch.empty(64, 256, dtype=torch.float8_e4m3fn).t(), torch.empty(scale), torch.empty(1, 64), torch.empty(256, 64, dtype=torch.bfloat16)]
    nodes = [graph.placeholder(name) for name in ("x", "w", "a", "b")]
    call = graph.call_function(aten._scaled_mm.default, tuple(nodes), {"out_dtype": torch.bfloat16})
    for node, value in zip((*nodes, call), values, strict=True):
        node.meta["val"] = value
    graph.output((call,))
    flows = infer(graph, Sizes()).relations[call].flows
    assert ((0, 0) in flows) == divided and ((2, 0) in flows) == (scale == (256, 1))
