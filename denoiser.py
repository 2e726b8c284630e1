"""A model inside somebody else's pipeline: compiled when its first inputs are seen."""

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from seqpar.compat import pytree
from seqpar.errors import UnsupportedError

CompileModel = Callable[[torch.nn.Module, dict[str, Any]], Any]  # the program is called as the model is
# accelerate's offloading puts itself around a module's forward, and keeps the forward it found under this name.
HOOK, HOOKED_FORWARD = "_hf_hook", "_old_forward"
PLAIN = (bool, int, float, str, type(None))
CONTAINERS = (dict, list, tuple)
OWN_FIELDS = frozenset(torch.nn.Module().__dict__)


class Denoiser:
    """Runs calls of `model` by a compiled program for every *structure* of arguments it meets.

    A pipeline calls its denoiser in a few ways only (with and without guidance, conditional and unconditional), which it alone knows. The first call of
    each structure is the example input of a compilation; new lengths of a known structure are the compiled program's own business.
    """

    def __init__(self, model: torch.nn.Module, compile_model: CompileModel) -> None:
        self.model = model
        self._compile_model = compile_model
        self._signature = inspect.signature(model.forward)
        self._programs: dict[Any, Any] = {}
        self._state: Any = None

    @property
    def programs(self) -> list[Any]:
        """The compiled programs, in the order of their first calls."""
        return list(self._programs.values())

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a call by name; see `bind_by_name`."""
        return bind_by_name(self._signature, args, kwargs)

    def run(self, inputs: dict[str, Any]) -> Any:
        """The model's result for named arguments. Raises what `sp_compile` raises at the first call of a structure."""
        key = structure_of(inputs)
        if state_of(self.model) != self._state:
            self._programs.clear()
        if key not in self._programs:
            refuse_offloaded_parts(self.model)
            self._programs[key] = self._compile_model(self.model, inputs)
            self._state = state_of(self.model)  # afterwards: tracing may leave something on the model
        return self._programs[key](**inputs)


@contextlib.contextmanager
def forward_replaced(module: torch.nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Let `make(plain forward)` answer the module's calls for the time of the block; within accelerate's hook, where there is one.

    An attribute of the instance: the module stays the object it is, for everybody who looks at its class, config or weights.
    """
    name = HOOKED_FORWARD if HOOK in module.__dict__ else "forward"
    plain = getattr(module, name)
    with attribute_set(module, name, make(plain)):
        yield


@contextlib.contextmanager
def attribute_set(module: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute in the instance's own dictionary for the time of the block."""
    missing = object()
    before = module.__dict__.get(name, missing)
    module.__dict__[name] = value
    try:
        yield
    finally:
        if before is missing:
            del module.__dict__[name]
        else:
            module.__dict__[name] = before


def refuse_offloaded_parts(model: torch.nn.Module) -> None:
    """A whole model may be offloaded between calls; parts of one that come and go within a call cannot be compiled."""
    parts = [name for name, part in model.named_modules() if part is not model and HOOK in part.__dict__]
    if parts:
        raise UnsupportedError(
            f"parts of {type(model).__name__} are offloaded one by one ({parts[0]}, …): its weights must be on the device during a call. "
            "Use enable_model_cpu_offload() instead of sequential offload or a device map, or no offload"
        )


def state_of(model: torch.nn.Module) -> int:
    """A hash of what a program depends on besides inputs and the values of weights: submodules, parameters, plain values kept on modules.

    Adapters come, go and change their scale this way, between the steps of a pipeline too. Identities and not shapes: this runs in every step.
    """
    state: list[Any] = []
    for module in model.modules():
        state.append(id(module))
        state += map(id, module._parameters.values())
        state += map(id, module._buffers.values())
        for key, value in module.__dict__.items():
            if isinstance(value, PLAIN):
                state += (key, value)
            elif isinstance(value, CONTAINERS) and value and key not in OWN_FIELDS and is_plain(value):
                state += (key, repr(value))
    return hash(tuple(state))


def is_plain(value: Any) -> bool:
    """Numbers, strings, None, and lists, tuples and dicts of them."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, CONTAINERS):
        return isinstance(value, PLAIN)
    return all(map(is_plain, value))


def bind_by_name(signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
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
