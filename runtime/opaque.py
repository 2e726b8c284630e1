"""A module of the user run as it is inside a program: whole values in, whole values out, on every rank.

Before: a module whose Python code branches on activations, so that no graph of it is right for the next call
After:  %results = run_opaque(%_opaque_0, %blocks_0_mlp, (%x,)): the module's own `forward`, with its own parameters
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqpar.compat import pytree
from seqpar.errors import UnsupportedError
from seqpar.runtime.current import whole_tensors


@dataclass(frozen=True)
class Form:
    """Shape and dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(value: Tensor) -> Form:
        return Form(tuple(int(size) for size in value.shape), value.dtype)

    def __str__(self) -> str:
        return f"{list(self.shape)} {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class OpaqueCall:
    """One call of a module that runs as it is.

    name, kind: its qualified name and its class. reader, where: what reads an activation, and the source line. flops: operations of its
    contractions, as measured. by_token: it treats every token alone, so that a rank may give it some of them. autocast: (enabled, dtype) around the call, None where the device has none.

    Invariants: `arguments` are the leaves of `in_spec` = (args, kwargs), `places` those that are tensors (None stands there) and
    `inputs` their forms; `outputs` has one entry per leaf of `out_spec`, None for a None.
    """

    name: str
    kind: str
    reader: str
    where: str
    in_spec: Any
    arguments: tuple[Any, ...]
    places: tuple[int, ...]
    inputs: tuple[Form, ...]
    out_spec: Any
    outputs: tuple[Form | None, ...]
    flops: int
    autocast: tuple[bool, torch.dtype] | None
    by_token: bool = False

    def __post_init__(self) -> None:
        assert len(self.arguments) == self.in_spec.num_leaves and len(self.places) == len(self.inputs)
        assert len(self.outputs) == self.out_spec.num_leaves

    @property
    def title(self) -> str:
        return f"{self.name} ({self.kind})"

    def bind(self, tensors: Sequence[Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """(args, kwargs) with these tensors."""
        leaves = list(self.arguments)
        for place, tensor in zip(self.places, tensors, strict=True):
            leaves[place] = tensor
        return pytree.tree_unflatten(leaves, self.in_spec)

    @property
    def tokens(self) -> tuple[int, ...]:
        """All dims but the last of the first input: where tokens are, for one that treats them alone."""
        return self.inputs[0].shape[:-1]

    def outputs_for(self, tensors: Sequence[Tensor]) -> tuple[Form | None, ...]:
        """`outputs` for these inputs, which may be some of the tokens if it treats them alone."""
        if not self.by_token:
            return self.outputs
        return tuple(form and Form((*tensors[0].shape[:-1], form.shape[-1]), form.dtype) for form in self.outputs)

    def flops_for(self, tensors: Sequence[Tensor]) -> int:
        """`flops` for these inputs."""
        return self.flops * math.prod(tensors[0].shape[:-1]) // math.prod(self.tokens) if self.by_token else self.flops

    def results(self, returned: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The tensors in what the module returned for these inputs.

        Raises:
            UnsupportedError: they are not what the program was made for.
        """
        leaves, spec = pytree.tree_flatten(returned)
        found = [Form.of(leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        outputs = self.outputs_for(tensors)
        if spec != self.out_spec or tuple(found) != outputs:
            expected = ", ".join(map(str, outputs))
            raise UnsupportedError(
                f"{self.title} returned {', '.join(map(str, found))}, and the program was made for {expected}: what a module that runs as it is returns "
                "must have the same shapes for inputs of the same shapes. Give the model a form of it with fixed sizes"
            )
        return tuple(leaf.contiguous() for leaf in leaves if isinstance(leaf, Tensor))


@torch.compiler.disable
def run_opaque(call: OpaqueCall, module: torch.nn.Module, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The tensors `module.forward` returns; values whole, with shapes as in `call`, or those of a rank's tokens.

    Raises:
        UnsupportedError: it returned something else than while it was recorded.
    """
    # A gathered value has other strides than the model saw; contiguous ones fit every view.
    args, kwargs = call.bind([tensor.contiguous() for tensor in tensors])
    with whole_tensors():
        if call.autocast is None or not tensors:
            return call.results(module.forward(*args, **kwargs), tensors)
        enabled, dtype = call.autocast
        with torch.autocast(tensors[0].device.type, dtype=dtype, enabled=enabled):
            return call.results(module.forward(*args, **kwargs), tensors)


def autocast_state(tensors: Sequence[Tensor]) -> tuple[bool, torch.dtype] | None:
    """(enabled, dtype) of autocast where these tensors are, None if it does not exist there."""
    kind = tensors[0].device.type if tensors else "meta"
    if not torch.amp.is_autocast_available(kind):
        return None
    return torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
