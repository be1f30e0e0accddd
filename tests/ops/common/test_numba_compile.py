import os
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_pisdm import ops


pytest.importorskip("numba")

from diffusers_pisdm.ops.common import numba_compile


COMMON = Path(ops.__file__).parent / "common"
# A package whose kernel inlines a function of another folder: what Numba's own cache would not see change.
HELPER = """
from numba import njit
@njit
def answer():
    return {answer}
"""
KERNEL = """
import ctypes
from ..common.numba_vectors import store_float
from ..other.numba_helper import answer
def kernel(address):
    store_float(address, 0, answer())
def run():
    from ..common.numba_compile import kernel_address
    value = ctypes.c_float()
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(kernel_address(kernel))(ctypes.addressof(value))
    return value.value
"""


@pytest.fixture
def package(tmp_path):
    folder = tmp_path / "probe"
    for name in ("", "common", "kernels", "other"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    for name in ("numba_compile.py", "numba_vectors.py"):
        (folder / "common" / name).write_text((COMMON / name).read_text())
    (folder / "kernels" / "numba_kernel.py").write_text(KERNEL)
    (folder / "other" / "numba_helper.py").write_text(HELPER.format(answer=1))
    return folder


def run_probe(package, **environment):
    """The kernel's answer in a new process, and how many kernels were compiled there rather than loaded."""
    code = """
import numba.core.compiler as compiler
compiled = []
compile_extra = compiler.compile_extra
compiler.compile_extra = lambda *args, **kwargs: (compiled.append(args[2].__name__), compile_extra(*args, **kwargs))[1]
from probe.kernels.numba_kernel import run
print(run(), compiled.count("kernel"))
"""
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=package.parent,
        env={**os.environ, "PYTHONPATH": str(package.parent), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    answer, compiled = result.stdout.split()
    return float(answer), int(compiled)


def test_cache_is_used_and_never_stale(package):
    assert run_probe(package) == (1.0, 1)
    assert run_probe(package) == (1.0, 0)
    (package / "other" / "numba_helper.py").write_text(HELPER.format(answer=2))
    assert run_probe(package) == (2.0, 1)
    for file in package.rglob("*.nbc"):
        file.write_bytes(file.read_bytes()[:100])  # a full disk, say
    assert run_probe(package) == (2.0, 1)


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_damaged_cache_is_compiled_anew_and_replaced(package, suffix):
    assert run_probe(package) == (1.0, 1)
    (path,) = package.rglob(f"*.{suffix}")
    whole = path.read_bytes()
    damaged = bytearray(whole)
    for i in range(len(whole) // 4, len(whole), 64):  # machine code of another processor, say
        damaged[i] ^= 0xFF
    path.write_bytes(damaged)
    assert run_probe(package) == (1.0, 1)
    assert path.read_bytes() != damaged
    assert run_probe(package) == (1.0, 0)


def test_every_flipped_bit_is_noticed(tmp_path):
    """An unpickled entry is code that runs: nothing is unpickled before its digest."""
    files = numba_compile._CheckedFiles(str(tmp_path), "kernel", "stamp")
    files.save("key", ("code", b"of a kernel"))
    assert files.load("key") == ("code", b"of a kernel")
    for path in tmp_path.iterdir():
        whole = path.read_bytes()
        for i in range(8 * len(whole)):
            flipped = bytearray(whole)
            flipped[i // 8] ^= 1 << i % 8
            path.write_bytes(flipped)
            assert files.load("key") is None
        for damaged in (b"", whole[:-1], whole[:10], bytes(len(whole)), whole + b"0"):
            path.write_bytes(damaged)
            assert files.load("key") is None
        path.write_bytes(whole)
    assert files.load("key") == ("code", b"of a kernel")


def test_works_without_a_cache(package):
    # No folder that Numba may write to: it finds no locator and raises.
    assert run_probe(package, NUMBA_CACHE_LOCATOR_CLASSES="ZipCacheLocator") == (1.0, 1)
    assert not list(package.rglob("*.nb?"))
