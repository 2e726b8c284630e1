"""Literals of a call that follow the local shapes, one function per kind of `Rewrite`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from seqpar.errors import UnsupportedError
from seqpar.partitioner.lengths import Length, minus, product, simplify, total
from seqpar.partitioner.op import bind_arguments, per_dim, shape_of
from seqpar.partitioner.relation import Relation
from seqpar.runtime.halo import halo, window
from seqpar.runtime.statistics import deviation, deviation_and_mean, euclidean_norm, group_norm, variance, variance_and_mean
from seqpar.runtime.strided import as_complex

if TYPE_CHECKING:
    from seqpar.passes.emit import Emitter

aten = torch.ops.aten
# A local value, or the result of an exchange, may have strides that the whole value did not have.
STRIDED = {aten.view.default: aten.reshape.default, aten._unsafe_view.default: aten.reshape.default, aten.view_as_complex.default: as_complex}
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]
# Arguments with which an operator that may draw random numbers draws none.
SWITCHED_OFF = (("p", 0.0), ("dropout", 0.0), ("dropout_p", 0.0), ("train", False), ("training", False))
TORCH = os.path.dirname(torch.__file__) + os.sep


def localise(emitter: Emitter, node: Node, relation: Relation) -> Call:
    """Target, arguments and keyword arguments of a node on local operands (operands still as nodes of the source graph)."""
    rewrite = relation.rewrite
    call: Call = node.target, node.args, dict(node.kwargs)
    if rewrite is not None and _touched(emitter, node, relation):
        call = KINDS[rewrite.kind](emitter, node, relation)
    return (STRIDED.get(call[0], call[0]), *call[1:])


def _touched(emitter: Emitter, node: Node, relation: Relation) -> bool:
    layouts = [emitter.view.required(node, relation, i) for i in range(len(relation.operands))]
    return any(any(layout) for layout in layouts) or any((node, d, a) in emitter.view.labels.sharded for d, axis in enumerate(relation.out_axes[0]) for a in emitter.view.inference.table.roots(axis))


def refuse_random(node: Node) -> None:
    """Ranks would draw different numbers than one process does."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return
    given = bind_arguments(node)
    if not any(name in given and given[name] == off for name, off in SWITCHED_OFF):
        raise UnsupportedError(
            f"{node.target} draws random numbers, and ranks cannot reproduce those of one process.\n{source_line(node)}"
            "Call model.eval(), set dropout to 0, or draw the numbers outside and pass them in."
        )


def source_line(node: Node) -> str:
    """The user's own line of a node (the innermost frame outside torch), as in a traceback."""
    frames = [f for f in (node.meta.get("stack_trace") or "").strip().split("\n  File ") if f.strip()]
    frames = [f for f in frames if TORCH not in f.partition(",")[0]] or frames
    return f"  File {frames[-1].removeprefix('File ').strip()}\n" if frames else ""


def one_line(node: Node) -> str:
    """`file.py:12` of the user's source."""
    text = source_line(node).strip().splitlines()
    if not text:
        return ""
    parts = text[0].removeprefix("File ").split(",")
    return f"{parts[0].strip().strip(chr(34))}:{parts[1].replace('line', '').strip()}" if len(parts) > 1 else parts[0]


def _sizes(emitter: Emitter, node: Node, relation: Relation) -> Call:
    assert relation.rewrite is not None
    args = list(node.args)
    args[relation.rewrite.arg] = emitter.local_shape(node)
    return node.target, tuple(args), dict(node.kwargs)


def _view(emitter: Emitter, node: Node, relation: Relation) -> Call:
    return aten.reshape.default, (node.args[0], emitter.local_shape(node)), {}


def _bounds(emitter: Emitter, node: Node, relation: Relation) -> tuple[Length, Length]:
    """Local start and stop of a cut-out range: what precedes it, and what is in it, in the operand's layout."""
    assert relation.rewrite is not None
    dim = relation.rewrite.dim
    layout = emitter.view.required(node, relation, 0)[dim]
    before, kept = relation.rewrite.data
    start = emitter.view.axis_length(before, layout)
    return start, total((start, emitter.view.axis_length(kept, layout)))


def _slice(emitter: Emitter, node: Node, relation: Relation) -> Call:
    assert relation.rewrite is not None
    dim = relation.rewrite.dim
    if not emitter.view.required(node, relation, 0)[dim]:
        return node.target, node.args, dict(node.kwargs)
    start, stop = _bounds(emitter, node, relation)
    return aten.slice.Tensor, (node.args[0], dim, emitter.sizes.emit(start), emitter.sizes.emit(stop)), {}


def _slice_scatter(emitter: Emitter, node: Node, relation: Relation) -> Call:
    assert relation.rewrite is not None
    bound = bind_arguments(node)
    dim = relation.rewrite.dim
    if not emitter.view.required(node, relation, 0)[dim]:
        return node.target, node.args, dict(node.kwargs)
    start, stop = _bounds(emitter, node, relation)
    return node.target, (bound["self"], bound["src"], dim, emitter.sizes.emit(start), emitter.sizes.emit(stop)), {}


