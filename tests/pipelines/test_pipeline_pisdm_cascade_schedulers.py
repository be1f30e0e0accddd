"""
With a model that predicts exactly what Gaussian data ask for, sampling has a known result. A deterministic scheduler
maps the initial noise z to `mean + std * z` in every pixel; a stochastic one gives pixels of that mean and std.
"""

import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
)
from diffusers.utils import is_scipy_available

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.ops.conditioning_augmentation import upsample_low_res
from diffusers_pisdm.schedulers import NO_SAMPLE_PREDICTION, SETTINGS
from tests.pipelines.gaussian_model import BETA_SCHEDULE, GaussianDenoiser
from tests.pipelines.tiny_cascade import generators, make_cascade


pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers on NumPy 2

MEAN = 0.5  # of class 1
STD = 0.25

# Largest error of a pixel after 50 steps, as measured, times 1.5. Initial noise reaches 4 standard deviations.
DETERMINISTIC = {
    "DPMSolverMultistepScheduler": 0.006,
    "DPMSolverSinglestepScheduler": 0.04,
    "DDIMScheduler": 0.07,
    "DDIMParallelScheduler": 0.07,
    "CogVideoXDDIMScheduler": 0.07,
    "TCDScheduler": 0.07,
    "EulerDiscreteScheduler": 0.08,
    "HeunDiscreteScheduler": 0.06,
    "UniPCMultistepScheduler": 0.012,
    "DEISMultistepScheduler": 0.02,
    "KDPM2DiscreteScheduler": 0.02,
    "PNDMScheduler": 0.06,
    "LMSDiscreteScheduler": 0.006,
}
# Name, options, and eta; 200 steps.
STOCHASTIC = [
    ("DDPMScheduler", {}, 0.0),
    ("DDIMScheduler", {}, 1.0),
    ("DDPMParallelScheduler", {}, 0.0),
    ("SASolverScheduler", {}, 0.0),
    ("EulerAncestralDiscreteScheduler", {}, 0.0),
    ("KDPM2AncestralDiscreteScheduler", {}, 0.0),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}, 0.0),
]
FEW_STEPS = 20
EVEN = {"HeunDiscreteScheduler": {"use_exponential_sigmas": False}}  # half of the steps are half of the timesteps


def make_scheduler(name: str, prediction_type: str = "epsilon", **options):
    if name == "LMSDiscreteScheduler" and not is_scipy_available():
        pytest.skip("LMSDiscreteScheduler needs scipy")
    config = DDPMScheduler(beta_schedule=BETA_SCHEDULE, prediction_type=prediction_type, clip_sample=False).config
    return getattr(diffusers, name).from_config(config, **{**SETTINGS.get(name, {}), **options})


def make_pipeline(scheduler, *higher, prediction_type: str = "epsilon", **model) -> PISDMCascadePipeline:
    """One stage of 64 pixels, or of 32 below the given higher one."""
    first = GaussianDenoiser(prediction_type=prediction_type, sample_size=32 if higher else 64, **model)
    pipe = PISDMCascadePipeline(first, scheduler, *higher)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def sample(pipe, steps=50, **arguments) -> torch.Tensor:
    defaults = {"class_labels": 1, "guidance_scale": 1.0, "output_type": "latent", "generator": generators(0)}
    return pipe(**{**defaults, "num_inference_steps": steps, **arguments}).images


