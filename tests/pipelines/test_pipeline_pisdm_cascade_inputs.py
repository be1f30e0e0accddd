"""Bad input: each case raises one exact exception type, with a message that names the culprit and the remedy."""

import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from diffusers_pisdm import PISDMCascadePipeline
from tests.pipelines.tiny_cascade import generators, make_cascade, make_scheduler, make_transformer


@pytest.fixture(scope="module")
def pipe():
    return make_cascade(3, id2label=["cat", "dog", "crane", "crane"])


def raises(exception: type[Exception], *fragments: str):
    """Expects exactly this type, not one derived from it, and all fragments in this order."""

    class Expectation:
        def __enter__(self):
            return self

        def __exit__(self, kind, error, traceback):
            assert kind is exception, f"expected {exception.__name__}, got {kind and kind.__name__}: {error}"
            assert re.search(".*".join(re.escape(fragment) for fragment in fragments), str(error)), str(error)
            return True

    return Expectation()


# Labels


@pytest.mark.parametrize("label", [10, -1, [0, 10], torch.tensor([10])], ids=repr)
def test_label_out_of_range(pipe, label):
    culprit = "-1" if label == -1 else "10"
    with raises(ValueError, f"`class_labels` contains {culprit}, but this pipeline's classes are 0 to 9."):
        pipe(label)


def test_unknown_name(pipe):
    with raises(ValueError, "`class_labels` contains 'dgo'", "Did you mean 'dog'?"):
        pipe("dgo")


def test_name_of_two_classes(pipe):
    with raises(
        ValueError, "`class_labels` contains 'crane', the name of several classes: [2, 3].", "one of these ids"
    ):
        pipe("crane")


def test_name_without_names():
    with raises(ValueError, "Cannot look up 'cat': this pipeline has no class names.", "Pass class ids", "`id2label`"):
        make_cascade(1)("cat")


@pytest.mark.parametrize("labels", [[], (), torch.tensor([], dtype=torch.int64)], ids=repr)
def test_no_labels(pipe, labels):
    with raises(ValueError, "`class_labels` is empty. Pass at least one class id or name."):
        pipe(labels)


@pytest.mark.parametrize("label", [True, 1.0, None, np.float32(1), np.bool_(True), [1], b"cat"], ids=repr)
def test_label_of_another_type(pipe, label):
    with raises(TypeError, "`class_labels`", "`int`", "`str`", f"has {label!r}, a", "class"):
        pipe([label])


@pytest.mark.parametrize(
    ("labels", "culprit"), [(torch.ones(1), "1.0"), (torch.tensor(True), "True"), (torch.ones(1, 1).long(), "[1]")]
)
def test_label_tensor_of_another_kind(pipe, labels, culprit):
    with raises(TypeError, "`class_labels` has to hold class ids (`int`)", f"has {culprit}, a"):
        pipe(labels)


# Sizes


@pytest.mark.parametrize(("name", "value", "nearest"), [("height", 30, 32), ("width", 41, 40), ("height", 1, 8)])
def test_size_that_leaves_a_fraction_of_a_patch(pipe, name, value, nearest):
    with raises(ValueError, f"`{name}` has to be divisible by 8,", f"but is {value}. Pass `{name}={nearest}`."):
        pipe(1, **{name: value})


@pytest.mark.parametrize("value", [0, -8, 32.0, True])
def test_size_that_is_no_positive_integer(pipe, value):
    with raises(ValueError, "`height` has to be divisible by 8,", f"but is {value}. Pass `height="):
        pipe(1, height=value)


# Stages


def test_gap_in_the_stages():
    with raises(
        ValueError, "`transformer_2` is None, but `transformer_3`", "Pass `transformer_2`, or `transformer_3=None`"
    ):
        PISDMCascadePipeline(make_transformer(1), make_scheduler(), transformer_3=make_transformer(3))


def test_no_first_stage():
    with raises(ValueError, "`transformer` is None", "Pass `transformer`."):
        PISDMCascadePipeline(None, make_scheduler())


