"""Attention called by the name of one kernel becomes attention by its usual name.

Before: %f = aten._scaled_dot_product_flash_attention(%q, %k, %v, 0.0, True, scale=0.25); %o = getitem(%f, 0)
After:  %o = aten.scaled_dot_product_attention(%q, %k, %v, None, 0.0, True, scale=0.25, enable_gqa=False)

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


def kernels_to_attention(gm: GraphModule) -> GraphModule:
    """A copy of `gm` with `scaled_dot_product_attention` in place of kernels called directly; `gm` itself if there is none."""
    if not any(node.target in MASKS for node in gm.graph.nodes):
        return gm
    graph = copied(gm.graph)
    changed = [rewrite(graph, node) for node in list(graph.nodes) if node.target in MASKS]
    if not any(changed):
        return gm
    graph.eliminate_dead_code()
    graph.lint()
    return with_graph(gm, graph)


def rewrite(graph: Graph, node: Node) -> bool:
    """Replace one call; False if it must stay."""
    if any(user.target is not operator.getitem or (user.args[1] != 0 and user.users) for user in node.users):
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
        out = build.call(aten.scaled_dot_product_attention.default, *args, scale=call["scale"], enable_gqa=grouped)
    for user in list(node.users):
        user.replace_all_uses_with(out)
        graph.erase_node(user)
    graph.erase_node(node)
    return True
