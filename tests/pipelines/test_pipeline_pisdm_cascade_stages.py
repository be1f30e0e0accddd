"""Four stages, each with its own value of every argument: what the models are called with, by the formulas."""

import logging

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
)

from diffusers_pisdm import PISDMCascadePipeline
from tests.pipelines.tiny_cascade import NUM_CLASSES, generators, make_cascade, make_transformer


pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers on NumPy 2

LABELS = [1, 1, 2, 2]  # two classes, two images of each
SIZES = [(8, 12), (16, 24), (32, 48), (64, 96)]
RESIDUAL_SCALE = 0.3  # of the third stage
SEEDS = (3, 1, 4, 2)
ETA = 0.6

ARGUMENTS = {
    "num_inference_steps": [7, 9, 8, 5],  # the first two have schedules of their own
    "sigmas": [[50.0, 5.0, 0.5, 0.0], None, None, None],
    "timesteps": [None, [900, 700, 400, 300, 20], None, None],
    "guidance_scale": [2.0, 3.0, 1.5, 4.0],
    "guidance_start": [0.3, 0.0, 0.25, 0.5],
    "guidance_stop": [1.0, 0.8, 0.75, 0.7],
    "noise_level": [0.1, 0.4, 0.7],
    "relay_strength": [None, 0.5, 0.9],
}
# By the formulas: which steps of each stage are guided, `start <= i / T < stop`, for 3, 5, 4 of 8 and 7 of 9 steps.
GUIDED = [[1, 2], [0, 1, 2, 3], [1, 2], [4]]
STEPS = [3, 5, 4, 7]


def make_schedulers():
    config = {"beta_schedule": "scaled_linear", "prediction_type": "v_prediction"}
    return [
        EulerDiscreteScheduler(**config),
        DPMSolverMultistepScheduler(**config),
        DDIMScheduler(**config, timestep_spacing="trailing", clip_sample=False),
        HeunDiscreteScheduler(**config),
    ]


def make_pipe():
    stages = [make_transformer(1), make_transformer(2), make_transformer(3, residual_scale=RESIDUAL_SCALE)]
    pipe = PISDMCascadePipeline.from_stages([*stages, make_transformer(4)], make_schedulers())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def spy_on_stages(pipe):
    """Each stage's calls, in a list that grows: what the model was given, by name, and what it gave."""
    calls = [[] for _ in pipe.stages]
    for transformer, own_calls in zip(pipe.stages, calls):
        transformer.register_forward_hook(
            lambda _, args, kwargs, output, own_calls=own_calls: own_calls.append(
                {"hidden_states": args[0], **kwargs, "output": output[0]}
            ),
            with_kwargs=True,
        )
    return calls


def draw(images_generators, size):
    return torch.stack([torch.randn(3, *size, generator=generator) for generator in images_generators])


def set_schedule(scheduler, stage):
    """The scheduler's timesteps of a stage, from where a relay enters."""
    sigmas, timesteps = ARGUMENTS["sigmas"][stage], ARGUMENTS["timesteps"][stage]
    if sigmas is not None:
        scheduler.set_timesteps(sigmas=sigmas)
    elif timesteps is not None:
        scheduler.set_timesteps(timesteps=timesteps)
    else:
        scheduler.set_timesteps(ARGUMENTS["num_inference_steps"][stage])
    return scheduler.timesteps[-STEPS[stage] :]


def check_stage(stage, scheduler, calls, image, given_noise, images_generators):
    """Goes through a stage's calls with a scheduler of its own and the model's outputs; returns the stage's image."""
    schedule, size = set_schedule(scheduler, stage), SIZES[stage]
    low_res = level = upsampled = None
    is_residual = stage == 2
    if stage > 0:
        level = ARGUMENTS["noise_level"][stage - 1]
        upsampled = F.interpolate(
            image, size=size, mode="bicubic" if is_residual else "bilinear", antialias=is_residual
        )
        low_res = (1 - level**2) ** 0.5 * upsampled + level * draw(images_generators, size)
    noise = draw(images_generators, size) if given_noise is None else given_noise
    if stage > 1:
        start = 0 * upsampled if is_residual else upsampled
        latents = scheduler.add_noise(start, noise, schedule[:1].repeat(len(LABELS)))
    else:
        latents = noise * scheduler.init_noise_sigma

    assert len(calls) == len(schedule) == STEPS[stage]
    for i, (t, call) in enumerate(zip(schedule, calls)):
        guided = i in GUIDED[stage]
        halves = 2 if guided else 1
        labels = [NUM_CLASSES] * 4 + LABELS if guided else LABELS
        assert call["class_labels"].tolist() == labels
        assert call["timestep"].tolist() == [t] * len(labels)
        model_input = scheduler.scale_model_input(latents, t)
        torch.testing.assert_close(call["hidden_states"], torch.cat([model_input] * halves), rtol=1e-5, atol=1e-5)
        if stage == 0:
            assert "low_res" not in call and "noise_level" not in call
        else:
            torch.testing.assert_close(call["low_res"], torch.cat([low_res] * halves), rtol=0, atol=1e-5)
            assert call["noise_level"].tolist() == pytest.approx([level] * len(labels))
        prediction = call["output"]
        if guided:
            uncond, cond = prediction.chunk(2)
            prediction = uncond + ARGUMENTS["guidance_scale"][stage] * (cond - uncond)
        own = {"eta": ETA, "generator": images_generators} if is_residual else {}  # the third is DDIM's
        latents = scheduler.step(prediction, t, latents, **own).prev_sample
    return upsampled + RESIDUAL_SCALE * latents if is_residual else latents


