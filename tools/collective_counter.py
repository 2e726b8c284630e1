"""Count the collectives that any code really calls, as `runtime.counting` counts those of an emitted program."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass_type

from seqpar.compat import TorchDispatchMode
from seqpar.runtime.counting import Traffic
from seqpar.runtime.groups import rank_of, size_of

_FREE = ("wait_tensor", "_wrap_tensor_autograd", "send")  # what is sent is counted where it is received


class CollectiveCounter(TorchDispatchMode):
    """While active, adds what this rank receives from other ranks to `traffic`.

    Sees functional collectives and those of `torch.distributed`. An all-to-all within `ring_group` (a process-group name) counts
    as "ring", and so does what arrives from one rank alone. Raises NotImplementedError for a collective it cannot count: none goes
    unseen, except calls of `torch.distributed` functions on a group that is written in Python (`slow_link`): they do not pass the dispatcher.
    """

    def __init__(self, ring_group: str | None = None) -> None:
        super().__init__()
        self.ring_group = ring_group
        self.traffic = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # a DTensor calls collectives on its parts, which are seen then
        if "c10d" in func.namespace:
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Sequence[Any]) -> None:
        functional = torch.ops._c10d_functional
        if func is functional.all_to_all_single.default:
            x, out_sizes, _, group = args
            row = math.prod(x.shape[1:])  # sizes are rows of dim 0
            self.traffic.all_to_all(x, [row * size for size in out_sizes], rank_of(group), "ring" if group == self.ring_group else "all_to_all")
        elif func is functional.all_gather_into_tensor.default:
            self.traffic.all_gather(args[0], args[1])
        elif func is functional.all_reduce.default:
            self.traffic.all_reduce(args[0], size_of(args[2]))
        elif func is torch.ops.c10d.allgather_.default:
            for outputs, own in zip(args[0], args[1], strict=True):
                self.traffic.add("all_gather", sum(map(_nbytes, outputs)) - _nbytes(own))
        elif func is torch.ops.c10d.alltoall_base_.default:
            self._count_alltoall_base(*args[:5])
        elif func is torch.ops.c10d.recv_.default:
            self.traffic.add("ring", sum(map(_nbytes, args[0])))
        elif func.overloadpacket.__name__ not in _FREE:
            raise NotImplementedError(f"{func} is a collective this counter does not know")

    def _count_alltoall_base(self, out: Tensor, x: Tensor, group: Any, out_sizes: Sequence[int], in_sizes: Sequence[int]) -> None:
        """Rows of dim 0 travel; without sizes, the same number to every rank."""
        process_group = dist.ProcessGroup.unbox(group)
        size, rank = process_group.size(), process_group.rank()
        own = out_sizes[rank] / out.shape[0] if out_sizes else 1 / size
        kind = "ring" if process_group.group_name == self.ring_group else "all_to_all"
        self.traffic.add(kind, round(_nbytes(out) * (1 - own)))


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
