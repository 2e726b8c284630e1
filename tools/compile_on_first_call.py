"""A stand-in for a model inside somebody else's pipeline: compiled when its first inputs are seen."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch

from seqpar.compat import pytree

CompileModel = Callable[[torch.nn.Module, dict[str, Any]], torch.nn.Module]


class CompileOnFirstCall(torch.nn.Module):
    """Behaves like `model`, but runs a compiled program for every *structure* of arguments it meets.

    A pipeline calls its transformer in a few ways only (with and without guidance, conditional and unconditional), which it
    alone knows. The first call of each structure is the example input of a compilation; new lengths of a known structure
    are the compiled program's own business. Everything but the call (`config`, `dtype`, `cache_context`, …) is the model's.
    """

    def __init__(self, model: torch.nn.Module, compile_model: CompileModel) -> None:
        super().__init__()
        self.model = model
        self._signature = inspect.signature(model.forward)
        self._compile_model = compile_model
        self._programs: dict[Any, torch.nn.Module] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        inputs = bind_by_name(self._signature, args, kwargs)
        key = structure_of(inputs)
        if key not in self._programs:
            self._programs[key] = self._compile_model(self.model, inputs)
        return self._programs[key](**inputs)

    @property
    def programs(self) -> list[torch.nn.Module]:
        """The compiled programs, in the order of their first calls."""
        return list(self._programs.values())

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        return self.model.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.model.load_state_dict(*args, **kwargs)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
        return self.model.named_parameters(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Only reached for names that neither the instance nor nn.Module has.
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not yet set: do not look for it in itself
                raise
            return getattr(self.model, name)


def bind_by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call as keywords only, in the signature's order, with defaults: leaving one out is no other structure.

    Raises TypeError, as the call itself would, for arguments that do not fit.
    """
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    inputs: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            inputs.update(value)
        elif kind is inspect.Parameter.VAR_POSITIONAL and not value:
            continue
        elif kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY):
            raise TypeError(f"argument {name!r} can only be passed by position; a model in a pipeline needs named arguments")
        else:
            inputs[name] = value
    return inputs


def structure_of(inputs: dict[str, Any]) -> tuple[str, tuple[str, ...]]:
    """What makes two calls the same program: nesting, names, and which leaves are tensors, numbers or None."""
    leaves, spec = pytree.tree_flatten(inputs)
    kinds = tuple("tensor" if isinstance(leaf, torch.Tensor) else type(leaf).__name__ for leaf in leaves)
    return str(spec), kinds
