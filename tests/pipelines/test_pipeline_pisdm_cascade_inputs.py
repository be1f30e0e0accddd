"""Bad input: each case raises one exact exception type, with a message that names the culprit and the remedy."""

import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.utils.messages import count_of
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


@pytest.mark.parametrize(("name", "nearest"), [("dgo", "dog"), ("carnes", "crane"), ("quiet zebra", None)])
def test_unknown_name(pipe, name, nearest):
    with raises(
        ValueError,
        f"`class_labels` contains {name!r}",
        f"Did you mean {nearest!r}?" if nearest else "`config.id2label` lists them",
    ):
        pipe(name)


def test_name_of_two_classes(pipe):
    with raises(
        ValueError, "`class_labels` contains 'crane', the name of several classes: [2, 3].", "one of these ids"
    ):
        pipe("crane")


def test_name_without_names():
    with raises(ValueError, "Cannot look up class names", "Pass class ids from 0 to 9"):
        make_cascade(1)("cat")


@pytest.mark.parametrize("labels", [[], (), torch.tensor([], dtype=torch.int64)], ids=repr)
def test_no_labels(pipe, labels):
    with raises(ValueError, "`class_labels` is empty. Pass at least one class id or name."):
        pipe(labels)


@pytest.mark.parametrize("label", [True, 1.0, None, np.float32(1), np.bool_(True), {1}, b"cat"], ids=repr)
def test_label_of_another_type(pipe, label):
    with raises(TypeError, "`class_labels`", "`int`", "`str`", f"has {label!r}, a", "class"):
        pipe([label])


@pytest.mark.parametrize(
    ("labels", "culprit"),
    [(torch.ones(1), "1.0"), (torch.tensor(True), "True"), (np.ones((1, 1)), "1.0"), ([[1], [None]], "None")],
)
def test_label_tensor_of_another_kind(pipe, labels, culprit):
    with raises(TypeError, "`class_labels` has to hold class ids (`int`)", f"has {culprit}, a"):
        pipe(labels)


# Sizes


@pytest.mark.parametrize(("name", "value", "nearest"), [("height", 30, 32), ("width", 41, 40), ("height", 1, 8)])
def test_size_that_leaves_a_fraction_of_a_patch(pipe, name, value, nearest):
    with raises(ValueError, f"`{name}` has to be", "divisible by 8,", f"but is {value}. Pass `{name}={nearest}`."):
        pipe(1, **{name: value})


@pytest.mark.parametrize("value", [0, -8, 32.0, True, "8", [8], float("nan"), float("inf")])
def test_size_that_is_no_positive_integer(pipe, value):
    with raises(ValueError, "`height` has to be a positive integer", f"but is {value!r}. Pass `height="):
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


