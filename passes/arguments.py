"""From a call to its canonical form: arguments by name with defaults filled in, flattened to leaves with names."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from seqpar.compat import pytree
from seqpar.errors import SignatureError
from seqpar.passes.state import close_state, open_state


@dataclass(frozen=True)
class Call:
    """One call of a model.

    Invariants: `leaves`, `paths` have one entry per leaf, in flatten order of `{argument name: value}`, plain objects that hold
    tensors opened (see `passes/state.py`).
    """

    signature: inspect.Signature
    leaves: tuple[Any, ...]
    paths: tuple[str, ...]
    spec: Any
    positional: int  # how many arguments the call gave by position

    def __post_init__(self) -> None:
        assert len(self.leaves) == len(self.paths) == self.spec.num_leaves

    def rebuild(self, leaves: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of the same call with other leaves. Objects are copies; tensors are those in `leaves`."""
        return self.bind(self.arguments(leaves))

    def arguments(self, leaves: Sequence[Any]) -> dict[str, Any]:
        """The arguments by name, with other leaves."""
        return close_state(pytree.tree_unflatten(list(leaves), self.spec))

    def bind(self, arguments: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) of arguments by name, given as the call gave them: wrappers of `forward` may look for names."""
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        for i, (name, parameter) in enumerate(self.signature.parameters.items()):
            if parameter.kind is parameter.VAR_POSITIONAL:
                args.extend(arguments[name])
            elif parameter.kind is parameter.VAR_KEYWORD:
                kwargs.update(arguments[name])
            elif parameter.kind is parameter.POSITIONAL_ONLY or (parameter.kind is parameter.POSITIONAL_OR_KEYWORD and i < self.positional):
                args.append(arguments[name])
            else:
                kwargs[name] = arguments[name]
        return tuple(args), kwargs

    def without_data(self) -> "Call":
        """The same call with meta tensors: what is kept of a call must not keep its tensors alive."""
        leaves = tuple(leaf.detach().to("meta") if isinstance(leaf, torch.Tensor) else leaf for leaf in self.leaves)
        return replace(self, leaves=leaves)


def canonical_call(signature: inspect.Signature, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Bind (args, kwargs) like Python would.

    Raises:
        SignatureError: an argument is unknown, missing or given twice.
    """
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise SignatureError(f"the inputs do not fit the model: {error}. Its arguments are {tuple(signature.parameters)}") from None
    bound.apply_defaults()
    with_paths, spec = pytree.tree_flatten_with_path(open_state(dict(bound.arguments)))
    paths = tuple(path_text(path) for path, _ in with_paths)
    return Call(signature, tuple(resolved(leaf) for _, leaf in with_paths), paths, spec, len(args))


def copied_inputs(inputs: Any) -> Any:
    """A deep copy of what a model is called with. Tensors that were computed with gradients lose how: torch copies no others."""
    computed = (leaf for leaf in pytree.tree_leaves(open_state(inputs)) if isinstance(leaf, torch.Tensor) and not leaf.is_leaf)
    return copy.deepcopy(inputs, {id(tensor): tensor.detach().clone() for tensor in computed})


def resolved(leaf: Any) -> Any:
    """A tensor that is conjugated or negated when it is read (`x.conj()`), as one that is so already: graphs are made for those."""
    return leaf.resolve_conj().resolve_neg() if isinstance(leaf, torch.Tensor) and (leaf.is_conj() or leaf.is_neg()) else leaf


def path_text(path: Sequence[Any]) -> str:
    """`[MappingKey('x'), SequenceKey(1)]` -> `x[1]`: the first key is the argument's name."""
    text = str(path[0].key)
    return text + pytree.keystr(tuple(path[1:]))
