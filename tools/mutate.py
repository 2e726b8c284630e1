"""Test the tests: plant one mistake after the other and see that the suite notices.

    python -m seqpar.tools.mutate                        all mutants of tools/mutants.py
    python -m seqpar.tools.mutate cat halo               those with one of these words in their name
    python -m seqpar.tools.mutate --table docs/mutants.md

Each mutant is planted in a copy of the package, and only the tests that should notice it are run there, until one fails. Beside them the same
tests are run without a mistake. Exit status 1 if fewer than 95 % of the mutants are noticed.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from seqpar.errors import SeqparError
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


def run_tests(package: Path, tests: Iterable[str], timeout: float) -> str | None:
    """The first test that fails in a copy of the package, or None. Tests that never end fail, too."""
    tests = list(tests)
    for rules in (test for test in tests if test.startswith(RULES)):
        done = run(package, ["-m", "seqpar.tools.check_rules", "--samples", "1", *rules.removeprefix(RULES).split()], timeout)
        if done is None or done[0] != 0:
            return rules
    files = [test for test in tests if not test.startswith(RULES)]
    done = run(package, ["-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", "--show-capture=no", *files], timeout) if files else (0, "")
    if done is None:
        return f"no end after {timeout:.0f} s"
    if done[0] == 0:
        return None
    found = FAILED.search(done[1])
    if found is None:
        raise SeqparError(f"the tests did not run:\n{done[1][-2000:]}")
    return found[1]


def run(package: Path, arguments: Sequence[str], timeout: float) -> tuple[int, str] | None:
    """(exit status, output) of a Python process that imports the copy; None after `timeout`."""
    fewer = {"SEQPAR_FUZZ": os.environ.get("SEQPAR_FUZZ", "60")}  # random programs: a mistake that matters shows early
    environment = os.environ | fewer | {"PYTHONPATH": str(package.parent), "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run([sys.executable, *arguments], cwd=package, env=environment, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None
    return done.returncode, done.stdout + done.stderr


def examine(mutant: Mutant, timeout: float) -> Outcome:
    """Plant one mutant in a copy of its own and run its tests."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        package = copy_package(Path(folder))
        plant(mutant, package)
        noticed_by = run_tests(package, mutant.tests, timeout)
    return Outcome(mutant, noticed_by, time.monotonic() - started)


def check_without_mistakes(mutants: Sequence[Mutant], timeout: float) -> None:
    """Raise SeqparError if a test fails that no mutant made fail."""
    tests = {test for mutant in mutants for test in mutant.tests}
    rules = {operator for test in tests if test.startswith(RULES) for operator in test.removeprefix(RULES).split()}
    files = {test for test in tests if not test.startswith(RULES) and test.partition("::")[0] not in tests - {test}}
    together = [*sorted(files), *([RULES + " ".join(sorted(rules))] if rules else [])]
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        failed = run_tests(copy_package(Path(folder)), together, timeout * 10)
    if failed is not None:
        raise SeqparError(f"{failed} fails without any mistake planted: nothing can be said about the mutants")


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


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m seqpar.tools.mutate", description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("words", nargs="*", metavar="WORD", help="only mutants with one of these in their name or file; all if none is given")
    parser.add_argument("--jobs", type=int, default=2, help="mutants examined at a time")
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="tests that take longer count as failed")
    parser.add_argument("--table", type=Path, help="write a page about all mutants")
    options = parser.parse_args(arguments)
    mutants = [m for m in MUTANTS if not options.words or any(word in m.name or word in m.file for word in options.words)]
    outcomes: list[Outcome] = []
    try:
        with ThreadPoolExecutor(options.jobs) as pool:
            unplanted = pool.submit(check_without_mistakes, mutants, options.timeout)
            for outcome in pool.map(lambda mutant: examine(mutant, options.timeout), mutants):
                outcomes.append(outcome)
                print(line(outcome), flush=True)
            unplanted.result()
    except SeqparError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{noticed(outcomes)} of {len(outcomes)} noticed, {sum(not outcome.fine for outcome in outcomes)} survive without an explanation")
    if options.table:
        options.table.write_text(table(outcomes))
    return int(noticed(outcomes) < WANTED * len(outcomes))


if __name__ == "__main__":
    sys.exit(main())
