"""`seqpar.plan`: what a model would do on a mesh, without running it and without a process group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from seqpar import logs
from seqpar.compile import split_inputs, traced_with
from seqpar.partitioner.cost import Machine
from seqpar.partitioner.machines import rates_of
from seqpar.passes.pipeline import partition
from seqpar.passes.plan import Plan
from seqpar.runtime.mesh import check_degrees
from seqpar.runtime.travel import check_comm_dtype
from seqpar.sp_plan import declarations


def plan(
    model: torch.nn.Module,
    example_inputs: Sequence[Any] | Mapping[str, Any],
    *,
    ulysses: int = 1,
    ring: int = 1,
    sp_plan: Any = None,
    comm_dtype: torch.dtype | None = None,
    hardware: str | Machine | None = None,
) -> Plan:
    """The plan of `ulysses * ring` ranks for these input sizes.

    Model and inputs may live on the meta device: a full-size plan needs no memory and no GPU.

    Args:
        model: any module.
        example_inputs: tuple of positional or dict of keyword inputs, full (global) tensors.
        ulysses: number of ranks that exchange attention heads.
        ring: number of ranks keys and values travel around.
        sp_plan: a declared plan, as in `sp_compile`.
        comm_dtype: what attention's exchanges are rounded to, as in `sp_compile`.
        hardware: as in `sp_compile`; predicted times are this machine's.

    Raises:
        SeqparError: the model cannot be traced or partitioned, or the degrees do not fit it.
    """
    logs.configure()
    check_degrees(ulysses=ulysses, ring=ring)
    check_comm_dtype(comm_dtype)
    machine = rates_of(hardware)
    args, kwargs = split_inputs(example_inputs)
    traced = traced_with(model, args, kwargs, declarations(model, sp_plan), dynamic=False)
    return partition(traced, ulysses=ulysses, ring=ring, machine=machine, comm_dtype=comm_dtype).plan
