"""Declared plans: where a model's tensors are split and gathered, with the names and meaning of vLLM-Omni's `sp_plan` module.

    class MyTransformer(nn.Module):
        _sp_plan = {
            "rope": {0: SequenceParallelInput(split_dim=1, expected_dims=4, split_output=True)},
            "blocks.0": {"hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3)},
            "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3),
        }

Keys are submodule paths: `""` is the model, `"blocks.0"` one of a ModuleList, `"blocks.*"` all of them, `"outputs.main"` an entry of a ModuleDict. Inside,
a string is a parameter of that module's `forward`, an integer an output (`split_output=True`). A list or tuple declares the tensors of a parameter that is a list.
`ByToken()` in place of these says that a module treats every token alone.

`seqpar.sp_compile(..., sp_plan=...)` takes such a plan, one of diffusers (`_cp_plan`, whose entries have the same fields), or `"model"`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from seqpar.errors import PlanError
from seqpar.passes.declared import Declaration
from seqpar.runtime.current import current_mesh
from seqpar.runtime.mesh import build_mesh, check_degrees
from seqpar.sp_sharding import sp_gather, sp_shard, use_mesh

__all__ = [
    "AnySequenceParallelInput",
    "ByToken",
    "SequenceParallelConfig",
    "SequenceParallelInput",
    "SequenceParallelInputType",
    "SequenceParallelModelPlan",
    "SequenceParallelOutput",
    "SequenceParallelOutputType",
    "SequenceParallelPartialInput",
    "get_sp_plan_from_model",
    "sp_gather",
    "sp_shard",
    "use_mesh",
    "validate_sp_plan",
]

MODEL_PLANS = ("_sp_plan", "_cp_plan")  # where classes keep their plan: vLLM-Omni, diffusers


@dataclass
class SequenceParallelConfig:
    """Degrees of a mesh of ranks, and where this process stands in it.

    Args:
        ulysses_degree: ranks that exchange attention heads.
        ring_degree: ranks keys and values travel around.
        convert_to_fp32: accepted for compatibility; partial results of a ring are always merged in float32.

    Raises:
        MeshError: a degree is not a positive integer (a ValueError).
    """

    ulysses_degree: int = 1
    ring_degree: int = 1
    convert_to_fp32: bool = True
    _mesh: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_degrees(ulysses_degree=self.ulysses_degree, ring_degree=self.ring_degree)

    @property
    def sequence_parallel_size(self) -> int:
        """Ranks that share one sequence."""
        return self.ulysses_degree * self.ring_degree

    def setup(self, rank: int, world_size: int, device: torch.device | None = None) -> None:
        """Build the mesh and make it the current one for `sp_shard` and `sp_gather`; collective, every rank of the default process group calls it.

        Raises:
            RuntimeError: there is no process group, or `rank` and `world_size` are not its.
            MeshError: the degrees do not fit the world size.
        """
        if not dist.is_initialized():
            raise RuntimeError("SequenceParallelConfig.setup needs a process group: call torch.distributed.init_process_group first")
        if (rank, world_size) != (dist.get_rank(), dist.get_world_size()):
            raise RuntimeError(f"setup(rank={rank}, world_size={world_size}) in a process that is rank {dist.get_rank()} of {dist.get_world_size()}")
        self._mesh = build_mesh(self.ulysses_degree, self.ring_degree, device_type=torch.device(device or "cpu").type)
        current_mesh.set(self._mesh)

    def is_initialized(self) -> bool:
        """True after `setup`."""
        return self._mesh is not None

    @property
    def mesh(self) -> Any:
        """The mesh of process groups; RuntimeError before `setup`."""
        if self._mesh is None:
            raise RuntimeError("sequence parallelism is not initialised: call setup(rank, world_size, device) on every rank first")
        return self._mesh

    def get_rank(self) -> int:
        """Rank among those that share one sequence."""
        return int(self.mesh.rank)

    def get_world_size(self) -> int:
        """Ranks that share one sequence."""
        return int(self.mesh.ulysses * self.mesh.ring)

    def get_ulysses_rank(self) -> int:
        """Rank among those that exchange heads."""
        return self.get_rank() % int(self.mesh.ulysses)

    def get_ulysses_world_size(self) -> int:
        """Ranks that exchange heads with each other."""
        return int(self.mesh.ulysses)

    def get_ring_rank(self) -> int:
        """Rank in the ring."""
        return self.get_rank() // int(self.mesh.ulysses)

    def get_ring_world_size(self) -> int:
        """Ranks of one ring."""
        return int(self.mesh.ring)


@dataclass(frozen=True)
class SequenceParallelInput:
    """Split a tensor over the ranks along `split_dim`: an input of a module, or with `split_output` an output.

    Args:
        split_dim: the dim that is the sequence.
        expected_dims: number of dims the tensor must have; another number is an error (None: any).
        split_output: this is an output of the module; its key is the output's index.
        auto_pad: accepted; lengths that the ranks do not divide are split unevenly, nothing is padded.
    """

    split_dim: int
    expected_dims: int | None = None
    split_output: bool = False
    auto_pad: bool = False


@dataclass(frozen=True)
class SequenceParallelPartialInput:
    """Split only the second part of `[text, image]` along `split_dim`; the text stays whole on every rank.

    Args:
        split_dim: the dim that is the sequence, text first.
        text_len_source: length of the text: a number, or a parameter of the module's or the model's `forward`: an integer, or a
            tensor whose dim 0 it is (dim -2 of one with three dims or more: [batch, text, channels]).
        expected_dims: as in `SequenceParallelInput`.
        split_output: as in `SequenceParallelInput`.
    """

    split_dim: int
    text_len_source: str | int
    expected_dims: int | None = None
    split_output: bool = False


@dataclass(frozen=True)
class SequenceParallelOutput:
    """Gather an output of a module, so that it is whole on every rank.

    Args:
        gather_dim: the dim that is split.
        expected_dims: number of dims the tensor must have; another number is an error (None: any).
    """

    gather_dim: int
    expected_dims: int | None = None


@dataclass(frozen=True)
class ByToken:
    """A module that routes by activations (a mixture of experts) treats every token alone: it may run on the tokens of a rank.

    Nothing in a plan but this leaves everything else inferred. Modules that can be traced do not need it. That the result for half of the tokens is half of the
    result is checked with the example inputs; what cannot be seen there (experts that drop tokens when they are full) is your word.

        sp_plan={"blocks.*.moe": ByToken()}
    """


AnySequenceParallelInput = SequenceParallelInput | SequenceParallelPartialInput
SequenceParallelInputType = dict[str | int, AnySequenceParallelInput | list[AnySequenceParallelInput] | tuple[AnySequenceParallelInput, ...]]
SequenceParallelOutputType = SequenceParallelOutput | list[SequenceParallelOutput] | tuple[SequenceParallelOutput, ...]
SequenceParallelModelPlan = dict[str, SequenceParallelInputType | SequenceParallelOutputType | ByToken]


def get_sp_plan_from_model(model: torch.nn.Module) -> SequenceParallelModelPlan | None:
    """The plan a model or its class declares (`_sp_plan`, else diffusers' `_cp_plan`); None if it declares none."""
    plans = (getattr(model, name, None) for name in MODEL_PLANS)
    found = next((plan for plan in plans if plan is not None), None)
    return None if found is None else from_any(found)


def validate_sp_plan(plan: SequenceParallelModelPlan) -> None:
    """Check the form of a plan (whether it fits a model is checked by `sp_compile`).

    Raises:
        ValueError: a key or an entry has the wrong type or a wrong value; the text names it.
    """
    if not isinstance(plan, Mapping):
        found = f"{plan!r} (the text 'model' stands for the model's own)" if isinstance(plan, str) else f"a {type(plan).__name__}"
        raise ValueError(f"a plan is a dict from module paths to entries, not {found}")
    for path, entry in plan.items():
        if not isinstance(path, str):
            raise ValueError(f"keys of a plan are module paths such as 'blocks.0', not {path!r}")
        if isinstance(entry, Mapping):
            for key, value in entry.items():
                _validate_input(f"plan[{path!r}][{key!r}]", key, value)
        elif not isinstance(entry, ByToken):
            _validate_outputs(f"plan[{path!r}]", entry)


def _validate_input(where: str, key: str | int, value: Any) -> None:
    if not isinstance(key, str | int) or isinstance(key, bool):
        raise ValueError(f"{where}: the key is a parameter name or the index of an output, not {key!r}")
    entries = value if isinstance(value, list | tuple) else [value]
    for entry in entries:
        if not isinstance(entry, SequenceParallelInput | SequenceParallelPartialInput):
            raise ValueError(f"{where} must be a SequenceParallelInput or SequenceParallelPartialInput (or a list of them), not {entry!r}")
        if isinstance(key, int) != entry.split_output:
            what = "an index names an output, which needs split_output=True" if isinstance(key, int) else "a name is an input, which needs split_output=False"
            raise ValueError(f"{where}: {what}")
        _validate_dim(where, "split_dim", entry.split_dim, entry.expected_dims)
        if isinstance(entry, SequenceParallelPartialInput):
            length = entry.text_len_source
            if isinstance(length, bool) or not isinstance(length, str | int) or length == "" or (isinstance(length, int) and length < 0):
                raise ValueError(f"{where}: text_len_source is a parameter name or a length >= 0, not {length!r}")


def _validate_outputs(where: str, value: Any) -> None:
    entries = value if isinstance(value, list | tuple) else [value]
    for entry in entries:
        if entry is None and isinstance(value, list | tuple):
            continue  # an output that is left as it is
        if not isinstance(entry, SequenceParallelOutput):
            raise ValueError(f"{where} must be a dict of inputs or a SequenceParallelOutput (or a list of them), not {entry!r}")
        _validate_dim(where, "gather_dim", entry.gather_dim, entry.expected_dims)


def _validate_dim(where: str, name: str, dim: Any, expected: Any) -> None:
    for label, number in ((name, dim), *((("expected_dims", expected),) if expected is not None else ())):
        if not isinstance(number, int) or isinstance(number, bool):
            raise ValueError(f"{where}: {label} must be an integer, not {number!r}")
    if expected is not None and not -expected <= dim < expected:
        raise ValueError(f"{where}: {name}={dim} is not a dim of a tensor with expected_dims={expected}")


def from_any(plan: Any) -> SequenceParallelModelPlan:
    """A plan with entries of this module, from one whose entries have the same fields (diffusers, vLLM-Omni). A valid plan comes back equal."""
    if not isinstance(plan, Mapping):
        return plan
    return {path: {k: _convert(v) for k, v in entry.items()} if isinstance(entry, Mapping) else _convert(entry) for path, entry in plan.items()}


def _convert(entry: Any) -> Any:
    if isinstance(entry, list | tuple):
        return type(entry)(map(_convert, entry))
    for kind, needs in ((SequenceParallelPartialInput, "text_len_source"), (SequenceParallelOutput, "gather_dim"), (SequenceParallelInput, "split_dim")):
        if hasattr(entry, needs):
            return kind(**{name: getattr(entry, name) for name in kind.__dataclass_fields__ if hasattr(entry, name)})
    return entry


# ---- for the compiler ----------------------------------------------------------------------------


def declarations(model: torch.nn.Module, plan: Any) -> tuple[Declaration, ...] | None:
    """The entries of `plan` ("model": that of the model or its class), one each; None for no plan.

    Raises:
        PlanError: the plan is malformed, or the model declares none.
    """
    if plan is None:
        return None
    found = get_sp_plan_from_model(model) if isinstance(plan, str) and plan == "model" else from_any(plan)
    if found is None:
        raise PlanError(f"sp_plan='model', but {type(model).__name__} declares no plan ({' or '.join(MODEL_PLANS)}). Leave sp_plan out: everything is inferred then")
    try:
        validate_sp_plan(found)
    except ValueError as error:
        raise PlanError(str(error)) from None
    entries: list[Declaration] = []
    for path, entry in found.items():
        if isinstance(entry, Mapping):
            for key, value in entry.items():
                entries += _inputs(path, key, value)
        elif isinstance(entry, ByToken):
            entries.append(Declaration(f"plan[{path!r}]", path, "tokens", "", None, -1))
        else:
            entries += _outputs(path, entry)
    return tuple(entries)


def _inputs(path: str, key: str | int, value: Any) -> list[Declaration]:
    kind, listed = "output" if isinstance(key, int) else "input", isinstance(value, list | tuple)
    return [
        Declaration(
            f"plan[{path!r}][{key!r}]" + (f"[{i}]" if listed else ""), path, kind, key, i if listed else None, entry.split_dim,
            expected_dims=entry.expected_dims, text=getattr(entry, "text_len_source", None), auto_pad=getattr(entry, "auto_pad", False),
        )
        for i, entry in enumerate(value if listed else [value])
    ]  # fmt: skip


def _outputs(path: str, value: Any) -> list[Declaration]:
    listed = isinstance(value, list | tuple)
    entries = value if listed else [value]
    return [
        Declaration(f"plan[{path!r}]" + (f"[{i}]" if listed else ""), path, "output", i, None, entry.gather_dim, gather=True, expected_dims=entry.expected_dims, count=len(entries))
        for i, entry in enumerate(entries)
        if entry is not None
    ]
