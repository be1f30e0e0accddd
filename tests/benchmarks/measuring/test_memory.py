import sys

import pytest
import torch

from benchmarks.measuring.memory import measure_peak_growth


CPU = torch.device("cpu")
MIB = 2**20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="is not measured elsewhere")


def fill(mebibytes, count):
    return [torch.ones(mebibytes * MIB // 4 // count) for _ in range(count)]


def test_the_worst_moment_counts():
    def call():
        fill(96, 1)
        fill(32, 1)

    assert measure_peak_growth(call, CPU) == pytest.approx(96 * MIB, rel=0.1)


def test_what_was_held_before_does_not_count():
    held = fill(64, 1)
    assert measure_peak_growth(lambda: fill(32, 1), CPU) == pytest.approx(32 * MIB, rel=0.15)
    del held


def test_memory_that_was_freed_before_counts_again():
    # Small tensors, which the C library keeps when they are freed. It would give them out again unnoticed.
    kept = fill(64, 1024)[::100]
    assert measure_peak_growth(lambda: fill(32, 512), CPU) == pytest.approx(32 * MIB, rel=0.15)
    del kept
