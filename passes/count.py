"""Count what an emitted program does: run it on meta tensors with groups that only count.

FLOPs are those of contractions (linear, matmul, convolution, attention), a multiply-add counted as two. Of causal attention the visible
pairs are counted; around a ring, and of some rows, the kernels that really run, with what they cannot skip. Bytes are those a rank
receives from other ranks, wire padding included.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from seqpar.compat import HigherOrderOperator, TorchDispatchMode, pytree
from seqpar.partitioner.cost import attention_pairs, contraction_flops, is_contraction
from seqpar.partitioner.registry import registry
from seqpar.passes.meta_results import MetaResults
from seqpar.runtime.counting import CountingGroup, Traffic
from seqpar.runtime.head_shares import causal_rows
from seqpar.runtime.opaque import run_opaque
from seqpar.runtime.ring import ring_attention, split_kv_attention
from seqpar.runtime.zigzag import zigzag_attention

aten = torch.ops.aten
SEVERAL_KERNELS = (ring_attention, split_kv_attention, zigzag_attention, causal_rows)


@dataclass
class Counts:
    """flops: per node name; traffic: bytes and calls per kind, received by this rank; received: the same per node that communicates.

    made: bytes of the new storages of a node's results, touched: those of its operands and results; of nodes that make any (a view makes none).
    """

    flops: dict[str, int] = field(default_factory=dict)
    traffic: Traffic = field(default_factory=Traffic)
    received: dict[str, Traffic] = field(default_factory=dict)
    made: dict[str, int] = field(default_factory=dict)
    touched: dict[str, int] = field(default_factory=dict)

    @property
    def total_flops(self) -> int:
        return sum(self.flops.values())


def to_meta(value: Any) -> Any:
    return value.detach().to("meta") if isinstance(value, Tensor) and value.device.type != "meta" else value


class CountInterpreter(fx.Interpreter):
    """Runs one rank's unbound program on meta tensors.

    results: what operators, and seqpar's own functions, gave before; shared by runs of similar programs. Without it those functions
    run every time, so that it can be seen what they do.
    """

    def __init__(self, gm: fx.GraphModule, groups: dict[str, CountingGroup], counts: Counts, results: MetaResults | None = None) -> None:
        super().__init__(gm, garbage_collect_values=True)
        self.groups = groups
        self.counts = counts
        self.own = results
        self.results = MetaResults() if results is None else results
        self.extra_traceback = False

    def fetch_attr(self, target: str) -> Any:
        return to_meta(super().fetch_attr(target))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if "group" in kwargs:
            kwargs = {**kwargs, "group": self.groups[kwargs["group"]]}
        if "device" in kwargs:
            kwargs = {**kwargs, "device": "meta"}
        # Meta kernels do not always return the strides that real kernels do.
        target = aten.reshape.default if target in (aten.view.default, aten._unsafe_view.default) else target
        result: Any
        if target is run_opaque:
            result = tuple(torch.empty(form.shape, dtype=form.dtype, device="meta") for form in args[0].outputs_for(args[2]) if form is not None)
        elif target is torch.ops.higher_order.flex_attention:
            q, v = args[0], args[2]
            rows = q.new_empty(q.shape[:-1], dtype=torch.float32)
            result = (q.new_empty((*q.shape[:-1], v.shape[-1])), rows, rows)  # beside the log-sum-exp the maximum
        elif isinstance(target, HigherOrderOperator):
            result = whole_result(self.current)
        elif target in (aten._local_scalar_dense.default, aten.item.default):
            result = 1.0  # any number: no size follows from it
        elif target in SEVERAL_KERNELS or getattr(target, "__module__", "").startswith("seqpar.runtime."):
            return self.call_own(target, args, kwargs)
        else:
            result = self.call_operator(target, args, kwargs)
        flops = call_flops(target, args, kwargs, result)
        if flops:
            self.counts.flops[self.current.name] = flops
        return result

    def call_operator(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """An operator, even if it reads values and so cannot run without (`istft`), or makes tensors on a device of its own: without a rule it works on whole operands."""
        try:
            return self.results(target, args, kwargs)
        except (NotImplementedError, RuntimeError):
            if registry.find(target) is not None:
                raise
            return whole_result(self.current)

    def call_own(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """One of seqpar's own functions; if it was called like this before, what it did then is noted again."""
        traffic, ran = self.counts.traffic, False

        def run() -> tuple[Any, tuple[int, Traffic]]:
            nonlocal ran
            before, ran = traffic.copy(), True
            with KernelCounter() if target in SEVERAL_KERNELS else nullcontext() as counter:
                result = target(*args, **kwargs)
            return result, (0 if counter is None else counter.flops, traffic.since(before))

        result, (flops, received) = run() if self.own is None else self.own.noted(target, args, kwargs, run)
        if not ran:
            traffic.include(received)
        if target in SEVERAL_KERNELS:
            self.counts.flops[self.current.name] = flops
        return result

    def run_node(self, n: fx.Node) -> Any:
        self.current = n
        before = self.counts.traffic.copy() if "group" in n.kwargs else None
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        result = getattr(self, n.op)(n.target, args, kwargs)
        if before is not None:
            self.counts.received[n.name] = self.counts.traffic.since(before)
        if n.op == "call_function":
            self._note_bytes(n, result)
        return result

    def _note_bytes(self, n: fx.Node, result: Any) -> None:
        read, made = [t for i in n.all_input_nodes for t in _tensors(self.env[i])], _tensors(result)
        known = {t.untyped_storage()._cdata for t in read}
        new = {storage._cdata: storage.nbytes() for storage in (t.untyped_storage() for t in made) if storage._cdata not in known}
        if new:
            self.counts.made[n.name] = sum(new.values())
            self.counts.touched[n.name] = sum(t.numel() * t.element_size() for t in (*read, *made))