def _split(emitter: Emitter, node: Node, relation: Relation) -> Call:
    assert relation.rewrite is not None
    dim = relation.rewrite.dim
    layout = emitter.view.required(node, relation, 0)[dim]
    if not layout:
        return node.target, node.args, dict(node.kwargs)
    lengths = [emitter.sizes.emit(emitter.view.axis_length(axes[dim], layout)) for axes in relation.out_axes]
    return aten.split_with_sizes.default, (node.args[0], lengths, dim), {}


def _pad(emitter: Emitter, node: Node, relation: Relation) -> Call:
    assert relation.rewrite is not None
    pads = list(node.args[1])  # type: ignore[arg-type]
    layouts = emitter.view.produced(node)
    table = emitter.view.inference.table
    for dim, head, tail in relation.rewrite.data:
        if not layouts[dim]:
            continue
        atoms = relation.out_axes[0][dim][0]
        at = 2 * (len(layouts) - 1 - dim)
        if head:
            pads[at] = emitter.sizes.emit(emitter.view.factor_length(table.expand(atoms[:1]), layouts[dim]))
        if tail:
            pads[at + 1] = emitter.sizes.emit(emitter.view.factor_length(table.expand(atoms[-1:]), layouts[dim]))
    return node.target, (node.args[0], pads, *node.args[2:]), dict(node.kwargs)


def _mean(emitter: Emitter, node: Node, relation: Relation) -> Call:
    """A partial sum in at least float32; `Emitter.finish` divides by the global count."""
    if emitter.view.reduced(node, relation) is None:
        return node.target, node.args, dict(node.kwargs)
    bound = bind_arguments(node)
    dtype = node.meta["val"].dtype
    wide = torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype
    if bound.get("dim") is None:
        return aten.sum.default, (bound["self"],), {"dtype": wide}
    return aten.sum.dim_IntList, (bound["self"], bound["dim"], bound["keepdim"]), {"dtype": wide}


def _added_once(emitter: Emitter, node: Node, relation: Relation) -> Call:
    """A partial product: what is added to it (a bias) enters the sum on one rank, others leave it out as the rewrite says."""
    if emitter.view.reduced(node, relation) is None or emitter.view.rank == 0:
        return node.target, node.args, dict(node.kwargs)
    assert relation.rewrite is not None and isinstance(node.target, torch._ops.OpOverload)
    bound, schema = bind_arguments(node) | dict(relation.rewrite.data), node.target._schema.arguments
    return node.target, tuple(bound[a.name] for a in schema if not a.kwarg_only), {a.name: bound[a.name] for a in schema if a.kwarg_only}


MOMENTS: dict[Any, Callable[..., Any]] = {
    aten.var.correction: variance, aten.var.dim: variance, aten.std.correction: deviation, aten.std.dim: deviation,
    aten.var_mean.correction: variance_and_mean, aten.std_mean.correction: deviation_and_mean,
}  # fmt: skip


def _dims(node: Node, bound: dict[str, Any]) -> list[int]:
    """The reduced dims of a call; all of them if it names none."""
    dim = bound["dim"]
    if dim is None or dim == []:
        return list(range(len(bound["self"].meta["val"].shape)))
    return [dim] if isinstance(dim, int) else list(dim)


def _moments(emitter: Emitter, node: Node, relation: Relation) -> Call:
    """Variance over a divided dim: the ranks' sums, around the common mean."""
    if emitter.view.reduced(node, relation) is None:
        return node.target, node.args, dict(node.kwargs)
    bound = bind_arguments(node)
    correction = bound["correction"] if "correction" in bound else int(bound["unbiased"])
    dims = _dims(node, bound)
    shape = shape_of(bound["self"].meta["val"])
    count = emitter.sizes.emit(product(shape[d] for d in dims))
    args = (bound["self"], dims, 1 if correction is None else correction, bool(bound["keepdim"]), count)
    return MOMENTS[node.target], args, {"group": "sp"}


def _euclidean_norm(emitter: Emitter, node: Node, relation: Relation) -> Call:
    if emitter.view.reduced(node, relation) is None:
        return node.target, node.args, dict(node.kwargs)
    bound = bind_arguments(node)
    return euclidean_norm, (bound["self"], _dims(node, bound), bool(bound["keepdim"])), {"group": "sp"}


def _repeat_interleave(emitter: Emitter, node: Node, relation: Relation) -> Call:
    bound = bind_arguments(node)
    return node.target, (bound["self"], bound["repeats"], bound["dim"]), {}


def _upsample(emitter: Emitter, node: Node, relation: Relation) -> Call:
    shape = emitter.local_shape(node)
    return node.target, (node.args[0], shape[2:], None), {}


