"""Traces with and without copies of what alike blocks do, compared in everything that they say."""

import copy
import functools
import re

import torch
from torch import fx

from seqpar.passes import export
from seqpar.passes.region import Region
from seqpar.passes.trace import trace


def lines(traced):
    """Everything that a graph says."""
    text = []
    for node in traced.gm.graph.nodes:
        value = fx.node.map_aggregate(node.meta.get("val"), lambda v: f"{tuple(v.shape)} {v.stride()} {v.dtype} {v.device}" if isinstance(v, torch.Tensor) else str(v))
        rest = {key: re.sub(r"eval_with_key>.\d+", "", str(entry)) for key, entry in node.meta.items() if key != "val"}
        text.append(f"{node.op} {node.name} {node.target} {node.args} {node.kwargs} {value} {rest}")
    return text


class Both:
    """Compares the traces with and without copies; returns how many calls were copied."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def __call__(self, model, args, kwargs=None, **settings):
        copies = []
        aot_export, usual, copied = export.aot_export, export.in_one_trace, Region.copy
        with self.monkeypatch.context() as patch:
            # Of the last trace, where one was given up.
            patch.setattr(export, "aot_export", lambda *given: copies.clear() or aot_export(*given))
            patch.setattr(Region, "copy", lambda region, *given: copies.append(region) or copied(region, *given))
            stamped = trace(copy.deepcopy(model), args, kwargs or {}, **settings)
        made = len(copies)
        with self.monkeypatch.context() as patch:
            patch.setattr(export, "in_one_trace", functools.partial(usual, stamp=False))
            full = trace(model, args, kwargs or {}, **settings)
        assert len(copies) == made and lines(stamped) == lines(full)
        assert (stamped.symbols, stamped.mutations, stamped.states, stamped.out_spec) == (full.symbols, full.mutations, full.states, full.out_spec)
        assert stamped.constants.keys() == full.constants.keys() and [read.function for read in stamped.reads] == [read.function for read in full.reads]
        if stamped.shape_env is not None:
            assert [str(guard.expr) for guard in stamped.shape_env.guards] == [str(guard.expr) for guard in full.shape_env.guards]
        return made

