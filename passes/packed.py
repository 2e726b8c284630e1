"""Sequences that lie one after another, attended each alone.

Before: %o = attend(%q, %k, %v), ends 0, 101, 202 of queries and keys                                 %q [202, H, D]
After:  %o = view(attend(view(%q, [2, 101, H, D]), …), [202, H, D])

Before: %o = attend(%q, %k, %v), ends 0, 40, 101                                                      %q [101, H, D]
After:  %o = cat([attend(%q[None, :40], …), attend(%q[None, 40:], …)]), without their first dim

Before: %o = attend(%q, %k, %v), ends that are known when it runs, or of many sequences
After:  %o = attend(%q[None], %k[None], %v[None], mask), which lets a query see the keys of its own sequence; without their first dim
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from seqpar.partitioner.lengths import Length
from seqpar.passes.build import Builder

aten = torch.ops.aten
MANY = 16  # sequences: more attentions than that are worse than a mask


@dataclass(frozen=True)
class Run:
    """`count` sequences in a row with as many queries each, and as many keys."""

    count: int
    queries: int
    keys: int


def runs_of(ends_q: Any, ends_k: Any, queries: Length, keys: Length) -> tuple[Run, ...] | None:
    """The sequences that end at these places ([sequences + 1]): one run if they are alike and fill the tensors, else each its own.

    None if the places are unknown, do not begin at 0, or are many, or if not all queries belong to a sequence with keys.
    """
    if not isinstance(ends_q, torch.Tensor) or not isinstance(ends_k, torch.Tensor) or ends_q.ndim != 1 or ends_q.shape != ends_k.shape:
        return None
    q, k = ends_q.tolist(), ends_k.tolist()
    lengths = list(zip(*([b - a for a, b in itertools.pairwise(ends)] for ends in (q, k)), strict=True))
    if q[0] or k[0] or q[-1] != queries or not isinstance(keys, int) or k[-1] > keys or any(n < 1 or m < 1 for n, m in lengths):
        return None
    if len(set(lengths)) == 1 and k[-1] == keys:
        return (Run(len(lengths), *lengths[0]),)
    # One by one, also if some neighbours are alike: a batch of them would take apart a stretch of the tokens that is divided as it is.
    return tuple(Run(1, *length) for length in lengths) if len(lengths) <= MANY else None


def by_sequence(build: Builder, q: Node, k: Node, v: Node, runs: Sequence[Run], attend: Callable[[Node, Node, Node], Node]) -> Node:
    """[T, H, D] of the attentions of all runs, `attend([B, S, H, D], …)`, one after another."""
    outs, start, start_k = [], 0, 0
    for run in runs:
        parts = [_part(build, q, start, run.count, run.queries), *(_part(build, x, start_k, run.count, run.keys) for x in (k, v))]
        start, start_k = start + run.count * run.queries, start_k + run.count * run.keys
        out = attend(*parts)
        outs.append(build.call(aten.reshape.default, out, [run.count * run.queries, *out.meta["val"].shape[2:]]))
    return outs[0] if len(outs) == 1 else build.call(aten.cat.default, outs)


def as_one(build: Builder, q: Node, k: Node, v: Node, mask: Node, attend: Callable[..., Node]) -> Node:
    """[T, H, D] of one attention, `attend([1, T, H, D], …, mask)`."""
    out = attend(*(build.call(aten.unsqueeze.default, x, 0) for x in (q, k, v)), mask=mask)
    return build.call(aten.squeeze.dim, out, 0)


def same_sequence(build: Builder, q: Node, k: Node, ends: tuple[Node, ...], causal: bool) -> Node:
    """[queries, keys], True where both are in one sequence. Rows behind the last end, which belong to none, are as arbitrary as the kernel's.

    causal: of sequences with as many queries as keys.
    """
    rows, columns = (_positions(build, x) for x in (q, k))
    own_q, own_k = (_sequences(build, places, end) for places, end in ((rows, ends[0]), (columns, ends[1])))
    mask_QK = build.call(aten.eq.Tensor, build.call(aten.unsqueeze.default, own_q, 1), build.call(aten.unsqueeze.default, own_k, 0))
    if causal:
        mask_QK = build.call(aten.logical_and.default, mask_QK, build.call(aten.ge.Tensor, build.call(aten.unsqueeze.default, rows, 1), build.call(aten.unsqueeze.default, columns, 0)))
    return mask_QK


def _positions(build: Builder, x: Node) -> Node:
    return build.call(aten.arange.start_step, 0, build.size(x, 0), 1, dtype=torch.int64, device=x.meta["val"].device)


def _sequences(build: Builder, positions: Node, ends: Node) -> Node:
    """The number of the sequence that each position [T] is in: how many ends are not behind it; 0 before the first begins."""
    behind = build.call(aten.ge.Tensor, build.call(aten.unsqueeze.default, positions, 1), ends)
    return build.call(aten.sum.dim_IntList, behind, [1])


def _part(build: Builder, x: Node, start: int, count: int, length: int) -> Node:
    """`count` sequences from `start` on: [count, length, H, D]."""
    tokens, *rest = x.meta["val"].shape
    if count * length != tokens:
        x = build.call(aten.slice.Tensor, x, 0, start, start + count * length)
    return build.call(aten.view.default, x, [count, length, *rest])
