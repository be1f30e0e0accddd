"""`strength=`, image-to-image, and `mask_image=`, inpainting: where stages begin, and what they keep."""

import diffusers
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import DummyObject

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.models.latents import encode_moments
from diffusers_pisdm.ops.conditioning_augmentation import upsample_low_res
from diffusers_pisdm.schedulers import NO_SAMPLE_PREDICTION, SETTINGS, UNSUITABLE
from tests.models.tiny_vae import make_kl
from tests.pipelines.gaussian_model import BETA_SCHEDULE, GaussianDenoiser
from tests.pipelines.tiny_cascade import generators, make_cascade, make_transformer


RESIDUAL_SCALE = 0.3
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 1e-4, "beta_end": 0.02}  # schedulers' defaults differ
SCHEDULE = {**BETAS, "prediction_type": "v_prediction"}
LEVELS = [0.2, 0.5]
STEPS = [10, 8, 5]


@pytest.fixture(scope="module")
def pipe():
    """Stages of 8, 16 and 32 pixels; the second diffuses residuals, with a scheduler of second order."""
    stages = [make_transformer(1), make_transformer(2, residual_scale=RESIDUAL_SCALE), make_transformer(3)]
    ddim = DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", clip_sample=False)
    heun = HeunDiscreteScheduler(**SCHEDULE, use_exponential_sigmas=True)
    pipe = PISDMCascadePipeline.from_stages(stages, [ddim, heun, ddim])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def calls_of(pipe, **arguments):
    """What each stage's model was called with, by stage from 1, and the output."""
    calls, handles = {}, []
    for number, transformer in enumerate(pipe.stages, 1):

        def record(module, args, kwargs, number=number):
            calls.setdefault(number, []).append({"hidden_states": args[0], **kwargs})

        handles.append(transformer.register_forward_pre_hook(record, with_kwargs=True))
    defaults = {"class_labels": [1], "guidance_scale": 1.0, "output_type": "pt", "output_stages": True}
    count = pipe.num_stages
    defaults |= {"num_inference_steps": STEPS[:count], "noise_level": LEVELS[: count - 1], "generator": generators(7)}
    try:
        output = pipe(**{**defaults, **arguments})
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def alphas(timestep):
    """The forward process's a and s at a step, also between those of training, as the schedulers interpolate."""
    abar = DDPMScheduler(**BETAS).alphas_cumprod.double().numpy()
    log_sigma = np.interp(float(timestep), np.arange(len(abar)), 0.5 * np.log((1 - abar) / abar))
    return (1 / (1 + np.exp(2 * log_sigma)) ** 0.5, 1 / (1 + np.exp(-2 * log_sigma)) ** 0.5)


def draw(generator, side):
    return torch.randn(1, 3, side, side, generator=generator)


# --- Image-to-image ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "stage", "num_steps"), [(8, 1, 6), (16, 2, 9), (32, 3, 3)])
def test_the_stage_of_the_image_begins_with_it(pipe, side, stage, num_steps):
    """At 0.6 of the schedule, conditioned on the image shrunk to the stage below; 5 of Heun's steps are 9 calls."""
    pixels = torch.rand(1, 3, side, side)
    calls, output = calls_of(pipe, image=pixels, strength=0.65 if stage == 2 else 0.6)
    assert [*calls] == list(range(stage, 4))
    assert len(calls[stage]) == num_steps
    assert len(output.stage_images) == 4 - stage
    generator, image, upsampled = generators(7)[0], 2 * pixels - 1, 0
    if stage > 1:
        lower = F.avg_pool2d(image, 2)
        upsampled = upsample_low_res(lower, (side, side), RESIDUAL_SCALE if stage == 2 else None)
        level = LEVELS[stage - 2]
        low_res = (1 - level**2) ** 0.5 * upsampled + level * draw(generator, side)
        torch.testing.assert_close(calls[stage][0]["low_res"], low_res, rtol=0, atol=1e-5)
    a, s = alphas(calls[stage][0]["timestep"])
    assert 0.2 < a < 0.9
    start = (image - upsampled) / RESIDUAL_SCALE if stage == 2 else image
    wanted = a * start + s * draw(generator, side)
    torch.testing.assert_close(calls[stage][0]["hidden_states"], wanted.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("side", "stage"), [(8, 1), (16, 2)])
