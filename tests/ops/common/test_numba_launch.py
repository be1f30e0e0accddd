import multiprocessing
import sys
import threading

import pytest
import torch

from diffusers_pisdm.ops.common import numba_launch
from diffusers_pisdm.ops.common.numba_launch import (
    LANES,
    MAX_GROUPS,
    WANTED_UNITS,
    channels_last,
    memory_dtype,
    split_channels,
)
from diffusers_pisdm.ops.scan.numba_operator import selective_scan_numba
from tests.ops.scan.test_dispatch import make_inputs


@pytest.mark.parametrize("batch", [0, 1, 2, 15, 64])
@pytest.mark.parametrize("channels", [1, 16, 17, 63, 64, 65, 512, 768, 1000, 3072])
def test_blocks_cover_the_channels(batch, channels):
    blocks, groups = split_channels(batch, channels)
    assert (blocks - 1) * groups * LANES < channels <= blocks * groups * LANES  # and none of them is empty
    assert groups <= MAX_GROUPS


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_long_rows_keep_many_threads_busy(batch):
    blocks, _ = split_channels(batch, 3072)
    assert batch * blocks >= WANTED_UNITS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_channels_last_copies_only_what_it_must(dtype):
    rows = torch.randn(2, 5, 6, dtype=dtype)
    for x in (rows.mT, rows[..., :3].mT, rows[:, ::2].mT, rows[:1].expand(4, 5, 6).mT, rows[..., :1].mT):
        result = channels_last(x, dtype)
        assert result.data_ptr() == x.data_ptr() and torch.equal(result, x)
    for x in (rows, rows.mT.half(), rows.mT.flip(2).contiguous(), rows[..., :1].expand(2, 5, 6).mT):
        result = channels_last(x, dtype)
        assert result.stride(1) == 1 and torch.equal(result, x.to(dtype))


def test_only_bfloat16_alone_is_read_as_it_is():
    single, half, other = (torch.zeros(1, dtype=dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16))
    assert memory_dtype(half, None, half) == torch.bfloat16
    for tensors in ((half, single), (single, None, half), (other,), (other, half), (single,)):
        assert memory_dtype(*tensors) == torch.float32


pytest.importorskip("numba")


@pytest.fixture
def leaves():
    """Large enough for several threads."""
    inputs = make_inputs(4, 200, 100)
    return [v.float().requires_grad_() if isinstance(v, torch.Tensor) else v for v in inputs.values()]


@pytest.fixture
def threads():
    """Sets the number of threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def scan_with_gradients(leaves):
    out = selective_scan_numba(*leaves)
    return [out, *torch.autograd.grad(out.square().sum(), leaves[:-1])]


def assert_equal(results, wanted):
    assert all(torch.equal(result, want) for result, want in zip(results, wanted))


@pytest.mark.parametrize("num_threads", [2, 3, 8])
@pytest.mark.parametrize("with_openmp", [True, False])
def test_results_do_not_depend_on_the_threads(leaves, threads, num_threads, with_openmp, monkeypatch):
    threads(1)
    wanted = scan_with_gradients(leaves)
    if not with_openmp:
        monkeypatch.setattr(numba_launch, "_gomp_parallel", lambda: None)
    started = []
    run_kernel = numba_launch.run_kernel
    monkeypatch.setattr(
        "diffusers_pisdm.ops.common.numba_launch.run_kernel",
        lambda address, parameters, count: (started.append(count), run_kernel(address, parameters, count)),
    )
    threads(num_threads)
    for _ in range(3):
        assert_equal(scan_with_gradients(leaves), wanted)
    assert set(started) == {num_threads}


@pytest.mark.skipif(sys.platform != "linux" or not torch.backends.openmp.is_available(), reason="no libgomp")
def test_finds_the_openmp_of_torch():
    assert numba_launch._gomp_parallel() is not None


def test_concurrent_callers(leaves, threads):
    threads(2)
    wanted = scan_with_gradients(leaves)
    results = {}

    def call(index):
        results[index] = [scan_with_gradients(leaves) for _ in range(5)]

    callers = [threading.Thread(target=call, args=(index,)) for index in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(results) == 4
    for repeated in results.values():
        for result in repeated:
            assert_equal(result, wanted)


def _scan_in_child(leaves, wanted):
    # As in a data loader's worker: more OpenMP threads would hang after a fork, as in any operator of PyTorch.
    torch.set_num_threads(1)
    assert_equal(scan_with_gradients(leaves), wanted)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="no fork on this system")
def test_forked_worker(leaves, threads):
    threads(2)
    wanted = [result.detach() for result in scan_with_gradients(leaves)]
    process = multiprocessing.get_context("fork").Process(target=_scan_in_child, args=(leaves, wanted))
    process.start()
    process.join(60)
    if process.is_alive():
        process.kill()
    assert process.exitcode == 0
