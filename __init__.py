"""seqpar: sequence-parallel programs for PyTorch attention models, derived from the model's own code.

    fast = seqpar.sp_compile(model, example_inputs, ulysses=2, ring=2)
    out = fast(**inputs)
"""

import importlib
from typing import TYPE_CHECKING, Any

from seqpar.errors import SeqparError

if TYPE_CHECKING:
    from seqpar.compile import sp_compile
    from seqpar.derive import derive_sp_plan, format_plan
    from seqpar.launching import launch
    from seqpar.passes.config import config
    from seqpar.pipelines import parallelize, unparallelize
    from seqpar.planning import plan
    from seqpar.saving import load, save
    from seqpar.sp_sharding import sp_gather, sp_shard
    from seqpar.suggestion import suggest
    from seqpar.verification import verify

__all__ = [
    "SeqparError",
    "config",
    "derive_sp_plan",
    "format_plan",
    "launch",
    "load",
    "parallelize",
    "plan",
    "save",
    "sp_compile",
    "sp_gather",
    "sp_shard",
    "suggest",
    "unparallelize",
    "verify",
]

# Loaded on first use: torch's compiler reads the entry point of this package even when nobody uses it.
PUBLIC = {
    "config": "seqpar.passes.config",
    "derive_sp_plan": "seqpar.derive",
    "format_plan": "seqpar.derive",
    "launch": "seqpar.launching",
    "load": "seqpar.saving",
    "parallelize": "seqpar.pipelines",
    "plan": "seqpar.planning",
    "save": "seqpar.saving",
    "sp_compile": "seqpar.compile",
    "sp_gather": "seqpar.sp_sharding",
    "sp_shard": "seqpar.sp_sharding",
    "suggest": "seqpar.suggestion",
    "unparallelize": "seqpar.pipelines",
    "verify": "seqpar.verification",
}


def __getattr__(name: str) -> Any:
    if name not in PUBLIC:
        raise AttributeError(f"module 'seqpar' has no attribute {name!r}")
    value = getattr(importlib.import_module(PUBLIC[name]), name)
    globals()[name] = value
    return value
