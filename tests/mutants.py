"""
Mutation testing: changes one thing in a file, runs the tests of that file, and lists the changes no test has noticed.

    python -m tests.mutants [--jobs 2] [FILE[:NUMBERS] ...]

mutmut says what to change; running the mutants is our own. mutmut leaves out decorated functions and all that is
outside of functions (here the model's `__init__`, the scan transitions, and the casting lists), and its wrappers hide
the signatures that `register_to_config` reads. Here each mutant is a process forked from one that has imported
everything but the package, with the mutated source in place of the file's.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import importlib
import importlib.abc
import importlib.util
import itertools
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import libcst as cst
from libcst.metadata import ByteSpanPositionProvider, MetadataWrapper
from mutmut.mutation.mutators import mutation_operators, operator_string


ROOT = Path(__file__).parents[1]

# The fast tests of each file, the likeliest to fail first.
CASCADE = [
    "pipelines/test_pipeline_pisdm_cascade.py",
    "pipelines/test_pipeline_pisdm_cascade_stages.py",
    "pipelines/test_pipeline_pisdm_cascade_schedulers.py",
    "pipelines/test_pipeline_pisdm_cascade_inputs.py",
    "pipelines/test_pipeline_pisdm_cascade_guidance.py",
]
IMAGES_IN = ["pipelines/images_in"]
TESTS = {
    "models/transformer_pisdm.py": [
        "models/test_transformer_pisdm.py",
        "models/test_transformer_pisdm_extensions.py",
        "models/test_transformer_pisdm_classes.py",
        "models/test_mamba_mixer.py",
        "models/test_transformer_pisdm_memory.py",
        "models/test_transformer_pisdm_loading.py",
    ],
    "models/transformer_dim.py": ["models/dim/test_transformer_dim.py", "models/dim/test_stage_models.py"],
    "schedulers.py": [
        "test_schedulers.py",
        "pipelines/test_pipeline_pisdm_cascade_schedulers.py",
    ],
    "ops/scan_paths.py": ["ops/test_scan_paths.py"],
    "ops/conditioning_augmentation.py": ["ops/test_conditioning_augmentation.py"],
    "training/cascade_objective.py": ["training/test_cascade_objective.py"],
    "training/denoising_loss.py": ["training/test_denoising_loss.py"],
    "training/scale_invariant_loss.py": ["training/test_scale_invariant_loss.py"],
    "training/noise.py": ["training/test_noise.py"],
    "training/loss_meter.py": ["training/test_loss_meter.py"],
    "training/optimization.py": ["training/test_optimization.py"],
    "training/trainer.py": ["training/test_trainer.py"],
    "pipelines/image_inputs.py": IMAGES_IN,
    "pipelines/class_names.py": [*IMAGES_IN, "pipelines/test_pipeline_pisdm_cascade_inputs.py"],
    "pipelines/cuda_graphs.py": ["pipelines/on_device/test_cuda_graphs.py"],
    "pipelines/stage_plan.py": CASCADE,
    "pipelines/stage_denoising.py": [*IMAGES_IN, *CASCADE],
    "pipelines/pipeline_pisdm_cascade.py": [
        *CASCADE,
        *IMAGES_IN,
        "pipelines/test_pipeline_pisdm_cascade_loading.py",
        "models/test_latents.py",
    ],
}
# Tests of these words are slow, or run in a process of their own, which has the file as it is.
LEFT_OUT = ("compile_once", "export", "last_digits", "lora", "lowers", "one_graph", "two_processes_give")
# What does not find failures costs a second a mutant: plugins, and asserts that explain themselves.
PYTEST_ARGS = [
    *("-p", "pytest_timeout", "-p", "no:cacheprovider", "-p", "no:unraisableexception", "-p", "no:threadexception"),
    "--assert=plain",
]
IMPORTED_ONCE = (
    "diffusers.models.auto_model",
    "diffusers.pipelines.pipeline_utils",
    "diffusers.schedulers.scheduling_ddpm",
    "diffusers.training_utils",
    "peft",
    "pytest",
    "pytest_timeout",
    "torch._dynamo",
    "torch.utils.flop_counter",
    "transformers",
)

SWAPPED_CALLS = {
    "mean": ("sum", "amax"),
    "sum": ("mean",),
    "min": ("max",),
    "max": ("min",),
    "sin": ("cos",),
    "cos": ("sin",),
    "rand": ("randn",),
    "randn": ("rand",),
}


def remove_statement(node: cst.Expr | cst.AugAssign) -> Iterator[cst.Pass]:
    if isinstance(node, cst.AugAssign) or isinstance(node.value, cst.Call):
        yield cst.Pass()


def unwrap_call(node: cst.Call) -> Iterator[cst.BaseExpression]:
    """`F.silu(x)` becomes `x`, and so does `x.sqrt()`."""
    if not isinstance(node.func, cst.Attribute):
        return
    owner = node.func.value
    if isinstance(owner, cst.Name) and owner.value in ("F", "dist", "math", "torch"):
        if node.args and not node.args[0].star:
            yield node.args[0].value
    elif not node.args and not isinstance(owner, cst.Call):
        yield owner


def change_string(node: cst.SimpleString) -> Iterator[cst.SimpleString]:
    """mutmut also changes the case, which finds nothing more."""
    yield from itertools.islice(operator_string(node), 1)


def swap_call(node: cst.Call) -> Iterator[cst.Call]:
    name = node.func.attr if isinstance(node.func, cst.Attribute) else node.func
    for other in SWAPPED_CALLS.get(name.value, ()) if isinstance(name, cst.Name) else ():
        yield node.with_deep_changes(name, value=other)


OPERATORS = (
    *((kind, operator) for kind, operator in mutation_operators if operator is not operator_string),
    (cst.SimpleString, change_string),
    ((cst.Expr, cst.AugAssign), remove_statement),
    (cst.Call, unwrap_call),
    (cst.Call, swap_call),
)


class Mutations(cst.CSTVisitor):
    """Collects what to put in the place of which bytes."""

    METADATA_DEPENDENCIES = (ByteSpanPositionProvider,)

    # Type hints, messages of errors and imports are no behaviour, and a decorator registers what it decorates.
    SKIPPED = (cst.Annotation, cst.Decorator, cst.Import, cst.ImportFrom, cst.Raise)

    def __init__(self):
        super().__init__()
        self.found = []

    def on_visit(self, node: cst.CSTNode) -> bool:
        is_docstring = isinstance(node, cst.Expr) and isinstance(
            node.value, (cst.SimpleString, cst.ConcatenatedString)
        )
        if isinstance(node, self.SKIPPED) or is_docstring:
            return False
        for kind, operator in OPERATORS:
            if isinstance(node, kind):
                span = self.get_metadata(ByteSpanPositionProvider, node)
                self.found += [(span.start, span.length, mutated) for mutated in operator(node)]
        return True


def make_mutants(source: str) -> list[str]:
    """All sources that differ from this one in one place and still compile."""
    wrapper = MetadataWrapper(cst.parse_module(source))
    mutations = Mutations()
    wrapper.visit(mutations)
    text, mutants = source.encode(), {}  # a dict keeps the order and drops repetitions
    for start, length, mutated in mutations.found:
        middle = wrapper.module.code_for_node(mutated).encode()
        mutants[(text[:start] + middle + text[start + length :]).decode()] = True
    return [mutant for mutant in mutants if mutant != source and compiles(mutant)]


def compiles(source: str) -> bool:
    try:
        compile(source, "mutant", "exec")
    except SyntaxError:
        return False
    return True


def difference(source: str, mutant: str) -> str:
    lines = list(difflib.unified_diff(source.splitlines(), mutant.splitlines(), n=0, lineterm=""))[2:]
    return "\n".join("    " + line for line in lines)


class MutantFinder(importlib.abc.MetaPathFinder, importlib.abc.SourceLoader):
    """Imports one module of the package from another source."""

    def __init__(self, path: Path, source: str):
        self.path = path
        self.source = source
        self.name = ".".join(path.relative_to(ROOT).with_suffix("").parts)

    def find_spec(self, fullname, path=None, target=None):
        return (
            importlib.util.spec_from_file_location(self.name, self.path, loader=self)
            if fullname == self.name
            else None
        )

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return self.source.encode()


class FirstFailure:
    """
    A plugin of pytest's that reports which test has failed and ends the process there and then. The tests that have
    noticed most mutants come first.
    """

    def __init__(self, writer: int, noticed: Counter[str]):
        self.writer = writer
        self.noticed = noticed

    def pytest_collection_modifyitems(self, items):
        items.sort(key=lambda item: -self.noticed[item.nodeid])

    def end(self, result: str | None) -> NoReturn:
        os.write(self.writer, json.dumps(result).encode())
        os._exit(0)

    def pytest_collectreport(self, report):
        if report.failed:
            self.end(f"import of {report.nodeid}")

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.end(report.nodeid)


def run_tests(path: Path, source: str, seconds: float, plugin: FirstFailure) -> NoReturn:
    """Ends this process, having written which test fails with this source in place of the file's (`null`: none)."""
    import pytest

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    # Of the processor's time: the machine may be busy.
    resource.setrlimit(resource.RLIMIT_CPU, (int(seconds), int(seconds) + 1))
    sys.meta_path.insert(0, MutantFinder(path, source))
    tests = [f"tests/{name}" for name in TESTS[str(path.relative_to(ROOT / "diffusers_pisdm"))]]
    chosen = " and ".join(f"not {word}" for word in LEFT_OUT)
    code = pytest.main(["-q", *PYTEST_ARGS, "-k", chosen, *tests], plugins=[plugin])
    plugin.end(None if code == 0 else f"pytest ends with {code}")


