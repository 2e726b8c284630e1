"""Convolutions, pools and enlargements by hand: lengths from 32 on are long enough to be products that a stride divides (`partitioner/shortened.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from seqpar.partitioner.edges import CONV_EDGES

if TYPE_CHECKING:
    from seqpar.tools.rule_hand_samples import Maker

aten = torch.ops.aten
Row = tuple[Any, ...]


def convolutions(m: Maker) -> list[Row]:
    x, grid, square = m.f(4, 3, 12), m.f(2, 3, 7, 12), m.f(4, 4, 1)
    return [
        (aten.conv1d.default, (x, m.f(5, 3, 1), m.f(5))),
        (aten.conv1d.default, (x, m.f(5, 3, 5), None, [1], [4], [2])),
        *((aten.conv1d.default, operands) for operands in ((m.f(3, 7), m.f(5, 3, 1)), (square, square))),
        (aten.conv1d.default, (m.f(3, 17), m.f(5, 3, 2), None, [3], [2], [3])),
        (aten.conv2d.default, (m.f(2, 3, 11, 12), m.f(4, 3, 3, 2), None, [2, 1], [4, 0])),
        (aten.conv2d.default, (grid, m.f(4, 3, 1, 3), None, [1, 1], [0, 1])),
        (aten.conv2d.default, (m.f(2, 4, 7, 12), m.f(4, 1, 1, 1), None, [1, 1], [0, 0], [1, 1], 4)),
        (aten.conv2d.padding, (grid, m.f(4, 3, 1, 1), None, [1, 1], "valid")),
        (aten.conv3d.default, (m.f(1, 2, 4, 4, 7), m.f(3, 2, 1, 1, 1))),
        (aten.conv_transpose1d.default, (x, m.f(3, 5, 2))),
        (aten.conv1d.padding, (x, m.f(5, 3, 1), None, [1], "same")),
        (aten.conv_transpose2d.input, (grid, m.f(3, 5, 2, 2))),
        (aten.conv_transpose3d.input, (m.f(4, 2, 3, 3, 3), m.f(2, 3, 2, 2, 2))),
        *((getattr(aten, f"{name}_pool{n}d").default, (m.f(2, 3, *[34, 6, 4][:n]), [2] * n)) for n in (1, 2, 3) for name in ("avg", "max")),
        *((target, (m.f(4, 34, 6), [2, 3], [2, 2], [0, 1])) for target in (aten.avg_pool2d.default, aten.max_pool2d.default)),
        (aten.reflection_pad1d.default, (m.f(7, 4, 5), [2, 1])),
        (aten.reflection_pad2d.default, (m.f(7, 4, 5, 5), [2, 1, 1, 1])),
        *((target, (m.f(7, 4, 3, 3, 3), [1] * 6)) for target in (aten.reflection_pad3d.default, aten.replication_pad3d.default)),
        (CONV_EDGES, (m.f(2, 3, 12, 7), m.f(4, 3, 3, 2), None, [1, 1], [2, 1], 1, [1, 0, 3, 1])),
        (aten.upsample_bilinear2d.vec, (m.f(7, 4, 3, 3), [5, 6], False, None)),
        *((getattr(aten, f"{name}{n}d").vec, (m.f(7, 4, *[17, 3, 2][:n]), None, [2.0, 3.0, 1.0][:n])) for n in (1, 2, 3) for name in ("upsample_nearest", "_upsample_nearest_exact")),
        (aten.upsample_nearest2d.vec, (m.f(7, 4, 18, 3), [36, 4], None)),
        *strided(m),
        *transposed(m),
    ]


def strided(m: Maker) -> list[Row]:
    """Odd lengths, and parts shorter than what a wide kernel reads around them, among those that can be divided."""
    return [
        (aten.conv1d.default, (m.f(2, 3, 34), m.f(4, 3, 3), m.f(4), [2], [1])),
        (aten.conv1d.default, (m.f(4, 36), m.f(6, 2, 4), None, [2], [3], [2], 2)),
        (aten.conv1d.default, (m.f(1, 3, 68), m.f(4, 3, 7), None, [4], [3])),
        *((aten.conv1d.default, (m.f(1, 3, 35), m.f(4, 3, 3), None, [2], [padding])) for padding in (0, 1)),
        (aten.conv1d.default, (m.f(1, 3, 32), m.f(4, 3, 3), None, [2], [12], [12])),
        (aten.conv2d.default, (m.f(2, 3, 34, 6), m.f(4, 3, 2, 2), None, [2, 2])),
        (aten.conv2d.default, (m.f(2, 4, 51, 6), m.f(4, 1, 5, 3), None, [3, 2], [1, 1], [1, 1], 4)),
        (aten.conv3d.default, (m.f(1, 2, 3, 34, 4), m.f(3, 2, 3, 3, 3), None, [2, 2, 1], [1, 1, 1])),
        *((CONV_EDGES, (m.f(2, 2, 34, 5), m.f(4, 2, 3, 3), m.f(4), [2, 2], [1, 1], 1, *pads)) for pads in (([0, 1, 0, 1], True), ([1, 1, 2, 0],), ([1, 1, 0, 0],))),
    ]


def transposed(m: Maker) -> list[Row]:
    """Lengths that the stride multiplies, and one that it does not: kernels as wide as the stride, wider, narrower, with holes."""
    settings = (([2], [0], [0], 2), ([3], [1], [0], 5), ([2], [1], [1], 3), ([4], [2], [0], 8), ([3], [0], [2], 1), ([1], [2], [0], 5), ([2], [0], [0], 3))
    return [
        *((aten.conv_transpose1d.default, (m.f(1, 3, 17), m.f(3, 2, kernel), m.f(2), stride, padding, extra)) for stride, padding, extra, kernel in settings),
        (aten.conv_transpose1d.default, (m.f(4, 19), m.f(4, 1, 3), None, [2], [2], [1], 2, [2])),
        (aten.conv_transpose2d.input, (m.f(2, 3, 17, 5), m.f(3, 2, 4, 2), m.f(2), [2, 2], [1, 0])),
        (aten.conv_transpose3d.input, (m.f(1, 2, 3, 17, 4), m.f(2, 3, 3, 3, 3), None, [1, 2, 1], [1, 1, 1], [0, 1, 0])),
    ]
