"""yunchang's attention (Ulysses x ring, "USP") in place of every scaled_dot_product_attention of the model. No dependency: used where it is installed."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor

from seqpar.errors import UnsupportedError
from seqpar.tools.bench.contender import Call, Contender, Setting, compiled
from seqpar.tools.bench.hooked_model import HookedModel, attention_replaced, split_by_plan


def prepare(setting: Setting) -> Call:
    """The model with hooks and with yunchang's layer on torch's flash kernel, its process groups over this mesh.

    Raises UnsupportedError if yunchang is not installed.
    """
    place = setting.place
    try:
        from yunchang import LongContextAttention, set_seq_parallel_pg
        from yunchang.kernels import AttnType, attention
    except ImportError as error:
        raise UnsupportedError(f"not installed ({error}): pip install yunchang") from error
    set_seq_parallel_pg(place.ulysses, place.ring, dist.get_rank(), dist.get_world_size())
    layer = LongContextAttention(ring_impl_type="basic_pytorch", attn_type=AttnType.TORCH_FLASH)

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
        """[B, H, S / ranks, D] each, the same out."""
        if attn_mask is not None or enable_gqa:
            raise UnsupportedError("yunchang's attention takes neither masks nor fewer heads of keys")
        heads_last = [x.transpose(1, 2).contiguous() for x in (query, key, value)]
        return layer(*heads_last, dropout_p=dropout_p, softmax_scale=scale, causal=is_causal).transpose(1, 2)

    @contextlib.contextmanager
    def within() -> Iterator[None]:
        cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # yunchang calls the kernel of GPUs by name
        on_cpu = place.device_mesh is not None and place.device_mesh.device_type == "cpu"
        kernel = mock.patch.object(attention, "_scaled_dot_product_flash_attention", cpu) if on_cpu else contextlib.nullcontext()
        with kernel, attention_replaced(attend):
            yield

    return HookedModel(compiled(split_by_plan(setting.model, place), setting.backend), within)


CONTENDER = Contender(
    "yunchang", "yunchang", lambda ulysses, ring: True, prepare, "yunchang's `LongContextAttention` on torch's flash kernel; split and gathered as for torch"
)
