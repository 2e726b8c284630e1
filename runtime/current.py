"""The current mesh: the ranks among which `sp_shard` and `sp_gather` divide tensors when a model runs without being compiled.

The only state of this package that is not passed as an argument. It is a context variable: `use_mesh` sets it for a block,
`SequenceParallelConfig.setup` for the rest of the caller's context (a thread starts without a mesh). Compiled programs never read it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar

from seqpar.runtime.mesh import SequenceMesh

current_mesh: ContextVar[SequenceMesh | None] = ContextVar("seqpar_current_mesh", default=None)


@contextmanager
def use_mesh(mesh: SequenceMesh | None) -> Iterator[None]:
    """Make `mesh` the current one inside a `with` block; None: tensors stay whole."""
    token = current_mesh.set(mesh)
    try:
        yield
    finally:
        current_mesh.reset(token)


def whole_tensors() -> AbstractContextManager[None]:
    """Inside, `sp_shard` and `sp_gather` are identities: a model that is traced, or is a reference, works on whole tensors."""
    return use_mesh(None)
