import pytest

from diffusers_pisdm.training.batch_shares import stage_batch_size


@pytest.mark.parametrize(
    ("share", "batch_size", "images"), [(1.0, 8, 8), (0.25, 8, 2), (0.3, 8, 2), (0.4, 8, 3), (0.1, 4, 1), (0.5, 1, 1)]
)
def test_a_share_is_rounded_to_whole_images_and_never_empty(share, batch_size, images):
    assert stage_batch_size(share, batch_size) == images
