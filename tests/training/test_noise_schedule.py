import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from diffusers_pisdm.training import shift_noise_schedule
from diffusers_pisdm.training.noise_schedule import sampling_schedulers, stage_noise_schedules


def snr(scheduler):
    alpha_bar = scheduler.alphas_cumprod.double()
    return alpha_bar / (1 - alpha_bar)


@pytest.mark.parametrize("shift", [0.5, 2.0, 4.0])
@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_signal_to_noise_ratio_falls_by_the_square(shift, beta_schedule):
    scheduler = DDPMScheduler(beta_schedule=beta_schedule, prediction_type="v_prediction")
    shifted = shift_noise_schedule(scheduler, shift)
    assert shifted.config.prediction_type == "v_prediction"
    torch.testing.assert_close(snr(shifted) * shift**2, snr(scheduler), rtol=2e-3, atol=1e-9)


def test_the_shift_survives_saving_and_a_change_of_scheduler(tmp_path):
    shifted = shift_noise_schedule(DDPMScheduler(), 3.0)
    DPMSolverMultistepScheduler.from_config(shifted.config).save_pretrained(tmp_path)
    loaded = DPMSolverMultistepScheduler.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.alphas_cumprod, shifted.alphas_cumprod)


def test_no_shift_changes_nothing_and_a_wrong_one_is_refused():
    scheduler = DDPMScheduler()
    assert shift_noise_schedule(scheduler, 1.0) is scheduler
    with pytest.raises(ValueError, match="positive factor only, got 0"):
        shift_noise_schedule(scheduler, 0)


def test_each_stage_has_its_shift_and_its_prediction_type():
    scheduler = DDPMScheduler(prediction_type="v_prediction", clip_sample=False)
    first, second, third = stage_noise_schedules(
        scheduler, 3, shifts=[1.0, 2.0, 1.0], prediction_types=["v_prediction", "sample", "epsilon"]
    )
    assert first is scheduler
    assert [s.config.prediction_type for s in (first, second, third)] == ["v_prediction", "sample", "epsilon"]
    torch.testing.assert_close(snr(second) * 4, snr(scheduler), rtol=2e-3, atol=1e-9)
    torch.testing.assert_close(snr(third), snr(scheduler))
    assert not third.config.clip_sample
    assert stage_noise_schedules(scheduler, 2) == [scheduler] * 2
    assert stage_noise_schedules([second, first], 2) == [second, first]  # each stage's own


@pytest.mark.parametrize(
    "arguments", [{"shifts": [1.0]}, {"prediction_types": ["sample"]}, {"schedulers": []}], ids=str
)
def test_one_of_each_for_every_stage(arguments):
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}` must name one for each of the 2 stages"):
        stage_noise_schedules(**{"schedulers": DDPMScheduler(), "num_stages": 2, **arguments})


def test_samplers_are_dpm_solver_with_each_stages_schedule():
    schedulers = stage_noise_schedules(DDPMScheduler(), 2, shifts=[1.0, 3.0], prediction_types=["epsilon", "sample"])
    samplers = sampling_schedulers(schedulers)
    for scheduler, sampler in zip(schedulers, samplers, strict=True):
        assert type(sampler) is DPMSolverMultistepScheduler
        assert sampler.config.timestep_spacing == "trailing"
        assert sampler.config.prediction_type == scheduler.config.prediction_type
        torch.testing.assert_close(sampler.alphas_cumprod, scheduler.alphas_cumprod)
