"""Full-size models with random weights, made on the device in the dtype they run in: never in float32 first, never on the host."""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn

from seqpar.errors import SeqparError
from seqpar.models import registry
from seqpar.models.family import Config, Family


@contextlib.contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Parameters that modules register within the block take no memory; buffers and other tensors are real."""
    register = nn.Module.register_parameter

    def empty(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and parameter.device.type != "meta":
            parameter = nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    with mock.patch.object(nn.Module, "register_parameter", empty):
        yield


def fill(model: nn.Module, device: torch.device) -> nn.Module:
    """Give every meta parameter of `model` normal values on `device`, of variance 1 / fan-in; in place."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.device.type == "meta":
                values = torch.empty_like(parameter, device=device).normal_(0.0, max(parameter[0].numel(), 1) ** -0.5 if parameter.dim() > 1 else 1.0)
                module._parameters[name] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    return model


def build_full(family: Family, config: Config, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """A model of `family`; peak memory is that of its weights in `dtype`."""
    with parameters_on_meta():
        model = family.build(config, device=device, dtype=dtype)
    return fill(model, device)


def inputs_of(family: Family, config: Config, device: torch.device, dtype: torch.dtype, size: tuple[int, ...], **request: Any) -> dict[str, Any]:
    """Inputs for (height, width) or (height, width, frames) in pixels; without a size those the model is published for."""
    named = dict(zip(("height", "width", "frames"), size, strict=False))
    defaults = dict(family.native) if config == family.full else {"height": 256, "width": 256}
    return family.example_inputs(config, **{**defaults, **named, **request}, device=device, dtype=dtype)


def full_case(name: str, size: str | None, device: torch.device, dtype: torch.dtype) -> tuple[str, nn.Module, dict[str, Any]]:
    """(title, model, inputs) of "full:flux" or "tiny:flux" at "1024x1024" or "720x1280x81"; without a size, what the model is published for. Raises SeqparError."""
    kind, colon, family_name = name.partition(":")
    if not colon or kind not in ("full", "tiny"):
        raise SeqparError(f"a model to emulate is written full:NAME or tiny:NAME, not {name!r}")
    family = registry.get(family_name)
    parts = size.split("x") if size else []
    if any(not part.isdigit() for part in parts) or len(parts) not in (0, 2, 3):
        raise SeqparError(f"a size is written HEIGHTxWIDTH or HEIGHTxWIDTHxFRAMES, for example 1024x1024, not {size!r}")
    config = family.full if kind == "full" else family.tiny
    try:
        inputs = inputs_of(family, config, device, dtype, tuple(map(int, parts)))
    except ValueError as error:
        raise SeqparError(str(error)) from error
    return f"{name}{f' at {size}' if size else ''}", build_full(family, config, device, dtype), inputs
