"""diffusers' own context parallelism with its hand-written `_cp_plan`, made to run on CPU.

What has to be worked around (diffusers 0.42): it divides by the number of accelerators, which is 0; its CPU attention has no
log-sum-exp, which its ring needs, so the ring gets ours (its exchange and merging code is unchanged); a ModelOutput is refused
by its gather hook, so models are called with `return_dict=False`.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from seqpar.errors import SeqparError
from seqpar.runtime.attention import attend


def enable(model: nn.Module, ulysses: int, ring: int, mesh: DeviceMesh, plan: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    """`model` itself, parallelised in place by diffusers over `mesh` (dims "ring" and "ulysses"); call it within `adapted()`.

    plan: a `_cp_plan` in place of the class's own. options: more of its ContextParallelConfig, `ulysses_anything=True` for example.
    """
    from diffusers import ContextParallelConfig

    with mock.patch.object(torch.accelerator, "device_count", lambda: 1):
        model.enable_parallelism(config=ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses, mesh=mesh, **options), cp_plan=plan)  # type: ignore[operator]
    return model


@contextlib.contextmanager
def adapted() -> Iterator[None]:
    """For the time of the block: diffusers' native attention has a log-sum-exp where one is asked for, and warnings are off."""
    from diffusers.models import attention_dispatch
    from diffusers.utils import logging

    native = attention_dispatch._native_attention_forward_op

    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask, _, _, scale, _, return_lse = args[:6]
        if not return_lse:
            return native(ctx, query, key, value, *args, **kwargs)
        out, lse = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), mask, scale)
        return out.transpose(1, 2), lse.transpose(1, 2)

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings(), mock.patch.object(attention_dispatch, "_native_attention_forward_op", forward):
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)


@contextlib.contextmanager
def fake_world(ranks: int) -> Iterator[None]:
    """A process group of `ranks` of which only this process exists; collectives return at once with arbitrary values."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise SeqparError("counting with imagined ranks needs a process without a process group")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()
