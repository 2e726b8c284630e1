"""Look-ups by position: the index's dims keep their place, the table's looked-up dim is whole."""

from __future__ import annotations

import torch
from torch.fx import Node

from seqpar.partitioner.op import Op
from seqpar.partitioner.registry import rule

aten = torch.ops.aten


@rule(aten.embedding.default)
def embedding(op: Op) -> None:
    """`[v, e], [..., s] -> [..., s, e]`"""
    op.carry_all(op.index(op.args["indices"]))
    op.carry(op.index(op.args["weight"]), 1, len(op.out_shape) - 1)
    op.reason = "looked up along this dim"


@rule(aten.index_select.default)
def index_select(op: Op) -> None:
    x, index = op.index(op.args["self"]), op.index(op.args["index"])
    if op.rank(x) == 0:
        return
    dim = op.args["dim"] % op.rank(x)
    op.carry_all(x, skip=(dim,))
    if op.rank(index):
        op.carry(index, 0, dim)
    op.reason = "looked up along this dim"


@rule(aten.index.Tensor)
def index(op: Op) -> None:
    """Integer tensors at adjacent dims: their broadcast dims replace those dims. Boolean masks have data-dependent shapes: whole."""
    indices = op.args["indices"]
    at = [i for i, n in enumerate(indices) if isinstance(n, Node)]
    if any(indices[i].meta["val"].dtype in (torch.bool, torch.uint8) for i in at) or at != list(range(at[0], at[0] + len(at))):
        return
    x = op.index(op.args["self"])
    operands = [op.index(indices[i]) for i in at]
    op.alike = x not in operands
    width = max(op.rank(i) for i in operands)
    for d in range(op.rank(x)):
        if d not in at:
            op.carry(x, d, d if d < at[0] else d - len(at) + width)
    for i in dict.fromkeys(operands):
        for d in range(op.rank(i)):
            op.carry(i, d, at[0] + d + width - op.rank(i))
    op.reason = "looked up along this dim"


@rule(aten.gather.default)
def gather(op: Op) -> None:
    """Along `dim` the table is whole; elsewhere table and index are cut alike where their lengths agree."""
    x, index_ = op.index(op.args["self"]), op.index(op.args["index"])
    dim = op.args["dim"] % max(op.rank(x), 1)
    op.carry(index_, dim, dim)
    for d in range(op.rank(x)):
        if d != dim and op.shapes[x][d] == op.shapes[index_][d]:
            op.carry(x, d, d)
            op.carry(index_, d, d)
    op.reason = "looked up along this dim"


@rule(aten.grid_sampler.default, aten.grid_sampler_2d.default, aten.grid_sampler_3d.default)
def grid_sampler(op: Op) -> None:
    """`input [B, C, *places]` looked up at `grid [B, *out, coordinates]`: every result may need all places."""
    x, grid = op.index(op.args["input"]), op.index(op.args["grid"])
    for d in (0, 1):
        op.carry(x, d, d)
    op.carry(grid, 0, 0)
    for d in range(1, op.rank(grid) - 1):
        op.carry(grid, d, d + 1)
    op.reason = "looked up along this dim"


@rule(aten.scatter.src, aten.scatter.value, aten.scatter_add.default)
def scatter(op: Op) -> None:
    """Other dims than `dim` are cut alike if self, index and source agree on them."""
    x = op.index(op.args["self"])
    dim = op.args["dim"] % max(op.rank(x), 1)
    for d in range(op.rank(x)):
        if d != dim and all(shape[d] == op.shapes[x][d] for shape in op.shapes):
            for operand in range(len(op.operands)):
                op.carry(operand, d, d)
    op.reason = "scattered along this dim"


@rule(aten.index_copy.default, aten.index_add.default)
def index_copy(op: Op) -> None:
    """Other dims than `dim` are cut alike."""
    dim = op.args["dim"]
    for name in ("self", "source"):
        op.carry_all(op.index(op.args[name]), skip=(dim,))
    op.reason = "written to by position along this dim"


@rule(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def index_fill(op: Op) -> None:
    """Other dims than `dim` keep their place."""
    op.carry_all(op.index(op.args["self"]), skip=(op.args["dim"],))
    op.reason = "written to by position along this dim"


@rule(aten.index_put.default)
def index_put(op: Op) -> None:
    """Integer tensors at adjacent dims: the other dims keep their place, in the values too."""
    indices = op.args["indices"]
    at = [i for i, n in enumerate(indices) if isinstance(n, Node)]
    if any(indices[i].meta["val"].dtype in (torch.bool, torch.uint8) for i in at) or at != list(range(at[0], at[0] + len(at))):
        return
    x, values = op.index(op.args["self"]), op.index(op.args["values"])
    width = max(len(indices[i].meta["val"].shape) for i in at)
    missing = op.rank(x) - len(at) + width - op.rank(values)
    for d in range(op.rank(x)):
        if d not in at:
            op.carry(x, d, d)
            from_values = (d if d < at[0] else d - len(at) + width) - missing
            if from_values >= 0:
                op.carry(values, from_values, d)
    op.reason = "written to by position along this dim"
