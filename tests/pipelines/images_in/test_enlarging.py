"""`image=`: what is given is taken as the output of the stage of its size, and enlarged by those above."""

import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.models.latents import encode_moments
from diffusers_pisdm.pipelines.image_inputs import read_image, read_mask
from tests.models.tiny_vae import KINDS
from tests.pipelines.tiny_cascade import generators, make_cascade, make_scheduler, make_transformer


LEVELS = [0.1, 0.4, 0.7]  # of the higher stages
RESIDUAL_SCALE = 0.3  # of the third stage
STEPS = [2, 3, 4, 2]


@pytest.fixture(scope="module")
def pipe():
    """Stages of 8, 16, 32 and 64 pixels."""
    stages = [make_transformer(1), make_transformer(2), make_transformer(3, residual_scale=RESIDUAL_SCALE)]
    pipe = PISDMCascadePipeline.from_stages([*stages, make_transformer(4)], make_scheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def first_calls(pipe, **arguments):
    """What each stage's model is called with first, by stage from 1; stages that do not run are missing."""
    calls, handles = {}, []
    for number, transformer in enumerate(pipe.stages, 1):

        def record(module, args, kwargs, number=number):
            calls.setdefault(number, {"hidden_states": args[0], **kwargs})

        handles.append(transformer.register_forward_pre_hook(record, with_kwargs=True))
    arguments = {
        "guidance_scale": 1.0,
        "noise_level": LEVELS[: pipe.num_stages - 1],
        "output_type": "latent",
        **arguments,
    }
    pipe(**{"num_inference_steps": STEPS[: pipe.num_stages], **arguments})
    for handle in handles:
        handle.remove()
    return calls


def condition(lower, stage, seeds, is_residual):
    """The formula of conditioning augmentation, by images of `stage` - 1."""
    upsampled = F.interpolate(
        lower, scale_factor=2, mode="bicubic" if is_residual else "bilinear", antialias=is_residual
    )
    noise = torch.stack([torch.randn(upsampled.shape[1:], generator=generator) for generator in generators(*seeds)])
    return (1 - LEVELS[stage - 2] ** 2) ** 0.5 * upsampled + LEVELS[stage - 2] * noise


def make_pixels(side: int, number: int = 1) -> torch.Tensor:
    """8-bit images `(N, 3, H, W)`."""
    return torch.randint(256, (number, 3, side, side), generator=torch.Generator().manual_seed(side))


def to_pil(pixels: torch.Tensor) -> PIL.Image.Image:
    return PIL.Image.fromarray(pixels.permute(1, 2, 0).byte().numpy())


FORMS = {
    "PIL": lambda pixels: to_pil(pixels[0]),
    "list of PIL": lambda pixels: [to_pil(image) for image in pixels],
    "array": lambda pixels: (pixels[0] / 255).permute(1, 2, 0).numpy(),
    "batch of arrays": lambda pixels: (pixels / 255).permute(0, 2, 3, 1).double().numpy(),
    "list of arrays": lambda pixels: list((pixels / 255).permute(0, 2, 3, 1).numpy()),
    "tensor": lambda pixels: pixels[0] / 255,
    "batch of tensors": lambda pixels: pixels / 255,
    "tuple of tensors": lambda pixels: tuple(pixels / 255),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_image_conditions_the_stage_above_its_own(pipe, form, stage):
    """One image for both labels, or one per label; each label has two images, each with its own noise."""
    is_one = form in ("PIL", "array", "tensor")
    pixels = make_pixels(4 * 2**stage, 1 if is_one else 2)
    seeds = (3, 1, 4, 2)
    arguments = {"class_labels": [1, 2], "num_images_per_prompt": 2, "generator": generators(*seeds)}
    calls = first_calls(pipe, image=FORMS[form](pixels), **arguments)
    assert [*calls] == list(range(stage + 1, 5))
    images = (2 * pixels / 255 - 1)[[0, 0, 0, 0] if is_one else [0, 0, 1, 1]]
    wanted = condition(images, stage + 1, seeds, is_residual=stage == 2)
    torch.testing.assert_close(calls[stage + 1]["low_res"], wanted, rtol=0, atol=1e-5)
    assert calls[stage + 1]["noise_level"].tolist() == pytest.approx([LEVELS[stage - 1]] * 4)


@pytest.mark.parametrize(("side", "stage"), [(9, 1), (15, 1), (24, 2), (63, 3)])
def test_sizes_between_are_shrunk_by_area(pipe, side, stage):
    pixels = make_pixels(side)
    calls = first_calls(pipe, class_labels=1, image=to_pil(pixels[0]), generator=generators(5))
    assert [*calls] == list(range(stage + 1, 5))
    lower = F.adaptive_avg_pool2d(2 * pixels / 255 - 1, 4 * 2**stage)
    wanted = condition(lower, stage + 1, (5,), is_residual=stage == 2)
    torch.testing.assert_close(calls[stage + 1]["low_res"], wanted, rtol=0, atol=1e-5)


def test_stages_above_run_as_they_would_have(pipe):
    """A whole run, and one from its second stage's image with the generator as it was then."""
    arguments = {"class_labels": [1, 2], "output_type": "pt", "output_stages": True, "noise_level": LEVELS}
    arguments |= {"guidance_scale": [1.0, 2.0, 3.0, 1.5], "relay_strength": [None, 0.6, None]}
    generator, states = torch.Generator().manual_seed(0), []

    def clamp(pipe, step, timestep, tensors):
        states.append(generator.get_state())
        return {"latents": tensors["latents"].clamp(-1, 1)}

    whole = pipe(generator=generator, num_inference_steps=STEPS, callback_on_step_end=clamp, **arguments)
    generator.set_state(states[STEPS[0] + STEPS[1] - 1])
    steps = []

    def record(pipe, step, timestep, tensors):
        steps.append((step, tensors["stage"]))
        return {"latents": tensors["latents"].clamp(-1, 1)}

    rest = pipe(
        image=whole.stage_images[1],
        generator=generator,
        num_inference_steps=[100, 100, *STEPS[2:]],  # those of stages that do not run have no effect
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=["latents", "stage"],
        **arguments,
    )
    assert steps == [(0, 3), (1, 3), (2, 4), (3, 4)]  # the relay runs 2 of the third stage's 4 steps
    assert pipe.num_timesteps == 4
    for images, wanted in zip(rest.stage_images, whole.stage_images[2:], strict=True):
        torch.testing.assert_close(images, wanted, rtol=0, atol=1e-4)


def test_a_single_guidance_scale_is_set_at_the_first_stage_that_runs(pipe):
    pipe(1, num_inference_steps=1, guidance_scale=5.0)
    pipe(1, num_inference_steps=1, guidance_scale=2.0, image=np.zeros((16, 16, 3)))
    assert pipe.guidance_scale == 2.0


def test_rectangles(pipe):
    pixels = torch.rand(1, 3, 16, 24)
    calls = first_calls(pipe, class_labels=1, image=pixels, height=64, width=96, generator=generators(5))
    assert [calls[stage]["low_res"].shape[2:] for stage in calls] == [(32, 48), (64, 96)]


@pytest.mark.parametrize(
    ("channels", "mode", "wanted"),
    [
        (3, "RGBA", [255 - 0.4 * 255, 255 - 0.4 * 204, 255]),  # 102 of 255 are 40%
        (3, "P", [10, 20, 30]),
        (1, "RGB", [0.299 * 10 + 0.587 * 20 + 0.114 * 30]),
        (4, "RGBA", [0, 51, 255, 102]),
    ],
)
def test_modes_and_transparency(channels, mode, wanted):
    """Transparent pixels are white, as in training; a model of four channels gets the transparency itself."""
    image = PIL.Image.new("RGB", (8, 8), (10, 20, 30))
    if mode == "RGBA":
        image = PIL.Image.new("RGBA", (8, 8), (0, 51, 255, 102))
    elif mode == "P":
        image = image.quantize(2)
    calls = first_calls(make_cascade(2, in_channels=channels), class_labels=1, image=image, noise_level=0.0)
    found = (calls[2]["low_res"][0, :, 0, 0] + 1) * 127.5
    torch.testing.assert_close(found, torch.tensor(wanted).float(), rtol=0, atol=0.6)


@pytest.mark.parametrize("kind", KINDS)
def test_latents_of_an_image(kind):
    vae = KINDS[kind](latent_channels=4) if kind != "dc" else KINDS[kind]()
    pipe = PISDMCascadePipeline.from_stages(
        [make_transformer(1, 4), make_transformer(2, 4)], make_scheduler(), vae=vae.eval()
    )
    pipe.set_progress_bar_config(disable=True)
    pixels = torch.rand(2, 3, 32, 32)  # the autoencoder shrinks them to 8, the first stage's size
    calls = first_calls(pipe, class_labels=[1, 2], image=pixels, generator=generators(5, 6))
    wanted = condition(encode_moments(vae, 2 * pixels - 1)[0], 2, (5, 6), is_residual=False)
    torch.testing.assert_close(calls[2]["low_res"], wanted, rtol=0, atol=1e-4)


WRONG = {
    "larger": (torch.rand(3, 65, 65), ValueError, "`image` is 65x65 .* 64x64. Shrink"),
    "wider": (torch.rand(3, 16, 65), ValueError, "`image` is 65x16 .* 64x64. Shrink"),
    "smaller": (torch.rand(3, 7, 7), ValueError, "7x7 .* first stage's 8x8. Enlarge"),
    "narrow": (torch.rand(3, 16, 7), ValueError, "7x16 .* first stage's 8x8. Enlarge"),
    "of another shape": (torch.rand(3, 16, 24), ValueError, "24x16 .* another shape.* `height` and `width`"),
    "of the last stage": (torch.rand(3, 64, 64), ValueError, "has the size .*64x64.* smaller one, or `strength`"),
    "text": ("image.png", TypeError, "`image` has to be a PIL image.* holds 'image.png'"),
    "empty": ([], TypeError, "`image` .* is empty"),
    "mixed": ([torch.rand(3, 8, 8), np.zeros((8, 8, 3))], ValueError, "`image` .*several sizes or types"),
    "of two sizes": ([torch.rand(3, 8, 8), torch.rand(3, 16, 16)], ValueError, "`image` .*several sizes"),
    "three": (torch.rand(3, 3, 8, 8), ValueError, "`image` holds 3 images for 2 labels. Pass one"),
    "bytes": (torch.zeros(3, 8, 8, dtype=torch.uint8), TypeError, "uint8.* floats in .0, 1.. Divide"),
    "whole numbers": (np.zeros((8, 8, 3), dtype=np.uint8), TypeError, "uint8.* floats in .0, 1.. Divide"),
    "not scaled": (255 * torch.ones(3, 8, 8), ValueError, "`image` has values from 255 to 255.* Scale"),
    "negative": (-torch.ones(3, 8, 8), ValueError, "`image` has values from -1 to -1.* Scale"),
    "not finite": (torch.full((3, 8, 8), float("nan")), ValueError, "`image` has values from nan"),
    "grey": (torch.rand(1, 8, 8), ValueError, "`image` has 1 channel, but .* 3"),
    "flat": (torch.rand(8, 8), ValueError, "`image` has shape .8, 8., .*channels, height, width"),
    "swapped axes": (torch.rand(8, 8, 3), ValueError, "`image` has 8 channels, but .* 3"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_images(pipe, case):
    image, exception, message = WRONG[case]
    called = []
    handle = pipe.transformer_4.register_forward_pre_hook(lambda *_: called.append(1))
    with pytest.raises(exception, match=message):
        pipe([1, 2], image=image)
    handle.remove()
    assert called == []


def test_noise_of_a_stage_that_does_not_run(pipe):
    with pytest.raises(ValueError, match=r"`latents` .* `image` begins with stage 3. Pass a list, with None"):
        pipe(1, image=torch.rand(3, 16, 16), latents=torch.randn(1, 3, 8, 8))


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("value", [300, 20_000, 60_000])
def test_16_bit_grey_keeps_its_upper_8_bits(channels, value):
    image = PIL.Image.fromarray(np.full((8, 8), value, np.uint16))
    pixels = read_image("image", image, channels, 1)
    assert pixels.shape == (1, channels, 8, 8)
    assert torch.equal(pixels[:, : min(channels, 3)].unique(), torch.tensor([(value >> 8) / 255]))
    assert read_mask(image, (8, 8), 1).unique().item() == (value >> 8 >= 128)


@pytest.mark.parametrize(
    "form",
    [
        lambda white: PIL.Image.fromarray(white),
        lambda white: PIL.Image.fromarray(np.uint8(255 * white)),
        lambda white: white.astype(np.float32),
        lambda white: torch.from_numpy(white).float(),
        lambda white: [torch.from_numpy(white).float()],
        lambda white: white,
        lambda white: torch.from_numpy(white),
    ],
    ids=["1", "L", "array", "tensor", "list", "boolean array", "boolean tensor"],
)
def test_a_mask_needs_no_channels(form):
    white = np.arange(8 * 12).reshape(8, 12) % 5 == 0
    assert np.array_equal(read_mask(form(white), (8, 12), 1)[0, 0].numpy(), white)


@pytest.mark.parametrize(("mode", "what"), [("F", "floats"), ("I", "32-bit integers"), ("LAB", "CIELAB")])
def test_pixels_without_a_defined_range_are_refused(mode, what):
    image = PIL.Image.new(mode, (8, 8))
    with pytest.raises(ValueError, match=f"`image` are {what}.*8-bit RGB"):
        read_image("image", image, 3, 1)
    with pytest.raises(ValueError, match=f"`mask_image` are {what}"):
        read_mask(image, (8, 8), 1)
