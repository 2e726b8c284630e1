"""One all-to-all in which every rank gets parts of the same tensors: packed peer by peer, rounded to `comm_dtype`, the scales in front (`travel.py`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.runtime.groups import Group, rank_of, size_of, start_all_to_all, wait
from seqpar.runtime.travel import SCALE_BYTES, Form
from seqpar.runtime.wire import Block, pack, unpack


@dataclass(frozen=True)
class Incoming:
    """What one peer sends. count: the tensors it sends of; parts: of which of them each part is, and its shape, in the order in which they arrive."""

    count: int
    parts: Sequence[tuple[int, Sequence[int]]]

    def shapes(self, header: int) -> list[Sequence[int]]:
        """Of everything on the wire. Who sends nothing sends no header."""
        return [*([[header]] if header and self.parts else []), *(shape for _, shape in self.parts)]


def start_to_peers(
    tensors: Sequence[Tensor],
    outgoing: Callable[[int, Sequence[Tensor]], Sequence[Block]],
    incoming: Callable[[int], Incoming],
    *,
    group: Group,
    comm_dtype: torch.dtype | None,
) -> Tensor:
    """The 1-D buffer of what all other ranks send, on its way; `finish_from_peers` reads it.

    outgoing(peer, tensors as they travel): what that rank gets of them; incoming(peer): what comes from it. One dtype.
    """
    assert len({x.dtype for x in tensors}) == 1, f"one dtype per exchange, got {[x.dtype for x in tensors]}"
    size, rank, dtype = size_of(group), rank_of(group), tensors[0].dtype
    form = Form.of(dtype, len(tensors), comm_dtype)
    encoded, header = form.encode(tensors)
    blocks: list[Block] = []
    in_sizes, out_sizes = [0] * size, [0] * size
    for peer in (r for r in range(size) if r != rank):  # the own part never travels
        sent = list(outgoing(peer, encoded))
        if header and sent:
            sent.insert(0, (header, 0))
        blocks += sent
        in_sizes[peer] = sum(x.numel() for pieces, _ in sent for x in pieces)
        arriving = incoming(peer)
        out_sizes[peer] = sum(math.prod(shape) for shape in arriving.shapes(Form.of(dtype, arriving.count, comm_dtype).header))
    return start_all_to_all(pack(blocks, encoded[0], dtype=form.wire), out_sizes, in_sizes, group)


def finish_from_peers(
    wire: Tensor, dtype: torch.dtype, incoming: Callable[[int], Incoming], *, group: Group, comm_dtype: torch.dtype | None
) -> dict[int, list[Tensor]]:
    """Wait for what `start_to_peers` began: per other rank its parts, in `dtype` or still in bfloat16 where the copy that follows converts. Views, if they can be."""
    size, rank = size_of(group), rank_of(group)
    arriving = {peer: incoming(peer) for peer in range(size) if peer != rank}
    forms = {peer: Form.of(dtype, one.count, comm_dtype) for peer, one in arriving.items()}
    received = iter(unpack(wait(wire), [shape for peer, one in arriving.items() for shape in one.shapes(forms[peer].header)]))
    found = {}
    for peer, one in arriving.items():
        header = next(received) if forms[peer].header and one.parts else None
        scales = None if header is None else torch.cat([header.narrow(0, SCALE_BYTES * i, SCALE_BYTES) for i, _ in one.parts])
        found[peer] = forms[peer].decode([next(received) for _ in one.parts], scales)
    return found
