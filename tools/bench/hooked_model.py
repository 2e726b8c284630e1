"""A model whose inputs are split and whose outputs are gathered by diffusers' hooks, with somebody else's attention in between.

The peers of this kind replace `scaled_dot_product_attention` and leave the rest to their user. Where to split is what the model's own `_cp_plan` says, as a
user would do it by hand; keys that stay whole (the text of a cross-attention) are then attended once per rank, which changes no result.
"""

import contextlib
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import nn

from seqpar.errors import UnsupportedError
from seqpar.runtime.mesh import SequenceMesh
from seqpar.tools.bench.contender import Call, copied

Within = Callable[[], contextlib.AbstractContextManager[Any]]


class HookedModel:
    """Calls `model` (compiled, where it is) within the context that installs the attention."""

    def __init__(self, model: Call, within: Within) -> None:
        self.model, self.within = model, within

    def __call__(self, **inputs: Any) -> Any:
        """The model's outputs, whole."""
        with self.within():
            return self.model(**inputs)


def split_by_plan(model: nn.Module, place: SequenceMesh) -> nn.Module:
    """A copy of `model` with hooks that split and gather over all ranks of the mesh, and its attention as it is.

    Raises UnsupportedError if the class has no plan.
    """
    from diffusers import ContextParallelConfig
    from diffusers.hooks.context_parallel import apply_context_parallel

    plan = getattr(model, "_cp_plan", None)
    if plan is None:
        raise UnsupportedError(f"{type(model).__name__} has no _cp_plan that says where to split")
    assert place.device_mesh is not None
    config = ContextParallelConfig(ring_degree=place.ring, ulysses_degree=place.ulysses, mesh=place.device_mesh)
    config.setup(place.rank, place.size, torch.device(place.device_mesh.device_type), place.device_mesh)
    hooked = copied(model)
    apply_context_parallel(hooked, config, plan)
    return hooked


def attention_replaced(attend: Callable[..., torch.Tensor]) -> contextlib.AbstractContextManager[Any]:
    """`scaled_dot_product_attention` is `attend` for the time of the block."""
    return mock.patch.object(torch.nn.functional, "scaled_dot_product_attention", attend)