def make_noise() -> torch.Tensor:
    return torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "prediction_type"),
    [
        (name, prediction_type)
        for name in DETERMINISTIC
        for prediction_type in ("epsilon", "v_prediction", "sample")
        if prediction_type != "sample" or name not in NO_SAMPLE_PREDICTION
    ],
)
def test_deterministic_schedulers_map_noise_to_data(name, prediction_type):
    pipe = make_pipeline(make_scheduler(name, prediction_type), prediction_type=prediction_type)
    noise = make_noise()
    torch.testing.assert_close(sample(pipe, latents=noise), MEAN + STD * noise, rtol=0, atol=DETERMINISTIC[name])


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_ddim_takes_the_noise_of_the_clipped_image(prediction_type):
    """DDIM is DPM-Solver++ of first order, whose noise always is that of the clipped image."""
    noise = 3 * make_noise()  # reaches beyond [-1, 1]

    def almost_done(name, **options) -> torch.Tensor:
        """The latents before the last step: after it, both are the clipped image itself."""
        scheduler = make_scheduler(name, prediction_type, timestep_spacing="trailing", **options)
        pipe = make_pipeline(scheduler, prediction_type=prediction_type)
        kept = []

        def keep(pipe, step, timestep, callback_kwargs):
            kept.append(callback_kwargs["latents"])
            return callback_kwargs

        sample(pipe, 20, latents=noise, callback_on_step_end=keep)
        return kept[-2]

    ddim = almost_done("DDIMScheduler", thresholding=True)
    assert (ddim - almost_done("DDIMScheduler")).abs().max() > 0.1  # something was clipped
    expected = almost_done("DPMSolverMultistepScheduler", thresholding=True, solver_order=1)
    torch.testing.assert_close(ddim, expected, rtol=0, atol=1e-3)


def test_the_stage_of_uneven_steps_is_warned_of(caplog):
    scheduler_2 = make_scheduler("PNDMScheduler", timestep_spacing="linspace")
    pipe = make_cascade(2, scheduler=make_scheduler("DDIMScheduler"), scheduler_2=scheduler_2)
    pipe(1, num_inference_steps=[3, 6])
    (message,) = [record.getMessage() for record in caplog.records]
    assert "PNDMScheduler" in message and "6 steps" in message


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(("name", "options", "eta"), STOCHASTIC)
def test_stochastic_schedulers_give_the_data_distribution(name, options, eta, prediction_type):
    pipe = make_pipeline(make_scheduler(name, prediction_type, **options), prediction_type=prediction_type)
    noise = make_noise()
    images = sample(pipe, 200, latents=noise, eta=eta)
    assert images.mean().item() == pytest.approx(MEAN, abs=4 * STD / 64)  # 4096 pixels
    assert images.std().item() == pytest.approx(STD, rel=0.08)
    correlation = torch.corrcoef(torch.stack([images.flatten(), noise.flatten()]))[0, 1]
    assert correlation.abs() < 0.2  # new noise has replaced the initial noise; SASolver adds none at the ends


@pytest.mark.parametrize(("name", "options", "eta"), STOCHASTIC)
def test_scheduler_noise_comes_from_each_images_generator(name, options, eta):
    pipe = make_pipeline(make_scheduler(name, **options))
    alone = sample(pipe, FEW_STEPS, eta=eta, generator=generators(7))
    in_batch = sample(pipe, FEW_STEPS, eta=eta, class_labels=[0, 1, 0], generator=generators(3, 7, 5))
    torch.testing.assert_close(in_batch[1:2], alone)
    assert (in_batch[0] - in_batch[2]).abs().max() > 0.1


@pytest.mark.parametrize(
    "name", [*DETERMINISTIC, "EulerAncestralDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"]
)
def test_runs_leave_no_state_behind(name):
    """Neither a complete run, nor one that was interrupted or broken off, changes the next one."""
    higher = GaussianDenoiser(means=(0.0, 0.2), low_res_channels=1)
    pipe = make_pipeline(make_scheduler(name), higher)

    def interrupt(pipe, step, timestep, callback_kwargs):
        pipe._interrupt = step == 4
        return callback_kwargs

    def break_off(pipe, step, timestep, callback_kwargs):
        raise RuntimeError("broken off")

    first = sample(pipe, FEW_STEPS)
    assert torch.equal(sample(pipe, FEW_STEPS), first)
    sample(pipe, FEW_STEPS + 1, callback_on_step_end=interrupt)
    assert torch.equal(sample(pipe, FEW_STEPS), first)
    with pytest.raises(RuntimeError, match="broken off"):
        sample(pipe, FEW_STEPS + 1, callback_on_step_end=break_off)
    assert torch.equal(sample(pipe, FEW_STEPS), first)
    if name != "PNDMScheduler":
        sample(pipe, FEW_STEPS, relay_strength=0.5)
        assert torch.equal(sample(pipe, FEW_STEPS), first)