@pytest.mark.parametrize("slot", ["even", "odd"])
def test_every_stage_takes_its_own_values(slot):
    """Initial noise is given to every other stage: `slot` says which."""
    torch.manual_seed(0)
    pipe, steps = make_pipe(), []
    calls = spy_on_stages(pipe)
    noise = [torch.randn(4, 3, *size) if i % 2 == (slot == "odd") else None for i, size in enumerate(SIZES)]

    def record(pipe, step, timestep, tensors):
        assert pipe.current_timestep == timestep
        given = calls[pipe.stage - 1][-1].get("low_res")
        assert tensors["low_res"] is None if given is None else torch.equal(tensors["low_res"], given[-len(LABELS) :])
        steps.append((step, tensors["stage"], pipe.stage, pipe.guidance_scale, timestep.item()))
        return {}

    output = pipe(
        [1, 2],
        height=64,
        width=96,
        num_images_per_prompt=2,
        generator=generators(*SEEDS),
        latents=noise,
        eta=ETA,
        output_type="latent",
        output_stages=True,
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=["stage", "low_res"],
        **ARGUMENTS,
    )
    images_generators, image = generators(*SEEDS), None
    wanted_steps = []
    for stage, scheduler in enumerate(make_schedulers()):
        image = check_stage(stage, scheduler, calls[stage], image, noise[stage], images_generators)
        torch.testing.assert_close(output.stage_images[stage], image, rtol=0, atol=1e-4)
        scale = ARGUMENTS["guidance_scale"][stage]
        wanted_steps += [(stage + 1, stage + 1, scale, t.item()) for t in scheduler.timesteps[-STEPS[stage] :]]
    assert steps == [(step, *wanted) for step, wanted in enumerate(wanted_steps)]
    assert pipe.num_timesteps == sum(STEPS) == len(steps)
    assert output.images is output.stage_images[-1]
    assert pipe.current_timestep is None


def test_one_value_is_every_stages():
    one = {
        "num_inference_steps": 4,
        "guidance_scale": 2.0,
        "guidance_start": 0.25,
        "guidance_stop": 0.75,
        "noise_level": 0.3,
        "relay_strength": 0.5,
    }
    pipe = make_cascade(4)
    calls = spy_on_stages(pipe)
    pipe(1, generator=generators(0), **one)
    assert [[len(call["class_labels"]) for call in own_calls] for own_calls in calls] == [[1, 2, 2, 1]] + [[1, 2]] * 3
    levels = [call["noise_level"][0].item() for own_calls in calls[1:] for call in own_calls]
    assert levels == pytest.approx([0.3] * 6)


def test_what_a_callback_makes_of_the_labels_lasts():
    pipe = make_cascade(3)
    calls = spy_on_stages(pipe)

    def change(pipe, step, timestep, tensors):
        return {"class_labels": tensors["class_labels"] + 1} if step % 2 else {}

    arguments = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["class_labels"]}
    pipe([1, 4], num_inference_steps=2, guidance_scale=1.0, **arguments)
    labels = [[call["class_labels"].tolist() for call in own_calls] for own_calls in calls]
    assert labels == [[[1, 4]] * 2, [[2, 5]] * 2, [[3, 6]] * 2]


def test_what_a_callback_makes_of_the_condition_lasts_for_its_stage():
    pipe = make_cascade(3)
    calls = spy_on_stages(pipe)

    def change(pipe, step, timestep, tensors):
        return {"low_res": torch.full_like(tensors["low_res"], 7.0)} if step == 2 else {}

    arguments = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["low_res"]}
    pipe(1, num_inference_steps=2, guidance_scale=1.0, **arguments)
    is_changed = [[bool((call["low_res"] == 7).all()) for call in own_calls] for own_calls in calls[1:]]
    assert is_changed == [[False, True], [False, False]]


@pytest.mark.parametrize("step", range(6))
def test_an_interrupted_run_ends_with_the_running_stages_image(step, caplog, monkeypatch):
    """Two steps per stage, the second of which diffuses residuals: before its last step, latents are such."""
    stages = [make_transformer(1), make_transformer(2, residual_scale=RESIDUAL_SCALE), make_transformer(3)]
    pipe = PISDMCascadePipeline.from_stages(stages, make_schedulers()[2])
    pipe.set_progress_bar_config(disable=True)
    seen, calls = [], spy_on_stages(pipe)

    def interrupt(pipe, index, timestep, tensors):
        seen.append(tensors["latents"])
        pipe._interrupt = index == step
        return {}

    arguments = {"num_inference_steps": 2, "generator": generators(0), "output_type": "latent", "output_stages": True}
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    output = pipe(1, callback_on_step_end=interrupt, **arguments)
    side = (8, 16, 32)[step // 2]
    said = f"interrupted in stage {step // 2 + 1} of 3: its images are that stage's, of {side}x{side} pixels"
    assert [said in record.getMessage() for record in caplog.records] == ([True] if step < 4 else [])
    whole = pipe(1, **{**arguments, "generator": generators(0)}).stage_images
    assert len(seen) == step + 1
    assert len(output.stage_images) == step // 2 + 1
    expected = seen[-1]
    if step == 2:
        upsampled = F.interpolate(seen[1], size=(16, 16), mode="bicubic", antialias=True)
        expected = upsampled + RESIDUAL_SCALE * expected
    torch.testing.assert_close(output.images, expected)
    for found, wanted in zip(output.stage_images[:-1], whole):
        assert torch.equal(found, wanted)
    if step % 2:  # a stage's last step: its image is as it would have been
        assert torch.equal(output.images, whole[step // 2])
    wanted = [2 + min(max(step + 1 - first, 0), 2) for first in (0, 2, 4)]
    assert [len(own_calls) for own_calls in calls] == wanted  # two of them are the whole run's
