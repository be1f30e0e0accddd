import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_pisdm.training import LOSS_WEIGHTINGS, denoising_target, denoising_weights


TIMESTEPS = torch.tensor([3, 250, 500, 750, 990])


def make_scheduler(prediction_type):
    return DDPMScheduler(prediction_type=prediction_type, beta_schedule="scaled_linear")


def relation(prediction_type, alpha_bar):
    """What the squared error of the noise is as a multiple of the prediction's own."""
    return {"epsilon": torch.ones_like(alpha_bar), "v_prediction": alpha_bar, "sample": alpha_bar / (1 - alpha_bar)}[
        prediction_type
    ]


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_weights_are_their_formulas_in_double_precision(prediction_type):
    scheduler = make_scheduler(prediction_type)
    beta, alpha_bar = scheduler.betas.double(), scheduler.alphas_cumprod.double()
    alpha, sigma_squared = scheduler.alphas.double(), scheduler.betas.double()
    snr = alpha_bar / (1 - alpha_bar)
    of_noise = {
        "uniform": 1 / relation(prediction_type, alpha_bar),  # 1 for the prediction as it is
        "vlb": beta**2 / (2 * sigma_squared * alpha * (1 - alpha_bar)),  # equation 17
        "min_snr": snr.clamp(max=5.0) / snr,
    }
    assert {*of_noise, "sigmoid"} == set(LOSS_WEIGHTINGS)
    for weighting, weights in of_noise.items():
        expected = (weights * relation(prediction_type, alpha_bar)).float()
        actual = denoising_weights(scheduler, weighting)
        torch.testing.assert_close(actual, expected, rtol=1e-7, atol=0)
    capped = denoising_weights(make_scheduler("epsilon"), "min_snr", min_snr_gamma=2.0)
    torch.testing.assert_close(capped, (snr.clamp(max=2.0) / snr).float(), rtol=1e-7, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_sigmoid_weights_are_those_of_their_integral_over_log_snr(prediction_type):
    """On the cosine schedule, log SNR = -2 log tan(pi t / 2), whose derivative is known."""
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=prediction_type)
    found = denoising_weights(scheduler, "sigmoid", sigmoid_bias=-1.0).double()
    assert found.mean() == pytest.approx(1)
    alpha_bar = scheduler.alphas_cumprod.double()
    snr = alpha_bar / (1 - alpha_bar)
    slope = torch.pi / (alpha_bar * (1 - alpha_bar)).sqrt()  # -d log SNR / dt
    expected = slope / (1 + snr * torch.e) * relation(prediction_type, alpha_bar)  # sigmoid(-1 - log SNR)
    middle = slice(50, 950)
    torch.testing.assert_close(found[middle] / found[500], expected[middle] / expected[500], rtol=0.05, atol=0)
    higher = denoising_weights(scheduler, "sigmoid", sigmoid_bias=1.0)
    assert higher[100] / higher[900] > found[100] / found[900]


def test_sigmoid_weights_of_a_schedule_without_signal_at_its_end_are_finite():
    scheduler = DDPMScheduler(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] < 1e-6
    assert denoising_weights(scheduler, "sigmoid").isfinite().all()


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


def test_unknown_weighting_and_prediction_type_name_the_choices():
    with pytest.raises(ValueError, match=r"`weighting`.*uniform, vlb, min_snr, sigmoid.*cosine"):
        denoising_weights(make_scheduler("epsilon"), "cosine")
    scheduler = make_scheduler("epsilon")
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(ValueError, match=r"`prediction_type`.*epsilon.*v_prediction.*sample.*flow"):
        denoising_target(scheduler, torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long))
