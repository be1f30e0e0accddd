import threading
import time
from itertools import count, islice

import pytest

from diffusers_pisdm.data.parallel_read import read_ahead, read_batches
from diffusers_pisdm.data.rows import DataError


def total(keys):
    if sum(keys) == 5:
        raise DataError("five is wrong")
    return sum(keys)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_results_come_in_order_and_errors_as_they_were(num_workers):
    results = read_batches(total, ([i, 0] for i in count()), num_workers)
    assert list(islice(results, 5)) == [0, 1, 2, 3, 4]
    with pytest.raises(DataError, match=r"^five is wrong$"):
        next(results)


def test_a_thread_runs_ahead_and_no_further():
    taken = []

    def items():
        for i in range(100):
            taken.append(i)
            yield i

    results = read_ahead(items(), depth=3)
    assert taken == []  # nothing starts before it is needed: workers must be forked first
    assert next(results) == 0
    deadline = time.time() + 10
    while len(taken) < 5 and time.time() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    assert taken == [0, 1, 2, 3, 4]  # one taken, three waiting, one in hand
    assert list(results) == list(range(1, 100))


def test_the_thread_ends_with_the_iterator():
    before = threading.active_count()
    results = read_ahead(count(), depth=1)
    next(results)
    assert threading.active_count() == before + 1
    results.close()
    deadline = time.time() + 10
    while threading.active_count() > before and time.time() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_errors_of_the_thread_arrive_after_its_items():
    def items():
        yield 1
        raise OSError("gone")

    results = read_ahead(items(), depth=2)
    assert next(results) == 1
    with pytest.raises(OSError, match="gone"):
        next(results)
