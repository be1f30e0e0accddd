"""`batch_size=`: the models take fewer images at once, and the images stay the same."""

import pytest
import torch
from diffusers import DDPMScheduler

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.models.latents import vae_scale_factor
from tests.models.tiny_vae import make_kl
from tests.pipelines.tiny_cascade import generators, make_cascade, make_scheduler, make_transformer


SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}
NUM_IMAGES = 7


def draw(pipe, batch_size, **arguments):
    """The stages' images, the sizes of the first and second stage's batches, and what a callback saw."""
    sizes, steps, handles = [], [], []
    for transformer in pipe.stages:

        def record(module, args, kwargs):
            assert {len(value) for value in kwargs.values() if isinstance(value, torch.Tensor)} == {len(args[0])}
            sizes.append(len(args[0]))

        handles.append(transformer.register_forward_pre_hook(record, with_kwargs=True))

    def callback(pipe, step, timestep, tensors):
        steps.append((step, len(tensors["latents"]), len(tensors["class_labels"])))
        return {"latents": 0.9 * tensors["latents"]} if step == 1 else {}

    defaults = {"guidance_scale": [2.0, 1.0], "generator": generators(*range(NUM_IMAGES)), "output_type": "latent"}
    output = pipe(
        [*range(NUM_IMAGES)],
        num_inference_steps=2,
        batch_size=batch_size,
        output_stages=True,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "class_labels"],
        **{**defaults, **arguments},
    )
    for handle in handles:
        handle.remove()
    return output.stage_images, sizes, steps


@pytest.mark.parametrize("slicing", [False, True], ids=["batched", "sliced"])
@pytest.mark.parametrize("generator", ["one per image", "one"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_images_do_not_depend_on_it(batch_size, generator, slicing):
    """Nor with a scheduler that draws noise at every step."""
    pipe = make_cascade(2, scheduler=DDPMScheduler(**SCHEDULE, clip_sample=False))
    if slicing:
        pipe.enable_guidance_slicing()

    def arguments():
        seeds = generators(*range(NUM_IMAGES)) if generator == "one per image" else torch.Generator().manual_seed(5)
        mixes = torch.rand(NUM_IMAGES, 3, 16, 16, generator=torch.Generator().manual_seed(6))
        return {"generator": seeds, "image": mixes, "mask_image": (mixes.mean(1, keepdim=True) > 0.5).float()}

    wanted, _, steps = draw(pipe, None, **arguments())
    images, sizes, found_steps = draw(pipe, batch_size, **arguments())
    for found, expected in zip(images, wanted, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert found_steps == steps == [(step, NUM_IMAGES, NUM_IMAGES) for step in range(4)]
    batches = {1: [1] * 7, 3: [3, 3, 1], 7: [7], 100: [7]}[batch_size]
    guided = [size for batch in batches for size in ([batch] * 2 if slicing else [2 * batch])]
    assert sizes == guided * 2 + batches * 2


def test_mixes_of_classes_are_split_with_their_images():
    pipe = make_cascade(2)
    mixes = [{1: 0.5, 2: 0.5}, 3, {4: 0.2, 5: 0.3, 6: 0.5}]
    arguments = {"num_inference_steps": 2, "output_type": "latent"}
    wanted = pipe(mixes, generator=generators(0, 1, 2), **arguments).images
    images = pipe(mixes, generator=generators(0, 1, 2), batch_size=2, **arguments).images
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-4)


def test_the_autoencoder_takes_no_more_either():
    vae, sizes = make_kl(latent_channels=4).eval(), []
    vae.encoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    vae.decoder.register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    stages = [make_transformer(1, 4), make_transformer(2, 4)]
    pipe = PISDMCascadePipeline.from_stages(stages, make_scheduler(), vae=vae)
    pipe.set_progress_bar_config(disable=True)
    image = torch.rand(3, 3, 8 * vae_scale_factor(vae), 8 * vae_scale_factor(vae))
    arguments = {"num_inference_steps": 1, "image": image, "output_type": "pt"}
    wanted = pipe([1, 2, 3], generator=generators(0, 1, 2), **arguments).images
    assert sizes == [3, 3]
    images = pipe([1, 2, 3], generator=generators(0, 1, 2), batch_size=2, **arguments).images
    assert sizes[2:] == [2, 1, 2, 1]
    torch.testing.assert_close(images, wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_a_wrong_batch_size(value):
    with pytest.raises(ValueError, match=f"`batch_size` has to be a positive integer but is {value!r}"):
        make_cascade(1)(1, batch_size=value)
