"""Operators without a rule that PyTorch writes in terms of others become those, where all of them have one; so do operators of other libraries that are written in Python.

Before: %y = aten.concatenate(%a, %b, 1);  %c = aten.cosine_similarity(%q, %k, -1)
After:  %y = aten.cat(%a, %b, 1);          %n = aten.linalg_vector_norm(%q, …); …

Before: %y = quanto.qbytes_mm(%x, %w, %s)
After:  %m = aten.mul(%s, %w);  %y = aten.mm(%x, aten.t(%m))

What they become is what runs in eager mode, too: the results have the same bits.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from types import FrameType
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from seqpar.compat import OpOverload, contentless, python_kernel, pytree
from seqpar.partitioner.op import as_length
from seqpar.partitioner.registry import registry
from seqpar.passes.build import ORIGIN
from seqpar.passes.kernels import MASKS
from seqpar.passes.share import copied, with_graph
from seqpar.passes.state_digest import is_elsewhere
from seqpar.passes.warm import CONTAINERS, caches_in, put_back, remember

OWN = ("aten", "prims", "seqpar")
MANY = 32  # parts: a recurrent network is written out step by step
MANY_IN_PYTHON = 1_000
DEPTH = 4
SIZES = (operator.getitem, torch.ops.aten.sym_size.int, operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.neg)


def composites_apart(gm: GraphModule) -> GraphModule:
    """A copy of `gm` in which such operators are replaced by their parts; `gm` itself if it has none."""
    known = _Composites()
    if not any(known.has(node) for node in gm.graph.nodes):
        return gm
    graph, changed = copied(gm.graph), False
    todo = list(graph.nodes)
    for _ in range(DEPTH):  # one may call another
        inner: list[Node] = []
        for node in todo:
            parts = known.parts(node) if known.has(node) else None
            if parts is not None:
                inner += _inline(graph, node, parts)
                changed = True
        todo = inner
    return with_graph(gm, graph) if changed else gm


class _Composites:
    """What operators are made of. Equal calls of one, as equal layers make them, are opened once."""

    def __init__(self) -> None:
        self.kernels: dict[tuple[OpOverload, str], torch._C.DispatchKey | None] = {}
        self.opened: dict[Any, Graph | None] = {}

    def has(self, node: Node) -> bool:
        """Whether a node calls an operator that may be taken apart."""
        if node.op != "call_function" or not isinstance(node.target, OpOverload) or node.target in SIZES or registry.find(node.target) is not None:
            return False
        return node.target._can_decompose() or self._kernel(node) is not None

    def parts(self, node: Node) -> Graph | None:
        """What the operator does, as a graph of the nodes among its arguments; None if there are many parts, or one without a rule."""
        key = _call(node)
        if key not in self.opened:
            self.opened[key] = self._parts(node)
        return self.opened[key]

    def _kernel(self, node: Node) -> torch._C.DispatchKey | None:
        """The key of the kernel that runs an operator of another library on the device of its arguments, if that kernel is a Python function."""
        devices = [leaf.meta["val"].device.type for leaf in node.all_input_nodes if isinstance(leaf.meta.get("val"), torch.Tensor)]
        operator: OpOverload = node.target  # type: ignore[assignment]
        if not devices or operator.namespace in OWN or len(node.meta.get("autocast", ())) > 1:
            return None
        key = (operator, devices[0])
        if key not in self.kernels:
            self.kernels[key] = python_kernel(*key)
        return self.kernels[key]

    def _parts(self, node: Node) -> Graph | None:
        kernel = None if node.target._can_decompose() else self._kernel(node)  # type: ignore[union-attr]
        try:
            graph = _opened(node, kernel)
            if kernel is not None and _text(graph) != _text(_opened(node, kernel)):  # it remembers something from call to call
                return None
        except Exception:  # it has many parts, or needs values: it stays whole
            return None
        made, expected = ([_form(v) for v in pytree.tree_leaves(value)] for value in (pytree.tree_map(_value, graph.output_node().args[0]), node.meta["val"]))
        if made != expected:  # a kernel that does not do what its fake says
            return None
        calls = [part for part in graph.nodes if part.op not in ("placeholder", "output")]
        return graph if all(part.op == "call_function" and (part.target in SIZES or part.target in MASKS or self.has(part) or registry.find(part.target) is not None) for part in calls) else None


def _call(node: Node) -> Any:
    """Equal for calls that have the same parts."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    order = {other: number for number, other in enumerate(dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, Node)))}
    said = tuple((order[leaf], _seen(leaf.meta["val"])) if isinstance(leaf, Node) else (type(leaf), str(leaf)) for leaf in leaves)
    return node.target, str(spec), said, tuple(map(_form, pytree.tree_leaves(node.meta["val"]))), node.meta.get("autocast", ())


