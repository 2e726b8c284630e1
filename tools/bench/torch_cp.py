"""torch's experimental `context_parallel`: its ring in place of every scaled_dot_product_attention of the model.

On CPU its dispatcher has no rule for the kernel that runs there and looks for one for minutes (torch 2.13), so the model's attention calls the ring itself, the function that
the dispatcher ends in, with the CPU kernel.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from seqpar.errors import UnsupportedError
from seqpar.tools.bench.contender import Call, Contender, Setting, compiled
from seqpar.tools.bench.hooked_model import HookedModel, attention_replaced, split_by_plan


@contextlib.contextmanager
def within(mesh: DeviceMesh) -> Iterator[None]:
    """Attention is torch's ring for the time of the block, without the balancing that is meant for causal attention."""
    from torch.distributed.tensor.experimental import context_parallel
    from torch.distributed.tensor.experimental._context_parallel import _attention

    if mesh.device_type == "cpu":
        replaced: contextlib.AbstractContextManager[Any] = attention_replaced(ring_on_cpu(mesh))
    else:  # it wants a buffer to split; the model's are split by hooks
        token = torch.zeros(mesh.size(), device=mesh.device_type)
        replaced = context_parallel(mesh, buffers=[token], buffer_seq_dims=[0])
    with mock.patch.object(_attention._cp_options, "enable_load_balance", False), replaced:
        yield


def ring_on_cpu(mesh: DeviceMesh) -> Any:
    """A function like scaled_dot_product_attention, [B, H, S / ranks, D] each."""
    from torch.distributed.tensor.experimental._context_parallel._attention import _templated_ring_attention

    group, kernel = mesh.get_group(), torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
        if attn_mask is not None or enable_gqa:
            raise UnsupportedError("torch's ring takes neither masks nor fewer heads of keys")
        return _templated_ring_attention(group, 2, kernel, query, key, value, is_causal, dropout_p=dropout_p, scale=scale)[0]

    return attend


def prepare(setting: Setting) -> Call:
    """The model with hooks, called within the context."""
    assert setting.place.device_mesh is not None
    mesh = setting.place.device_mesh["ring"]
    return HookedModel(compiled(split_by_plan(setting.model, setting.place), setting.backend), lambda: within(mesh))


CONTENDER = Contender(
    "torch",
    "torch",
    lambda ulysses, ring: ulysses == 1,
    prepare,
    "`torch.distributed.tensor.experimental.context_parallel` (on CPU: its ring, called directly); split and gathered where diffusers' plan says",
)
