"""From a model's Python code to a functional ATen program.

Before: FlatModel and its tensors
After:  the ExportedProgram that `torch.export.export(...).run_decompositions({})` makes, in about half of the time

torch.export runs the model once, before autograd is dispatched, and `run_decompositions` runs what came out through AOTAutograd, which
runs it twice, with code generated for the graph in between a dozen times. Running AOTAutograd on the model itself gives the same
graph. What only torch.export understands (buffers that are assigned, tables that a run leaves where the next finds them) takes
the long way, and so does whatever fails: its errors are those that torch documents.
"""

import contextlib
import io
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

from seqpar.compat import FakeTensor, aot_export
from seqpar.passes.flat_model import FlatModel
from seqpar.passes.stamp import GaveUp, Stamper

log = logging.getLogger("seqpar.trace")
ATTEMPTS = 3  # traces, each with fewer blocks that are copied


def export_functional(flat: FlatModel, leaves: Sequence[torch.Tensor], dims: Any) -> ExportedProgram:
    """The program of `flat(leaves)`; dims: `dynamic_shapes` of torch.export for its one argument."""
    program = in_one_trace(flat, leaves, dims)
    if program is None:
        with contextlib.redirect_stderr(io.StringIO()):  # it prints the graph of a failed attempt
            program = torch.export.export(flat, (tuple(leaves),), dynamic_shapes=dims, strict=False).run_decompositions({})
    return program


def in_one_trace(flat: FlatModel, leaves: Sequence[torch.Tensor], dims: Any, *, stamp: bool = True) -> ExportedProgram | None:
    """The same by AOTAutograd alone, or None where it cannot be had. stamp: copy what blocks that are alike do, instead of running them all."""
    program = reason = None
    flat.repeatable = True
    try:
        if stamp and not flat.opaque.calls and not flat.parts.weights:
            program = stamped(flat, leaves, dims)
        if program is None:
            program = aot_export(flat, (tuple(leaves),), dims)
            reason = unsound(program)
    except Exception as error:  # whatever it is, torch.export decides
        log.debug("traced by torch.export, since AOTAutograd failed: %s: %s", type(error).__name__, error)
        return None
    finally:
        flat.repeatable = False
    if reason is not None:
        log.debug("traced by torch.export, since the other graph has %s", reason)
        return None
    return program


def stamped(flat: FlatModel, leaves: Sequence[torch.Tensor], dims: Any) -> ExportedProgram | None:
    """The program of a model some of whose blocks are alike, or None where all must run."""
    stamper = Stamper(flat.model, lambda: flat.replayer.position, FlatModel.forward.__code__)
    flat.stamper = stamper
    try:
        for _ in range(ATTEMPTS if stamper.blocks else 0):
            try:
                program = aot_export(flat, (tuple(leaves),), dims)
            except GaveUp as reason:
                log.debug("traced anew, with blocks that run as usual: %s", reason)
                stamper.exclude(reason.kind)
                if not stamper.blocks:
                    break
            else:
                return program if unsound(program) is None else None
    except Exception as error:  # it may be due to copying
        log.debug("traced anew, since a trace with copied blocks failed: %s: %s", type(error).__name__, error)
    finally:
        flat.stamper = None
    return None


def unsound(program: ExportedProgram) -> str | None:
    """Why the graph may not be the model's, or None: a value of an earlier run taken for a constant, a write that was not made functional."""
    stale = [name for name, value in program.constants.items() if isinstance(value, FakeTensor)]
    if stale:
        return f"a constant from another run ({stale[0]})"
    for gm in program.graph_module.modules():
        for node in gm.graph.nodes if isinstance(gm, torch.fx.GraphModule) else ():
            if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
                return f"an operator that writes ({node.target})"
    return None
