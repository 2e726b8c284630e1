"""Derive a `_cp_plan` for every diffusers class of the coverage cases, and run it through diffusers' own hooks on real ranks.

    python -m seqpar.tools.derive_plans --work DIR [--only PATTERN] [--docs docs/plans.md]

Deriving is single-process, one JSON file per case in DIR; a case that is there already is not derived again. Then one start of `--ranks` gloo ranks runs
every class with its derived plan, and with the class's own where it has one, and compares with the model in one process. Exit status 1 if an output differs.
"""

import argparse
import dataclasses
import fnmatch
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

from seqpar.derive import derive_sp_plan
from seqpar.errors import SeqparError
from seqpar.hooked import has_context_parallelism
from seqpar.launching import launch
from seqpar.models.family import output_tensors
from seqpar.runtime.mesh import build_mesh
from seqpar.tools.coverage_cases import all_cases
from seqpar.tools.coverage_cases.case import Case, Draw
from seqpar.tools.diffusers_peer import adapted, enable
from seqpar.tools.peer_bytes import counted_call
from seqpar.verification import difference

TOLERANCE = 1e-4
BEGIN, END = "<!-- table of derived plans -->", "<!-- end of the table -->"
# What diffusers' attention over ranks cannot take: masks with heads, or made inline. Optional inputs; the classes are derived without them as well.
OPTIONAL_MASKS = ("encoder_attention_mask", "encoder_hidden_states_mask", "attention_mask", "audio_encoder_attention_mask")
FITTED = "fitted"
VARIANTS = ("even", FITTED, "large")
UNEVEN = "positions are not divided by"
ALONE = "does not exchange over the ranks"  # its attention does not go by diffusers' dispatcher: no plan could help
Plan = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One case. reason: why it has no plan. without: inputs that were left out. error: largest relative difference over ranks; received: bytes per rank and call.

    `own_*`: the same for the plan the class ships (None: it ships none, or `own_refusal` says why it does not run).
    """

    case: str
    plan: Any = None
    reason: str = ""
    variant: str = "even"
    without: tuple[str, ...] = ()
    seconds: float = 0.0
    error: float | None = None
    received: int | None = None
    refusal: str = ""
    own: bool = False
    own_error: float | None = None
    own_received: int | None = None
    own_refusal: str = ""

    @property
    def good(self) -> bool:
        """Its plan was run on real ranks, and the outputs agree."""
        return self.error is not None and self.error < TOLERANCE


def encode(value: Any) -> Any:
    """A plan as JSON: entries are marked by their type."""
    if isinstance(value, Mapping):
        return {"dict": [[key, encode(entry)] for key, entry in value.items()]}
    if isinstance(value, list | tuple):
        return [encode(entry) for entry in value]
    return {type(value).__name__: dataclasses.asdict(value)}


def decode(value: Any) -> Any:
    """The plan of `encode`."""
    if isinstance(value, list):
        return [decode(entry) for entry in value]
    ((kind, content),) = value.items()
    if kind == "dict":
        return {key: decode(entry) for key, entry in content}
    return {"ContextParallelInput": ContextParallelInput, "ContextParallelOutput": ContextParallelOutput}[kind](**content)


class Fitted(Draw):
    """Even inputs, with so many fewer tokens that those the model adds by itself make their number even too."""

    @property
    def tokens(self) -> int:
        return super().tokens - 3


def inputs_of(case: Case, variant: str, without: Sequence[str]) -> dict[str, Any]:
    """The inputs of these lengths, with those in `without` left out."""
    given = case.draw(Fitted("even")) if variant == FITTED else case.inputs(variant)
    return {name: None if name in without else value for name, value in given.items()}


def derive_case(case: Case, ulysses: int, ring: int, variants: Sequence[str] = VARIANTS) -> Row:
    """The plan of a class, or why there is none: without its masks if there is none with them, and with longer inputs if the ranks do not divide these."""
    started = time.perf_counter()
    model = case.build()
    masks = tuple(name for name in OPTIONAL_MASKS if case.inputs("even").get(name) is not None)
    row = Row(case.name, own=bool(getattr(model, "_cp_plan", None)))
    for variant in variants:
        for without in dict.fromkeys(((), masks)):
            try:
                plan = derive_sp_plan(model, inputs_of(case, variant, without), ulysses=ulysses, ring=ring, style="cp_plan")
                return dataclasses.replace(row, plan=encode(plan), reason="", variant=variant, without=without, seconds=time.perf_counter() - started)
            except Exception as error:  # the model itself may need its masks
                row = dataclasses.replace(row, reason=row.reason or (str(error) if isinstance(error, SeqparError) else f"{type(error).__name__}: {error}"))
        if UNEVEN not in row.reason:
            break
        row = dataclasses.replace(row, reason="" if variant != variants[-1] else row.reason)
    return dataclasses.replace(row, seconds=time.perf_counter() - started)


def check_on_rank(rows: Sequence[Row], ulysses: int, ring: int, path: str) -> None:
    """Collective: run every derived plan, and the classes' own; rank 0 writes the rows with what was found."""
    torch.set_num_threads(1)
    mesh = build_mesh(ulysses, ring, device_type="cpu").device_mesh
    assert mesh is not None
    cases = {case.name: case for case in all_cases()}
    found = []
    for row in rows:
        case = cases[row.case]
        inputs = inputs_of(case, row.variant, row.without)
        with torch.no_grad():
            expected = output_tensors(case.build()(**inputs))

        def run(plan: Plan | None, case: Case = case, inputs: dict[str, Any] = inputs, expected: list[torch.Tensor] = expected) -> tuple[float, int]:
            with adapted():
                outputs, count = counted_call(enable(case.build(), ulysses, ring, mesh, plan), inputs)
            worst = max(difference(a, b)[1] for a, b in zip(outputs, expected, strict=True))
            worst_of_all = torch.tensor(worst)
            torch.distributed.all_reduce(worst_of_all, torch.distributed.ReduceOp.MAX)
            return float(worst_of_all), count.total_bytes

        if row.plan is not None:
            error, received, refusal = attempt(run, decode(row.plan))
            row = dataclasses.replace(row, error=error, received=received, refusal=refusal)
        if row.own:
            error, received, refusal = attempt(run, None)
            row = dataclasses.replace(row, own_error=error, own_received=received, own_refusal=refusal)
        found.append(dataclasses.asdict(row))
        if torch.distributed.get_rank() == 0:
            Path(path).write_text(json.dumps(found))


