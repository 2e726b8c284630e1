"""Reductions over dims: local result, then an all-reduce if the dim is sharded."""

from __future__ import annotations

from typing import Any

import torch

from seqpar.partitioner.op import Op
from seqpar.partitioner.registry import rule
from seqpar.partitioner.relation import Rewrite

aten = torch.ops.aten


def _dims(op: Op, dim: Any) -> set[int]:
    rank = op.rank()
    if dim is None or dim == []:
        return set(range(rank))
    return {d % rank for d in ([dim] if isinstance(dim, int) else dim)} if rank else set()


def keep_others(op: Op, gone: set[int], keepdim: bool) -> None:
    out_dim = 0
    for d in range(op.rank()):
        if d in gone:
            out_dim += keepdim
            continue
        op.carry(0, d, out_dim)
        out_dim += 1


def reduction(op: Op, kind: str) -> None:
    gone = _dims(op, op.args.get("dim"))
    keep_others(op, gone, bool(op.args.get("keepdim")))
    for d in gone:
        op.reduce(0, d, kind)


@rule(aten.sum.dim_IntList, aten.sum.default, aten.count_nonzero.dim_IntList, aten.count_nonzero.default)
def sum_(op: Op) -> None:
    reduction(op, "sum")


@rule(aten.mean.dim, aten.mean.default)
def mean(op: Op) -> None:
    """Local sum over the global count."""
    reduction(op, "sum")
    op.rewrite = Rewrite("mean")


@rule(aten.amax.default, aten.max.default)
def amax(op: Op) -> None:
    reduction(op, "max")


@rule(aten.amin.default, aten.min.default)
def amin(op: Op) -> None:
    reduction(op, "min")


def _is_complex(op: Op) -> bool:
    return op.operands[0].meta["val"].is_complex()


@rule(aten.var.correction, aten.var.dim, aten.std.correction, aten.std.dim, aten.var_mean.correction, aten.std_mean.correction)
def moments(op: Op) -> None:
    """The emitted call sums over the ranks itself: around the common mean."""
    if _is_complex(op) or isinstance(op.args["dim"], bool):
        whole_reduction(op)
        return
    reduction(op, "within")
    op.rewrite = Rewrite("moments")


@rule(aten.linalg_vector_norm.default)
def vector_norm(op: Op) -> None:
    """A root of summed squares; any other order needs the dims whole."""
    if op.args["ord"] != 2 or op.args["dim"] == [] or op.args["dtype"] is not None or _is_complex(op):
        whole_reduction(op)
        return
    reduction(op, "within")
    op.rewrite = Rewrite("euclidean_norm")


@rule(
    aten.max.dim,
    aten.min.dim,
    aten.argmax.default,
    aten.argmin.default,
    aten.any.dim,
    aten.any.dims,
    aten.any.default,
    aten.all.default,
    aten.all.dim,
    aten.all.dims,
    aten.median.dim,
    aten.kthvalue.default,
    aten.mode.default,
    aten.aminmax.default,
    aten.nansum.default,
    aten.prod.dim_int,
    aten.logsumexp.default,
    aten.linalg_norm.default,
    aten.norm.ScalarOpt_dim,
)
def whole_reduction(op: Op) -> None:
    keep_others(op, _dims(op, op.args.get("dim")), bool(op.args.get("keepdim")))
    op.reason = "reduced over this dim"
