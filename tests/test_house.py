"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusers_pisdm"

# What a module, or the files of a folder, may import from the package: dependencies flow one way.
MAY_IMPORT = {
    "schedulers.py": set(),
    "ops": {"ops"},
    "models": {"ops", "models"},
    "pipelines": {"ops", "models", "schedulers", "pipelines"},
    "training": {"ops", "models", "schedulers", "training", "image_grid"},
    "evaluation": {"ops", "models", "schedulers", "pipelines", "evaluation", "image_grid"},
}


def imported_modules(path: Path) -> set[str]:
    """Absolute names of what a file imports, wherever in the file; `from a import b` counts as `a` and as `a.b`."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            names |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return names


def package_files() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def test_imports_are_read_as_absolute_names(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "diffusers_pisdm" / "models" / "a.py"
    path.parent.mkdir(parents=True)
    path.write_text("import torch.nn\nfrom ..ops.scan import f\nfrom .. import pipelines\nfrom . import b\n")
    assert imported_modules(path) == {
        "torch.nn",
        "diffusers_pisdm.ops.scan",
        "diffusers_pisdm.ops.scan.f",
        "diffusers_pisdm",
        "diffusers_pisdm.pipelines",
        "diffusers_pisdm.models",
        "diffusers_pisdm.models.b",
    }


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_dependencies_flow_one_way(folder):
    """A file of a folder imports only from the folders it may know, never from the package's top, which knows all."""
    wrong = {}
    for path in package_files():
        if path.relative_to(PACKAGE).parts[0] != folder:
            continue
        own = [name.split(".") for name in imported_modules(path) if name.split(".")[0] == PACKAGE.name]
        rooms = {parts[1] if len(parts) > 1 else "the package itself" for parts in own}
        if rooms - MAY_IMPORT[folder]:
            wrong[str(path.relative_to(ROOT))] = sorted(rooms - MAY_IMPORT[folder])
    assert wrong == {}


def test_nothing_in_the_package_imports_examples_tests_or_torchvision():
    forbidden = {"examples", "tests", "benchmarks", "torchvision"}
    wrong = {
        str(path.relative_to(ROOT)): sorted(imported_modules(path) & forbidden)
        for path in package_files()
        if {name.split(".")[0] for name in imported_modules(path)} & forbidden
    }
    assert wrong == {}


def test_every_folder_of_the_package_has_a_rule():
    folders = {path.relative_to(PACKAGE).parts[0] for path in package_files() if path.parent != PACKAGE}
    assert folders <= MAY_IMPORT.keys()


def test_importing_prints_nothing_and_starts_no_gpu():
    code = "import sys, torch, diffusers_pisdm; sys.exit(torch.cuda.is_initialized())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]], ids=["lint", "format"])
def test_ruff(command):
    run = subprocess.run([sys.executable, "-m", "ruff", *command, "."], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stdout + run.stderr
