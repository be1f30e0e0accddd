"""The page with DiM as the first stage."""

import pytest
from diffusers import DPMSolverMultistepScheduler

from diffusers_pisdm import DiMTransformer2DModel, PISDMCascadePipeline
from diffusers_pisdm.app.models import Models
from diffusers_pisdm.app.page import build_app
from diffusers_pisdm.app.scans import scans_of


@pytest.mark.parametrize("channels", [3, 4])
def test_a_page_draws_with_dim_if_its_channels_are_of_pictures(tmp_path, channels):
    dim = DiMTransformer2DModel(sample_size=8, in_channels=channels, num_layers=5, hidden_size=16, num_classes=2)
    PISDMCascadePipeline(dim, DPMSolverMultistepScheduler()).save_pretrained(tmp_path)
    if channels == 4:
        with pytest.raises(ValueError, match=r"latents of 4 channels"):
            build_app(str(tmp_path))
        return
    build_app(str(tmp_path))
    notes = {item["name"]: item["note"] for item in scans_of(Models().get(str(tmp_path)))["directions"]}
    assert notes["Rows, from top left"] == "Layers 1, 5" and notes["Rows, from bottom right"] == "Layers 2, 4"
