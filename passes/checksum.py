"""A number that tells weights from others, of all their bytes and as fast as memory is read."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

WORDS = 1 << 16  # of 8 bytes, summed up in one number
AT_ONCE = 1 << 6  # such sums, so that what is made meanwhile stays small


def weights_checksum(model: nn.Module) -> str:
    """SHA-256 of a sum for every half megabyte of every parameter and buffer: words times odd numbers, modulo 2^64.

    Odd numbers have an inverse, so that no single change goes unnoticed; of two that differ in more, one in about 2^63 is taken for the other (the numbers are random,
    as in multilinear hashing: Carter and Wegman, "Universal classes of hash functions", 1979).
    """
    digest = hashlib.sha256()
    multipliers = torch.randint(-(1 << 62), 1 << 62, (WORDS,), generator=torch.Generator().manual_seed(0)) * 2 + 1
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type != "meta" and tensor.layout is torch.strided and tensor.numel():
                digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(sums(tensor.detach(), multipliers.to(tensor.device)).cpu().numpy().tobytes())
    return digest.hexdigest()


def sums(tensor: Tensor, multipliers: Tensor) -> Tensor:
    """[chunks] int64, of a tensor's bytes."""
    found = []
    step = WORDS * AT_ONCE * 8 // tensor.element_size()
    for part in tensor.resolve_conj().resolve_neg().contiguous().flatten().split(step):
        raw = part.view(torch.uint8)
        if rest := -raw.numel() % (WORDS * 8):
            raw = torch.cat([raw, raw.new_zeros(rest)])
        found.append((raw.view(torch.int64).view(-1, WORDS) * multipliers).sum(1))
    return torch.cat(found)
