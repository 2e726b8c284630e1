"""Local attention that also returns the log-sum-exp, and the merge of partial results.

Shapes: B batch, H query heads, Hk key heads (divides H), Sq queries, Sk keys, D and Dv head dims.
lse is float32 (float64 for float64 inputs), natural log; a row that sees no key has out 0 and lse -inf.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
Partial = tuple[Tensor, Tensor]
"""out [B, H, Sq, Dv] and lse [B, H, Sq]."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    is_causal: bool = False,
) -> Partial:
    """Attention of q [B, H, Sq, D] to k [B, Hk, Sk, D], v [B, Hk, Sk, Dv]: out in q's dtype, and lse.

    mask: boolean (True = visible) or additive, broadcastable to [B, H, Sq, Sk]. `is_causal` is the top-left
    mask and excludes `mask`. A single key head serves all queries. Uses the fastest kernel of the device that reports the log-sum-exp.
    """
    assert mask is None or not is_causal, "mask and is_causal exclude each other"
    assert enable_gqa or k.shape[1] in (1, q.shape[1]), f"{q.shape[1]} query heads, {k.shape[1]} key heads: pass enable_gqa"
    if q.numel() == 0 or k.numel() == 0:
        return nothing_seen(q, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if mask is None:
        return _kernel(q, k, v, None, scale, is_causal)
    bias, blind = _additive(mask, q)
    out, lse = _kernel(q, k, v, bias, scale, False)
    # Kernels disagree on rows without any visible key (the CPU one reports lse 0): settle them here.
    return out.masked_fill(blind, 0), lse.masked_fill(blind.squeeze(-1), -math.inf)


def nothing_seen(q: Tensor, v: Tensor) -> Partial:
    """The result for queries that see no key at all: out 0, lse -inf."""
    shape = q.shape[:3]
    return q.new_zeros((*shape, v.shape[-1])), q.new_full(shape, -math.inf, dtype=_wide(q.dtype))


def merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> Partial:
    """Combine attention to two disjoint sets of keys; computed and returned in float32 (or wider)."""
    wide = _wide(out_a.dtype)
    share_b = torch.sigmoid(lse_b - lse_a).masked_fill(lse_b == -math.inf, 0)  # -inf - -inf would be NaN
    return torch.lerp(out_a.to(wide), out_b.to(wide), share_b.unsqueeze(-1)), torch.logaddexp(lse_a, lse_b)


def causal_mask(
    query_ranges: Sequence[tuple[int, int]], key_ranges: Sequence[tuple[int, int]], device: torch.device | str
) -> Tensor:
    """bool [Sq, Sk], True where key position <= query position; ranges are (start, length) in the global order."""
    return _positions(key_ranges, device).unsqueeze(0) <= _positions(query_ranges, device).unsqueeze(1)


def select_heads(x: Tensor, index: Sequence[int]) -> Tensor:
    """The listed heads of x [B, H, S, D], in that order, repeats allowed: K/V heads for an unaligned GQA share."""
    first = index[0]
    if list(index) == list(range(first, first + len(index))):
        return x.narrow(1, first, len(index))
    return torch.cat([x.narrow(1, i, 1) for i in index], 1)


def _kernel(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, is_causal: bool) -> Partial:
    device, dim = q.device.type, q.shape[-1]
    if dim != v.shape[-1] or k.shape[1] != v.shape[1]:
        return _math(q, k, v, bias, scale, is_causal)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))  # kernels do not check
    if device == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)
    if device == "meta":  # only shapes; this operator is the one FLOP counters know
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)
        return out, lse.to(_wide(q.dtype))
    if device == "cuda" and dim % 8 == 0:
        if bias is None and dim <= 256 and q.dtype in (torch.float16, torch.bfloat16):
            return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal, scale=scale)[:2]
        if q.dtype != torch.float64:
            return _efficient(q, k, v, bias, scale, is_causal)
    return _math(q, k, v, bias, scale, is_causal)


def _efficient(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, is_causal: bool) -> Partial:
    k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))
    if bias is not None:  # rows of the bias must start at multiples of 16 elements
        keys = k.shape[2]
        bias = bias.to(q.dtype).expand(*bias.shape[:3], keys)
        bias = F.pad(bias, (0, -keys % 16))[..., :keys].expand(q.shape[0], q.shape[1], q.shape[2], keys)
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, bias, True, 0.0, is_causal, scale=scale)
    return out, lse[:, :, : q.shape[2]]  # the kernel pads lse to multiples of 32 rows


def _math(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float, is_causal: bool) -> Partial:
    wide = _wide(q.dtype)
    k, v = (_repeat_heads(x, q.shape[1]) for x in (k, v))
    scores = (q.to(wide) * scale) @ k.to(wide).mT
    if is_causal:
        seen = causal_mask([(0, q.shape[2])], [(0, k.shape[2])], q.device)
        scores = scores.masked_fill(~seen, -math.inf)
    elif bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    weights = (scores - lse.masked_fill(lse == -math.inf, 0).unsqueeze(-1)).exp()
    return (weights @ v.to(wide)).to(q.dtype), lse


def _additive(mask: Tensor, q: Tensor) -> Partial:
    """`mask` as a 4-D additive bias, and bool [B|1, H|1, Sq|1, 1]: the rows in which every key is masked."""
    mask = mask[(None,) * (4 - mask.ndim)]
    if mask.dtype == torch.bool:
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -math.inf)
        return bias, ~mask.any(-1, keepdim=True)
    blind = (mask == -math.inf).all(-1, keepdim=True)
    return mask if mask.dtype == torch.float32 else mask.to(q.dtype), blind


def _repeat_heads(x: Tensor, heads: int) -> Tensor:
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _positions(ranges: Sequence[tuple[int, int]], device: torch.device | str) -> Tensor:
    return torch.cat([torch.arange(start, start + length, device=device) for start, length in ranges])


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
