"""Test the tests: plant one mistake after the other and see that the suite notices.

    python -m seqpar.tools.mutate                        all mutants of tools/mutants.py
    python -m seqpar.tools.mutate cat halo               those with one of these words in their name
    python -m seqpar.tools.mutate --state build/mutants.jsonl --table docs/mutants.md

Each mutant is planted in a copy of the package, and only the tests that should notice it are run there, until one fails. After them the same
tests are run without a mistake. Exit status 1 if fewer than 95 % of the mutants are noticed.

With `--state` an interrupted run goes on where it was: what was found out about a mutant is kept as long as its own text and its list of tests are
the same. It is not seen that the rest of the source changed: delete the file to examine all again. Survivors without an explanation are always examined again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from seqpar.errors import SeqparError
from seqpar.tools.forks import ForkServer
from seqpar.tools.mutants import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[1]
LEAVE_OUT = shutil.ignore_patterns(".*", "build", "dist", "demo_output", "__pycache__", "*.egg-info")
WANTED = 0.95
RULES = "check_rules "  # operators whose rules are checked by that tool
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """`noticed_by`: the first failing test; None if all passed."""

    mutant: Mutant
    noticed_by: str | None
    seconds: float

    @property
    def fine(self) -> bool:
        """Noticed, or explained."""
        return self.noticed_by is not None or bool(self.mutant.harmless)


def plant(mutant: Mutant, package: Path) -> None:
    """Change the copy of the package at `package`.

    Raises:
        SeqparError: the text to replace does not occur exactly once.
    """
    file = package / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise SeqparError(f"mutant {mutant.name!r}: {mutant.file} has {text.count(mutant.old)} times {mutant.old!r}. Adapt tools/mutants.py to the source")
    file.write_text(text.replace(mutant.old, mutant.new))


def copy_package(folder: Path) -> Path:
    """The package without what is made from it, in `folder`; importable with `folder` on the path."""
    return Path(shutil.copytree(ROOT, folder / "seqpar", ignore=LEAVE_OUT))


def run_tests(package: Path, tests: Iterable[str], timeout: float, server: ForkServer) -> str | None:
    """The first test that fails in a copy of the package, or None. Tests that never end fail, too."""
    tests = list(tests)

    def run(module: str, *arguments: str) -> tuple[int, str] | None:
        return server.run(module, arguments, package.parent, package, timeout)

    for rules in (test for test in tests if test.startswith(RULES)):
        done = run("seqpar.tools.check_rules", "--samples", "1", *rules.removeprefix(RULES).split())
        if done is None or done[0] != 0:
            return rules
    files = [test for test in tests if not test.startswith(RULES)]
    done = run("pytest", "-x", "-q", "-p", "no:cacheprovider", "--show-capture=no", *files) if files else (0, "")
    if done is None:
        return f"no end after {timeout:.0f} s"
    if done[0] == 0:
        return None
    found = FAILED.search(done[1])
    if found is None:
        raise SeqparError(f"the tests did not run:\n{done[1][-2000:]}")
    return found[1]


def start_server() -> ForkServer:
    """One whose children run tests."""
    fewer = {"SEQPAR_FUZZ": os.environ.get("SEQPAR_FUZZ", "60")}  # random programs: a mistake that matters shows early
    return ForkServer(os.environ | fewer | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"})


def examine(mutant: Mutant, timeout: float, server: ForkServer) -> Outcome:
    """Plant one mutant in a copy of its own and run its tests."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        package = copy_package(Path(folder))
        plant(mutant, package)
        noticed_by = run_tests(package, mutant.tests, timeout, server)
    return Outcome(mutant, noticed_by, time.monotonic() - started)


def without_mistakes(mutants: Sequence[Mutant]) -> list[str]:
    """The tests of all mutants, each once."""
    tests = {test for mutant in mutants for test in mutant.tests}
    rules = {operator for test in tests if test.startswith(RULES) for operator in test.removeprefix(RULES).split()}
    files = {test for test in tests if not test.startswith(RULES) and test.partition("::")[0] not in tests - {test}}
    return [*sorted(files), *([RULES + " ".join(sorted(rules))] if rules else [])]


def check_without_mistakes(tests: Sequence[str], timeout: float, server: ForkServer) -> None:
    """Raise SeqparError if a test fails that no mutant made fail."""
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        failed = run_tests(copy_package(Path(folder)), tests, timeout * 10, server)
    if failed is not None:
        raise SeqparError(f"{failed} fails without any mistake planted: nothing can be said about the mutants")


