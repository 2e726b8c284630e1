"""Count the collectives that any code really calls, as `runtime.counting` counts those of an emitted program."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from seqpar.compat import TorchDispatchMode
from seqpar.runtime.counting import Traffic
from seqpar.runtime.groups import rank_of, size_of

_FREE = ("wait_tensor", "_wrap_tensor_autograd")


class CollectiveCounter(TorchDispatchMode):
    """While active, adds what this rank receives from other ranks to `traffic`.

    Sees functional collectives and those of `torch.distributed`. An all-to-all within `ring_group` (a process-group name) counts
    as "ring". Raises NotImplementedError for a collective it cannot count: none goes unseen.
    """

    def __init__(self, ring_group: str | None = None) -> None:
        super().__init__()
        self.ring_group = ring_group
        self.traffic = Traffic()

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if "c10d" in func.namespace:
            self._count(func, args)
        return func(*args, **(kwargs or {}))

    def _count(self, func: Any, args: Sequence[Any]) -> None:
        functional = torch.ops._c10d_functional
        if func is functional.all_to_all_single.default:
            x, out_sizes, _, group = args
            # Sizes are rows of dim 0; both programs send flat buffers, so a row is an element.
            assert x.dim() == 1, f"an all-to-all of shape {tuple(x.shape)}"
            self.traffic.all_to_all(x, out_sizes, rank_of(group), "ring" if group == self.ring_group else "all_to_all")
        elif func is functional.all_gather_into_tensor.default:
            self.traffic.all_gather(args[0], args[1])
        elif func is functional.all_reduce.default:
            self.traffic.all_reduce(args[0], size_of(args[2]))
        elif func is torch.ops.c10d.allgather_.default:
            for outputs, own in zip(args[0], args[1], strict=True):
                self.traffic.add("all_gather", sum(map(_nbytes, outputs)) - _nbytes(own))
        elif func.overloadpacket.__name__ not in _FREE:
            raise NotImplementedError(f"{func} is a collective this counter does not know")


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()
