"""Attention called by the name of one kernel becomes attention by its usual name.

Before: %f = aten._scaled_dot_product_flash_attention(%q, %k, %v, 0.0, True, scale=0.25); %o = getitem(%f, 0)
After:  %o = aten.scaled_dot_product_attention(%q, %k, %v, None, 0.0, True, scale=0.25, enable_gqa=False)

Before: %f = flash_attn._flash_attn_forward(%q, %k, %v, 0.0, 0.25, False, -1, -1, 0.0, None, False); %o = getitem(%f, 0)      # [B, S, H, D]
After:  %o = transpose(aten.scaled_dot_product_attention(transpose(%q, 1, 2), …), 1, 2)

The same for sequences that lie one after another, [tokens, H, D] (`packed.py`).

Only where nothing but the result is used (no log-sum-exp, no random state), without dropout, and not for a triangle over
unequal lengths, which the kernels align differently, or a boolean mask, which some of them add.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from seqpar.partitioner.op import as_length, bind_arguments
from seqpar.passes.build import Builder
from seqpar.passes.packed import as_one, by_sequence, runs_of, same_sequence
from seqpar.passes.share import copied, with_graph
from seqpar.passes.triangle import evaluate

aten = torch.ops.aten
MASKS: dict[Any, str | None] = {
    aten._scaled_dot_product_flash_attention.default: None,
    aten._scaled_dot_product_flash_attention_for_cpu.default: "attn_mask",
    aten._scaled_dot_product_efficient_attention.default: "attn_bias",
    aten._scaled_dot_product_cudnn_attention.default: "attn_bias",
    aten._scaled_dot_product_fused_attention_overrideable.default: "attn_bias",
    aten._scaled_dot_product_attention_math.default: "attn_mask",
}


# Of other libraries, [batch, length, heads, width] or, with the ends of sequences, [tokens, heads, width]. By name, since nobody may have them; what an argument must be is what
# leaves the kernel plain attention.
ELSEWHERE = ("flash_attn::_flash_attn_forward", "flash_attn::_flash_attn_varlen_forward", "flash_attn_3::_flash_attn_forward", "torch_attn::_varlen_attn")
NAMES = {"query": "q", "key": "k", "value": "v", "is_causal": "causal", "scale": "softmax_scale", "cu_seq_q": "cu_seqlens_q", "cu_seq_k": "cu_seqlens_k"}
PLAIN = {
    "dropout_p": (0.0,), "window_size_left": (-1, None), "window_size_right": (-1, None), "window_size": (None, [-1, -1]), "softcap": (0.0,), "attention_chunk": (0,), "zero_tensors": (False,),
}  # fmt: skip
ENDS = ("cu_seqlens_q", "cu_seqlens_k")
FREE = (
    "q", "k", "v", "softmax_scale", "causal", "return_softmax", "num_splits", "pack_gqa", "enable_gqa", "deterministic", "sm_margin", *ENDS, "max_seqlen_q", "max_seqlen_k", "max_q", "max_k", *PLAIN,
)  # the others must be None  # fmt: skip


def kernels_to_attention(gm: GraphModule) -> GraphModule:
    """A copy of `gm` with `scaled_dot_product_attention` in place of kernels called directly; `gm` itself if there is none."""
    if not any(node.target in MASKS or of_other_library(node) for node in gm.graph.nodes):
        return gm
    graph = copied(gm.graph)
    changed = [rewrite(graph, node) for node in list(graph.nodes) if node.target in MASKS]
    calls = [node for node in graph.nodes if of_other_library(node)]
    known = evaluate(gm, graph, [call[name] for call in map(arguments, calls) for name in ENDS if isinstance(call.get(name), Node)])
    masks: dict[Any, Node] = {}
    changed += [rewrite_flash(graph, node, arguments(node), known, masks) for node in calls]
    if not any(changed):
        return gm
    graph.eliminate_dead_code()
    graph.lint()
    return with_graph(gm, graph)


def of_other_library(node: Node) -> bool:
    return getattr(node.target, "_name", "") in ELSEWHERE


def arguments(node: Node) -> dict[str, Any]:
    """What another library's kernel is called with, by flash-attn's names."""
    return {NAMES.get(name, name): value for name, value in bind_arguments(node).items()}


def used_otherwise(node: Node) -> bool:
    """True if more of a kernel than its result is used."""
    return any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in node.users)


def replace(graph: Graph, node: Node, out: Node) -> bool:
    """`out` in place of the result of a kernel."""
    for user in list(node.users):
        user.replace_all_uses_with(out)
        graph.erase_node(user)
    graph.erase_node(node)
    return True


def rewrite_flash(graph: Graph, node: Node, call: dict[str, Any], known: Mapping[Node, Any], masks: dict[Any, Node]) -> bool:
    """Replace one call of another library; False if it must stay. known: what ends of sequences are, where they are numbers; masks: those made so far, which later layers share."""
    plain = all(call[name] in PLAIN[name] for name in PLAIN if name in call) and all(call[name] is None for name in call if name not in FREE)
    (*_, queries, heads, _), (*_, keys, groups, _) = ([as_length(n) for n in call[x].meta["val"].shape] for x in ("q", "k"))
    if not plain or used_otherwise(node):
        return False
    causal, scale = bool(call.get("causal")), call.get("softmax_scale")
    ends = tuple(call[name] for name in ENDS if call.get(name) is not None)
    runs = runs_of(known.get(ends[0]), known.get(ends[1]), queries, keys) if len(ends) == 2 else None
    alike = all(run.queries == run.keys for run in runs) if runs else ends[0] is ends[1] if ends else queries == keys
    if len(ends) == 1 or (causal and not alike):
        return False
    with graph.inserting_before(node):
        build = Builder(graph, node)

        def attend(*operands: Node, mask: Node | None = None) -> Node:
            """[B, S, H, D], as the library has them."""
            q, k, v = (build.call(aten.transpose.int, x, 1, 2) for x in operands)
            attended = build.call(aten.scaled_dot_product_attention.default, q, k, v, mask, 0.0, causal and mask is None, scale=scale, enable_gqa=heads != groups)
            return build.call(aten.transpose.int, attended, 1, 2)

        q, k, v = (call[x] for x in "qkv")
        if not ends:
            return replace(graph, node, attend(q, k, v))
        if runs:
            return replace(graph, node, by_sequence(build, q, k, v, runs, attend))
        key = (ends, queries, keys, causal)
        if key not in masks:
            masks[key] = same_sequence(build, q, k, ends, causal)
        return replace(graph, node, as_one(build, q, k, v, masks[key], attend))


def rewrite(graph: Graph, node: Node) -> bool:
    """Replace one call; False if it must stay."""
    if used_otherwise(node):
        return False
    call = bind_arguments(node)
    q, k, v = call["query"], call["key"], call["value"]
    mask = call[name] if (name := MASKS[node.target]) else None
    if call["dropout_p"] or call.get("dropout_mask") is not None:
        return False
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        return False
    shapes = [[as_length(n) for n in x.meta["val"].shape] for x in (q, k, v)]
    if call["is_causal"] and (mask is not None or shapes[0][-2] != shapes[1][-2]):
        return False
    grouped = len(shapes[0]) == 4 and shapes[0][1] != shapes[1][1]
    with graph.inserting_before(node):
        build = Builder(graph, node)
        args = (q, k, v, mask, 0.0, call["is_causal"])
        return replace(graph, node, build.call(aten.scaled_dot_product_attention.default, *args, scale=call["scale"], enable_gqa=grouped))
