"""The repository root is the package: what gets installed must be seqpar, all of seqpar, and nothing else."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_PACKAGES = {"tests", "docs", "build", "dist", "demo_output"}
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PACKAGES = PYPROJECT["tool"]["setuptools"]["packages"]


def folders_with_python():
    """Every folder that holds a Python file and is meant to be installed, as a dotted name."""
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).parts[:-1]
        if not any(part.startswith(".") or part in NOT_PACKAGES for part in parts):
            yield ".".join(["seqpar", *parts])


def test_package_list_is_complete():
    assert sorted(set(folders_with_python())) == sorted(PACKAGES)


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize(("given", "installs"), [("torch==2.11.0", True), ("torch==2.12.0", False), (None, False)])
def test_make_installs_the_torch_that_is_asked_for(given, installs, tmp_path):
    """Else `make test TORCH=...` would test the torch that is there, and say nothing."""
    tmp_path.joinpath(".installed").write_text("torch==2.12.0\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE") and name not in ("MFLAGS", "TORCH")}
    asked = [f"TORCH={given}"] if given else []
    done = subprocess.run(["make", "-n", "setup", f"VENV={tmp_path}", *asked], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert (f"pip install --quiet {given}" in done.stdout) is installs and ("pip install" in done.stdout) is installs


def test_every_package_has_an_init():
    missing = [name for name in PACKAGES if not ROOT.joinpath(*name.split(".")[1:], "__init__.py").is_file()]
    assert missing == []


def test_metadata():
    project = PYPROJECT["project"]
    assert project["license"] == "Apache-2.0" and "Apache License" in (ROOT / "LICENSE").read_text()
    assert {"diffusers", "dev"} <= project["optional-dependencies"].keys()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built offline from a copy: setuptools leaves build folders behind."""
    folder = tmp_path_factory.mktemp("wheel")
    # Symlinks stay symlinks: .typing/seqpar points back at the root.
    ignore = shutil.ignore_patterns(".venv", ".git", ".*_cache", "__pycache__", "*.egg-info", "build", "dist", "demo_output")
    shutil.copytree(ROOT, folder / "source", symlinks=True, ignore=ignore)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(folder), "."]
    built = subprocess.run(command, cwd=folder / "source", capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_holds_seqpar_and_nothing_else(wheel):
    names = wheel.namelist()
    assert {name for name in {n.split("/")[0] for n in names} if not name.endswith(".dist-info")} == {"seqpar"}
    sources = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in ROOT.joinpath(*name.split(".")[1:]).glob("*.py")}
    assert {n.removeprefix("seqpar/") for n in names if n.startswith("seqpar/")} == sources | {"py.typed", "passes/plan.html.jinja", "passes/plan.svg.jinja"}


def test_wheel_registers_the_backend(wheel):
    (entry_points,) = (n for n in wheel.namelist() if n.endswith(".dist-info/entry_points.txt"))
    text = wheel.read(entry_points).decode()
    assert re.search(r"\[torch_dynamo_backends\]\s+seqpar = seqpar\.backend:seqpar_backend", text)


def test_torch_lists_the_backend_without_importing_seqpar():
    program = "import sys, torch._dynamo as d; assert 'seqpar' in d.list_backends(); assert 'seqpar' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
