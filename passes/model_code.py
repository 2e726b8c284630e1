"""What the code of a model names."""

from __future__ import annotations

import types

import torch

from seqpar.passes.state_digest import Code


def names_in_code(model: torch.nn.Module) -> set[str]:
    """All names in the code that a call of the model may run: of its modules, of the functions and objects in their attributes, and of what these call."""
    code, modules = Code(), list(model.modules())
    held = [value for module in modules for value in vars(module).values() if hasattr(value, "__dict__")]
    code.add(*dict.fromkeys(value if isinstance(value, types.FunctionType) else type(value) for value in (*modules, *held)))
    code.text()
    return code.named