def test_no_strength_keeps_the_image(pipe, side, stage):
    image = torch.rand(1, 3, side, side)
    calls, output = calls_of(pipe, image=image, strength=0.0)
    assert [*calls] == list(range(stage + 1, 4))
    assert torch.equal(output.images, calls_of(pipe, image=image)[1].images)


def test_full_strength_begins_at_the_first_step(pipe):
    calls, _ = calls_of(pipe, image=torch.rand(1, 3, 8, 8), strength=1.0)
    assert [len(own) for own in calls.values()] == [10, 15, 5]


def test_strength_takes_the_place_of_the_relay_only_in_its_stage(pipe):
    calls, _ = calls_of(pipe, image=torch.rand(1, 3, 16, 16), strength=0.5, relay_strength=[1.0, 0.8])
    assert [len(own) for own in calls.values()] == [7, 4]


# --- Inpainting ----------------------------------------------------------------------------------------------------


def make_mask(side: int) -> torch.Tensor:
    """White in a square off the grid of the lower stages: `(1, 1, H, W)`."""
    mask = torch.zeros(1, 1, side, side)
    mask[..., side // 4 + 1 : side // 2 + 3, side // 2 - 3 :] = 1
    return mask


def test_known_pixels_are_noised_to_the_level_of_each_step_and_returned(pipe):
    """In every stage, with the noise it began with; of Heun's calls, each step's first: between, it goes its way."""
    pixels, mask, made = torch.rand(1, 3, 32, 32), make_mask(32), []

    def record(pipe, step, timestep, tensors):
        made.append(tensors["latents"])
        return {}

    arguments = {"image": pixels, "mask_image": mask, "output_type": "latent"}
    calls, output = calls_of(pipe, callback_on_step_end=record, **arguments)
    for i in range(1, 15, 2):
        a, _ = alphas(calls[2][i]["timestep"])
        torch.testing.assert_close(calls[2][i]["hidden_states"], (a * made[10 + i - 1]).float(), rtol=0, atol=1e-3)
    assert [len(own) for own in calls.values()] == [10, 15, 5]
    generator, lower = generators(7)[0], None
    for stage, side in ((1, 8), (2, 16), (3, 32)):
        known = F.avg_pool2d(2 * pixels - 1, 32 // side)
        keep = F.max_pool2d(mask, 32 // side).expand_as(known) == 0  # no pixel of it is repainted
        assert 0 < keep.sum() < keep.numel()
        upsampled = 0
        if stage > 1:
            upsampled = upsample_low_res(lower, (side, side), RESIDUAL_SCALE if stage == 2 else None)
            draw(generator, side)  # for the condition
        noise = draw(generator, side)
        diffused = (known - upsampled) / RESIDUAL_SCALE if stage == 2 else known
        for call in calls[stage][:: 2 if stage == 2 else 1]:
            a, s = alphas(call["timestep"])
            wanted = (a * diffused + s * noise).float()
            torch.testing.assert_close(call["hidden_states"][keep], wanted[keep], rtol=0, atol=1e-3)
        lower = output.stage_images[stage - 1]
        torch.testing.assert_close(lower[keep], known[keep], rtol=0, atol=1e-6)
        assert (lower - known)[~keep].abs().mean() > 0.1


def test_the_image_is_exact_in_8_bits(pipe):
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    masks = [PIL.Image.fromarray(np.uint8(255 * make_mask(32)[0, 0].numpy())).rotate(angle) for angle in (0, 90)]
    images = pipe(
        [1, 2],
        image=[PIL.Image.fromarray(image) for image in pixels],
        mask_image=masks,
        num_images_per_prompt=2,
        num_inference_steps=[2, 8, 2],
    ).images
    for i, image in enumerate(images):
        keep = np.array(masks[i // 2]) == 0
        assert (np.array(image)[keep] == pixels[i // 2][keep]).all()
        assert (np.array(image)[~keep] != pixels[i // 2][~keep]).mean() > 0.9


def test_all_white_is_a_new_image_and_all_black_the_old_one(pipe):
    image = torch.rand(1, 3, 32, 32)
    _, plain = calls_of(pipe)
    _, white = calls_of(pipe, image=image, mask_image=torch.ones(1, 1, 32, 32))
    assert all(torch.equal(*pair) for pair in zip(plain.stage_images, white.stage_images, strict=True))
    _, black = calls_of(pipe, image=image, mask_image=torch.zeros(1, 1, 32, 32))
    torch.testing.assert_close(black.images, image, rtol=0, atol=1e-6)


def test_a_small_image_is_known_up_to_its_own_stage(pipe):
    image = torch.rand(1, 3, 16, 16)
    calls, output = calls_of(pipe, image=image, mask_image=torch.zeros(1, 1, 16, 16))
    assert [*calls] == [1, 2, 3]
    torch.testing.assert_close(output.stage_images[1], image, rtol=0, atol=1e-6)
    upsampled = upsample_low_res(2 * image - 1, (32, 32))
    assert (calls[3][0]["hidden_states"] - upsampled).std() > 0.5


def test_strength_of_inpainting_is_the_first_stages(pipe):
    """What is repainted begins with the noised image there, and with pure noise above."""
    image, mask = torch.rand(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
    calls, _ = calls_of(pipe, image=image, mask_image=mask, strength=0.6)
    assert [len(own) for own in calls.values()] == [6, 15, 5]
    a, s = alphas(calls[1][0]["timestep"])
    wanted = a * F.avg_pool2d(2 * image - 1, 4) + s * draw(generators(7)[0], 8)
    torch.testing.assert_close(calls[1][0]["hidden_states"], wanted.float(), rtol=0, atol=1e-3)


def test_interrupting_keeps_the_known_pixels(pipe):
    def stop(pipe, step, timestep, tensors):
        pipe._interrupt = step == 3
        return {}

    image = torch.rand(1, 3, 32, 32)
    _, output = calls_of(pipe, image=image, mask_image=make_mask(32), callback_on_step_end=stop)
    known = F.avg_pool2d(image, 4)
    keep = F.max_pool2d(make_mask(32), 4).expand_as(known) == 0
    torch.testing.assert_close(output.images[keep], known[keep], rtol=0, atol=1e-6)


NAMES = {kind.name for kind in KarrasDiffusionSchedulers} - {*UNSUITABLE["is for EDM models"]}
NAMES |= {
    "CogVideoXDDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMParallelScheduler",
    "SASolverScheduler",
    "TCDScheduler",
}


@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers on NumPy 2
@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_scheduler_noises_to_its_own_steps(name):
    """What the model sees of the known pixels has the level of the timestep it is told, whatever the scheduler."""
    if isinstance(getattr(diffusers, name), DummyObject):
        pytest.skip(f"{name} needs a package that is not installed")
    prediction_type = "epsilon" if name in NO_SAMPLE_PREDICTION else "sample"
    config = DDPMScheduler(beta_schedule=BETA_SCHEDULE, prediction_type=prediction_type, clip_sample=False).config
    scheduler = getattr(diffusers, name).from_config(config, **SETTINGS.get(name, {}))
    model, seen = GaussianDenoiser(prediction_type=prediction_type, sample_size=16), []
    pipe = PISDMCascadePipeline(model, scheduler)
    pipe.set_progress_bar_config(disable=True)
    model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((args[0], kwargs["timestep"])), with_kwargs=True
    )
    image, noise, mask = torch.rand(1, 1, 16, 16), torch.randn(1, 1, 16, 16), make_mask(16)
    arguments = {"num_inference_steps": 20, "guidance_scale": 1.0, "generator": generators(0), "output_type": "pt"}
    output = pipe(1, image=image, mask_image=mask, latents=noise, **arguments).images
    torch.testing.assert_close(output[mask == 0], image[mask == 0], rtol=0, atol=1e-6)
    # The rest is the model's: pixels are independent, around 0.5 with a standard deviation of 0.25.
    assert abs((2 * output - 1)[mask == 1].mean() - 0.5) < 0.15
    for latents, timestep in seen[:: scheduler.order]:
        a, s = (np.exp(v) for v in (0, np.interp(timestep.item(), np.arange(1000), model.log_sigmas)))
        a, s = a / (1 + s**2) ** 0.5, s / (1 + s**2) ** 0.5
        wanted = (a * (2 * image - 1) + s * noise).float()
        torch.testing.assert_close(latents[mask == 0], wanted[mask == 0], rtol=0, atol=0.01)


def test_latents_are_known_where_no_pixel_of_theirs_is_repainted():
    """With an autoencoder; its own errors are not in the result."""
    vae = make_kl(latent_channels=4).eval()
    stages = [make_transformer(1, 4), make_transformer(2, 4, residual_scale=RESIDUAL_SCALE)]
    ddim = DDIMScheduler(**SCHEDULE, timestep_spacing="trailing", clip_sample=False)
    pipe = PISDMCascadePipeline.from_stages(stages, ddim, vae=vae)
    pipe.set_progress_bar_config(disable=True)
    image, mask = torch.rand(1, 3, 64, 64), make_mask(64)
    arguments = {"image": image, "mask_image": mask}
    _, output = calls_of(pipe, **arguments)
    keep = (mask == 0).expand_as(image)
    torch.testing.assert_close(output.images[keep], image[keep], rtol=0, atol=1e-6)
    _, output = calls_of(pipe, **arguments, output_type="latent")
    for latents, factor in zip(output.stage_images, (2, 1), strict=True):
        known = encode_moments(vae, F.avg_pool2d(2 * image - 1, factor))[0]
        keep = F.max_pool2d(mask, 4 * factor).expand_as(known) == 0
        assert 0 < keep.sum() < keep.numel()
        torch.testing.assert_close(latents[keep], known[keep], rtol=0, atol=1e-4)
        assert (latents - known)[~keep].abs().mean() > 0.1


IMAGE = torch.rand(1, 3, 32, 32)
WRONG = {
    "mask alone": ({"mask_image": make_mask(32)}, ValueError, "`mask_image` needs an `image`"),
    "strength alone": ({"strength": 0.5}, ValueError, "`strength` needs an `image`"),
    "mask of another size": (
        {"image": IMAGE, "mask_image": make_mask(16)},
        ValueError,
        "`mask_image` is 16x16 .* `image` is 32x32",
    ),
    "colours": ({"image": IMAGE, "mask_image": IMAGE}, ValueError, "`mask_image` has 3 channels"),
    "text": ({"image": IMAGE, "mask_image": "mask.png"}, TypeError, "`mask_image` has to be a PIL image"),
    "nothing to repaint": (
        {"image": IMAGE, "mask_image": make_mask(32), "strength": 0.0},
        ValueError,
        "repaint nothing",
    ),
    "nothing to do": (
        {"image": IMAGE, "strength": 0.0},
        ValueError,
        "`image` has the size .* `strength` .* `mask_image`",
    ),
    **{
        str(value): ({"image": IMAGE, "strength": value}, ValueError, r"`strength` has to be in \[0, 1\]")
        for value in (-0.1, 1.1, float("nan"), "1", True)
    },
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_arguments(pipe, case):
    arguments, exception, message = WRONG[case]
    with pytest.raises(exception, match=message):
        pipe(1, **arguments)


def test_a_scheduler_that_cannot_start_midway():
    """It can inpaint from pure noise."""
    pipe = make_cascade(1, scheduler=diffusers.PNDMScheduler(**SCHEDULE))
    image, mask = torch.rand(1, 3, 8, 8), make_mask(8)
    with pytest.raises(ValueError, match=r"`strength` .* PNDMScheduler"):
        pipe(1, image=image, strength=0.5)
    with pytest.raises(ValueError, match=r"`strength` .* PNDMScheduler"):
        pipe(1, image=image, mask_image=mask, strength=0.5)
    pipe(1, image=image, mask_image=mask, num_inference_steps=10)
