"""Convolutions of values around which edges are repeated, or zeros put unevenly, as one operator, so that parts of them can take neighbours' rows instead.

Before: %p = aten.replication_pad3d(%x, [1, 1, 1, 1, 2, 0]); %y = aten.conv3d(%p, %w, %b, [1, 1, 1], [0, 0, 0])
After:  %y = seqpar.conv_edges(%x, %w, %b, [1, 1, 1], [1, 1, 1], 1, [1, 1, 1, 1, 2, 0])
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@torch.library.custom_op("seqpar::conv_edges", mutates_args=())
def conv_edges(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], dilation: Sequence[int], groups: int, pads: Sequence[int], zeros: bool = False) -> Tensor:
    """`pads` as in `F.pad(x, pads, mode="replicate")`, or with zeros; the convolution itself pads nothing."""
    return _conv_edges(x, weight, bias, stride, dilation, groups, pads, zeros)


def _conv_edges(x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], dilation: Sequence[int], groups: int, pads: Sequence[int], zeros: bool = False) -> Tensor:
    padded = F.pad(x, list(pads), mode="constant" if zeros else "replicate") if any(pads) else x
    return CONVOLUTIONS[weight.ndim - 2](padded, weight, bias, list(stride), 0, list(dilation), groups)


conv_edges.register_fake(_conv_edges)
CONV_EDGES = torch.ops.seqpar.conv_edges.default
