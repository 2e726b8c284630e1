"""How the floating-point tensors of an exchange travel: as they are, rounded to bfloat16, or as float8 with one scale per tensor.

Float8 with a scale per tensor, its largest magnitude put at the largest number of the format, is the scaling of "FP8 Formats for Deep Learning"
(Micikevicius et al. 2022, arXiv:2209.05433, section 3.2). A sender scales its tensor as a whole, so all receivers of a position get the same
bits; the scales (float32) go in front of what every peer gets, in the same collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from seqpar.errors import UnsupportedError

FLOAT8 = torch.float8_e4m3fn
COMM_DTYPES = (torch.bfloat16, FLOAT8)
SCALE_BYTES = 4
LARGEST = 448.0  # of float8_e4m3fn
SMALLEST = 1e-30  # scale: what is all zero stays zero


def check_comm_dtype(comm_dtype: torch.dtype | None) -> None:
    """Raise UnsupportedError unless exchanges can travel so."""
    if comm_dtype not in (None, *COMM_DTYPES):
        raise UnsupportedError(f"comm_dtype must be None or one of {', '.join(map(str, COMM_DTYPES))}, not {comm_dtype!r}")


@dataclass(frozen=True)
class Form:
    """How `count` tensors of `dtype` travel: `wire` is the dtype of the buffer, `header` how many elements of it come before each peer's parts."""

    dtype: torch.dtype
    wire: torch.dtype
    header: int

    @staticmethod
    def of(dtype: torch.dtype, count: int, comm_dtype: torch.dtype | None) -> Form:
        """Only floating point that becomes narrower is converted: integers, bool and what is as narrow already travel as they are."""
        if comm_dtype is None or not dtype.is_floating_point or dtype.itemsize <= comm_dtype.itemsize:
            return Form(dtype, dtype, 0)
        return Form(dtype, torch.uint8, SCALE_BYTES * count) if comm_dtype == FLOAT8 else Form(dtype, comm_dtype, 0)

    def encode(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """(what is sent of each tensor, the header: a list of none or one). Packing converts to bfloat16."""
        if not self.header:
            return list(tensors), []
        scales = [scale_of(x) for x in tensors]
        return [(x / s).to(FLOAT8).view(torch.uint8) for x, s in zip(tensors, scales, strict=True)], [torch.stack(scales).view(torch.uint8)]

    def decode(self, parts: Sequence[Tensor], header: Tensor | None) -> list[Tensor]:
        """The tensors of one peer, in `dtype`, or still in bfloat16 where the copy that follows converts."""
        if header is None:
            return list(parts)
        scales = header.clone().view(torch.float32)  # the copy is aligned
        return [(part.view(FLOAT8).to(torch.float32) * scales[i]).to(self.dtype) for i, part in enumerate(parts)]

    def rounded(self, x: Tensor) -> Tensor:
        """What others receive of `x`, in `dtype`."""
        if self.wire == self.dtype:
            return x
        if not self.header:
            return x.to(self.wire).to(self.dtype)
        (sent,), (header,) = self.encode([x])
        return self.decode([sent], header)[0]


def scale_of(x: Tensor) -> Tensor:
    """The scale of one tensor, a float32 number; an empty tensor has one, too."""
    if x.numel() == 0:
        return x.new_ones((), dtype=torch.float32)
    low, high = torch.aminmax(x)
    return (torch.maximum(-low, high).to(torch.float32) / LARGEST).clamp_min(SMALLEST)