def test_higher_stage_first():
    with raises(ValueError, "`transformer` is a higher stage (`low_res_channels=3`)", "with `low_res_channels=None`"):
        PISDMCascadePipeline(make_transformer(2), make_scheduler())


def test_first_stage_above():
    with raises(
        ValueError, "`transformer_2` has `low_res_channels=None`", "stage before has `in_channels=3`", "one cascade"
    ):
        PISDMCascadePipeline(make_transformer(1), make_scheduler(), make_transformer(1))


def test_channels_do_not_fit_between_stages():
    with raises(
        ValueError, "`transformer_2` has `low_res_channels=4`", "stage before has `in_channels=3`", "one cascade"
    ):
        PISDMCascadePipeline(make_transformer(1), make_scheduler(), make_transformer(2, low_res_channels=4))


def test_channels_of_a_stages_image_do_not_fit():
    with raises(ValueError, "`transformer_2` has `in_channels=4`", "stage before has `in_channels=3`", "one cascade"):
        PISDMCascadePipeline(
            make_transformer(1), make_scheduler(), make_transformer(2, in_channels=4, low_res_channels=3)
        )


@pytest.mark.parametrize("out_channels", [1, 4, 6])
def test_output_channels_do_not_fit(out_channels):
    with raises(ValueError, f"`transformer` has {out_channels} output channels", "3 ", "Pass a transformer"):
        PISDMCascadePipeline(make_transformer(1, out_channels=out_channels), make_scheduler())


def test_classes_do_not_fit_between_stages():
    with raises(ValueError, "`transformer_2` has `num_classes=7`", "stage before has `num_classes=10`", "one cascade"):
        PISDMCascadePipeline(make_transformer(1), make_scheduler(), make_transformer(2, num_classes=7))


def test_autoencoder_does_not_fit():
    with raises(
        ValueError, "`vae` has 4 latent channels (`latent_channels`), but `transformer` has 3", "Pass the auto"
    ):
        PISDMCascadePipeline(make_transformer(1), make_scheduler(), vae=AutoencoderKL(latent_channels=4))


def test_flow_matching_scheduler():
    scheduler = FlowMatchEulerDiscreteScheduler()
    with raises(ValueError, "`scheduler` ", "for flow matching"):
        PISDMCascadePipeline(make_transformer(1), scheduler)
    pipe = make_cascade(2)
    pipe.register_modules(scheduler_2=scheduler)
    with raises(ValueError, "`scheduler_2` ", "for flow matching"):
        pipe(1)


# Latents


@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (1, 4, 8, 8), (1, 3, 8), (1, 3, 16, 16)])
def test_latents_of_another_shape(pipe, shape):
    with raises(ValueError, "`latents` has to have shape (1, 3, 8, 8)", f"but has shape {shape}"):
        pipe(1, latents=torch.randn(shape))


@pytest.mark.parametrize("latents", [torch.zeros(1, 3, 8, 8).long(), torch.zeros(1, 3, 8, 8) > 0])
def test_latents_of_another_dtype(pipe, latents):
    with raises(TypeError, f"`latents` has to be a floating point tensor but is {latents.dtype}. Pass `torch.randn("):
        pipe(1, latents=latents)


def test_latents_that_are_no_tensor(pipe):
    with raises(TypeError, "`latents` has to be a floating point tensor but is <class 'numpy.ndarray'>. Pass `torch."):
        pipe(1, latents=[np.zeros((1, 3, 8, 8)), None, None])


def test_latents_on_another_device(pipe):
    with raises(ValueError, "`latents` is on meta, but the pipeline runs on cpu. Move it with `latents.to('cpu')`."):
        pipe(1, latents=torch.randn(1, 3, 8, 8, device="meta"))


def test_latents_of_a_higher_stage_are_checked_too(pipe):
    with raises(ValueError, "`latents` has to have shape (1, 3, 32, 32)", "but has shape (1, 3, 8, 8)"):
        pipe(1, latents=[None, None, torch.randn(1, 3, 8, 8)])


