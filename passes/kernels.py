"""Attention called by the name of one kernel becomes attention by its usual name.

Before: %f = aten._scaled_dot_product_flash_attention(%q, %k, %v, 0.0, True, scale=0.25); %o = getitem(%f, 0)
After:  %o = aten.scaled_dot_product_attention(%q, %k, %v, None, 0.0, True, scale=0.25, enable_gqa=False)

Before: %f = flash_attn._flash_attn_forward(%q, %k, %v, 0.0, 0.25, False, -1, -1, 0.0, None, False); %o = getitem(%f, 0)      # [B, S, H, D]
After:  %o = transpose(aten.scaled_dot_product_attention(transpose(%q, 1, 2), …), 1, 2)

Only where nothing but the result is used (no log-sum-exp, no random state), without dropout, and not for a triangle over
unequal lengths, which the kernels align differently, or a boolean mask, which some of them add.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from seqpar.partitioner.op import as_length, bind_arguments
from seqpar.passes.build import Builder
from seqpar.passes.share import copied, with_graph

aten = torch.ops.aten
MASKS: dict[Any, str | None] = {
    aten._scaled_dot_product_flash_attention.default: None,
    aten._scaled_dot_product_flash_attention_for_cpu.default: "attn_mask",
    aten._scaled_dot_product_efficient_attention.default: "attn_bias",
    aten._scaled_dot_product_cudnn_attention.default: "attn_bias",
    aten._scaled_dot_product_fused_attention_overrideable.default: "attn_bias",
    aten._scaled_dot_product_attention_math.default: "attn_mask",
}


# Of other libraries, [batch, length, heads, width]. By name, since nobody may have them; what an argument must be is what leaves the kernel plain attention.
ELSEWHERE = ("flash_attn::_flash_attn_forward", "flash_attn_3::_flash_attn_forward")
PLAIN = {"dropout_p": (0.0,), "window_size_left": (-1, None), "window_size_right": (-1, None), "softcap": (0.0,), "attention_chunk": (0,)}
FREE = ("q", "k", "v", "softmax_scale", "causal", "return_softmax", "num_splits", "pack_gqa", "deterministic", "sm_margin", *PLAIN)  # the others must be None


def kernels_to_attention(gm: GraphModule) -> GraphModule:
    """A copy of `gm` with `scaled_dot_product_attention` in place of kernels called directly; `gm` itself if there is none."""
    if not any(node.target in MASKS or of_other_library(node) for node in gm.graph.nodes):
        return gm
    graph = copied(gm.graph)
    changed = [rewrite(graph, node) for node in list(graph.nodes) if node.target in MASKS]
    changed += [rewrite_flash(graph, node) for node in list(graph.nodes) if of_other_library(node)]
    if not any(changed):
        return gm
    graph.eliminate_dead_code()
    graph.lint()
    return with_graph(gm, graph)


def of_other_library(node: Node) -> bool:
    return getattr(node.target, "_name", "") in ELSEWHERE


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


def rewrite_flash(graph: Graph, node: Node) -> bool:
    """Replace one call of another library; False if it must stay."""
    call = bind_arguments(node)
    plain = all(call[name] in PLAIN[name] for name in PLAIN if name in call) and all(call[name] is None for name in call if name not in FREE)
    (_, queries, heads, _), (_, keys, groups, _) = ([as_length(n) for n in call[x].meta["val"].shape] for x in ("q", "k"))
    if not plain or used_otherwise(node) or (call.get("causal") and queries != keys):
        return False
    with graph.inserting_before(node):
        build = Builder(graph, node)
        q, k, v = (build.call(aten.transpose.int, call[x], 1, 2) for x in "qkv")
        attended = build.call(aten.scaled_dot_product_attention.default, q, k, v, None, 0.0, bool(call.get("causal")), scale=call.get("softmax_scale"), enable_gqa=heads != groups)
        return replace(graph, node, build.call(aten.transpose.int, attended, 1, 2))


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