def test_class_factors_do_not_fit_between_stages():
    """The same in a list and in tuples are equal, as JSON makes lists."""
    factors = [(i % 2, i // 2) for i in range(10)]
    for other in (None, [(i // 2, i % 2) for i in range(10)]):
        with raises(ValueError, "`transformer_2` has other `class_factors`", "one cascade"):
            PISDMCascadePipeline(
                make_transformer(1, class_factors=other), make_scheduler(), make_transformer(2, class_factors=factors)
            )
    stages = [make_transformer(1, class_factors=factors), make_transformer(2, class_factors=[*map(list, factors)])]
    assert PISDMCascadePipeline.from_stages(stages, make_scheduler()).num_stages == 2


def test_model_of_another_class():
    for other in (AutoencoderKL(), torch.nn.Linear(1, 1)):
        with raises(ValueError, f"`transformer` is of {type(other)}", "Pass a `PISDMTransformer2DModel`"):
            PISDMCascadePipeline(other, make_scheduler())


def test_no_scheduler():
    with raises(ValueError, "`scheduler` is None", "Pass `scheduler`."):
        PISDMCascadePipeline(make_transformer(1), None)


# Settings that are saved with the pipeline


@pytest.mark.parametrize(
    ("default", "value", "wanted"),
    [
        ("guidance_scale", [1.0], "has 1 value, but this pipeline has 2 stages"),
        ("guidance_scale", float("nan"), "has to be a finite number"),
        ("guidance_scale", "4", "has to be a finite number"),
        ("guidance_scale", [1.0, None], "has to be a finite number"),
        ("num_inference_steps", [5], "has 1 value, but this pipeline has 2 stages"),
        ("num_inference_steps", 0, "has to be a positive integer"),
        ("num_inference_steps", 10**9, "has to be a positive integer up to"),
        ("noise_level", [], "has 0 values, but this pipeline has 1 higher stage"),
        ("noise_level", 1.0, "has to be in [0, 1)"),
        ("noise_level", None, "has to be in [0, 1)"),
    ],
)
def test_default_that_is_wrong(default, value, wanted):
    """Found when the pipeline is made, not when it draws."""
    with raises(ValueError, f"`default_{default}` {wanted}"):
        make_cascade(2, **{f"default_{default}": value})


@pytest.mark.parametrize(
    ("names", "exception", "culprit"),
    [
        ({"10": "a"}, ValueError, "'10' as an id"),
        ({-1: "a"}, ValueError, "-1 as an id"),
        ({"one": "a"}, ValueError, "'one' as an id"),
        ({"²": "a"}, ValueError, "'²' as an id"),
        ({1.0: "a"}, ValueError, "1.0 as an id"),
        ({True: "a"}, ValueError, "True as an id"),
        ({1: "a", "1": "b"}, ValueError, "'1' as an id"),
        (["a"] * 11, ValueError, "10 as an id"),
        ({1: 5}, TypeError, "names class 1 5, of <class 'int'>"),
        (["a", None], TypeError, "names class 1 None"),
        ("cat", TypeError, "but is 'cat'"),
        ({"a"}, TypeError, "but is {"),
    ],
    ids=repr,
)
def test_class_names_that_are_wrong(names, exception, culprit):
    with raises(exception, "`id2label`", culprit):
        make_cascade(1, id2label=names)


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


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_latents_that_are_not_finite(pipe, value):
    latents = torch.randn(1, 3, 16, 16)
    latents[0, 1, 2, 3] = value
    with raises(ValueError, "`latents` holds NaN or infinity. Pass `torch.randn((1, 3, 16, 16))`"):
        pipe(1, latents=[None, latents, None])


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
        ValueError,
        f"`{name}` has {count_of(len(value), 'value')}, but this pipeline has 3 stages. Pass one value for all",
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
    with raises(ValueError, f"`{name}` has to be a positive integer", f"but is {value!r} of type {type(value)}."):
        pipe(1, **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("guidance_scale", float("nan"), "a finite number"),
        ("guidance_scale", "4", "a finite number"),
        ("guidance_scale", True, "a finite number"),
        ("guidance_start", -0.1, "in [0, 1]"),
        ("guidance_start", 1.5, "in [0, 1]"),
        ("guidance_stop", -0.1, "in [0, 1]"),
        ("guidance_stop", 1.5, "in [0, 1]"),
        ("noise_level", 1.0, "in [0, 1)"),
        ("noise_level", -0.1, "in [0, 1)"),
        ("noise_level", float("nan"), "in [0, 1)"),
        ("noise_level", [0.1, None], "in [0, 1)"),
        ("relay_strength", 0.0, "None or in (0, 1]"),
        ("relay_strength", 1.1, "None or in (0, 1]"),
        ("num_inference_steps", [3, 0, 3], "a positive integer up to 100000"),
        ("num_inference_steps", 10**9, "a positive integer up to 100000"),
        ("eta", 1.5, "in [0, 1]"),
        ("eta", -0.1, "in [0, 1]"),
        ("eta", float("nan"), "in [0, 1]"),
        ("eta", "1", "in [0, 1]"),
    ],
)
def test_number_out_of_range(pipe, name, value, wanted):
    culprit = value[1] if isinstance(value, list) else value
    with raises(ValueError, f"`{name}` has to be {wanted} but is {culprit!r} of type"):
        pipe(1, **{name: value})


@pytest.mark.parametrize(
    ("start", "stop"), [(0.8, 0.2), ([0.0, 0.5, 0.0], [1.0, 0.4, 1.0]), ([0.0, 0.0, 0.7], 0.6)], ids=repr
)
def test_guidance_that_stops_before_it_starts(pipe, start, stop):
    with raises(ValueError, "`guidance_start` is", "`guidance_stop`", "Pass a start", "`guidance_scale=1.0`"):
        pipe(1, guidance_start=start, guidance_stop=stop)


@pytest.mark.parametrize(
    "generator", [3, "0", [3], [None], (torch.Generator(),)], ids=lambda value: type(value).__name__
)
def test_generator_that_is_none(pipe, generator):
    with raises(TypeError, "`generator` has to be a `torch.Generator`, or a list", "Pass `torch.Generator()"):
        pipe(1, generator=generator)


def test_callback_that_is_no_function(pipe):
    with raises(TypeError, "`callback_on_step_end` has to be a function but is 'print'. Pass one that takes `pipe,"):
        pipe(1, callback_on_step_end="print")


@pytest.mark.parametrize(
    "callback",
    [lambda pipe, step, timestep: {}, lambda *, pipe: {}, lambda: {}, lambda pipe, step, timestep, tensors, more: {}],
)
def test_callback_of_other_arguments(pipe, callback):
    with raises(TypeError, "`callback_on_step_end` has to take four arguments", "but takes ("):
        pipe(1, callback_on_step_end=callback)


@pytest.mark.parametrize("returned", [None, [], (1,), torch.zeros(1)], ids=repr)
def test_callback_that_returns_no_dictionary(pipe, returned):
    with raises(TypeError, "`callback_on_step_end` has to return a dictionary", "returned", "Let it return"):
        pipe(1, callback_on_step_end=lambda *arguments: returned, num_inference_steps=1)


@pytest.mark.parametrize("bound", [0.0, 1.0])
def test_bounds_are_in_range(pipe, bound):
    only = {"noise_level": bound} if bound == 0 else {"relay_strength": bound}
    pipe(1, num_inference_steps=1, guidance_start=bound, guidance_stop=bound, **only)


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
        with pytest.raises(ValueError, match=r"`class_labels` contains .* (Did you mean|lists them)") as error:
            pipe.get_label_ids(name)
        assert str(error.value).isprintable() and len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"attention_kwargs": 3}, "`attention_kwargs` has to be a dictionary"),
        ({"timesteps": 5}, "`timesteps` has to be"),
        ({"timesteps": ["a", "b", "c"]}, "`timesteps` has to be"),
        ({"timesteps": [5, 900]}, "`timesteps` has to be .* fall from at most 999"),
        ({"timesteps": [5000, 1]}, "`timesteps` has to be .* fall from at most 999"),
        ({"timesteps": [5, -9]}, "`timesteps` has to be"),
        ({"timesteps": [float("nan")]}, "`timesteps` has to be"),
        ({"height": 10**9}, "`height` has to be at most 16,384 pixels"),
    ],
    ids=str,
)
def test_values_that_cannot_be_meant_are_refused(pipe, arguments, told):
    with pytest.raises((TypeError, ValueError), match=told):
        pipe(0, num_inference_steps=2, **arguments)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("latents", None),
        ("latents", torch.zeros(1, 3, 4, 4)),
        ("low_res", torch.zeros(1)),
        ("class_labels", [0]),
        ("class_labels", torch.tensor([99])),
        ("class_labels", torch.tensor([-1])),
        ("class_labels", torch.zeros(2, dtype=torch.long)),
    ],
    ids=str,
)
def test_what_a_callback_returns_must_fit(name, value):
    with pytest.raises((TypeError, ValueError), match=f"`{name}`, which `callback_on_step_end` returned, has to be"):
        make_cascade(1)(0, num_inference_steps=2, callback_on_step_end=lambda *_: {name: value})


def test_pictures_of_nothing_finite_are_refused(pipe):
    options = {"guidance_scale": 1e38, "num_inference_steps": 2}
    with raises(ValueError, "NaN or infinity", "Lower `guidance_scale`"):
        pipe("cat", **options)
    assert not np.isfinite(pipe("cat", output_type="np", **options).images).all()
