"""Sizes that are read from tensors: of a model on the meta device known where it makes those of numbers, else refused.

Before: lengths = torch.tensor([len(x) for x in samples]); x[:, : int(lengths.max())]       a size that nobody knows
After:  the model was run once on meta tensors, and said 65
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from seqpar.compat import unbacked_symbols
from seqpar.errors import TraceError
from seqpar.passes.arguments import Call
from seqpar.passes.replay import Record, Recorder, example
from seqpar.passes.warm import restored

if TYPE_CHECKING:
    from seqpar.passes.trace import Traced


def of_unknown_size(traced: Traced) -> fx.Node | None:
    """The first tensor whose size is read from another, whose content is not fixed."""
    for node in traced.gm.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and any(unbacked_symbols(size) for size in value.shape):
            return node
    return None


def check_sizes_known(traced: Traced) -> None:
    """Raise TraceError if there is one: it cannot be divided in advance."""
    node = of_unknown_size(traced)
    if node is not None:
        frames = [line.strip() for line in node.meta.get("stack_trace", "").strip().splitlines()]
        empty = any(isinstance(leaf, torch.Tensor) and leaf.is_meta for leaf in traced.call.leaves)
        raise TraceError(
            f"the size of a tensor depends on data that changes with every call, so it cannot be divided over ranks\n"
            f"  operator: {node.target}\n  where:    {' '.join(frames[-2:]) or 'unknown'}\n"
            "  try:      a mask instead of a selection, so that sizes stay the same" + (", or real tensors: on the meta device none has a content to read" if empty else "")
        )


def on_meta(model: nn.Module, call: Call) -> bool:
    """Whether any tensor has no content."""
    tensors = (*model.parameters(), *model.buffers(), *(leaf for leaf in call.leaves if isinstance(leaf, torch.Tensor)))
    return any(tensor.is_meta for tensor in tensors)


def with_constants_read(model: nn.Module, call: Call, trace: Callable[[tuple[Record, ...]], Traced]) -> Traced:
    """`trace` without anything that was read; if that fails, or leaves a size unknown, with what the model reads, provided that all of it has content."""
    refused: TraceError | None = None
    try:
        traced = trace(())
        if of_unknown_size(traced) is None:
            return traced
    except TraceError as error:
        refused = error
    records = read_on_meta(model, call)
    if records:
        return trace(records)
    if refused is not None:
        raise refused
    return traced


def read_on_meta(model: nn.Module, call: Call) -> tuple[Record, ...]:
    """The reads of an eager run, which leaves the model as it was; none if it fails, as where it reads a tensor without content."""
    reader = Recorder(model)
    args, kwargs = example(call)
    try:
        with restored(model), torch.inference_mode(False), torch.no_grad(), reader:
            model(*args, **kwargs)
    except Exception:  # the tracer has said more about it
        return ()
    return tuple(reader.records)
