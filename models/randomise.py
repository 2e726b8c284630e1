"""Deterministic random weights that make every part of a model matter.

Published initialisations zero the gates and the last projection, and would hide any mistake behind them.
"""

import zlib

import torch
from torch import nn


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Overwrites all parameters of `model` in place and returns it.

    Each value depends on the seed and the parameter's name only: not on order, device, or other parameters.
    Matrices get variance 1 / fan-in, norm weights lie near one, biases are small, everything else
    (modulation tables, padding tokens) is normal with standard deviation one half.
    """
    norm_weights = {
        f"{prefix}.weight" if prefix else "weight"
        for prefix, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.dim() == 1
    }
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.device.type == "meta":
                continue
            generator = torch.Generator("cpu").manual_seed(seed * 1_000_003 + zlib.crc32(name.encode()))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(_rescale(name, noise, name in norm_weights or name.endswith("gamma")))
    return model


def _rescale(name: str, noise: torch.Tensor, is_norm_weight: bool) -> torch.Tensor:
    if is_norm_weight:
        return 1 + 0.1 * noise
    if name.endswith("bias"):
        return 0.1 * noise
    if name.endswith("weight") and noise.dim() >= 2:
        fan_in = noise[0].numel()
        return noise / fan_in**0.5
    return 0.5 * noise