class State:
    """What earlier runs found out, one JSON object a line: an outcome, or the tests that pass without a mistake.

    Lines that an interruption cut short are dropped. Without a path nothing is kept.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._records: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self._records = [record for line in path.read_text().splitlines() if (record := _parsed(line)) is not None]
            path.write_text("".join(json.dumps(record) + "\n" for record in self._records))

    def outcome(self, mutant: Mutant) -> Outcome | None:
        """Of the same change and the same tests, if it needs no second look."""
        key = _key(mutant)
        for record in reversed(self._records):
            if all(record.get(name) == value for name, value in key.items()):
                found = Outcome(mutant, record["noticed_by"], record["seconds"])
                return found if found.fine else None
        return None

    def passed(self, tests: Sequence[str]) -> bool:
        return any(record.get("without_mistakes") == list(tests) for record in self._records)

    def add(self, outcome: Outcome) -> None:
        self._write({"name": outcome.mutant.name, **_key(outcome.mutant), "noticed_by": outcome.noticed_by, "seconds": round(outcome.seconds, 1)})

    def add_passed(self, tests: Sequence[str]) -> None:
        self._write({"without_mistakes": list(tests)})

    def _write(self, record: dict[str, Any]) -> None:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(record) + "\n")


def _key(mutant: Mutant) -> dict[str, Any]:
    return {"file": mutant.file, "old": mutant.old, "new": mutant.new, "tests": list(mutant.tests)}


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(line))
    except ValueError:
        return None


def noticed(outcomes: Sequence[Outcome]) -> int:
    return sum(outcome.noticed_by is not None for outcome in outcomes)


def line(outcome: Outcome) -> str:
    state = outcome.noticed_by or ("harmless: " + outcome.mutant.harmless if outcome.mutant.harmless else "SURVIVES")
    return f"{outcome.seconds:6.1f} s  {outcome.mutant.file:34} {outcome.mutant.name}: {state}"


def table(outcomes: Sequence[Outcome]) -> str:
    """A page with one row per mutant."""
    rows = [
        "# Planted mistakes",
        "",
        f"Made by `make mutants`: {noticed(outcomes)} of {len(outcomes)} mistakes are noticed by the few tests chosen for each. The changes themselves are in",
        "`tools/mutants.py`. The test named is the first that fails; what survives is explained in its place.",
        "",
        "| file | mistake | noticed by |",
        "|---|---|---|",
    ]
    for outcome in outcomes:
        test = f"`{outcome.noticed_by.removeprefix('tests/')}`" if outcome.noticed_by else None
        rows.append(f"| `{outcome.mutant.file}` | {outcome.mutant.name} | {test or '**not noticed**: ' + (outcome.mutant.harmless or 'no test looks at it')} |")
    return "\n".join(rows) + "\n"


@contextmanager
def start_servers(count: int) -> Iterator[Callable[[], AbstractContextManager[ForkServer]]]:
    """A function that lends one of so many servers, and waits for one that is free."""
    free: SimpleQueue[ForkServer] = SimpleQueue()

    @contextmanager
    def lend() -> Iterator[ForkServer]:
        server = free.get()
        try:
            yield server
        finally:
            free.put(server)

    with ExitStack() as stack:
        for _ in range(count):
            free.put(stack.enter_context(start_server()))
        yield lend


def examine_all(mutants: Sequence[Mutant], state: State, jobs: int, timeout: float) -> Iterator[Outcome]:
    """The outcomes in the order of the mutants, and last the check without a mistake.

    Raises:
        SeqparError: the tests of a mutant did not run (the others are examined before), or fail without a mistake.
    """
    known = [state.outcome(mutant) for mutant in mutants]
    errors: list[str] = []
    with start_servers(jobs) as lend, ThreadPoolExecutor(jobs) as pool:

        def examine_one(mutant: Mutant) -> Outcome:
            with lend() as server:
                return examine(mutant, timeout, server)

        futures = [None if found else pool.submit(examine_one, mutant) for mutant, found in zip(mutants, known, strict=True)]
        for found, future in zip(known, futures, strict=True):
            try:
                if future is not None:
                    found = future.result()
                    state.add(found)
            except SeqparError as error:
                errors.append(str(error))
            if found is not None:
                yield found
        tests = without_mistakes(mutants)
        if not state.passed(tests):
            with lend() as server:
                check_without_mistakes(tests, timeout, server)
            state.add_passed(tests)
    if errors:
        raise SeqparError("\n".join(errors))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m seqpar.tools.mutate", description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutants with one of these in their name or file; all if none is given")
    parser.add_argument("--jobs", type=int, default=2, help="mutants examined at a time")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="tests that take longer count as failed")
    parser.add_argument("--table", type=Path, help="write a page about all mutants")
    parser.add_argument("--state", type=Path, help="JSON lines: what earlier runs found out, so that an interrupted one goes on")
    options = parser.parse_args(arguments)
    mutants = [m for m in MUTANTS if not options.words or any(word in m.name or word in m.file for word in options.words)]
    state, outcomes = State(options.state), []
    try:
        for outcome in examine_all(mutants, state, options.jobs, options.timeout):
            outcomes.append(outcome)
            print(line(outcome), flush=True)
    except SeqparError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{noticed(outcomes)} of {len(outcomes)} noticed, {sum(not outcome.fine for outcome in outcomes)} survive without an explanation")
    if options.table:
        options.table.write_text(table(outcomes))
    return int(noticed(outcomes) < WANTED * len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