def test_guidance_moves_the_mean():
    """Between Gaussians of one std guidance amounts to the mean `m_u + w (m_c - m_u)`; off, to that of the class."""
    noise = make_noise()
    pipe = make_pipeline(make_scheduler("DPMSolverMultistepScheduler"))
    guided = sample(pipe, latents=noise, guidance_scale=3.0)
    torch.testing.assert_close(guided, 0.1 + 3.0 * (MEAN - 0.1) + STD * noise, rtol=0, atol=0.03)
    for scale in (1.0, 0.0):
        torch.testing.assert_close(
            sample(pipe, latents=noise, guidance_scale=scale), MEAN + STD * noise, rtol=0, atol=0.006
        )


def test_guidance_is_on_inside_its_interval_only():
    pipe = make_pipeline(make_scheduler("DPMSolverMultistepScheduler"))
    sample(pipe, 10, guidance_scale=3.0, guidance_start=0.2, guidance_stop=0.5)
    assert [call["batch_size"] for call in pipe.transformer.calls] == [1, 1, 2, 2, 2, 1, 1, 1, 1, 1]
    noise = make_noise()
    images = sample(pipe, latents=noise, guidance_scale=3.0, guidance_stop=0.0)
    assert torch.equal(images, sample(pipe, latents=noise, guidance_scale=1.0))


def test_higher_stage_follows_the_lower():
    noise = make_noise()
    higher = GaussianDenoiser(means=(0.0, 0.2), low_res_channels=1)
    pipe = make_pipeline(make_scheduler("DPMSolverMultistepScheduler"), higher)
    output = pipe(
        1,
        num_inference_steps=[10, 50],
        guidance_scale=1.0,
        noise_level=0.0,
        latents=[None, noise],
        output_type="latent",
        output_stages=True,
    )
    low, high = output.stage_images
    assert low.shape == (1, 1, 32, 32)
    torch.testing.assert_close(high, upsample_low_res(low, (64, 64)) + 0.2 + STD * noise, rtol=0, atol=0.006)
    assert len(pipe.transformer.calls) == 10
    assert len(higher.calls) == 50
    assert all(call["noise_level"].tolist() == [0.0] for call in higher.calls)
    assert all(call["noise_level"] is None for call in pipe.transformer.calls)


def test_condition_is_noised_to_its_level():
    """The model's mean is the condition `sqrt(1 - l^2) u + l n`: what is added to the scaled image has std l."""
    higher = GaussianDenoiser(means=(0.0, 0.0), std=1e-3, low_res_channels=1)
    pipe = make_pipeline(make_scheduler("DPMSolverMultistepScheduler"), higher)
    arguments = {"guidance_scale": 1.0, "num_inference_steps": 20, "output_type": "latent", "output_stages": True}
    low, high = pipe(1, noise_level=0.6, generator=generators(0), **arguments).stage_images
    noise = high - 0.8 * upsample_low_res(low, (64, 64))
    assert noise.mean().abs() < 0.04
    assert noise.std().item() == pytest.approx(0.6, rel=0.04)
    assert all(call["noise_level"].tolist() == [pytest.approx(0.6)] for call in higher.calls)


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name != "PNDMScheduler"])
def test_relay_starts_from_the_noised_lower_image(name):
    r"""From `x_t = a u + s z` a deterministic scheduler reaches `m + std (x_t - a m) / sqrt(a^2 std^2 + s^2)`."""
    noise = make_noise()
    higher = GaussianDenoiser(means=(0.0, 0.2), low_res_channels=1)
    pipe = make_pipeline(make_scheduler("DPMSolverMultistepScheduler"), higher)
    pipe.scheduler_2 = make_scheduler(name, **EVEN.get(name, {}))
    arguments = {"guidance_scale": 1.0, "num_inference_steps": [10, 50], "noise_level": 0.0, "output_type": "latent"}
    output = pipe(1, relay_strength=0.5, latents=[None, noise], output_stages=True, **arguments)
    low, high = output.stage_images

    first = higher.calls[0]["timestep"].item()
    assert 450 < first < 550
    assert len(higher.calls) == (49 if pipe.scheduler_2.order == 2 else 25)
    sigma = np.exp(np.interp(first, np.arange(1000), higher.log_sigmas)).item()
    a, s = 1 / math.sqrt(sigma**2 + 1), sigma / math.sqrt(sigma**2 + 1)
    upsampled = upsample_low_res(low, (64, 64))
    mean = upsampled + 0.2
    expected = mean + STD * (a * upsampled + s * noise - a * mean) / math.sqrt((a * STD) ** 2 + s**2)
    atol = max(DETERMINISTIC[name], 0.045 if name == "LMSDiscreteScheduler" else 0)  # LMS starts with too low an order
    torch.testing.assert_close(high, expected, rtol=0, atol=atol)


