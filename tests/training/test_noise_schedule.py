import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler

from diffusers_pisdm.training import shift_noise_schedule


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
