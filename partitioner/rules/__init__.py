"""All operator rules; importing this package fills the registry."""

from seqpar.partitioner.rules import attention, conv, create, index, marker, matmul, norm, parts, pointwise, reduce, upsample, view

__all__ = ["attention", "conv", "create", "index", "marker", "matmul", "norm", "parts", "pointwise", "reduce", "upsample", "view"]