# --- Residual stages: `image = up(low) + s (m + std z)`, whatever noise the condition has ----------------------------

RESIDUAL_SCALE = 0.3


def make_residual_pipeline(name, prediction_type="sample", **options):
    higher = GaussianDenoiser(
        (0.0, 0.2),
        prediction_type=prediction_type,
        low_res_channels=1,
        residual_scale=RESIDUAL_SCALE,
    )
    scheduler = make_scheduler(name, prediction_type, **options)
    pipe = make_pipeline(make_scheduler("DPMSolverMultistepScheduler"), higher)
    pipe.scheduler_2 = scheduler
    return pipe


def sample_stages(pipe, steps, **arguments):
    """The first stage's image, upsampled as residual stages do, and the second's."""
    defaults = {"guidance_scale": 1.0, "num_inference_steps": [10, steps], "generator": generators(0)}
    output = pipe(1, **{**defaults, "output_type": "latent", "output_stages": True, **arguments})
    low, high = output.stage_images
    return upsample_low_res(low, (64, 64), RESIDUAL_SCALE), high


@pytest.mark.parametrize("noise_level", [0.0, 0.5])
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_residual_stages_add_what_they_drew_to_the_clean_upsampled_image(name, noise_level):
    noise, prediction_type = make_noise(), "epsilon" if name in NO_SAMPLE_PREDICTION else "sample"
    pipe = make_residual_pipeline(name, prediction_type)
    upsampled, high = sample_stages(pipe, 50, latents=[None, noise], noise_level=noise_level)
    expected = upsampled + RESIDUAL_SCALE * (0.2 + STD * noise)
    torch.testing.assert_close(high, expected, rtol=0, atol=RESIDUAL_SCALE * DETERMINISTIC[name])


@pytest.mark.parametrize(("name", "options", "eta"), STOCHASTIC)
def test_residual_stages_with_stochastic_schedulers(name, options, eta):
    prediction_type = "v_prediction" if "Ancestral" in name else "sample"  # diffusers has no other there
    pipe = make_residual_pipeline(name, prediction_type, **options)
    upsampled, high = sample_stages(pipe, 200, eta=eta)
    residual = (high - upsampled) / RESIDUAL_SCALE
    assert residual.mean().item() == pytest.approx(0.2, abs=4 * STD / 64)
    assert residual.std().item() == pytest.approx(STD, rel=0.08)