def _tensors(value: Any) -> Sequence[Tensor]:
    return (value,) if isinstance(value, Tensor) else [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def whole_result(node: fx.Node) -> Any:
    """Meta tensors in place of the result of an operator that carries a program of its own; it always works on whole values."""
    return pytree.tree_map(lambda v: torch.empty([int(s) for s in v.shape], dtype=v.dtype, device="meta") if isinstance(v, Tensor) else v, node.meta["val"])


def call_flops(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Operations of one executed call."""
    if target is run_opaque:
        return int(args[0].flops_for(args[2]))
    if not is_contraction(target):
        return 0
    result = result[0] if isinstance(result, tuple) else result
    if not isinstance(result, Tensor):
        return 0
    shapes = [tuple(a.shape) for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    return contraction_flops(target, args, kwargs, shapes, tuple(result.shape)) if shapes else 0


class KernelCounter(TorchDispatchMode):
    """Counts the attention kernels (and products) that run on meta tensors inside a call: what a ring really computes."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is aten._scaled_dot_product_flash_attention.default:
            q, k, v = args[:3]
            pairs = attention_pairs(q.shape[2], k.shape[2], len(args) > 4 and args[4])
            self.flops += 2 * q.shape[0] * q.shape[1] * pairs * (q.shape[3] + v.shape[3])
        elif isinstance(result, Tensor):
            self.flops += contraction_flops(func, args, kwargs or {}, [tuple(a.shape) for a in args if isinstance(a, Tensor)], tuple(result.shape))
        return result


def count(gm: fx.GraphModule, example: Sequence[Tensor], *, ulysses: int, ring: int, rank: int, results: MetaResults | None = None) -> Counts:
    """FLOPs and received bytes of the program of `rank` on (meta copies of) full example inputs; `results` is for programs counted one after another."""
    counts = Counts()
    with torch.no_grad():
        CountInterpreter(gm, counting_groups(ulysses, ring, rank, counts.traffic), counts, results).run(*[to_meta(x) for x in example])
    return counts


def counting_groups(ulysses: int, ring: int, rank: int, traffic: Traffic) -> dict[str, CountingGroup]:
    """Axis name -> a group that only counts, as `rank` sees it."""
    ring_rank, ulysses_rank = divmod(rank, ulysses)
    return {
        "ulysses": CountingGroup(ulysses, ulysses_rank, traffic),
        "ring": CountingGroup(ring, ring_rank, traffic),
        "sp": CountingGroup(ulysses * ring, rank, traffic),
    }
