"""Graph modules whose parameters are the model's own, through the very same dictionaries."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from seqpar.compat import lazy_graph_module


def share_graph(
    model: torch.nn.Module, graph: fx.Graph, extra: Mapping[str, Any], name: str = "SequenceParallelProgram", *, compiled: bool = False
) -> fx.GraphModule:
    """A GraphModule running `graph` whose submodules, parameters and buffers *are* those of `model`.

    The dictionaries themselves are shared, not their entries: `.to()`, `load_state_dict(assign=True)`, a buffer that is
    assigned anew or a merged LoRA is seen by the next call, and `state_dict()` has the model's keys. `fx.GraphModule(root, graph)`
    would copy the entries instead.

    Args:
        model: the module that the targets of `get_attr` nodes are relative to (may itself be a shared GraphModule).
        graph: the program.
        extra: constants and sub-graphs by attribute name. They are plain attributes: not in the state dict.
        compiled: generate its Python code now, as what torch.compile is to read needs it; else at the first call, for most programs never.

    Before: graph with `get_attr[blocks.0.weight]`, `get_attr[_constant_0]`
    After:  gm.blocks is model.blocks, gm._constant_0 is extra["_constant_0"]
    """
    kind = fx.GraphModule if compiled else lazy_graph_module()
    gm = kind(torch.nn.Module(), fx.Graph(), name)
    for shared in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set"):
        gm.__dict__[shared] = model.__dict__[shared]
    gm.__dict__["training"] = model.training
    # Past nn.Module.__setattr__, which would register a sub-graph in the dictionaries just shared with the model.
    gm.__dict__.update(extra)
    gm.__dict__["_seqpar_extra"] = dict(extra)
    gm.graph = graph
    return gm


def with_graph(gm: fx.GraphModule, graph: fx.Graph, extra: Mapping[str, Any] | None = None, *, compiled: bool = False) -> fx.GraphModule:
    """Another program over the same shared parameters and constants; `extra` adds constants."""
    kept = gm.__dict__.get("_seqpar_extra", {})
    return share_graph(gm, graph, {**kept, **(extra or {})}, type(gm).__name__, compiled=compiled)


def copied(graph: fx.Graph, copies: dict[fx.Node, fx.Node] | None = None) -> fx.Graph:
    """The same graph with its own nodes (fake tensors and source lines are shared). copies: filled with node -> its copy."""
    copy = fx.Graph()
    copy.output(copy.graph_copy(graph, {} if copies is None else copies))
    return copy
