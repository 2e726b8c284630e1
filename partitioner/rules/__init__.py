"""All operator rules; importing this package fills the registry."""

from seqpar.partitioner.rules import (
    attention,
    conv,
    conv_transpose,
    create,
    index,
    marker,
    matmul,
    norm,
    parts,
    pointwise,
    quantised,
    reduce,
    upsample,
    view,
)

__all__ = ["attention", "conv", "conv_transpose", "create", "index", "marker", "matmul", "norm", "parts", "pointwise", "quantised", "reduce", "upsample", "view"]
