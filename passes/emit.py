"""Emit the program of one rank: the traced graph on local shapes, with reshards between layouts and attention over the mesh.

Before: %h = aten.linear(%x, %w); %o = aten.scaled_dot_product_attention(%q, %k, %v); output %o
After:  %x_r = shard(%x, 1, ((8, 8),), rank=0); %h = aten.linear(%x_r, %w); …
        %q_h, … = seq_to_heads(…, group="ulysses"); %o = aten.scaled_dot_product_attention(%q_h, …)
        %o_r = heads_to_seq(%o, …, group="ulysses"); %out = gather(%o_r, 1, ((8, 8),), group="sp")
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch.fx import Graph, Node, map_arg

from seqpar.compat import unbacked_symbols
from seqpar.partitioner.atoms import Factor
from seqpar.partitioner.candidates import origin
from seqpar.partitioner.layout import Layout, LayoutView
from seqpar.partitioner.lengths import Length, product
from seqpar.partitioner.marker import is_marker
from seqpar.partitioner.op import as_length, shape_of
from seqpar.partitioner.relation import Relation
from seqpar.passes.agree import diverging
from seqpar.passes.attend import emit_exchange, emit_local_causal, emit_split
from seqpar.passes.copied_blocks import CopiedBlocks
from seqpar.passes.expressions import ExpressionEmitter
from seqpar.passes.localise import localise, refuse_random
from seqpar.passes.turn import emit_switch, switch_places
from seqpar.runtime.groups import all_reduce
from seqpar.runtime.layout import first_rank, gather, shard
from seqpar.runtime.opaque import run_opaque

aten = torch.ops.aten


class Emitter:
    """Rewrites one graph for one rank. `values[node][layout]` are the emitted nodes that hold a value in a layout."""

    def __init__(self, source: Graph, view: LayoutView, symbols: Mapping[sympy.Symbol, tuple[int, int]], comm_dtype: torch.dtype | None = None) -> None:
        self.source = source
        self.view = view
        self.comm_dtype = comm_dtype
        self.graph = Graph()
        self.sizes = ExpressionEmitter(self.graph, symbols)
        self.values: dict[Node, dict[Layout, Node]] = {}
        self.others: dict[Node, Any] = {}
        self.current: Node | None = None
        self.diverging = diverging(view)

    def run(self) -> Graph:
        copied = CopiedBlocks(self, self.view.inference.repeats)
        for node in self.source.nodes:
            if copied.has(node):
                continue
            self.current = node
            if node.op in ("placeholder", "get_attr"):
                emitted = self.graph.node_copy(node)
                if node.op == "placeholder":
                    self.sizes.add_placeholder(emitted)
                if node in self.view.inference.axes:
                    self.define(node, emitted)
                else:
                    self.others[node] = emitted
            elif node.op == "output":
                self.graph.output(map_arg(node.args[0], self.result))
            elif node.target is operator.getitem and node.args[0] in self.view.inference.axes:
                self.define(node, self.call(operator.getitem, (self.others[node.args[0]], node.args[1])))
            elif node in self.view.inference.relations:
                self.emit_call(node, self.view.inference.relations[node])
            elif not _is_size(node):
                self.others[node] = self.graph.node_copy(node, self.any_value)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        return self.graph

    # -- values --------------------------------------------------------------------------------------
    def define(self, node: Node, emitted: Node) -> None:
        """`emitted` holds the result of `node` in the layout it is produced in."""
        layout = self.view.produced(node)
        self.values[node] = {}
        self.hold(node, layout, emitted)
        if node.op == "call_function":
            emitted.meta["seqpar_value"] = (node.name, layout)

    def hold(self, node: Node, layout: Layout, emitted: Node) -> Node:
        """`emitted` is `node` in `layout` for all readers; `seqpar_layout` says so to people (`readable`)."""
        self.values[node][layout] = emitted
        emitted.meta["seqpar_layout"] = (node.name, layout)
        return emitted

    def whole(self, node: Node) -> Any:
        if node in self.values:
            return self.value(node, tuple(frozenset() for _ in self.view.produced(node)))
        return self.any_value(node)

    def result(self, node: Node) -> Any:
        """An output of the program: whole, with the same bits on every rank."""
        value = self.whole(node)
        if node in self.values and origin(node) in self.diverging:
            return self.call(first_rank, (value,), {"group": "sp"})
        return value

    def any_value(self, node: Node) -> Any:
        """A value outside the tensors with axes: a size (emitted anew from the inputs), a tuple, a constant."""
        if node in self.others:
            return self.others[node]
        if _is_size(node):
            return self.sizes.emit(as_length(node))
        assert node in self.values, f"{node.format_node()} was not emitted"
        return self.whole(node)

    def value(self, node: Node, layout: Layout) -> Node:
        """The value in a layout, resharded if it is not there yet; shared by all readers."""
        known = self.values[node]
        if layout not in known:
            have = next(iter(known))
            # gather first: gathering is what other readers of a wider layout share
            middle = tuple(h & w for h, w in zip(have, layout, strict=True))
            if middle not in known and not any(middle) and (places := switch_places(self, node, have, layout)):
                return self.hold(node, layout, emit_switch(self, node, known[have], have, layout, places))
            if middle not in known:
                self.hold(node, middle, self._gather(node, known[have], have, middle))
            if layout not in known:
                self.hold(node, layout, self._shard(node, known[middle], middle, layout))
        return known[layout]

    def _gather(self, node: Node, x: Node, have: Layout, want: Layout) -> Node:
        for dim, (h, w) in enumerate(zip(have, want, strict=True)):
            if h != w:
                x = self._along(node, x, dim, h, w, lambda y, d, segments: self._gathered(node, y, d, segments))
                have = (*have[:dim], w, *have[dim + 1 :])
        return x

    def _gathered(self, node: Node, x: Node, dim: int, segments: Any) -> Node:
        """One collective; `pack` may join it with others of this dtype."""
        emitted = self.call(gather, (x, dim, segments), {"group": "sp"})
        value = node.meta["val"]
        emitted.meta["seqpar_dtype"] = value.dtype if isinstance(value, torch.Tensor) else value[0].dtype
        return emitted

    def _shard(self, node: Node, x: Node, have: Layout, want: Layout) -> Node:
        for dim, (h, w) in enumerate(zip(have, want, strict=True)):
            if h != w:
                x = self._along(node, x, dim, h, w, lambda y, d, segments: self.call(shard, (y, d, segments), {"rank": self.view.rank}))
        return x

    def _along(self, node: Node, x: Node, dim: int, have: frozenset[int], want: frozenset[int], emit: Any) -> Node:
        """Apply a segment operation to one dim; a factor inside a product is laid open by a view around it."""
        axis = self.view.inference.table.expand_axis(self.view.inference.axes[node][0][dim])
        changed = have ^ want
        places = [i for i, f in enumerate(axis) if changed & set(f)]
        assert len(places) == 1, f"{node}: dim {dim} changes in {len(places)} factors"
        place = places[0]
        segments = self.segments(axis[place], changed, have)
        if len(axis) == 1:
            return emit(x, dim, segments)
        layout_now = tuple(have if d == dim else frozenset() for d in range(len(self.view.inference.axes[node][0])))
        before = product(self.view.factor_length(f, have) for f in axis[:place])
        after = product(self.view.factor_length(f, have) for f in axis[place + 1 :])
        shape = self._current_shape(node, x, layout_now, dim)
        own = self.view.factor_length(axis[place], have)
        opened = self.call(aten.reshape.default, (x, [*shape[:dim], *self.emit_lengths((before, own, after)), *shape[dim + 1 :]]))
        done = emit(opened, dim + 1, segments)
        length = self.view.axis_length(axis, want)
        return self.call(aten.reshape.default, (done, [*shape[:dim], self.sizes.emit(length), *shape[dim + 1 :]]))

    def _current_shape(self, node: Node, x: Node, layout: Layout, dim: int) -> list[Any]:
        """Sizes of all dims but `dim`, as emitted values."""
        produced = self.view.produced(node)
        sizes = []
        for d, axis in enumerate(self.view.inference.axes[node][0]):
            known = layout[d] if d == dim else produced[d]
            sizes.append(self.sizes.emit(self.local_length(node, d, axis, known)))
        return sizes

    # -- calls ---------------------------------------------------------------------------------------
    def call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> Node:
        node = self.graph.call_function(target, args, kwargs or {})
        if self.current is not None:
            for key in ("stack_trace", "nn_module_stack"):
                if key in self.current.meta:
                    node.meta[key] = self.current.meta[key]
            node.meta["seqpar_source"] = self.current.name
        return node

    def exchange(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Node:
        """A call that exchanges what an attention reads or makes, rounded on the way if the user asked for that."""
        return self.call(target, args, kwargs if self.comm_dtype is None else {**kwargs, "comm_dtype": self.comm_dtype})

    def emit_call(self, node: Node, relation: Relation) -> None:
        refuse_random(node)
        if is_marker(node):
            self.alias(node, relation)
            return
        operands = {n: self.value(n, self.view.required(node, relation, i)) for i, n in enumerate(relation.operands)}
        if node.target is run_opaque and not any(self.view.produced(node)):  # it may branch on the last bit: all ranks must branch alike
            operands = {n: self.result(n) for n in relation.operands}
        if node in self.view.labels.exchanged:
            self.define(node, emit_exchange(self, node, relation, operands))
            return
        if node in self.view.labels.split:
            self.define(node, emit_split(self, relation, operands, self.view.required(node, relation, relation.attention.k)[-2]))
            return
        if relation.attention is not None and relation.attention.is_causal and self.view.produced(node)[-2]:
            self.define(node, emit_local_causal(self, node, relation, operands))
            return
        target, args, kwargs = localise(self, node, relation)

        def place(n: Node) -> Any:
            if n.graph is self.graph:  # a size that localising emitted
                return n
            return operands[n] if n in operands else self.any_value(n)

        emitted = self.call(target, map_arg(args, place), map_arg(kwargs, place))
        if not relation.seen:  # works on whole values: what was traced is what comes out
            emitted.meta["val"] = node.meta["val"]
        emitted = self.finish(node, relation, emitted)
        if isinstance(node.meta["val"], torch.Tensor):
            self.define(node, emitted)
        else:
            self.others[node] = emitted

    def alias(self, node: Node, relation: Relation) -> None:
        """A marker is its operand, in the layout it asks for; no node of its own. What is whole before a split stays at hand."""
        operand, layout = relation.operands[0], self.view.required(node, relation, 0)
        assert layout == self.view.produced(node), f"{node}: a marker changes the layout"
        whole = tuple(frozenset[int]() for _ in layout)
        known = self.values[operand]
        self.values[node] = {layout: self.value(operand, layout), **({whole: known[whole]} if whole in known else {})}

    def finish(self, node: Node, relation: Relation, emitted: Node) -> Node:
        """Complete partial results, unless the call did."""
        kind = self.view.reduced(node, relation)
        if kind is None or kind == "within":
            return emitted
        reduced = self.call(all_reduce, (emitted, kind), {"group": "sp"})
        if relation.rewrite is not None and relation.rewrite.kind == "mean":
            dims = [(i, d) for i, d in relation.reduces]
            count = self.sizes.emit(product(self.view.inference.table.axis_length(relation.operand_axes[i][d]) for i, d in dims))
            reduced = self.call(aten.div.Tensor, (reduced, count))
            reduced = self.call(aten._to_copy.default, (reduced,), {"dtype": node.meta["val"].dtype})
        return reduced

    # -- lengths --------------------------------------------------------------------------------------
    def local_length(self, node: Node, dim: int, axis: Any, sharded: frozenset[int], output: int = 0) -> Length:
        """Local length of a dim; of an unsharded dim the traced size, which needs no assumption about its axis."""
        if not sharded:
            value = node.meta["val"]
            return shape_of(value if isinstance(value, torch.Tensor) else value[output])[dim]
        return self.view.axis_length(axis, sharded)

    def local_shape(self, node: Node) -> list[Any]:
        """The emitted sizes of a node's (single) result in the layout it is produced in."""
        axes = self.view.inference.axes[node][0]
        return [self.sizes.emit(self.local_length(node, d, axis, s)) for d, (axis, s) in enumerate(zip(axes, self.view.produced(node), strict=True))]

    def segments(self, factor: Factor, cut: frozenset[int], held: frozenset[int] = frozenset()) -> tuple[Any, ...]:
        """A factor as `runtime.layout.Segments`: parts of the atoms in `cut`; any other is kept, in part if it is in `held`."""
        return tuple(self.emit_lengths(self.view.parts(a)) if a in cut else self.sizes.emit(self.view.atom_length(a, a in held)) for a in factor)

    def emit_lengths(self, lengths: tuple[Length, ...]) -> tuple[Any, ...]:
        return tuple(self.sizes.emit(n) for n in lengths)


def _is_size(node: Node) -> bool:
    """True for a number that follows from sizes of the inputs (not for one read from the content of a tensor)."""
    value = node.meta.get("val")
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int)) and not unbacked_symbols(value)