def _seen(value: Any) -> Any:
    """What code can ask a traced value."""
    if not isinstance(value, torch.Tensor):
        return str(value)
    return _form(value), tuple(map(as_length, value.stride())), as_length(value.storage_offset()), str(value.device), value.is_conj(), value.is_neg(), value.requires_grad


def _opened(node: Node, kernel: torch._C.DispatchKey | None) -> Graph:
    """What runs in an operator, or in its kernel. Raises whatever that raises."""
    leaves, spec = pytree.tree_flatten((node.args, node.kwargs))
    values = [leaf.meta["val"] for leaf in leaves if isinstance(leaf, Node)]  # tensors, and sizes
    inside = _Inside(MANY if kernel is None else MANY_IN_PYTHON)

    def call(*values: Any) -> Any:
        given = iter(values)
        args, kwargs = pytree.tree_unflatten([next(given) if isinstance(leaf, Node) else leaf for leaf in leaves], spec)
        with inside:
            return node.target(*args, **kwargs) if kernel is None else node.target.redispatch(torch._C.DispatchKeySet(kernel), *args, **kwargs)  # type: ignore[operator, union-attr]

    try:
        cast = next(iter(node.meta.get("autocast", ())), None)  # the kernel ran so in the model
        region = nullcontext() if cast is None else torch.autocast(next(value.device.type for value in values if isinstance(value, torch.Tensor)), cast, cache_enabled=False)
        with torch.no_grad(), contentless(values), region:
            return make_fx(call)(*values).graph
    finally:
        put_back(inside.saved, inside.caches)


def _text(graph: Graph) -> list[str]:
    return [f"{part.name} {part.target} {part.args} {part.kwargs}" for part in graph.nodes]


def _value(node: Any) -> Any:
    return node.meta["val"] if isinstance(node, Node) else node


def _form(value: Any) -> Any:
    return (value.dtype, *map(as_length, value.shape)) if isinstance(value, torch.Tensor) else type(value)


class _Inside(TorchDispatchMode):
    """Raises when more than so many operators are called. Notes what the files of the functions that call them hold, for a kernel may keep a table there: saved, caches, as `put_back` wants them."""

    def __init__(self, left: int) -> None:
        super().__init__()
        self.left = left
        self.saved: list[tuple[Any, Any]] = []
        self.caches: list[tuple[Any, int]] = []
        self.seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals is not globals():  # no tensor is made before an operator is called
            self.note(frame.f_globals)
            frame = frame.f_back
        self.left -= 1
        if self.left < 0:
            raise RuntimeError("many parts")
        return function(*args, **(kwargs or {}))

    def note(self, variables: dict[str, Any]) -> None:
        if id(variables) not in self.seen and not is_elsewhere(str(variables.get("__name__"))):
            self.caches += caches_in(variables.values())
            for value in variables.values():
                remember(value, self.saved, self.seen, depth=2) if type(value) in CONTAINERS else None
            self.seen.add(id(variables))
            self.saved.append((variables, dict(variables)))


def _inline(graph: Graph, node: Node, parts: Graph) -> list[Node]:
    """Put the parts in place of the node; returns them."""
    nodes: Sequence[Node] = [leaf for leaf in pytree.tree_leaves((node.args, node.kwargs)) if isinstance(leaf, Node)]
    copies: dict[Node, Node] = dict(zip(parts.find_nodes(op="placeholder"), nodes, strict=True))
    with graph.inserting_before(node):
        results = graph.graph_copy(parts, copies)
    for part, copy in copies.items():
        if part.op == "call_function":
            copy.meta = {**{key: value for key, value in node.meta.items() if key in ORIGIN}, "val": part.meta["val"]}
    if isinstance(results, Node):
        node.replace_all_uses_with(results)
    else:
        for user in list(node.users):
            user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index, arg-type]
            graph.erase_node(user)
    graph.erase_node(node)
    return [copies[part] for part in parts.nodes if part.op == "call_function"]
