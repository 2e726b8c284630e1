"""`flex_attention` becomes ordinary attention, so that it can use the mesh like any other.

Before: %f = flex_attention(%q, %k, %v, score_mod, (…, mask_mod), 0.25, {…}, (), (%documents,)); %o = getitem(%f, 0)
        mask_mod(b, h, i, j, documents) = documents[i] == documents[j]
After:  %i = view(arange(Q), [1, 1, Q, 1]); %j = view(arange(K), [1, 1, 1, K]); %m = eq(index(%documents, [%i]), index(%documents, [%j]))
        %s = scaled_dot_product_attention(%q, %k, %v, %m, scale=0.25); %o = masked_fill(%s, logical_not(any(%m, -1, True)), 0)

Both functions are inlined on index tensors that broadcast (`inline.py`), so the usual rules cut the mask's rows and columns. Understood are
score functions that multiply by a constant, add what does not depend on the score, or set scores to minus infinity. Any other, and any use of the
log-sum-exp, is left to `flex_rows.py`. A row that sees no key is 0, as `flex_attention` has it.

The meaning is that of PyTorch's own operator run eagerly: `mask_mod` decides, and the lists of blocks in a `BlockMask` only tell a fused kernel
what it may skip. Work is counted for all pairs of positions, also those that such a kernel would skip.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from seqpar.partitioner.op import as_length, is_tensor
from seqpar.passes.build import Builder
from seqpar.passes.inline import Constant, Inliner, NotUnderstood, Plain, Spread, is_minus_infinity
from seqpar.passes.share import copied, with_graph

aten = torch.ops.aten
NAMES = ("query", "key", "value", "score_mod", "block_mask", "scale", "kernel_options", "score_mod_other_buffers", "mask_mod_other_buffers")
CAUSAL = {aten.ge.Tensor: (2, 3), aten.le.Tensor: (3, 2)}  # comparing these positions is the lower triangle
COPIES = (aten.clone.default, aten.alias.default, aten.detach.default)


def flex_to_attention(gm: GraphModule) -> GraphModule:
    """A copy of `gm` with `scaled_dot_product_attention` in place of every `flex_attention` that is understood; `gm` itself if there is none."""
    if not any(is_flex(node) for node in gm.graph.nodes):
        return gm
    graph = copied(gm.graph)
    shared: dict[object, Any] = {}
    changed = [rewrite(gm, graph, node, shared) for node in list(graph.nodes) if is_flex(node)]
    if not any(changed):
        return gm
    graph.eliminate_dead_code()
    graph.lint()
    return with_graph(gm, graph)


def is_flex(node: Node) -> bool:
    return node.op == "call_function" and node.target is torch.ops.higher_order.flex_attention


def rewrite(gm: GraphModule, graph: Graph, node: Node, shared: dict[object, Any]) -> bool:
    """Replace one call; False if it must stay. `shared`: index tensors and masks made so far, for layers that use the same."""
    if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in node.users):
        return False
    call = dict(zip(NAMES, node.args, strict=False)) | dict(node.kwargs)
    try:
        with graph.inserting_before(node):
            out = Flex(Builder(graph, node), gm, call, shared).emit()
    except NotUnderstood:
        return False
    for user in list(node.users):
        user.replace_all_uses_with(out)
        graph.erase_node(user)
    graph.erase_node(node)
    return True


class Flex:
    """One call while it is rewritten."""

    def __init__(self, build: Builder, gm: GraphModule, call: dict[str, Any], shared: dict[object, Any]) -> None:
        self.build, self.call, self.shared = build, call, shared
        self.q, self.k, self.v = (call[n] for n in ("query", "key", "value"))
        self.device = self.q.meta["val"].device
        self.score_mod, self.mask_mod = (getattr(gm, str(n.target)) for n in (call["score_mod"], call["block_mask"][-1]))
        shapes = [x.meta["val"].shape for x in (self.q, self.k)]
        self.sizes = tuple(as_length(n) for n in (*shapes[0][:3], shapes[1][2]))

    def emit(self) -> Node:
        """The result of the attention.

        Raises:
            NotUnderstood: its functions cannot be expressed as a scale and a mask.
        """
        q, k, v = self.q, *self._of_batch(self.k, self.v)
        if len({x.meta["val"].dtype for x in (q, k, v)}) != 1:
            raise NotUnderstood("operands of several dtypes")
        heads = [as_length(x.meta["val"].shape[1]) for x in (q, k)]
        score = self._once("score", self.score_mod, self.call.get("score_mod_other_buffers", ()), self._score)
        scale = float(self.call["scale"]) * score.scale
        options = {"scale": scale, "enable_gqa": heads[0] != heads[1]}
        seen = self._once("mask", self.mask_mod, self.call.get("mask_mod_other_buffers", ()), self._mask)
        if score.bias is None and score.seen is None and self._is_causal(seen):
            return self.build.call(aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, True, **options)
        mask, blind = self._once_more((score, seen), lambda: self._combine(score, seen))
        out = self.build.call(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, False, **options)
        return out if blind is None else self.build.call(aten.masked_fill.Scalar, out, blind, 0.0)

    def _of_batch(self, *tensors: Node) -> list[Node]:
        """Keys and values of batch 1 serve all of the batch."""
        batch = self.sizes[0]
        found = []
        for x in tensors:
            shape = x.meta["val"].shape
            if as_length(shape[0]) != batch:
                if not isinstance(batch, int):
                    raise NotUnderstood("a batch of unknown size")
                x = self.build.call(aten.expand.default, x, [batch, -1, -1, -1])
            found.append(x)
        return found

    # -- the two functions -----------------------------------------------------------------------------
    def _positions(self) -> list[Spread]:
        """Index tensors of batch, head, query and key."""
        found = []
        for dim, (x, place) in enumerate(((self.q, 0), (self.q, 1), (self.q, 2), (self.k, 2))):

            def make(dim: int = dim, x: Node = x, place: int = place) -> Spread:
                size = self.build.size(x, place)
                line = self.build.call(aten.arange.default, size, device=self.device)
                return Spread(self.build.call(aten.view.default, line, [size if d == dim else 1 for d in range(4)]))

            found.append(self._once_more(("position", dim, self.sizes[dim], self.device), make))
        return found

    def _once(self, kind: str, function: GraphModule, buffers: Any, make: Any) -> Any:
        key = (kind, function.code, tuple(buffers), self.sizes, self.device, self.q.meta["val"].dtype)
        return self._once_more(key, lambda: make(function, [Plain(b) if is_tensor(b) else b for b in buffers]))

    def _once_more(self, key: object, make: Any) -> Any:
        if key not in self.shared:
            self.shared[key] = make()
        return self.shared[key]

    def _score(self, function: GraphModule, buffers: list[Any]) -> Score:
        found = ScoreInliner(self.build, self.device).run(function, [Score(), *self._positions(), *buffers])
        if not isinstance(found, Score):
            raise NotUnderstood("the score is not the product of query and key")
        return found

    def _mask(self, function: GraphModule, buffers: list[Any]) -> Spread | None:
        """Which pairs see each other; None if all do."""
        inliner = Inliner(self.build, self.device)
        found = inliner.run(function, [*self._positions(), *buffers])
        if isinstance(found, Constant) and found.number:
            return None
        return Spread(inliner.node(found))

    def _is_causal(self, seen: Spread | None) -> bool:
        """The mask is the lower triangle and nothing else."""
        if seen is None or seen.node.target not in CAUSAL:
            return False
        places = self._positions()
        return tuple(seen.node.args) == tuple(places[i].node for i in CAUSAL[seen.node.target])

    def _combine(self, score: Score, seen: Spread | None) -> tuple[Node | None, Node | None]:
        """(mask as attention takes it, rows that see nothing)"""
        parts = [s.node for s in (seen, score.seen) if s is not None]
        visible = self.build.call(aten.logical_and.default, *parts) if len(parts) == 2 else parts[0] if parts else None
        if score.bias is None:
            if visible is None:
                return None, None
            return visible, self.build.call(aten.logical_not.default, self.build.call(aten.any.dim, visible, -1, True))
        bias = self.build.call(aten._to_copy.default, score.bias.node, dtype=self.q.meta["val"].dtype)
        if visible is not None:
            hidden = self.build.call(aten.logical_not.default, visible)
            bias = self.build.call(aten.masked_fill.Scalar, bias, hidden, -math.inf)
        return bias, self.build.call(aten.all.dim, self.build.call(aten.eq.Scalar, bias, -math.inf), -1, True)


@dataclass(frozen=True)
class Score:
    """scale * score + bias where `seen`, else minus infinity."""

    scale: float = 1.0
    bias: Spread | None = None
    seen: Spread | None = None


class ScoreInliner(Inliner):
    """Follows what a function does to the score."""

    def special(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        places = [i for i, a in enumerate(args) if isinstance(a, Score)]
        if not places:
            return None
        if len(places) > 1 or any(isinstance(v, Score) for v in kwargs.values()):
            raise NotUnderstood("the score is used twice")
        score, at = args[places[0]], places[0]
        if target in COPIES or (target is aten._to_copy.default and kwargs.get("dtype") in (None, torch.float32, torch.float64)):
            return score
        if target in (aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar) and not kwargs and len(args) == 2:
            return self._add(score, args[1 - at], at, negate=target in (aten.sub.Tensor, aten.sub.Scalar))
        if target in (aten.mul.Tensor, aten.mul.Scalar):
            return self._times(score, _number(args[1 - at]))
        if target in (aten.div.Tensor, aten.div.Scalar) and at == 0 and len(args) == 2 and not kwargs:
            return self._times(score, 1 / _number(args[1]))
        if target in (aten.where.self, aten.where.ScalarOther) and at == 1 and is_minus_infinity(args[2]):
            return self._hide(score, self.node(args[0]))
        if target in (aten.masked_fill.Scalar, aten.masked_fill.Tensor) and at == 0 and is_minus_infinity(args[2]):
            return self._hide(score, self.build.call(aten.logical_not.default, self.node(args[1])))
        raise NotUnderstood(f"{target} of a score")

    def _add(self, score: Score, other: Any, at: int, negate: bool) -> Score:
        if negate and at == 1:
            raise NotUnderstood("a negated score")
        if isinstance(other, (int, float)):
            other = Constant(float(other), torch.float32)
        node = self.node(other)
        if not node.meta["val"].dtype.is_floating_point:
            node = self.build.call(aten._to_copy.default, node, dtype=torch.float32)
        node = self.build.call(aten.neg.default, node) if negate else node
        total = node if score.bias is None else self.build.call(aten.add.Tensor, score.bias.node, node)
        return replace(score, bias=Spread(total))

    def _times(self, score: Score, factor: float) -> Score:
        if not 0 < factor < math.inf:
            raise NotUnderstood("a score times a factor that is not positive")
        bias = None if score.bias is None else Spread(self.build.call(aten.mul.Tensor, score.bias.node, factor))
        return Score(score.scale * factor, bias, score.seen)

    def _hide(self, score: Score, seen: Node) -> Score:
        both = seen if score.seen is None else self.build.call(aten.logical_and.default, score.seen.node, seen)
        return replace(score, seen=Spread(both))


def _number(value: Any) -> float:
    number = value.number if isinstance(value, Constant) else value
    if not isinstance(number, (int, float)):
        raise NotUnderstood("a score times a tensor")
    return float(number)
