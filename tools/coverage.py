"""Run seqpar over every model it should cover: trace, partition, and compare all simulated ranks with the model itself.

    python -m seqpar.tools.coverage --work DIR [--only PATTERN] [--jobs N] [--fresh] [--json FILE] [--table FILE]

One process per case; a case that is in DIR already is not run again. Exit status 1 if any case is wrong or raised.
"""

import argparse
import fnmatch
import json
import multiprocessing
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from seqpar.compat import pytree
from seqpar.errors import MeshError, SeqparError
from seqpar.passes.pipeline import partition
from seqpar.passes.plan import Plan
from seqpar.passes.trace import Traced, trace
from seqpar.tools.coverage_backend import has_plan, measure_backend, measure_peer
from seqpar.tools.coverage_cases import all_cases
from seqpar.tools.coverage_cases.case import Case
from seqpar.tools.coverage_table import summary_line, table
from seqpar.verification import difference, verify_traced

MESHES = {"u2": (2, 1), "r2": (1, 2), "u4": (4, 1), "u2r2": (2, 2)}
LARGE_MESHES = ("u2", "r2", "u2r2")
TIMEOUT_S = 400.0
Result = dict[str, Any]


def describe_plan(plan: Plan) -> Result:
    """What the table needs of a plan, equal rows folded."""
    strategies = Counter((a.strategy, a.queries, a.keys, a.heads) for a in plan.attention)
    replicated = Counter((o.op, o.reason, o.source) for o in plan.replicated_ops)
    flops: Counter[tuple[str, str, str]] = Counter()
    for o in plan.replicated_ops:
        flops[(o.op, o.reason, o.source)] += o.flops
    total = max(plan.flops_total, 1)
    return {
        "fraction": plan.sharded_flop_fraction,
        "comm_bytes": sum(plan.comm_bytes_per_rank.values()),
        "comm_calls": {k: n for k, n in plan.comm_calls.items() if n},
        "attention": [{"strategy": s, "queries": q, "keys": k, "heads": h, "count": n} for (s, q, k, h), n in strategies.items()],
        "replicated": [
            {"op": op, "reason": why, "source": source, "count": n, "share": flops[(op, why, source)] / total}
            for (op, why, source), n in sorted(replicated.items(), key=lambda item: -flops[item[0]])
        ],
        "nothing_to_shard": plan.nothing_to_shard,
    }


def failure(error: BaseException) -> Result:
    frames = traceback.extract_tb(error.__traceback__)
    where = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames[-4:]]
    return {"error": f"{type(error).__name__}: {error}", "where": where, "user_error": isinstance(error, SeqparError)}


def measure_mesh(traced: Traced, ulysses: int, ring: int, simulate: bool) -> Result:
    started = time.perf_counter()
    result: Result = {}
    try:
        if simulate:
            report = verify_traced(traced, ulysses=ulysses, ring=ring)
            plan = report.plan
            result = {"ok": report.ok, "rel_err": report.max_rel_err, "first_divergence": report.first_divergence}
        else:
            plan = partition(traced, ulysses=ulysses, ring=ring).plan
        result |= describe_plan(plan)
    except MeshError as error:
        result = {"skipped": str(error)}
    except Exception as error:
        result = failure(error)
    return result | {"seconds": round(time.perf_counter() - started, 2)}


def trace_error(case: Case, variant: str, traced: Traced) -> float:
    """Relative difference between the traced graph and the model itself, run eagerly with the same weights and inputs."""
    with torch.no_grad():
        expected = pytree.tree_leaves(case.build()(**case.inputs(variant)))
        found = traced.gm(*(traced.call.leaves[i].contiguous() for i in traced.input_positions))
    return max((difference(f, e)[1] for f, e in zip(found, expected, strict=False) if isinstance(e, torch.Tensor)), default=0.0)


def measure_variant(case: Case, variant: str, backend: bool) -> Result:
    """Trace once, then every mesh. The large variant is planned for three meshes and not simulated; `backend`: also under torch.compile."""
    started = time.perf_counter()
    try:
        traced = trace(case.build(), (), case.inputs(variant), dynamic=False)
        trace_err = trace_error(case, variant, traced)
    except Exception as error:
        return {"traced": False, **failure(error), "seconds": round(time.perf_counter() - started, 2)}
    seconds = round(time.perf_counter() - started, 2)
    result: Result = {"traced": True, "trace_err": trace_err, "nodes": len(traced.gm.graph.nodes), "seconds": seconds}
    result |= {"reads": len(traced.reads), "opaque": sorted({call.name for call in traced.opaque})}
    large = variant == "large"
    meshes = {name: mesh for name, mesh in MESHES.items() if not large or name in LARGE_MESHES}
    result["meshes"] = {name: measure_mesh(traced, u, r, not large) for name, (u, r) in meshes.items()}
    if variant == "even" and backend:
        result["backend"] = measure_backend(case, variant)
    if large and has_plan(case):
        result["peer"] = measure_peer(case, variant, meshes)
    return result


