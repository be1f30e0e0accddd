import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_pisdm.training import LOSS_WEIGHTINGS, denoising_target, denoising_weights


TIMESTEPS = torch.tensor([3, 250, 500, 750, 990])


def make_scheduler(prediction_type):
    return DDPMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear")


def test_vlb_weight_is_equation_17():
    scheduler = make_scheduler("epsilon")
    weights = denoising_weights(scheduler, "vlb")
    for t in TIMESTEPS.tolist():
        beta, alpha = scheduler.betas[t].item(), 1 - scheduler.betas[t].item()
        alpha_bar = scheduler.alphas_cumprod[t].item()
        assert weights[t].item() == pytest.approx(beta**2 / (2 * beta * alpha * (1 - alpha_bar)), rel=1e-5)


def test_min_snr_weight_caps_the_noise_weight_at_gamma_over_snr():
    scheduler = make_scheduler("epsilon")
    snr = scheduler.alphas_cumprod / (1 - scheduler.alphas_cumprod)
    weights = denoising_weights(scheduler, "min_snr", min_snr_gamma=5.0)
    assert torch.allclose(weights[snr < 5], torch.ones(1))
    assert torch.allclose(weights[snr > 5], 5.0 / snr[snr > 5], rtol=1e-4)


@pytest.mark.parametrize("weighting", ["vlb", "min_snr"])
@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
def test_every_prediction_type_gives_the_loss_of_the_noise(weighting, prediction_type):
    """The same imperfect noise estimate, expressed as another prediction, must cost the same."""
    torch.manual_seed(0)
    clean, noise, wrong_noise = torch.randn(3, len(TIMESTEPS), 3, 8, 8, dtype=torch.float64)
    of_noise, of_other = make_scheduler("epsilon"), make_scheduler(prediction_type)
    noisy = of_noise.add_noise(clean, noise, TIMESTEPS)
    signal = of_noise.alphas_cumprod.double()[TIMESTEPS].sqrt()[:, None, None, None]
    sigma = (1 - signal**2).sqrt()
    wrong_clean = (noisy - sigma * wrong_noise) / signal
    wrong = wrong_clean if prediction_type == "sample" else signal * wrong_noise - sigma * wrong_clean

    def loss(scheduler, prediction):
        error = (prediction - denoising_target(scheduler, clean, noise, TIMESTEPS)).square().mean(dim=(1, 2, 3))
        return denoising_weights(scheduler, weighting)[TIMESTEPS] * error

    torch.testing.assert_close(loss(of_other, wrong), loss(of_noise, wrong_noise), rtol=2e-3, atol=0)


def test_uniform_weight_is_one_whatever_is_predicted():
    for prediction_type in ("epsilon", "v_prediction", "sample"):
        assert (denoising_weights(make_scheduler(prediction_type), "uniform") == 1).all()


def test_unknown_weighting_and_prediction_type_name_the_choices():
    with pytest.raises(ValueError, match=", ".join(LOSS_WEIGHTINGS)):
        denoising_weights(make_scheduler("epsilon"), "cosine")
    scheduler = make_scheduler("epsilon")
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match="epsilon, v_prediction or sample, got flow"):
        denoising_target(scheduler, torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long))
