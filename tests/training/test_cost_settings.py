import pytest

from diffusers_pisdm.training.cost_settings import CostSettings


def test_an_unknown_precision_is_refused():
    with pytest.raises(ValueError, match="`mixed_precision` must be one of no, fp16, bf16, got fp8"):
        CostSettings(mixed_precision="fp8")
