"""Exchanges that a compiler takes as one operator, without looking into them.

What moves in such an exchange is described by minima and maxima of sums of quotients of lengths. As numbers they cost nothing; where lengths are symbols,
torch.compile compares them with one another and does not come to an end. `passes/seal.py` puts the operator into what is compiled.

Before: %o = pieces_to_seq((%o_0, %o_1), (%n, %m), ((0, 2, 0, %n), …), group="7")
After:  %r = seqpar.sealed((%o_0, %o_1), (%n, %m, …), '{"function": "pieces_to_seq", …}'); %o = %r[0]
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from seqpar.compat import pytree
from seqpar.runtime.groups import rank_of
from seqpar.runtime.head_shares import Table, causal_rows, pieces_to_seq, seq_to_pieces
from seqpar.runtime.layout import Segments, local_ranges, total
from seqpar.runtime.zigzag import zigzag_attention

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Sealable:
    """A function that may be one operator. operands: how many of its first arguments are or hold tensors. shapes: those of its results, [B, H, S, D], for its arguments."""

    run: Callable[..., Any]
    operands: int
    shapes: Callable[..., list[Shape]]


def _attended(q: Tensor, k: Tensor, v: Tensor, **_: Any) -> list[Shape]:
    batch, heads, rows, _width = q.shape
    return [(batch, heads, rows, v.shape[3])]


def _pieces(tensors: Sequence[Tensor], segments: Sequence[Segments], tables: Sequence[Table], **kwargs: Any) -> list[Shape]:
    wanted = [(x, piece) for x, table in zip(tensors, tables, strict=True) for piece in table[rank_of(kwargs["group"])]]
    return [(x.shape[0], stop - start, last - first, x.shape[3]) for x, (start, stop, first, last) in wanted]


def _part(pieces: Sequence[Tensor], segments: Segments, table: Table, order: Any = None, **kwargs: Any) -> list[Shape]:
    heads = max(stop for owned in table for _, stop, _, _ in owned)
    return [(pieces[0].shape[0], heads, total(local_ranges(segments, rank_of(kwargs["group"]))), pieces[0].shape[3])]


SEALABLE: Mapping[str, Sealable] = MappingProxyType(
    {
        "seq_to_pieces": Sealable(seq_to_pieces, 1, _pieces),
        "pieces_to_seq": Sealable(pieces_to_seq, 1, _part),
        "causal_rows": Sealable(causal_rows, 3, _attended),
        "zigzag_attention": Sealable(zigzag_attention, 3, _attended),
    }
)


@torch.library.custom_op("seqpar::sealed", mutates_args=())
def sealed(tensors: Sequence[Tensor], numbers: Sequence[int], call: str) -> list[Tensor]:
    """What the function named in `call` (see `written`) returns, as a list; each [B, H, S, D] in [B, S, H, D] memory order, and no view of an operand."""
    function, args, kwargs = _bound(tensors, numbers, call)
    results = function.run(*args, **kwargs)
    held = {x.untyped_storage().data_ptr() for x in tensors}
    return [_own(x.transpose(1, 2), held).transpose(1, 2) for x in ([results] if isinstance(results, Tensor) else results)]


@sealed.register_fake
def _(tensors: Sequence[Tensor], numbers: Sequence[int], call: str) -> list[Tensor]:
    function, args, kwargs = _bound(tensors, numbers, call)
    return [tensors[0].new_empty((batch, rows, heads, width)).transpose(1, 2) for batch, heads, rows, width in function.shapes(*args, **kwargs)]


@torch.library.custom_op("seqpar::after", mutates_args=())
def after(x: Tensor, before: Tensor) -> Tensor:
    """A copy of `x`, with its strides, for what must not begin until `before` has."""
    return x.clone()


@after.register_fake
def _(x: Tensor, before: Tensor) -> Tensor:
    return torch.empty_like(x)


SEALED = torch.ops.seqpar.sealed.default
AFTER = torch.ops.seqpar.after.default


def written(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any], symbol: type) -> tuple[list[Any], list[Any], str]:
    """The operator's arguments for a call of SEALABLE[name]: its tensors, the lengths that are symbols, and all else as JSON. Tensors and symbols are of type `symbol`."""
    first = len(pytree.tree_leaves(list(args[: SEALABLE[name].operands])))
    leaves, spec = pytree.tree_flatten((list(args), dict(kwargs)))
    tensors: list[Any] = []
    numbers: list[Any] = []
    rest: list[tuple[str, Any]] = []
    for place, leaf in enumerate(leaves):
        if isinstance(leaf, symbol):
            kind, found = ("tensor", tensors) if place < first else ("number", numbers)
            found.append(leaf)
            rest.append((kind, None))
        else:
            rest.append(("dtype", str(leaf).removeprefix("torch.")) if isinstance(leaf, torch.dtype) else ("value", leaf))
    return tensors, numbers, json.dumps({"function": name, "leaves": rest, "spec": pytree.treespec_dumps(spec)})


def _bound(tensors: Sequence[Tensor], numbers: Sequence[int], call: str) -> tuple[Sealable, list[Any], dict[str, Any]]:
    """The function, args and kwargs; inverse of `written`."""
    function, forms, spec = _read(call)
    sources = {"tensor": iter(tensors), "number": iter(numbers)}
    leaves = [next(sources[kind]) if kind in sources else getattr(torch, value) if kind == "dtype" else value for kind, value in forms]
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    return function, args, kwargs


@lru_cache(maxsize=4096)  # a program makes the same calls at every step
def _read(call: str) -> tuple[Sealable, list[tuple[str, Any]], Any]:
    said = json.loads(call)
    return SEALABLE[said["function"]], said["leaves"], pytree.treespec_loads(said["spec"])


def _own(x: Tensor, held: set[int]) -> Tensor:
    """`x`, contiguous and in a storage that is none of `held`."""
    return x.clone(memory_format=torch.contiguous_format) if not x.is_contiguous() or x.untyped_storage().data_ptr() in held else x