def _halo(emitter: Emitter, node: Node, relation: Relation) -> Call:
    """A convolution over a sharded dim reads its neighbours' rows, or its window of a whole operand, and no longer pads there."""
    bound = bind_arguments(node)
    source = bound["input"]
    layout = emitter.view.required(node, relation, relation.operands.index(source))
    x = emitter.value(source, layout)
    spatial = len(bound["weight"].meta["val"].shape) - 2
    padding = per_dim(bound["padding"], spatial)
    for dim in (*relation.halo, *relation.windows):
        if emitter.view.produced(node)[dim]:
            at = dim - (len(layout) - spatial)
            if dim in relation.halo and padding[at] == 0:  # every part has the zeros around the whole
                x = emitter.call(aten.narrow.default, (x, dim, relation.halo[dim].before, emitter.local_shape(node)[dim]))
            x = _surroundings(emitter, node, relation, x, dim)
            padding[at] = 0
    return node.target, (x, bound["weight"], bound["bias"], bound["stride"], padding, bound["dilation"], bound["groups"]), {}


def _transposed(emitter: Emitter, node: Node, relation: Relation) -> Call:
    """All that the neighbours' rows make as well, of which a part is left."""
    bound = bind_arguments(node)
    layout, spatial = emitter.view.produced(node), len(bound["weight"].meta["val"].shape) - 2
    x, weight, bias = (n and emitter.value(n, emitter.view.required(node, relation, relation.operands.index(n))) for n in map(bound.get, ("input", "weight", "bias")))
    stride, padding, extra, dilation = (per_dim(bound[name], spatial) for name in ("stride", "padding", "output_padding", "dilation"))
    starts: dict[int, int] = {}
    for dim in (dim for dim in range(len(layout) - spatial, len(layout)) if layout[dim]):
        at, around = dim - (len(layout) - spatial), relation.halo.get(dim)
        if around is not None:
            x = emitter.call(halo, (x, dim, around.before, around.after), {"group": "sp"})
            starts[dim] = around.before * stride[at] + padding[at]
        padding[at] = 0
    call: Call = node.target, (x, weight, bias, stride, padding, extra, bound["groups"], dilation), {}
    for dim, start in starts.items():
        call = aten.narrow.default, (emitter.call(*call), dim, start, emitter.local_shape(node)[dim]), {}
    return call


def _edges(emitter: Emitter, node: Node, relation: Relation) -> Call:
    """A convolution with pads reads its neighbours' rows over a sharded dim, or its window, and pads nothing there."""
    bound = bind_arguments(node)
    x, pads, rank = bound["x"], list(bound["pads"]), len(emitter.view.produced(node))
    value = emitter.value(x, emitter.view.required(node, relation, relation.operands.index(x)))
    for dim, sharded in enumerate(emitter.view.produced(node)):
        if sharded and dim >= 2:
            value = _surroundings(emitter, node, relation, value, dim, edges=not bound["zeros"])
            pads[2 * (rank - 1 - dim) : 2 * (rank - dim)] = [0, 0]
    return node.target, (value, bound["weight"], bound["bias"], bound["stride"], bound["dilation"], bound["groups"], pads, bound["zeros"]), {}


def _surroundings(emitter: Emitter, node: Node, relation: Relation, x: Node, dim: int, edges: bool = False) -> Node:
    """All that the local part of a result is made of along `dim`; beyond the ends are zeros, or the `edges` repeated."""
    ends = {"edges": True} if edges else {}
    if dim in relation.halo:
        around = relation.halo[dim]
        return emitter.call(halo, (x, dim, around.before, around.after), {"group": "sp", **ends})
    if dim not in relation.windows:
        return x
    needed, (atom,) = relation.windows[dim], emitter.view.produced(node)[dim]
    parts, rank = emitter.view.parts(atom), emitter.view.rank
    start, last = total(parts[:rank]), minus(total(parts[: rank + 1]), 1)
    first, stop = (needed.stride * position + needed.first for position in (start, last))
    return emitter.call(window, (x, dim, *(emitter.sizes.emit(simplify(n)) for n in (first, stop + needed.reach))), ends)


def _group_norm(emitter: Emitter, node: Node, relation: Relation) -> Call:
    """Over divided positions: the ranks' statistics together."""
    layout = emitter.view.produced(node)
    if not any(layout[dim] for dim in relation.pooled):
        return node.target, node.args, dict(node.kwargs)
    bound = bind_arguments(node)
    count = emitter.sizes.emit(product(shape_of(bound["input"].meta["val"])[2:]))
    return group_norm, (bound["input"], bound["num_groups"], bound["weight"], bound["bias"], bound["eps"], count), {"group": "sp"}


KINDS: dict[str, Callable[[Emitter, Node, Relation], Call]] = {
    "sizes": _sizes,
    "view": _view,
    "slice": _slice,
    "slice_scatter": _slice_scatter,
    "split": _split,
    "pad": _pad,
    "mean": _mean,
    "added once": _added_once,
    "moments": _moments,
    "euclidean_norm": _euclidean_norm,
    "repeat_interleave": _repeat_interleave,
    "upsample": _upsample,
    "halo": _halo,
    "edges": _edges,
    "transposed": _transposed,
    "group_norm": _group_norm,
}