def run_case(case: Case, variants: list[str], path: Path, backend: bool = False) -> None:
    """The whole measurement of one case, written to `path` after each variant."""
    torch.set_num_threads(1)
    result: Result = {"case": case.name, "variants": {}}
    for variant in variants:
        result["variants"][variant] = measure_variant(case, variant, backend)
        path.write_text(json.dumps(result))


@dataclass(frozen=True)
class Run:
    """A case that is being measured in a process of its own; its result goes to `path`."""

    case: Case
    variants: list[str]
    path: Path
    process: multiprocessing.process.BaseProcess
    started: float

    @classmethod
    def start(cls, case: Case, variants: list[str], path: Path, backend: bool = False) -> "Run":
        partial = path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        process = multiprocessing.get_context("fork").Process(target=run_case, args=(case, variants, partial, backend))
        process.start()
        return cls(case, variants, path, process, time.perf_counter())

    def over(self, timeout: float) -> bool:
        return not self.process.is_alive() or time.perf_counter() - self.started > timeout

    def finish(self, timeout: float) -> Result:
        """The result, after at most `timeout` seconds from the start; a crash or a hang becomes a recorded failure."""
        self.process.join(max(0.0, timeout - (time.perf_counter() - self.started)))
        problem = None
        if self.process.is_alive():
            problem = f"no answer after {timeout:.0f} s"
            self.process.kill()
            self.process.join()
        elif self.process.exitcode:
            problem = f"the process ended with {self.process.exitcode}"
        partial = self.path.with_suffix(".partial")
        result: Result = json.loads(partial.read_text()) if partial.exists() else {"case": self.case.name, "variants": {}}
        partial.unlink(missing_ok=True)
        if problem:
            missing = next((v for v in self.variants if v not in result["variants"]), self.variants[-1])
            result["variants"][missing] = {"traced": False, "error": problem, "seconds": timeout}
        result["seconds"] = round(time.perf_counter() - self.started, 1)
        self.path.write_text(json.dumps(result, indent=1))
        return result


def run_apart(case: Case, variants: list[str], path: Path, timeout: float, backend: bool = False) -> Result:
    """`run_case` in a process of its own."""
    return Run.start(case, variants, path, backend).finish(timeout)


def run_all(cases: list[Case], options: argparse.Namespace) -> Iterator[tuple[Result, bool]]:
    """(result, whether it was known) of every case, as they end; `options.jobs` at a time."""
    running: list[Run] = []
    waiting = list(cases)
    while waiting or running:
        while waiting and len(running) < options.jobs:
            case = waiting.pop(0)
            path = options.work / f"{case.name}.json"
            if path.exists() and not options.fresh:
                yield json.loads(path.read_text()), True
            else:
                running.append(Run.start(case, options.variants.split(","), path, not options.no_backend))
        connection.wait([run.process.sentinel for run in running], timeout=1.0)
        for run in [run for run in running if run.over(options.timeout)]:
            running.remove(run)
            yield run.finish(options.timeout), False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="seqpar.tools.coverage", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of one JSON file per case; finished cases are not run again")
    parser.add_argument("--only", default="*", help="patterns of case names, separated by commas, for example 'Flux*,Wan*'")
    parser.add_argument("--variants", default="even,odd,large")
    parser.add_argument("--fresh", action="store_true", help="run cases again that are finished")
    parser.add_argument("--timeout", type=float, default=TIMEOUT_S, help="seconds per case")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time")
    parser.add_argument("--no-backend", action="store_true", help="leave out torch.compile")
    parser.add_argument("--json", type=Path, help="write all results to one file")
    parser.add_argument("--table", type=Path, help="write the table as Markdown")
    parser.add_argument("--list", action="store_true", help="print the names of the cases")
    options = parser.parse_args(argv)
    patterns = options.only.split(",")
    cases = [c for c in all_cases() if any(fnmatch.fnmatchcase(c.name, p) for p in patterns)]
    if options.list:
        print("\n".join(c.name for c in cases))
        return 0
    options.work.mkdir(parents=True, exist_ok=True)
    found: dict[str, Result] = {}
    for number, (result, known) in enumerate(run_all(cases, options), 1):
        found[result["case"]] = result
        print(f"[{number}/{len(cases)}] {summary_line(result)}{' (known)' if known else ''}", flush=True)
    results = [found[case.name] for case in cases]
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    if options.table:
        options.table.write_text(table(results))
    return int(any(not summary_line(r).startswith("ok") for r in results))


if __name__ == "__main__":
    sys.exit(main())
