"""Blocks that are alike, one after another: what is found out and decided about one of them holds for the others.

    block 0    block 1    block 2 … block n-2    block n-1
    itself     itself     like block 1           itself

Alike: the same operators on equal shapes, wired in the same way to what is in the block, to what the block before made, to values that all of them share, and to
weights of their own. Nothing but the next block reads what a copy makes, so the last block, which the rest of the model reads, is no copy; nor is the first, whose
operands were made elsewhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch.fx import Graph, Node

from seqpar.partitioner.labels import Key
from seqpar.partitioner.op import as_length, outputs_of

GRAM = 8  # operators by which a place in a block is told from others
CANDIDATES = 12  # block lengths that are tried, of those that would explain most of the graph
LEAST = 2  # copies that are worth the looking


@dataclass(frozen=True)
class Run:
    """blocks: the calls of each, in order: block 0, block 1, and the copies of block 1. carried: pairs of values that block 1 reads from block 0, and their like in block 1.

    shared: what all blocks read. weights: of every block, its own ones, in one order; block 0's are not known.
    """

    blocks: tuple[tuple[Node, ...], ...]
    carried: tuple[tuple[Node, Node], ...]
    shared: tuple[Node, ...]
    weights: tuple[tuple[Node, ...], ...]


@dataclass(frozen=True)
class Repeats:
    """like: calls and weights of copies -> their like in the block that stands for them. times: calls of that block -> blocks that they stand for, with their own.

    handed_on: (call of that block, value of the block before it) -> the value of this one that the next block reads in its place.
    """

    runs: tuple[Run, ...] = ()
    like: Mapping[Node, Node] = field(default_factory=dict)
    times: Mapping[Node, int] = field(default_factory=dict)
    handed_on: Mapping[tuple[Node, Node], Node] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.runs)

    def for_all(self, keys: set[Key]) -> set[Key]:
        """Labels of all blocks, of those of the blocks that stand for them."""
        found: dict[Node, list[tuple[int, int]]] = {}
        for node, dim, atom in keys:
            if node in self.times:
                found.setdefault(node, []).append((dim, atom))
        return keys | {(node, dim, atom) for node, first in self.like.items() for dim, atom in found.get(first, ())}


def find_repeats(graph: Graph) -> Repeats:
    """The runs of equal blocks in a graph whose nodes carry `meta["val"]`; time grows with the number of nodes."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    known: dict[Hashable, int] = {}
    kinds = np.array([known.setdefault(_kind(node), len(known)) for node in calls], dtype=np.int64)
    place, taken, runs = {node: i for i, node in enumerate(calls)}, np.zeros(len(calls), dtype=bool), list[Run]()
    for length in _lengths(kinds):
        for start, stop in _stretches(kinds, length):
            if not taken[start:stop].any():
                found = list(_runs(calls, place, _narrowest(calls, place, start, stop, length), stop, length))
                runs += found
                for run in found:
                    taken[place[run.blocks[0][0]] : place[run.blocks[-1][-1]] + 1] = True
    like, times, handed_on = dict[Node, Node](), dict[Node, int](), dict[tuple[Node, Node], Node]()
    for run in runs:
        following = dict(run.carried)
        handed_on |= {(node, n): following[n] for node in run.blocks[1] for n in node.all_input_nodes if n in following}
        first = (*run.blocks[1], *run.weights[1])
        times |= dict.fromkeys(run.blocks[1], len(run.blocks) - 1)
        for block, weights in zip(run.blocks[2:], run.weights[2:], strict=True):
            like |= zip((*block, *weights), first, strict=True)
    return Repeats(tuple(runs), like, times, handed_on)


def _kind(node: Node) -> Hashable:
    """Equal for calls that differ in what they read only: in which nodes, not in how many or where."""
    places = {n: i for i, n in enumerate(node.all_input_nodes)}
    said = tuple((key, node.meta[key]) for key in ("rule", "flops") if key in node.meta)
    return node.target, _literal(node.args, places), _literal(node.kwargs, places), _form(node), said


def _literal(value: Any, places: Mapping[Node, int]) -> Hashable:
    """Two are equal only if they are one argument: not 1 and True, or 0.0 and -0.0."""
    if isinstance(value, Node):
        return Node, places[value]
    if isinstance(value, (tuple, list)):
        return tuple(_literal(part, places) for part in value)
    if isinstance(value, dict):
        return tuple((key, _literal(part, places)) for key, part in value.items())
    if isinstance(value, (float, complex, slice)):
        return type(value), repr(value)
    return type(value), value if type(value).__hash__ is not None else id(value)


def _form(node: Node) -> Hashable:
    tensors = outputs_of(node)
    if not tensors:
        value = node.meta.get("val")
        return str(value) if not isinstance(value, (tuple, list)) else len(value)
    return tuple((t.dtype, *(n if type(n) is int else as_length(n) for n in t.shape)) for t in tensors)


