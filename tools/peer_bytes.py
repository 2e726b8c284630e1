"""Communicated bytes: seqpar beside diffusers' own context parallelism, whose plan is written by hand for each model.

    python -m seqpar.tools.peer_bytes [--model flux …] [--ulysses N] [--ring N] [--tokens N] [--meta] [--json [PATH]]

Both are counted the same way: the bytes the busiest rank receives from other ranks per call of the model, and the calls of
collectives, by kind. By default both run on local gloo ranks, and their outputs are compared with one process. `--meta` runs
no ranks and no arithmetic: one rank's diffusers program on meta tensors, and `seqpar.plan`; full sizes take no memory then.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

from seqpar.compile import sp_compile
from seqpar.errors import SeqparError
from seqpar.launching import launch
from seqpar.models.family import output_tensors
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.runtime.counting import KINDS
from seqpar.runtime.mesh import DIMS, build_mesh
from seqpar.tools.collective_counter import CollectiveCounter
from seqpar.tools.diffusers_peer import adapted, enable, fake_world
from seqpar.tools.sized_models import PEER_MODELS, Sizes, build, inputs_of
from seqpar.verification import difference

DEFAULT_MESHES = ((2, 1), (1, 2), (4, 1), (1, 4))


@dataclass(frozen=True)
class Count:
    """Of the busiest rank: bytes received and calls, per kind. `relative_error`: against one process, None if not computed."""

    bytes: dict[str, int]
    calls: dict[str, int]
    relative_error: float | None = None

    @property
    def total_bytes(self) -> int:
        return sum(self.bytes.values())

    @property
    def total_calls(self) -> int:
        return sum(self.calls.values())


@dataclass(frozen=True)
class Comparison:
    """One model on one mesh. `diffusers` is None when it cannot run, `refusal` says why; `measured` is None without ranks."""

    model: str
    ulysses: int
    ring: int
    sizes: Sizes
    diffusers: Count | None
    refusal: str
    planned: Count
    measured: Count | None

    @property
    def bytes_ratio(self) -> float | None:
        """Planned bytes of seqpar over counted bytes of diffusers."""
        return self.planned.total_bytes / self.diffusers.total_bytes if self.diffusers else None

    @property
    def calls_ratio(self) -> float | None:
        return self.planned.total_calls / self.diffusers.total_calls if self.diffusers else None

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return dataclasses.asdict(self) | {"bytes_ratio": self.bytes_ratio, "calls_ratio": self.calls_ratio}


def counted_call(model: nn.Module, inputs: dict[str, Any], ring_group: str | None = None) -> tuple[list[torch.Tensor], Count]:
    """Outputs of one call, and what this rank received in it."""
    counter = CollectiveCounter(ring_group)
    with torch.no_grad(), counter:
        outputs = output_tensors(model(**inputs))
    return outputs, Count(dict(counter.traffic.bytes), dict(counter.traffic.calls))


def busiest(counts: Sequence[Count]) -> Count:
    """The largest of each figure over the ranks, as `seqpar.plan` reports it."""
    errors = [c.relative_error for c in counts if c.relative_error is not None]
    return Count(
        {kind: max(c.bytes[kind] for c in counts) for kind in KINDS},
        {kind: max(c.calls[kind] for c in counts) for kind in KINDS},
        max(errors) if errors else None,
    )


def planned(model: str, sizes: Sizes, meshes: Sequence[tuple[int, int]]) -> list[Count]:
    """What `seqpar.plan` counts for each mesh; the model is traced once."""
    traced = trace(build(model, sizes, "meta"), (), inputs_of(model, sizes, "meta"), dynamic=False)
    plans = [partition(traced, ulysses=ulysses, ring=ring).plan for ulysses, ring in meshes]
    return [Count(dict(p.comm_bytes_per_rank), dict(p.comm_calls)) for p in plans]


def attempt(run: Callable[[], Count]) -> tuple[Count | None, str]:
    """The count, or why there is none; diffusers refuses uneven lengths and heads with errors of many types, on every rank alike."""
    try:
        return run(), ""
    except (AssertionError, RuntimeError, ValueError) as error:
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


def imagined(model: str, sizes: Sizes, ulysses: int, ring: int) -> tuple[Count | None, str]:
    """diffusers on meta tensors, as rank 0 of a world that does not exist; its parts are even, so every rank receives the same."""

    def run() -> Count:
        mesh = init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=DIMS)
        return counted_call(enable(build(model, sizes, "meta"), ulysses, ring, mesh), inputs_of(model, sizes, "meta"))[1]

    with fake_world(ulysses * ring), adapted():
        return attempt(run)


def measure_on_rank(models: Sequence[str], sizes: Sizes, meshes: Sequence[tuple[int, int]]) -> list[list[Any]]:
    """Collective: run every model on every mesh: [[diffusers, refusal, seqpar], …], models outermost."""
    torch.set_num_threads(1)
    results = []
    for name in models:
        inputs = inputs_of(name, sizes)
        with torch.no_grad():
            reference = output_tensors(build(name, sizes)(**inputs))
        for ulysses, ring in meshes:
            results.append(_measure(name, sizes, ulysses, ring, inputs, reference))
    return results


def _measure(name: str, sizes: Sizes, ulysses: int, ring: int, inputs: dict[str, Any], reference: list[torch.Tensor]) -> list[Any]:
    place = build_mesh(ulysses, ring, device_type="cpu")
    mesh = place.device_mesh
    assert mesh is not None, "one rank communicates nothing"

    def run_diffusers() -> Count:
        with adapted():
            return _checked(enable(build(name, sizes), ulysses, ring, mesh), inputs, reference)

    theirs, refusal = attempt(run_diffusers)
    fast = sp_compile(build(name, sizes), inputs, ulysses=ulysses, ring=ring, mesh=mesh, dynamic=False)
    ours = _checked(fast, inputs, reference, place.groups["ring"])
    everywhere: list[Any] = [None] * dist.get_world_size()
    # Plain data: run as a program, this file's classes are another module's on the ranks.
    dist.all_gather_object(everywhere, [None if count is None else dataclasses.asdict(count) for count in (theirs, ours)])
    peers = [Count(**their) for their, _ in everywhere if their is not None]
    return [dataclasses.asdict(busiest(peers)) if peers else None, refusal, dataclasses.asdict(busiest([Count(**our) for _, our in everywhere]))]


def _checked(model: nn.Module, inputs: dict[str, Any], reference: list[torch.Tensor], ring_group: str | None = None) -> Count:
    outputs, count = counted_call(model, inputs, ring_group)
    error = max(difference(value, expected)[1] for value, expected in zip(outputs, reference, strict=True))
    return dataclasses.replace(count, relative_error=error)


def measure(models: Sequence[str], sizes: Sizes, meshes: Sequence[tuple[int, int]]) -> dict[tuple[str, int, int], list[Any]]:
    """`measure_on_rank` on local ranks, one start for all meshes of a size."""
    found = {}
    for world in sorted({ulysses * ring for ulysses, ring in meshes}):
        here = [mesh for mesh in meshes if mesh[0] * mesh[1] == world]
        results = launch(measure_on_rank, world, tuple(models), sizes, tuple(here), device="cpu")[0]
        for (name, mesh), result in zip([(name, mesh) for name in models for mesh in here], results, strict=True):
            found[name, *mesh] = result
    return found


def compare(models: Sequence[str], sizes: Sizes, meshes: Sequence[tuple[int, int]], *, meta: bool) -> list[Comparison]:
    """Count every model on every mesh (ulysses, ring); `meta`: without ranks."""
    runs = {} if meta else measure(models, sizes, meshes)
    found = []
    for name in models:
        for (ulysses, ring), plan in zip(meshes, planned(name, sizes, meshes), strict=True):
            if meta:
                theirs, refusal = imagined(name, sizes, ulysses, ring)
                ours = None
            else:
                raw, refusal, own = runs[name, ulysses, ring]
                theirs, ours = Count(**raw) if raw else None, Count(**own)
            found.append(Comparison(name, ulysses, ring, sizes, theirs, refusal, plan, ours))
    return found


def table(comparisons: Sequence[Comparison]) -> str:
    """One line per model, mesh and program."""
    lines = [f"{'model':12} {'mesh':6} {'program':15} {'received':>12} {'calls':>6} {'error':>8}  by kind"]
    for c in comparisons:
        mesh = f"u{c.ulysses}" * (c.ulysses > 1) + f"r{c.ring}" * (c.ring > 1)
        rows = (("diffusers", c.diffusers), ("seqpar plan", c.planned), ("seqpar measured", c.measured))
        lines += [_row(c.model, mesh, what, count) for what, count in rows if count]
        if c.diffusers:
            verdict = f"{c.bytes_ratio:.3f} of the bytes, {c.calls_ratio:.3f} of the calls"
            lines.append(f"{'':19} {'ratio':15} {verdict}{'' if (c.bytes_ratio or 0) <= 1 else '   MORE BYTES THAN DIFFUSERS'}")
        else:
            lines.append(f"{c.model:12} {mesh:6} {'diffusers':15} cannot: {c.refusal}")
    return "\n".join(lines)


def _row(model: str, mesh: str, what: str, count: Count) -> str:
    kinds = ", ".join(f"{kind} {count.bytes[kind]:,} / {calls}" for kind, calls in count.calls.items() if calls)
    error = "-" if count.relative_error is None else f"{count.relative_error:.1e}"
    return f"{model:12} {mesh:6} {what:15} {count.total_bytes:12,} {count.total_calls:6} {error:>8}  {kinds}"


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m seqpar.tools.peer_bytes", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", nargs="+", choices=PEER_MODELS, default=list(PEER_MODELS))
    parser.add_argument("--ulysses", type=int, help="with --ring: the one mesh to compare (default: 2 and 4, each way)")
    parser.add_argument("--ring", type=int)
    for field in dataclasses.fields(Sizes):
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=int, default=field.default)
    parser.add_argument("--meta", action="store_true", help="count on meta tensors, without ranks")
    parser.add_argument("--json", nargs="?", const="-", metavar="PATH", help="write the counts there as well; without a path: print them instead of the table")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status is 1 if seqpar receives more bytes than diffusers anywhere."""
    options = parse(arguments)
    given = [degree for degree in (options.ulysses, options.ring) if degree is not None]
    if given and (min(given) < 1 or max(given) < 2):
        raise SystemExit("--ulysses and --ring must be >= 1, and one of them larger")
    meshes = [(options.ulysses or 1, options.ring or 1)] if given else list(DEFAULT_MESHES)
    try:
        sizes = Sizes(**{field.name: getattr(options, field.name) for field in dataclasses.fields(Sizes)})
        comparisons = compare(options.model, sizes, meshes, meta=options.meta)
    except SeqparError as error:
        raise SystemExit(str(error)) from error
    text = json.dumps([c.to_dict() for c in comparisons], indent=1)
    if options.json and options.json != "-":
        Path(options.json).write_text(text)
    print(text if options.json == "-" else table(comparisons))
    return 1 if any(c.bytes_ratio is not None and c.bytes_ratio > 1 for c in comparisons) else 0


if __name__ == "__main__":
    sys.exit(main())
