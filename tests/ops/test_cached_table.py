"""Tables are made once for equal arguments, and never kept for another default dtype."""

import pytest
import torch

from diffusers_pisdm.models.transformer_pisdm import sincos_position_embedding
from diffusers_pisdm.ops.cached_table import cached_table


@pytest.fixture
def default_dtype():
    yield torch.set_default_dtype
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("first", [torch.float64, torch.bfloat16, torch.float32], ids=str)
def test_a_table_is_of_the_default_dtype_of_its_call(default_dtype, first):
    made = []

    @cached_table(maxsize=4)
    def halves(length, *, device=None):
        made.append(length)
        return torch.arange(length, device=device) / 2

    for dtype in (first, torch.float32, torch.float64, first):
        default_dtype(dtype)
        assert halves(3).dtype == dtype
        assert halves(3) is halves(3)
    assert len(made) == len({first, torch.float32, torch.float64})


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_positions_are_single_precision_whatever_the_default(default_dtype, dtype):
    wanted = sincos_position_embedding(3, 5, 16, 4)
    default_dtype(dtype)
    found = sincos_position_embedding(3, 5, 16, 4)
    assert found.dtype == torch.float32 and torch.equal(found, wanted)
