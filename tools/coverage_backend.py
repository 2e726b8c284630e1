"""What `torch.compile(model, backend="seqpar")` would make of a model, with all ranks simulated; and what diffusers' own plan receives.

Dynamo captures the graphs; each of them goes through what the backend does with it (`seqpar/backend.py`), except that the programs of
all ranks run in this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from seqpar.backend import concrete_inputs, may_attend
from seqpar.compat import outside_compiler, pytree
from seqpar.passes.pipeline import partition
from seqpar.passes.trace import trace
from seqpar.tools.collective_counter import CollectiveCounter
from seqpar.tools.coverage_cases.case import Case
from seqpar.verification import attention_tolerance, compare, same_bits, simulate

Result = dict[str, Any]


@dataclass
class SimulatingBackend:
    """A Dynamo backend that splits each graph over simulated ranks. graphs, split: graphs seen, and those with something to shard.
    least: tolerance of the lowest precision attended in."""

    ulysses: int
    ring: int
    graphs: int = 0
    split: int = 0
    agree: bool = True
    least: float = 0.0
    errors: list[str] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self.graphs += 1
        if not may_attend(gm):
            return gm.forward
        with outside_compiler():
            try:
                traced = trace(gm, concrete_inputs(gm, example_inputs), {}, dynamic=False, warm=False)
                partitioned = partition(traced, ulysses=self.ulysses, ring=self.ring)
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")
                return gm.forward
        if partitioned.nothing_to_shard:
            return gm.forward
        self.split += 1
        self.least = max(self.least, attention_tolerance(traced.gm.graph))

        def run(*inputs: Any) -> list[Any]:
            given = [inputs[position] for position in traced.input_positions]
            outputs = simulate(partitioned, [tensor.contiguous() for tensor in given])
            for other in outputs[1:]:
                self.agree = self.agree and all(same_bits(a, b) for a, b in zip(other, outputs[0], strict=True) if isinstance(a, torch.Tensor))
            for mutation in traced.mutations:
                given[mutation.placeholder].copy_(outputs[0][mutation.output])  # type: ignore[index]
            return list(outputs[0][: traced.num_outputs])

        return run


def measure_backend(case: Case, variant: str, ulysses: int = 2, ring: int = 1) -> Result:
    """One call of the compiled model, compared with the model: error, graphs, and those that were split."""
    started = time.perf_counter()
    backend = SimulatingBackend(ulysses, ring)
    torch._dynamo.reset()
    result: Result = {}
    try:
        with torch.no_grad():
            expected = pytree.tree_leaves(case.build()(**case.inputs(variant)))
            found = pytree.tree_leaves(torch.compile(case.build(), backend=backend)(**case.inputs(variant)))
        _, worst, ok = compare(expected, [found], backend.least)
        result = {"rel_err": worst, "ok": ok and backend.agree}
    except Exception as error:
        backend.errors.append(f"{type(error).__name__}: {error}")
    finally:
        torch._dynamo.reset()
    if backend.errors:
        result["error"] = backend.errors[0][:500]
    return result | {"graphs": backend.graphs, "split": backend.split, "seconds": round(time.perf_counter() - started, 2)}


def has_plan(case: Case) -> bool:
    """True if diffusers has a hand-written plan for the class."""
    return bool(getattr(case.build(), "_cp_plan", None))


def measure_peer(case: Case, variant: str, meshes: Mapping[str, tuple[int, int]]) -> Result:
    """Bytes one rank receives under diffusers' own plan, per mesh, or why it cannot run. Nothing but this rank exists."""
    from seqpar.tools.diffusers_peer import adapted, enable, fake_world

    found: Result = {}
    for name, (ulysses, ring) in meshes.items():
        with fake_world(ulysses * ring), adapted(), torch.no_grad():
            counter = CollectiveCounter()
            try:
                mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
                model = enable(case.build(), ulysses, ring, mesh)
                with counter:
                    model(**case.inputs(variant))
                found[name] = {"bytes": sum(counter.traffic.bytes.values())}
            except Exception as error:
                found[name] = {"refusal": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    return found
