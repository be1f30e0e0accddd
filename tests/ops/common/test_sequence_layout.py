import pytest
import torch

from diffusers_pisdm.ops.common.sequence_layout import empty_channels_last


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_empty_channels_last(dtype):
    x = empty_channels_last(torch.randn(2, 3, 5), dtype)
    assert x.shape == (2, 3, 5) and x.mT.is_contiguous() and x.dtype == dtype
