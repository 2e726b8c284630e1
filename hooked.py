"""What diffusers' context parallelism does with a `_cp_plan`, in one process: for deriving plans, and for checking them before they are returned.

Its own code runs (`enable_parallelism`, the split and gather hooks, the attention dispatcher up to the exchange), on one thread per rank;
only the places where it talks to other processes are replaced.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from seqpar.errors import NoPlanError, UnsupportedError
from seqpar.passes.arguments import copied_inputs
from seqpar.runtime.simulate import SimulatedWorld

MESH = "mesh"  # key of the mark on the queries of an attention that exchanges
ROWS, HEADS = 1, 2  # dims of queries, keys and values


class _Rank(threading.local):
    groups: Mapping[str, Any] = {}


def has_context_parallelism(model: nn.Module) -> bool:
    """True for a module that diffusers can run with a `_cp_plan`."""
    return callable(getattr(model, "enable_parallelism", None)) and hasattr(model, "_cp_plan")


def twin(model: nn.Module) -> nn.Module:
    """The same module once more, with the same parameters and buffers; hooks on it leave the first alone."""
    shared = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def without_constants(model: nn.Module) -> nn.Module:
    """A twin in which parameters that hold one value only (layers that begin at zero, scales at one) are random: nothing can hide behind them in a comparison."""
    other, draw = twin(model), torch.Generator().manual_seed(0)
    for module in other.modules():
        for name, value in module._parameters.items():
            if value is not None and value.device.type != "meta" and value.is_floating_point() and bool((value == value.flatten()[:1]).all()):
                noise = torch.randn(value.shape, generator=draw) * (value.shape[-1] ** -0.5 if value.dim() > 1 else 0.1)
                module._parameters[name] = nn.Parameter((noise + value.cpu()).to(value), requires_grad=False)
    return other


@contextlib.contextmanager
def marked_attention(model: nn.Module, mark: Callable[[Tensor, str], Tensor]) -> Iterator[nn.Module]:
    """A twin whose attentions know of ranks, as after `enable_parallelism`, but attend alone: the queries of those that would exchange are marked."""
    from diffusers.models import attention_dispatch

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        return _attend(mark(query, MESH), key, value, attn_mask, *args)

    with _quiet(), mock.patch.object(attention_dispatch, "_templated_context_parallel_attention", attend):
        yield _enabled(model, _config(2, 1), {})


def run_hooked(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], plan: Mapping[str, Any], *, ulysses: int = 1, ring: int = 1) -> list[Any]:
    """What every rank returns when diffusers runs the model with `plan`; `model` itself is left as it is.

    Works on meta tensors too: shapes are checked then, and no values.

    Raises:
        NoPlanError: the plan names what is not there, or the model's attention has a backend that knows of no ranks.
        UnsupportedError: diffusers' attention refuses something (causal, grouped heads, a mask of several rows, heads that ulysses does not divide).
        ValueError, AssertionError, RuntimeError: what diffusers raises: a length that the ranks do not divide, a parameter that is not passed, ...
    """
    from diffusers.hooks import context_parallel
    from diffusers.models import attention_dispatch

    rank, world = _Rank(), SimulatedWorld(ulysses, ring)

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, *rest: Any, **kwargs: Any) -> Tensor:
        return _attend_over(rank.groups, ulysses, ring, query, key, value, attn_mask, *rest)

    def shard(tensor: Tensor, dim: int, mesh: Any) -> Tensor:
        group = rank.groups["sp"]
        assert tensor.size(dim) % group.size == 0, f"diffusers splits only lengths that the ranks divide: {tensor.size(dim)} of {tuple(tensor.shape)} over {group.size}"
        return tensor.chunk(group.size, dim)[group.rank]

    def work(groups: Mapping[str, Any]) -> Any:
        rank.groups = groups
        given, named = copied_inputs((tuple(args), dict(kwargs)))
        with torch.no_grad():
            return hooked(*given, **named)

    with (
        _quiet(),
        mock.patch.object(attention_dispatch, "_templated_context_parallel_attention", attend),
        mock.patch.object(context_parallel.EquipartitionSharder, "shard", shard),
        mock.patch.object(context_parallel.EquipartitionSharder, "unshard", lambda tensor, dim, mesh: _gather(rank.groups["sp"], tensor, dim)),
    ):
        hooked = _enabled(model, _config(ulysses, ring), plan)
        return world.run([work] * world.size)


def _enabled(model: nn.Module, config: Any, plan: Mapping[str, Any]) -> nn.Module:
    hooked = twin(model)
    hooked._resolve_parallel_config = types.MethodType(lambda self, given: given, hooked)  # type: ignore[assignment]
    hooked._parallel_config = None  # type: ignore[assignment]
    try:
        hooked.enable_parallelism(config=config, cp_plan=dict(plan))  # type: ignore[operator]
    except ValueError as error:
        raise NoPlanError(f"diffusers does not run this model over several ranks: {error}") from error
    return hooked


def _config(ulysses: int, ring: int) -> Any:
    from diffusers import ContextParallelConfig
    from diffusers.models._modeling_parallel import ParallelConfig

    return ParallelConfig(context_parallel_config=ContextParallelConfig(ulysses_degree=ulysses, ring_degree=ring))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)


def _gather(group: Any, x: Tensor, dim: int) -> Tensor:
    return group.all_gather(x.transpose(0, dim).contiguous()).transpose(0, dim)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0, causal: bool = False, scale: float | None = None, grouped: bool = False, *_: Any) -> Tensor:
    """[batch, rows, heads, width], all three."""
    q, k, v = (x.transpose(ROWS, HEADS) for x in (query, key, value))
    out = nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout, causal, scale=scale, enable_gqa=grouped)
    return out.transpose(ROWS, HEADS)


def _attend_over(
    groups: Mapping[str, Any], ulysses: int, ring: int, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float = 0.0, causal: bool = False, scale: float | None = None, grouped: bool = False, *_: Any
) -> Tensor:
    """Every rank's rows beside every rank's keys, as an exchange of heads or a ring has them."""
    group, own = groups["sp"], key.shape[ROWS]
    if causal or grouped:
        raise UnsupportedError(f"diffusers' attention over several ranks knows no {'causal attention' if causal else 'grouped heads'}")
    if query.shape[HEADS] % ulysses or key.shape[HEADS] % ulysses:
        raise UnsupportedError(f"{query.shape[HEADS]} heads are not divided by ulysses={ulysses}; use a ring")
    key, value = (_gather(group, x, ROWS) for x in (key, value))
    rows = query.shape[ROWS]
    if mask is not None:
        if ring > 1:
            raise UnsupportedError("diffusers' ring attention has no masks: every step of the ring would use the same one")
        if mask.shape[-1] == own:
            mask = _gather(group, mask, mask.dim() - 1)
        if mask.dim() > 3 and mask.shape[-3] > 1:
            raise UnsupportedError(f"a mask with {mask.shape[-3]} heads does not fit the {query.shape[HEADS] // ulysses} heads of one rank")
        if mask.dim() > 1 and mask.shape[-2] > 1:
            query = _gather(group, query, ROWS)
    out = _attend(query, key, value, mask, dropout, False, scale)
    return out if out.shape[ROWS] == rows else out.chunk(group.size, ROWS)[group.rank]
