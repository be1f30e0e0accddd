"""The rules of CONTRIBUTING.md that a machine can check."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusers_pisdm"

# What the files of each folder may import from the package, beside their own folder: dependencies flow one way.
MAY_IMPORT = {
    "utils": set(),
    "ops": {"utils"},
    "models": {"utils", "ops"},
    "schedulers.py": {"utils"},
    "data": {"utils", "ops", "models"},
    "pipelines": {"utils", "ops", "models", "schedulers.py"},
    "training": {"utils", "ops", "models", "schedulers.py", "data", "pipelines"},
    "evaluation": {"utils", "ops", "models", "schedulers.py", "data", "pipelines"},
    "publishing": {"utils", "pipelines"},
    "app": {"utils", "ops", "models", "data", "pipelines"},
}
MOST_FILES = 14  # in a folder of code


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


def room_of(module: str) -> str:
    """The folder, or the file at the package's top, that a module of the package is in."""
    parts = module.split(".")
    if len(parts) == 1:
        return "the package itself"
    return parts[1] if (PACKAGE / parts[1]).is_dir() else f"{parts[1]}.py"


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_dependencies_flow_one_way(room):
    """A file imports only from the rooms that its own may know, never from the package's top, which knows all."""
    wrong = {}
    for path in package_files():
        if path.relative_to(PACKAGE).parts[0] != room or path.name == "remote_pipeline.py":  # runs elsewhere
            continue
        own = [name for name in imported_modules(path) if name.split(".")[0] == PACKAGE.name]
        refused = {room_of(name) for name in own} - MAY_IMPORT[room] - {room}
        if refused:
            wrong[str(path.relative_to(ROOT))] = sorted(refused)
    assert wrong == {}


def test_no_files_import_each_other_in_a_circle():
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in package_files()}
    modules = {name.removesuffix(".__init__"): path for name, path in modules.items()}
    # A folder's `__init__` hands on names of its files: those who import one of these do not depend on all of them.
    files = {name: path for name, path in modules.items() if path.name != "__init__.py"}
    left = {name: imported_modules(path) & (files.keys() - {name}) for name, path in files.items()}
    while free := [name for name, needed in left.items() if not needed & left.keys()]:
        for name in free:
            del left[name]
    assert left == {}


@pytest.mark.parametrize("top", ["diffusers_pisdm", "benchmarks", "examples", "tests"])
def test_a_folder_holds_no_more_files_than_one_can_know(top):
    folders = [ROOT / top, *(path for path in (ROOT / top).rglob("*") if path.is_dir())]
    counts = {
        str(folder.relative_to(ROOT)): len({*folder.glob("*.py"), *folder.glob("*.md")} - {folder / "__init__.py"})
        for folder in folders
    }
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


def test_nothing_in_the_package_imports_examples_tests_or_torchvision():
    forbidden = {"examples", "tests", "benchmarks", "torchvision"}
    wrong = {
        str(path.relative_to(ROOT)): sorted(imported_modules(path) & forbidden)
        for path in package_files()
        if {name.split(".")[0] for name in imported_modules(path)} & forbidden
    }
    assert wrong == {}


def test_every_room_of_the_package_has_a_rule():
    rooms = {path.relative_to(PACKAGE).parts[0] for path in package_files()}
    assert rooms - {"__init__.py", "registration.py", "commands"} <= MAY_IMPORT.keys()  # commands are on top of all


def test_importing_prints_nothing_and_starts_no_gpu():
    code = "import sys, torch, diffusers_pisdm; sys.exit(torch.cuda.is_initialized())"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