@pytest.mark.parametrize("name", [name for name in DETERMINISTIC if name != "PNDMScheduler"])
def test_relay_of_a_residual_stage_starts_from_the_upsampled_image(name):
    r"""That is a residual of zero: from `z_t = s z`, one reaches `m + std (z_t - a m) / sqrt(a^2 std^2 + s^2)`."""
    noise, prediction_type = make_noise(), "epsilon" if name in NO_SAMPLE_PREDICTION else "sample"
    pipe = make_residual_pipeline(name, prediction_type, **EVEN.get(name, {}))
    upsampled, high = sample_stages(pipe, 50, latents=[None, noise], relay_strength=0.5)
    first = pipe.transformer_2.calls[0]["timestep"].item()
    assert 450 < first < 550
    sigma = np.exp(np.interp(first, np.arange(1000), pipe.transformer_2.log_sigmas)).item()
    a, s = 1 / math.sqrt(sigma**2 + 1), sigma / math.sqrt(sigma**2 + 1)
    atol = max(DETERMINISTIC[name], 0.045 if name == "LMSDiscreteScheduler" else 0)  # LMS starts with too low an order
    expected = upsampled + RESIDUAL_SCALE * (0.2 + STD * (s * noise - a * 0.2) / math.sqrt((a * STD) ** 2 + s**2))
    torch.testing.assert_close(high, expected, rtol=0, atol=RESIDUAL_SCALE * atol)


def test_callbacks_see_the_residual_and_at_the_last_step_the_image():
    seen = []

    def keep(pipe, step, timestep, callback_kwargs):
        seen.append(callback_kwargs["latents"])
        return callback_kwargs

    pipe, noise = make_residual_pipeline("DPMSolverMultistepScheduler"), make_noise()
    arguments = {"latents": [None, noise], "callback_on_step_end": keep}
    upsampled, high = sample_stages(pipe, 5, **arguments)
    assert torch.equal(seen[-1], high)
    assert (seen[-2] - high).std() > 0.1  # a residual, around zero

    def interrupt(pipe, step, timestep, callback_kwargs):
        pipe._interrupt = step == 12
        return keep(pipe, step, timestep, callback_kwargs)

    _, stopped = sample_stages(pipe, 5, latents=[None, noise], callback_on_step_end=interrupt)
    torch.testing.assert_close(stopped, upsampled + RESIDUAL_SCALE * seen[-1])  # as far as the third step got


def test_schedulers_that_bound_residuals_are_refused():
    bounded = DDIMScheduler(beta_schedule=BETA_SCHEDULE, clip_sample=True)
    free = DDIMScheduler.from_config(bounded.config, clip_sample=False)
    first, higher = GaussianDenoiser(sample_size=32), GaussianDenoiser(low_res_channels=1, residual_scale=0.3)
    PISDMCascadePipeline.from_stages([first, higher], [bounded, free])  # the first stage may be bounded
    for schedulers in (bounded, [free, bounded]):
        with pytest.raises(ValueError, match=r"`scheduler_2` .*`clip_sample=True`.*clip_sample=False"):
            PISDMCascadePipeline.from_stages([first, higher], schedulers)


def test_relay_can_differ_by_stage():
    pipe = make_cascade(3)
    timesteps = []

    def record(pipe, step, timestep, callback_kwargs):
        timesteps.append((callback_kwargs["stage"], timestep.item()))
        return callback_kwargs

    pipe(
        1,
        num_inference_steps=10,
        relay_strength=[None, 0.3],
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=["stage"],
    )
    assert [sum(stage == i for stage, _ in timesteps) for i in (1, 2, 3)] == [10, 10, 3]
    assert pipe.num_timesteps == 23
    assert timesteps[10][1] > 900 > 400 > timesteps[20][1]


def test_relay_refuses_a_scheduler_that_cannot_start_midway():
    pipe = make_cascade(2, scheduler=PNDMScheduler(beta_schedule=BETA_SCHEDULE))
    with pytest.raises(ValueError, match="`relay_strength` need a scheduler that can start midway, but PNDMScheduler"):
        pipe(1, relay_strength=0.5)


def test_custom_timesteps():
    pipe = make_pipeline(make_scheduler("DPMSolverMultistepScheduler"))
    sample(pipe, timesteps=[990, 700, 300, 20])
    assert [call["timestep"].item() for call in pipe.transformer.calls] == [990, 700, 300, 20]


def test_custom_timesteps_of_one_stage():
    higher = GaussianDenoiser(low_res_channels=1)
    pipe = make_pipeline(make_scheduler("DPMSolverMultistepScheduler"), higher)
    sample(pipe, [3, 5], timesteps=[None, [900, 100]])
    assert len(pipe.transformer.calls) == 3
    assert [call["timestep"].item() for call in higher.calls] == [900, 100]


