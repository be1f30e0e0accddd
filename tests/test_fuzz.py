import pytest

from tests.fuzz import TARGETS, fuzz


@pytest.mark.parametrize("target", TARGETS)
def test_damaged_files_load_or_are_refused_as_documented(target):
    """A small `make fuzz`."""
    assert fuzz(target, range(10), seed=0) == []
