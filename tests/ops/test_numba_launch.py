import pytest
import torch

from diffusers_pisdm.ops.numba_launch import (
    LANES,
    MAX_GROUPS,
    WANTED_UNITS,
    channels_last,
    split_channels,
)


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


def test_channels_last_copies_only_what_it_must():
    rows = torch.randn(2, 5, 6)
    for x in (rows.mT, rows[..., :3].mT, rows[:, ::2].mT, rows[:1].expand(4, 5, 6).mT, rows[..., :1].mT):
        assert channels_last(x).data_ptr() == x.data_ptr() and torch.equal(channels_last(x), x)
    for x in (rows, rows.mT.bfloat16(), rows.mT.flip(2).contiguous(), rows[..., :1].expand(2, 5, 6).mT):
        assert channels_last(x).stride(1) == 1 and torch.equal(channels_last(x), x.float())
