"""The house rules that a machine can hold: floors, size budgets, and a compiler that knows no model by name."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("runtime", "partitioner", "passes", "models", "tools")
FILE_BUDGET = 400
FUNCTION_BUDGET = 60

# What each floor may import of seqpar. "root" is the files beside README.md; errors and compat belong to everybody.
FLOORS = {
    "runtime": {"runtime"},
    "partitioner": {"partitioner"},
    "passes": {"passes", "partitioner", "runtime"},
    "models": {"models", "passes", "partitioner", "runtime"},
    "root": {"root", "passes", "partitioner", "runtime"},
    "tools": {"tools", "root", "models", "passes", "partitioner", "runtime"},
}
NAMELESS_FLOORS = ("runtime", "partitioner", "passes")
NAMES = re.compile(
    r"flux|qwen|\bwan\b|wan2|z-image|z_image|zimage|longcat|\bsd3|stable.?diffusion|\bltx|hunyuan|bagel|diffusers|transformer2d|transformer3d|transformers\b",
    re.IGNORECASE,
)
NAME_DEPENDENCE = re.compile(r"__class__\.__name__\s*[!=]=|__name__\s*[!=]=|__name__\.(starts|ends)with|class_name|isinstance\(model,")


def floor_of(path):
    first = path.relative_to(ROOT).parts[0]
    return first if first in FOLDERS else "root"


def source_files():
    return sorted([*ROOT.glob("*.py"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))])


def imported_modules(tree):
    """(module, line) of every import, also inside functions; `from seqpar import x` counts as `seqpar.x`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names = [f"seqpar.{alias.name}" for alias in node.names] if module == "seqpar" else [module]
            yield from ((name, node.lineno) for name in names)


def floor_violations(source, floor):
    for module, line in imported_modules(ast.parse(source)):
        first, _, rest = module.partition(".")
        if module.startswith("."):
            yield f"line {line}: relative import {module}"
        elif first in FOLDERS:
            yield f"line {line}: import {module} as seqpar.{module}"
        elif first == "seqpar":
            part = rest.partition(".")[0]
            target = part if part in FOLDERS else "root"
            if part not in ("errors", "compat") and target not in FLOORS[floor]:
                yield f"line {line}: {floor} must not import {module}"


def long_functions(source):
    """Functions over the budget; a docstring is free, since a good one should not be shortened for it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0]
            has_docstring = ast.get_docstring(node) is not None
            docstring = (first.end_lineno or 0) - first.lineno + 1 if has_docstring else 0
            length = (node.end_lineno or 0) - node.lineno + 1 - docstring
            if length > FUNCTION_BUDGET:
                yield f"line {node.lineno}: {node.name} has {length} lines, {FUNCTION_BUDGET} are allowed"


def name_mentions(source):
    for number, line in enumerate(source.splitlines(), 1):
        found = NAMES.search(line) or NAME_DEPENDENCE.search(line)
        if found:
            yield f"line {number}: {found.group()!r}"


def check_all(paths, check):
    problems = [f"{path.relative_to(ROOT)}: {problem}" for path in paths for problem in check(path)]
    assert not problems, "\n" + "\n".join(problems)


def test_there_is_something_to_check():
    assert {floor_of(path) for path in source_files()} == set(FLOORS)


def test_floors():
    check_all(source_files(), lambda path: floor_violations(path.read_text(), floor_of(path)))


def test_the_compiler_knows_no_model():
    paths = [path for path in source_files() if floor_of(path) in NAMELESS_FLOORS]
    check_all(paths, lambda path: [*name_mentions(path.stem), *name_mentions(path.read_text())])


def test_file_budget():
    def check(path):
        lines = len(path.read_text().splitlines())
        return [f"{lines} lines, {FILE_BUDGET} are allowed"] if lines > FILE_BUDGET else []

    check_all([*source_files(), *sorted((ROOT / "tests").rglob("*.py"))], check)


def test_function_budget():
    check_all([*source_files(), *sorted((ROOT / "tests").rglob("*.py"))], lambda path: long_functions(path.read_text()))


@pytest.mark.parametrize(
    ("source", "floor", "allowed"),
    [
        ("from seqpar.errors import MeshError", "runtime", True),
        ("from seqpar import errors", "partitioner", True),
        ("from seqpar.runtime.ring import ring_attention", "passes", True),
        ("import seqpar.partitioner.atoms", "runtime", False),
        ("def f():\n    from seqpar.runtime import ring", "partitioner", False),
        ("from seqpar.passes import trace", "partitioner", False),
        ("from seqpar.models import flux", "root", False),
        ("import seqpar", "models", False),
        ("from seqpar import sp_compile", "passes", False),
        ("from . import trace", "passes", False),
        ("import passes.trace", "tools", False),
        ("import seqpar", "tools", True),
    ],
)
def test_floor_check_itself(source, floor, allowed):
    assert (list(floor_violations(source, floor)) == []) is allowed


def test_other_checks_themselves():
    assert list(name_mentions("# as in FluxTransformer2DModel")) and list(name_mentions("if type(m).__name__ == 'A':"))
    assert not list(name_mentions("want = swan + node.__name__"))
    body = "\n".join(["    x = 1"] * FUNCTION_BUDGET)
    assert list(long_functions(f"def f():\n{body}"))
    assert not list(long_functions('def f():\n    """a\n    b\n    """\n' + body.removesuffix("\n    x = 1")))
