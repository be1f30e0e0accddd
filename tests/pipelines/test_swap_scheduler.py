import pytest
from diffusers import EulerDiscreteScheduler

from diffusers_pisdm.pipelines.swap_scheduler import swap_scheduler
from tests.pipelines.tiny_cascade import make_cascade


def test_all_stages_get_the_class_and_keep_their_noise_schedule():
    pipe = make_cascade(2, scheduler_2=EulerDiscreteScheduler(beta_schedule="scaled_linear"))
    swap_scheduler(pipe, "DDIMScheduler")
    assert type(pipe.scheduler).__name__ == type(pipe.scheduler_2).__name__ == "DDIMScheduler"
    assert pipe.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler_2.config.beta_schedule == "scaled_linear"


def test_a_stage_without_a_scheduler_stays_without():
    pipe = make_cascade(2)
    swap_scheduler(pipe, "DDIMScheduler")
    assert pipe.scheduler_2 is None


@pytest.mark.parametrize("name", ["DDIMSchedular", "PISDMTransformer2DModel", "__version__"])
def test_what_is_no_scheduler_is_refused(name):
    with pytest.raises(ValueError, match=rf"diffusers has no scheduler `{name}`. It has .*DDIMScheduler"):
        swap_scheduler(make_cascade(1), name)