def test_custom_sigmas():
    pipe = make_pipeline(make_scheduler("EulerDiscreteScheduler"))
    sample(pipe, sigmas=[80.0, 5.0, 0.5, 0.0])  # this scheduler wants the last one, where the image is clean
    sigmas = np.exp([pipe.transformer.log_sigmas[round(call["timestep"].item())] for call in pipe.transformer.calls])
    np.testing.assert_allclose(sigmas, [80.0, 5.0, 0.5], rtol=0.35)  # the nearest training timesteps


def test_a_first_timestep_that_comes_twice_is_two_steps():
    """Two noise levels beyond the schedule's; a search for their timestep would find the second."""
    pipe, sigmas = make_pipeline(make_scheduler("EulerDiscreteScheduler")), [9e4, 6e4, 5.0, 0.0]
    inputs, latents = [], []
    pipe.transformer.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))

    def keep(pipe, step, timestep, callback_kwargs):
        latents.append(callback_kwargs["latents"])
        return callback_kwargs

    sample(pipe, sigmas=sigmas, callback_on_step_end=keep)
    assert [call["timestep"].item() for call in pipe.transformer.calls][:2] == [999, 999]
    for before, sigma, found in zip(latents, sigmas[1:], inputs[1:], strict=False):
        torch.testing.assert_close(found, before / math.sqrt(sigma**2 + 1))


@pytest.mark.parametrize(("name", "schedule"), [("DDIMScheduler", "timesteps"), ("DDPMScheduler", "sigmas")])
def test_custom_schedule_needs_a_scheduler_that_takes_it(name, schedule):
    pipe = make_pipeline(make_scheduler(name))
    with pytest.raises(ValueError, match=f"`{name}.set_timesteps` does not support custom `{schedule}`"):
        sample(pipe, **{schedule: [900, 100]})


def test_timesteps_and_sigmas_exclude_each_other():
    pipe = make_pipeline(make_scheduler("EulerDiscreteScheduler"))
    with pytest.raises(ValueError, match="Only one of `timesteps` or `sigmas` can be passed"):
        sample(pipe, timesteps=[900], sigmas=[1.0])


def test_stage_without_a_scheduler_copies_the_first():
    pipe = make_cascade(3)
    pipe.scheduler_2 = pipe.scheduler  # a shared object must not be set twice in one run
    schedulers = pipe.get_stage_schedulers()
    assert schedulers[0] is pipe.scheduler
    assert len({id(scheduler) for scheduler in schedulers}) == 3
    assert all(scheduler.config == pipe.scheduler.config for scheduler in schedulers)


def test_stage_schedulers_are_used():
    pipe = make_cascade(2, scheduler_2=DDIMScheduler(beta_schedule=BETA_SCHEDULE, clip_sample=False))
    first, second = pipe.get_stage_schedulers()
    assert isinstance(first, DPMSolverMultistepScheduler)
    assert second is pipe.scheduler_2
    pipe(1, num_inference_steps=[4, 3])
    assert (pipe.scheduler.num_inference_steps, pipe.scheduler_2.num_inference_steps) == (4, 3)


def test_initial_noise_is_scaled_for_the_scheduler_and_input_for_the_model():
    scheduler = make_scheduler("EulerDiscreteScheduler")
    pipe = make_pipeline(scheduler)
    seen = []

    def spy(module, args, kwargs):
        seen.append(args[0])

    pipe.transformer.register_forward_pre_hook(spy, with_kwargs=True)
    noise = make_noise()
    sample(pipe, 10, latents=noise)
    assert isinstance(scheduler, EulerDiscreteScheduler)
    assert scheduler.init_noise_sigma > 1000
    torch.testing.assert_close(seen[0], noise, rtol=1e-3, atol=0)  # sigma z / sqrt(sigma^2 + 1)
    assert all(0.15 < model_input.std() < 1.2 for model_input in seen)
