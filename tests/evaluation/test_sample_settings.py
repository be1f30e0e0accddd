import json
from dataclasses import asdict

import numpy as np
import pytest
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

from diffusers_pisdm.evaluation import SampleSettings
from tests.pipelines.tiny_cascade import make_cascade
from tests.pipelines.tiny_dit import make_dit


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"num_samples": 0}, "`num_samples` has to be from 1 to 2^32 but is 0"),
        ({"num_samples": 2.0}, "`num_samples` has to be an integer but is 2.0"),
        ({"num_samples": True}, "`num_samples` has to be an integer but is True"),
        ({"seed": -1}, "`seed` has to be 0 or more but is -1"),
        ({"classes": "even"}, "'balanced' or 'uniform' or a list of class ids but is 'even'"),
        ({"classes": []}, "`classes` is empty. Pass class ids, or one of balanced, uniform"),
        ({"classes": [1, "cat"]}, "A class id in `classes` has to be an integer but is 'cat'"),
    ],
)
def test_values_out_of_range_are_refused(arguments, message):
    with pytest.raises((TypeError, ValueError)) as raised:
        SampleSettings(**arguments)
    assert message in str(raised.value)


def test_integers_of_numpy_can_be_written_down():
    settings = SampleSettings(np.int64(3), np.uint8(1), np.array([4, 2]))
    assert json.loads(json.dumps(asdict(settings)))["classes"] == [4, 2]
    assert settings == SampleSettings(3, 1, [4, 2])


def test_what_is_left_out_is_the_pipelines_default():
    settings = SampleSettings(5, guidance_scale=[1.0, 2.0]).resolve(make_cascade())
    assert settings == SampleSettings(
        num_samples=5,
        num_inference_steps=20,
        guidance_scale=[1.0, 2.0],
        guidance_start=0.0,
        guidance_stop=1.0,
        noise_level=0.1,
    )


def test_another_pipeline_need_not_take_every_argument_but_those_that_are_set():
    pipe = make_dit()
    settings = SampleSettings(num_inference_steps=3).resolve(pipe)
    assert (settings.num_inference_steps, settings.guidance_scale, settings.noise_level) == (3, 4.0, None)
    with pytest.raises(ValueError, match="DiTPipeline does not take `guidance_stop`, `noise_level`"):
        SampleSettings(noise_level=0.2, guidance_stop=0.5).resolve(pipe)


def test_a_pipeline_without_classes_is_refused():
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = UNet2DModel(8, block_out_channels=(4,), norm_num_groups=2, attention_head_dim=2, **blocks)
    with pytest.raises(ValueError, match=r"DDPMPipeline does not take `class_labels`.*PISDMCascadePipeline"):
        SampleSettings().resolve(DDPMPipeline(unet, DDPMScheduler()))