def run_mutants(path: Path, mutants: dict[int, str], jobs: int, seconds: float) -> Iterator[tuple[int, str | None]]:
    """Yields each mutant's number and the test that has noticed it."""
    waiting, running, noticed = list(mutants.items()), {}, Counter()
    while waiting or running:
        while waiting and len(running) < jobs:
            number, mutant = waiting.pop(0)
            reader, writer = os.pipe()
            pid = os.fork()
            if pid == 0:
                run_tests(path, mutant, seconds, FirstFailure(writer, noticed))
            os.close(writer)
            running[pid] = number, reader
        pid, status = os.wait()
        number, reader = running.pop(pid)
        with os.fdopen(reader) as results:
            text = results.read()
        if os.WIFSIGNALED(status):
            text = json.dumps("timeout" if os.WTERMSIG(status) == signal.SIGXCPU else "crash")
        test = json.loads(text or '"crash"')
        noticed[test] += 1
        yield number, test


def test_file(path: Path, numbers: list[int], jobs: int) -> None:
    source = path.read_text(encoding="utf-8")
    before = time.monotonic()
    [(_, failed)] = run_mutants(path, {0: source}, 1, 600)
    if failed is not None:
        sys.exit(f"{path.relative_to(ROOT)}: {failed} fails without any mutant. Mend it first.")
    seconds = 10 + 4 * (time.monotonic() - before)

    mutants = dict(enumerate(make_mutants(source), start=1))
    if numbers:
        mutants = {number: mutants[number] for number in numbers}
    noticed = {}
    for number, test in run_mutants(path, mutants, jobs, seconds):
        noticed[number] = test
        if test is None:
            print(f"{path.relative_to(ROOT)}:{number} survived\n{difference(source, mutants[number])}", flush=True)
    tests = list(noticed.values())
    print(
        f"{path.relative_to(ROOT)}: {len(tests)} mutants, {tests.count(None)} survived"
        f" ({tests.count('timeout')} timeouts, {tests.count('crash')} crashes),"
        f" {time.monotonic() - before:.0f} s",
        flush=True,
    )


def import_once() -> None:
    """Imports here what all mutants need, and no thread may start: only the one that forks lives on in a fork."""
    os.environ |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "OMP_NUM_THREADS": "1"}
    for name in IMPORTED_ONCE:
        importlib.import_module(name)
    numba = importlib.import_module("numba")
    numba.njit(lambda x: x)(1)  # its first compilation imports half of numba
    gc.freeze()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="files, or FILE:3,7 for some mutants of one; all if not given")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    args = parser.parse_args()
    import_once()
    for name in args.files or [f"diffusers_pisdm/{name}" for name in TESTS]:
        file, _, numbers = name.partition(":")
        test_file(ROOT / file, [int(number) for number in numbers.split(",") if number], args.jobs)
    gc.unfreeze()  # or nanobind reports Triton's frozen objects as leaks


if __name__ == "__main__":
    main()
