"""The functions a saved program may call, by name: operators of ATen without side effects, seqpar's runtime, arithmetic on sizes.

Before: <OpOverload aten.add.Tensor>, <function gather>, <built-in function getitem>
After:  "aten.add.Tensor", "runtime.gather", "operator.getitem"
"""

from __future__ import annotations

import math
import operator
from typing import Any

import torch

from seqpar.errors import SavedProgramError
from seqpar.runtime import attention, groups, halo, head_shares, layout, opaque, ring, statistics, strided, switch, ulysses, zigzag

NAMESPACES = ("aten", "prims", "seqpar")
RUNTIME = (
    attention.causal_mask, attention.select_heads, groups.all_reduce, halo.halo, halo.window, head_shares.causal_rows, head_shares.pieces_to_seq, head_shares.seq_to_pieces, layout.first_rank, layout.gather, layout.gather_many, layout.shard,
    opaque.run_opaque,
    ring.ring_attention, ring.split_kv_attention, statistics.deviation, statistics.deviation_and_mean, statistics.euclidean_norm, statistics.group_norm,
    statistics.variance, statistics.variance_and_mean, strided.as_complex, strided.read_row, strided.write_row, strided.write_slices, switch.switch, ulysses.heads_to_seq, ulysses.seq_to_heads,
    zigzag.zigzag_attention,
    layout.start_gather, layout.finish_gather, layout.start_gather_many, layout.finish_gather_many, layout.start_first_rank, layout.finish_first_rank, switch.start_switch, switch.finish_switch,
    ulysses.start_seq_to_heads, ulysses.finish_seq_to_heads, ulysses.start_heads_to_seq, ulysses.finish_heads_to_seq,
    head_shares.start_pieces_to_seq, head_shares.finish_pieces_to_seq, head_shares.start_seq_to_pieces, head_shares.finish_seq_to_pieces,
)  # fmt: skip
ARITHMETIC = ("getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "eq", "ne", "lt", "le", "gt", "ge", "and_", "or_", "not_")
SIZES = ("sym_float", "sym_int", "sym_ite", "sym_max", "sym_min", "sym_not", "sym_sum", "_sym_sqrt")
SIZE_OPERATORS = ("aten::sym_size", "aten::sym_numel", "aten::sym_stride", "aten::sym_storage_offset")
FUNCTIONS: dict[str, Any] = {
    **{f"runtime.{function.__name__}": function for function in RUNTIME},
    **{f"operator.{name}": getattr(operator, name) for name in ARITHMETIC},
    **{f"torch.{name}": getattr(torch, name) for name in SIZES if hasattr(torch, name)},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "sqrt", "trunc")},
    **{f"builtins.{function.__name__}": function for function in (abs, max, min, round, bool, int, float)},
}
NAMES = {function: name for name, function in FUNCTIONS.items()}


def write_target(target: Any) -> str:
    """The name of a function.

    Raises:
        SavedProgramError: a file must not name it.
    """
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target.namespace}.{target._schema.name.partition('::')[2]}.{target._overloadname}"
        if allowed(target):
            return name
    else:
        name = str(getattr(target, "__name__", target))
        if target in NAMES:
            return NAMES[target]
    raise SavedProgramError(f"a program that calls {name} cannot be saved: only operators of {', '.join(NAMESPACES)} without side effects and seqpar's own functions can")


def read_target(name: Any) -> Any:
    """The inverse of `write_target`."""
    if isinstance(name, str) and name in FUNCTIONS:
        return FUNCTIONS[name]
    parts = name.split(".") if isinstance(name, str) else []
    if len(parts) == 3 and parts[0] in NAMESPACES and all(part.isidentifier() for part in parts):
        packet = getattr(getattr(torch.ops, parts[0]), parts[1], None)
        overload = getattr(packet, parts[2], None) if isinstance(packet, torch._ops.OpOverloadPacket) else None
        if isinstance(overload, torch._ops.OpOverload) and allowed(overload):
            return overload
    raise SavedProgramError(f"the file calls {name!r:.80}, which a saved program must not")


def allowed(target: torch._ops.OpOverload) -> bool:
    """True for a dispatched operator of the namespaces that writes to no argument and opens no file."""
    schema = target._schema
    takes_file = any("str" in str(argument.type) and ("filename" in argument.name or "path" in argument.name) for argument in schema.arguments)
    dispatched = torch._C._dispatch_has_kernel(target.name()) or schema.name in SIZE_OPERATORS
    return target.namespace in NAMESPACES and dispatched and not schema.is_mutable and not takes_file and schema.name != "seqpar::opaque_module"