def attempt(run: Callable[[Plan | None], tuple[float, int]], plan: Plan | None) -> tuple[float | None, int | None, str]:
    """(error, bytes, "") or (None, None, why not); diffusers refuses alike on every rank, with errors of many types."""
    try:
        return *run(plan), ""
    except Exception as error:
        return None, None, f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def entries(plan: Any) -> str:
    """A plan in one line of Markdown: what is split at each module, `→` what is gathered there."""
    if not isinstance(plan, Mapping):
        return ""
    words = []
    for path, table in plan.items():
        name = path or "model"
        if isinstance(table, Mapping):
            words.append(f"`{name}({', '.join(str(key) for key in table)})`")
        else:
            words.append(f"→ `{name}`")
    return " ".join(words)


def table(rows: Sequence[Row]) -> str:
    """Markdown: the classes with a plan, then those without and why; of those whose attention knows of no ranks the names."""
    lines = ["| class | plan: split at → gathered after | without | error | bytes | own plan: error, bytes |", "|---|---|---|---|---|---|"]
    for row in rows:
        if row.plan is None:
            continue
        own = "" if not row.own else row.own_refusal[:90] if row.own_error is None else f"{row.own_error:.0e}, {row.own_received}"
        error = f"{row.error:.0e}" if row.error is not None else row.refusal[:80]
        lines.append(f"| {row.case} | {entries(decode(row.plan))} | {', '.join(row.without)} | {error} | {row.received or ''} | {own} |")
    lines += ["", "| class without a plan | reason |", "|---|---|"]
    lines += [f"| {row.case} | {short(row.reason)} |" for row in rows if row.plan is None and ALONE not in row.reason]
    alone = [row.case for row in rows if row.plan is None and ALONE in row.reason]
    if alone:
        lines += ["", f"An attention of these calls `scaled_dot_product_attention` itself, and {ALONE} whatever the plan: {', '.join(alone)}."]
    good = [row for row in rows if row.good]
    lines += ["", f"{len(good)} plans reproduce the model, {sum(not row.own for row in good)} of them of classes that ship none."]
    return "\n".join(lines) + "\n"


def inserted(page: str, text: str) -> str:
    """The page with `text` between its two comments.

    Raises:
        SeqparError: the page has no such comments.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SeqparError(f"the page has no place for the table: add the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{text}\n{END}{after}"


def short(reason: str) -> str:
    """Without the class's name and the folders of files."""
    text = re.sub(r"[\w./-]*/(\w+\.py)", r"\1", reason.partition(" ranks: ")[2] or reason)
    return text.replace("\n", " ").replace("|", "\\|")[:400]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="seqpar.tools.derive_plans", description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="folder of one JSON file per case; derived cases are not derived again")
    parser.add_argument("--only", default="*", help="patterns of case names, separated by commas, for example 'Flux*,Wan*'")
    parser.add_argument("--variant", default=",".join(VARIANTS), help="lengths of the inputs: the first that the ranks divide")
    parser.add_argument("--ulysses", type=int, default=2)
    parser.add_argument("--ring", type=int, default=1)
    parser.add_argument("--no-ranks", action="store_true", help="derive only")
    parser.add_argument("--docs", type=Path, help="put the table into this page, between its two comments")
    options = parser.parse_args(argv)
    cases = [c for c in all_cases() if any(fnmatch.fnmatchcase(c.name, p) for p in options.only.split(","))]
    options.work.mkdir(parents=True, exist_ok=True)
    rows = []
    for case in cases:
        if not has_context_parallelism(case.construct()):
            continue
        path = options.work / f"{case.name}.json"
        if not path.exists():
            path.write_text(json.dumps(dataclasses.asdict(derive_case(case, options.ulysses, options.ring, options.variant.split(",")))))
        rows.append(Row(**json.loads(path.read_text())))
        print(f"{case.name}: {entries(decode(rows[-1].plan)) if rows[-1].plan else 'no plan: ' + short(rows[-1].reason)[:150]}", flush=True)
    if not options.no_ranks and rows:
        path = options.work / "checked.json"
        runnable = tuple(row for row in rows if row.plan is not None or row.own)
        launch(check_on_rank, options.ulysses * options.ring, runnable, options.ulysses, options.ring, str(path), device="cpu")
        checked = {row["case"]: Row(**row) for row in json.loads(path.read_text())}
        rows = [checked.get(row.case, row) for row in rows]
    text = table(rows)
    print(text)
    if options.docs:
        options.docs.write_text(inserted(options.docs.read_text(), text))
    return int(any(row.error is not None and not row.good for row in rows))


if __name__ == "__main__":
    sys.exit(main())
