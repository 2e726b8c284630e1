"""Collectives by group: a process-group name (real ranks) or a `LocalGroup` object (simulated ranks).

For names these are torch's functional collectives, so torch.compile traces them without a graph break.
`start_*` functions return at once; their result may be read only after `wait`.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group

REDUCE_OPS = ("sum", "avg", "max", "min", "product")


class LocalGroup(Protocol):
    """A group that is not a process group; its methods return finished tensors."""

    @property
    def size(self) -> int: ...

    @property
    def rank(self) -> int: ...

    def all_to_all(self, flat: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], kind: str) -> Tensor: ...

    def all_gather(self, x: Tensor) -> Tensor: ...

    def all_reduce(self, x: Tensor, op: str) -> Tensor: ...


Group = str | LocalGroup


# Constant for the life of a group: the compiler evaluates these at trace time.
@torch.compiler.assume_constant_result
def _named_rank(name: str) -> int:
    return _resolve_process_group(name).rank()  # type: ignore[arg-type]


@torch.compiler.assume_constant_result
def _named_size(name: str) -> int:
    return _resolve_process_group(name).size()  # type: ignore[arg-type]


def rank_of(group: Group) -> int:
    """This rank's index within `group`."""
    return _named_rank(group) if isinstance(group, str) else group.rank


def size_of(group: Group) -> int:
    """How many ranks `group` has."""
    return _named_size(group) if isinstance(group, str) else group.size


def start_all_to_all(flat: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], group: Group) -> Tensor:
    """Send the first `in_sizes[0]` elements of the 1-D `flat` to rank 0, the next to rank 1, …; receive `out_sizes`.

    `flat` is contiguous and of a real dtype (see `wire.to_wire`); sizes may be 0. Result: 1-D, sum(out_sizes).
    """
    return _start_all_to_all(flat, out_sizes, in_sizes, group, "all_to_all")


def start_ring_exchange(flat: Tensor, incoming: int, group: Group) -> Tensor:
    """Send all of the 1-D `flat` to the next rank and receive `incoming` elements from the previous one.

    An all-to-all whose only non-zero split is the neighbour's: point-to-point traffic that compilers can trace.
    """
    size, rank = size_of(group), rank_of(group)
    out_sizes, in_sizes = [0] * size, [0] * size
    out_sizes[(rank - 1) % size] = incoming
    in_sizes[(rank + 1) % size] = flat.shape[0]
    return _start_all_to_all(flat, out_sizes, in_sizes, group, "ring")


def _start_all_to_all(flat: Tensor, out_sizes: Sequence[int], in_sizes: Sequence[int], group: Group, kind: str) -> Tensor:
    if isinstance(group, str):
        return torch.ops._c10d_functional.all_to_all_single(flat, list(out_sizes), list(in_sizes), group)
    return group.all_to_all(flat, out_sizes, in_sizes, kind)


def start_all_gather(x: Tensor, group: Group) -> Tensor:
    """Concatenate every rank's `x` (same shape everywhere, real dtype) along dim 0, in rank order."""
    if isinstance(group, str):
        return torch.ops._c10d_functional.all_gather_into_tensor(x.contiguous(), size_of(group), group)
    return group.all_gather(x)


def all_reduce(x: Tensor, op: str, group: Group) -> Tensor:
    """Reduce `x` over the ranks; `op` is one of REDUCE_OPS; complex tensors can be summed or averaged.

    Every rank receives the same bits, and `x` itself is left alone.
    """
    assert op in REDUCE_OPS, f"unknown reduction {op!r}; one of {REDUCE_OPS}"
    if x.is_complex():
        assert op in ("sum", "avg"), f"reduction {op!r} has no meaning for {x.dtype}"
        return torch.view_as_complex(all_reduce(torch.view_as_real(x.resolve_conj()).contiguous(), op, group))
    if not isinstance(group, str):
        return group.all_reduce(x, op)
    if op == "avg":  # gloo has no average
        return all_reduce(x, "sum", group) / size_of(group)
    return wait(torch.ops._c10d_functional.all_reduce(x.contiguous(), op, group))


def wait(x: Tensor) -> Tensor:
    """The finished result of a `start_*` function; harmless on any other tensor."""
    if x.device.type == "meta":  # where the operator would make another tensor
        return x
    return torch.ops._c10d_functional.wait_tensor(x)
