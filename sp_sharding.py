"""`sp_shard` and `sp_gather`: splitting and gathering written into a model's own `forward`.

    x = sp_shard(x, dim=1)       [B, S, C] -> [B, S_r, C]
    …
    x = sp_gather(x, dim=1)      [B, S_r, C] -> [B, S, C]

In a model that seqpar compiles they pin the layout there and nothing else: shapes stay those of the whole tensors while it is traced, and
the program has no operator for them. In a model that runs as it is they work on the current mesh (`use_mesh`, `SequenceParallelConfig.setup`),
and are identities without one or with one rank. Under `torch.compile` with another backend they are identities as well: every rank computes everything.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from seqpar.passes.boundary import pinned_call
from seqpar.runtime import current
from seqpar.runtime.groups import start_all_gather, wait
from seqpar.runtime.layout import gather, parts_of, shard
from seqpar.runtime.mesh import SequenceMesh

if TYPE_CHECKING:
    from seqpar.sp_plan import SequenceParallelConfig


def sp_shard(x: Tensor, dim: int) -> Tensor:
    """This rank's part of a whole tensor: global [.., S, ..] -> local [.., S_r, ..], S_r = (S + N - 1 - rank) // N. A view.

    Raises:
        ValueError: `x` has no such dim.
    """
    dim = checked("sp_shard", x, dim)
    if torch.compiler.is_compiling():
        return pinned_call("sp_shard", x, split=dim)
    mesh = current.current_mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    return shard(x, dim, (parts_of(x.shape[dim], mesh.size),), rank=mesh.rank)


def sp_gather(x: Tensor, dim: int) -> Tensor:
    """The whole tensor of which every rank holds a part: local [.., S_r, ..] -> global [.., S, ..], the same bits on every rank. Collective.

    Forward only. Ranks may hold parts of any lengths; one more small collective tells them.

    Raises:
        ValueError: `x` has no such dim.
    """
    dim = checked("sp_gather", x, dim)
    if torch.compiler.is_compiling():
        return pinned_call("sp_gather", x, gather=dim)
    mesh = current.current_mesh.get()
    if mesh is None or mesh.size == 1:
        return x
    group = mesh.groups["sp"]
    lengths = wait(start_all_gather(torch.tensor([x.shape[dim]], device=x.device), group)).tolist()
    return gather(x, dim, (tuple(lengths),), group=group)


def use_mesh(config: SequenceParallelConfig | SequenceMesh) -> AbstractContextManager[None]:
    """`with use_mesh(config):` the mesh of `sp_shard` and `sp_gather` inside the block, whatever was set up outside."""
    return current.use_mesh(config if isinstance(config, SequenceMesh) else config.mesh)


def checked(function: str, x: Tensor, dim: int) -> int:
    """`dim` counted from the front."""
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{function}(x, dim={dim}): x has {x.dim()} dims {tuple(x.shape)}")
    return dim % x.dim()