def _lengths(kinds: np.ndarray) -> list[int]:
    """Lengths that a block may have, short ones first: how far the next place like one is, for most places."""
    latest: dict[tuple[int, ...], int] = {}
    apart: Counter[int] = Counter()
    listed = kinds.tolist()
    for i in range(len(listed) - GRAM + 1):
        gram = tuple(listed[i : i + GRAM])
        if gram in latest:
            apart[i - latest[gram]] += 1
        latest[gram] = i
    return sorted(length for length, _ in apart.most_common(CANDIDATES) if length >= GRAM)


def _stretches(kinds: np.ndarray, length: int) -> Iterator[tuple[int, int]]:
    """Where every call is of the kind of that one length before: from the first block to the end of the last."""
    same = np.concatenate(([False], kinds[:-length] == kinds[length:], [False]))
    edges = np.flatnonzero(same[1:] != same[:-1])
    for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        if stop - start >= (LEAST + 1) * length:
            yield start, stop + length


def _narrowest(calls: Sequence[Node], place: Mapping[Node, int], start: int, stop: int, length: int) -> int:
    """The first place in a stretch at which a block begins: where fewest values are handed on."""
    middle = start + (stop - start) // length // 2 * length
    alive = np.zeros(length + 1, dtype=np.int64)
    for i in range(middle - length, middle + length):
        last = max((place.get(user, stop) for user in calls[i].users), default=i)
        first, behind = max(i + 1, middle), min(last, middle + length - 1) + 1
        if first < behind:
            alive[first - middle] += 1
            alive[behind - middle] -= 1
    return start + int(np.argmin(np.cumsum(alive)[:length]))


def _runs(calls: Sequence[Node], place: Mapping[Node, int], start: int, stop: int, length: int) -> Iterator[Run]:
    """Blocks from `start` on, as far as each is like the one before; then from there."""
    while start + (LEAST + 2) * length <= stop:
        blocks = _Blocks(calls, place, start, length)
        count = blocks.extent(stop)
        if count >= LEAST + 2:
            yield blocks.run(count)
        start += max(count - 1, 1) * length


class _Blocks:
    """Blocks of one length, one after another, compared with block 1."""

    def __init__(self, calls: Sequence[Node], place: Mapping[Node, int], start: int, length: int) -> None:
        self.calls, self.place, self.start, self.length = calls, place, start, length
        self.read: list[dict[Node, Node]] = [{}]  # of every block: what block 1 reads from elsewhere -> what it reads there
        self.shared: set[Node] = set()

    def block(self, index: int) -> Sequence[Node]:
        begin = self.start + index * self.length
        return self.calls[begin : begin + self.length]

    def extent(self, stop: int) -> int:
        """How many are alike, with blocks 0 and 1."""
        count = 1
        while self.start + (count + 1) * self.length <= stop and self._is_alike(count):
            count += 1
        return count

    def _is_alike(self, index: int) -> bool:
        read: dict[Node, Node] = {}
        for node, first in zip(self.block(index), self.block(1), strict=True):
            if not self._within(node, index, blocks=2) or not all(self._is_same(a, b, index, read) for a, b in zip(node.all_input_nodes, first.all_input_nodes, strict=True)):
                return False
        shared = {first for first, node in read.items() if first is node}
        if index == 2:
            self.shared = shared
        self.read.append(read)
        return index < 2 or shared == self.shared

    def _within(self, node: Node, index: int, blocks: int) -> bool:
        """Only this block reads a value, and (two blocks) the next."""
        begin = self.start + index * self.length
        return all(begin <= self.place.get(user, -1) < begin + blocks * self.length for user in node.users)

    def _is_same(self, node: Node, first: Node, index: int, read: dict[Node, Node]) -> bool:
        """Whether an input of block `index` is to it what `first` is to block 1: made in it or in the block before, the same for all, or a weight of its own."""
        at = self.place.get(node)
        if at is not None and at >= self.start:
            return self.place.get(first) == at - (index - 1) * self.length
        if first in read:
            return read[first] is node
        read[first] = node
        return node is first or (
            at is None and first not in self.place and node.op == first.op and bool(outputs_of(node)) and _form(node) == _form(first)
            and self._within(node, index, blocks=1) and self._within(first, 1, blocks=1)
        )  # fmt: skip

    def run(self, count: int) -> Run:
        own = [first for first in self.read[1] if first not in self.shared]
        made = dict(zip(self.block(0), self.block(1), strict=True))
        carried = {n: made[n] for node in self.block(1) for n in node.all_input_nodes if n in made}
        weights = ((), *(tuple(read[first] for first in own) for read in self.read[1:count]))
        return Run(tuple(tuple(self.block(i)) for i in range(count)), tuple(carried.items()), tuple(self.shared), weights)