# Lists and numbers


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_inference_steps", [3, 3]),
        ("guidance_scale", [1.0] * 4),
        ("guidance_start", [0.0]),
        ("guidance_stop", []),
        ("latents", [None, None]),
        ("timesteps", [[900], [900]]),
        ("sigmas", [[1.0], None]),
    ],
)
def test_list_of_another_length(pipe, name, value):
    with raises(
        ValueError, f"`{name}` has {len(value)} values, but this pipeline has 3 stages. Pass one value for all"
    ):
        pipe(1, **{name: value})


@pytest.mark.parametrize("name", ["noise_level", "relay_strength"])
def test_list_of_another_length_for_the_higher_stages(pipe, name):
    with raises(ValueError, f"`{name}` has 3 values, but this pipeline has 2 higher stages. Pass one value for all"):
        pipe(1, **{name: [0.5, 0.5, 0.5]})


def test_generators_of_another_number(pipe):
    with raises(
        ValueError, "a list of generators of length 3, but requested an effective batch size of 4.", "Pass one"
    ):
        pipe([1, 2], num_images_per_prompt=2, generator=generators(0, 1, 2))


@pytest.mark.parametrize("name", ["num_inference_steps", "num_images_per_prompt"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "3"])
def test_count_that_is_no_positive_integer(pipe, name, value):
    with raises(ValueError, f"`{name}` has to be a positive integer but is {value!r} of type {type(value)}."):
        pipe(1, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("guidance_scale", float("nan"), "a finite number"),
        ("guidance_scale", "4", "a finite number"),
        ("guidance_start", -0.1, "in [0, 1]"),
        ("guidance_stop", 1.5, "in [0, 1]"),
        ("noise_level", 1.0, "in [0, 1)"),
        ("noise_level", -0.1, "in [0, 1)"),
        ("noise_level", float("nan"), "in [0, 1)"),
        ("noise_level", [0.1, None], "in [0, 1)"),
        ("relay_strength", 0.0, "None or in (0, 1]"),
        ("relay_strength", 1.1, "None or in (0, 1]"),
        ("num_inference_steps", [3, 0, 3], "a positive integer"),
    ],
)
def test_number_out_of_range(pipe, name, value, wanted):
    culprit = value[1] if isinstance(value, list) else value
    with raises(ValueError, f"`{name}` has to be {wanted} but is {culprit!r} of type"):
        pipe(1, **{name: value})


def test_unknown_output_type(pipe):
    with raises(ValueError, "`output_type` has to be one of pil, np, pt, latent but is 'jpeg'."):
        pipe(1, output_type="jpeg")


def test_unknown_callback_input(pipe):
    with raises(ValueError, "`callback_on_step_end_tensor_inputs` has to be in ['latents',", "but found ['prompt']."):
        pipe(1, callback_on_step_end_tensor_inputs=["latents", "prompt"])


def test_unknown_argument(pipe):
    with raises(TypeError, "got an unexpected keyword argument 'num_steps'"):
        pipe(1, num_steps=3)


def test_bad_input_costs_no_model_call(pipe):
    called = []
    handle = pipe.transformer.register_forward_pre_hook(lambda *_: called.append(1))
    with raises(ValueError, "`latents` has to have shape"):
        pipe(1, latents=[None, None, torch.randn(1, 3, 8, 8)], num_inference_steps=1)
    handle.remove()
    assert called == []


def test_odd_class_names_reach_no_message_raw():
    odd = "\u202ea\n\x1b[31m../" + "x" * 16_000
    pipe = make_cascade(2, id2label=[odd, *"bcdefghij"])
    assert pipe.get_label_ids(odd) == [0]
    for name in (odd + "y", "z" * 16_000):
        with pytest.raises(ValueError, match=r"`class_labels` contains .* Did you mean") as error:
            pipe.get_label_ids(name)
        assert str(error.value).isprintable() and len(str(error.value)) < 500
