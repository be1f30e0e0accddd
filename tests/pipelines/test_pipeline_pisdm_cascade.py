"""What users of diffusers expect of any pipeline: outputs, batches, callbacks, precision, offloading."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    KDPM2AncestralDiscreteScheduler,
    KDPM2DiscreteScheduler,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback

from diffusers_pisdm import PISDMCascadePipeline, PISDMCascadePipelineOutput
from diffusers_pisdm.evaluation import SampleSettings
from tests.pipelines.tiny_cascade import generators, make_cascade, make_scheduler, make_transformer


@pytest.fixture(scope="module")
def shared_pipe():
    """For tests that change nothing of it."""
    return make_cascade(2, id2label=["cat", "dog, hound", "crane", "crane", "apple", "fish", "b/c", "d", "e", "f"])


def run(pipe, class_labels=(1, 2), **arguments):
    """Three steps with a generator an image; NumPy images."""
    defaults = {"num_inference_steps": 3, "output_type": "np", "generator": generators(*range(len(class_labels)))}
    return pipe(list(class_labels), **{**defaults, **arguments})


pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers on NumPy 2


# Signature, components, outputs


def test_signature_is_as_in_the_design():
    parameters = inspect.signature(PISDMCascadePipeline.__call__).parameters
    assert {name: parameters[name].default for name in ("num_images_per_prompt", "guidance_scale", "return_dict")} == {
        "num_images_per_prompt": 1,
        "guidance_scale": None,
        "return_dict": True,
    }
    assert parameters["output_type"].default == "pil"
    assert list(parameters)[:2] == ["self", "class_labels"]
    assert {"generator", "latents", "eta", "callback_on_step_end", "height", "width"} <= set(parameters)


def test_components(shared_pipe):
    names = {f"{kind}{suffix}" for kind in ("transformer", "scheduler") for suffix in ("", "_2", "_3", "_4")} | {"vae"}
    assert set(shared_pipe.components) == names
    assert shared_pipe.parameters == {
        "id2label": shared_pipe.config.id2label,
        "default_num_inference_steps": 20,  # from benchmarks/sampling_efficiency.py
        "default_guidance_scale": 4.0,
        "default_noise_level": 0.1,
    }
    assert set(shared_pipe._optional_components) == names - {"transformer", "scheduler"}
    assert shared_pipe.model_cpu_offload_seq == "transformer->transformer_2->transformer_3->transformer_4->vae"


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4])
def test_one_to_four_stages(num_stages):
    pipe = make_cascade(num_stages)
    output = run(pipe, output_stages=True)
    assert pipe.num_stages == num_stages
    sizes = [8 * 2**stage for stage in range(num_stages)]
    assert [images.shape for images in output.stage_images] == [(2, size, size, 3) for size in sizes]
    assert output.images is output.stage_images[-1]  # decoded once
    assert np.isfinite(output.images).all()


def test_output_types_agree(shared_pipe):
    latents = run(shared_pipe, output_type="latent").images
    tensor = run(shared_pipe, output_type="pt").images
    array = run(shared_pipe, output_type="np").images
    pictures = run(shared_pipe, output_type="pil").images
    assert latents.dtype == tensor.dtype == torch.float32
    torch.testing.assert_close((latents / 2 + 0.5).clamp(0, 1), tensor)
    np.testing.assert_allclose(tensor.permute(0, 2, 3, 1).numpy(), array)
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    np.testing.assert_allclose(np.stack([np.asarray(picture) for picture in pictures]), array * 255, atol=0.51)


def test_grey_images():
    pipe = make_cascade(2, in_channels=1)
    assert run(pipe).images.shape == (2, 16, 16, 1)
    assert run(pipe, output_type="pil").images[0].mode == "L"


def test_tuple_output(shared_pipe):
    output = run(shared_pipe, output_stages=True)
    assert isinstance(output, PISDMCascadePipelineOutput)
    assert run(shared_pipe).stage_images is None
    (images,) = run(shared_pipe, return_dict=False)
    assert np.array_equal(images, output.images)
    images, stage_images = run(shared_pipe, return_dict=False, output_stages=True)
    assert np.array_equal(stage_images[0], output.stage_images[0])
    assert np.array_equal(images, output.images)


def test_nothing_is_recorded_for_autograd(shared_pipe):
    assert not run(shared_pipe, output_type="latent").images.requires_grad


# Labels and batches


@pytest.mark.parametrize(
    "class_labels",
    [4, "apple", [4], ["apple"], (4,), torch.tensor(4), torch.tensor([4], dtype=torch.int32), [np.int64(4)]],
    ids=repr,
)
def test_forms_of_one_label(shared_pipe, class_labels):
    assert shared_pipe.get_label_ids(class_labels) == [4]


def test_ids_names_and_synonyms_mix(shared_pipe):
    assert shared_pipe.get_label_ids([0, "hound", "dog", "dog, hound", "b/c"]) == [0, 1, 1, 1, 6]


def test_images_depend_on_their_label(shared_pipe):
    images = run(shared_pipe, [1, 2], generator=generators(0, 0)).images
    assert np.abs(images[0] - images[1]).max() > 0.01


@pytest.mark.parametrize("scheduler_class", [DPMSolverMultistepScheduler, EulerAncestralDiscreteScheduler])
def test_an_images_generator_decides_it_in_any_batch(scheduler_class):
    pipe = make_cascade(2, scheduler=scheduler_class(beta_schedule="linear"))  # both take three steps of it
    alone = run(pipe, [5], generator=generators(7), noise_level=0.5).images
    batch = run(pipe, [1, 5, 3], generator=generators(1, 7, 2), noise_level=0.5).images
    np.testing.assert_allclose(batch[1], alone[0], atol=1e-4)
    assert np.abs(batch[0] - batch[2]).max() > 0.05


def test_single_generator_draws_for_the_batch(shared_pipe):
    images = run(shared_pipe, [5, 5], generator=torch.Generator().manual_seed(7)).images
    assert np.abs(images[0] - images[1]).max() > 0.05
    again = run(shared_pipe, [5, 5], generator=torch.Generator().manual_seed(7)).images
    assert np.array_equal(images, again)
    single = run(shared_pipe, [5], generator=torch.Generator().manual_seed(7)).images
    assert np.array_equal(single, run(shared_pipe, [5], generator=generators(7)).images)


@pytest.mark.parametrize("class_labels", [[3], [3, 6]])
def test_num_images_per_prompt(shared_pipe, class_labels):
    seeds = range(2 * len(class_labels))
    images = run(shared_pipe, class_labels, num_images_per_prompt=2, generator=generators(*seeds)).images
    repeated = [label for label in class_labels for _ in range(2)]
    np.testing.assert_allclose(images, run(shared_pipe, repeated, generator=generators(*seeds)).images, atol=1e-5)


def test_guidance_changes_the_image(shared_pipe):
    off, on = (run(shared_pipe, guidance_scale=scale).images for scale in (1.0, 7.5))
    assert off.shape == on.shape
    assert np.abs(off - on).max() > 0.01


def test_arguments_of_one_value_a_stage(shared_pipe):
    per_stage = run(
        shared_pipe, guidance_scale=[4.0, 4.0], num_inference_steps=[3, 3], noise_level=[0.1], guidance_stop=[1.0, 1.0]
    )
    assert np.array_equal(per_stage.images, run(shared_pipe).images)
    first = [run(shared_pipe, guidance_scale=[4.0, scale], output_stages=True).stage_images for scale in (1.0, 4.0)]
    assert np.array_equal(first[0][0], first[1][0])
    assert np.abs(first[0][1] - first[1][1]).max() > 0.01


# Sizes and initial noise


def test_final_size_scales_the_lower_stages():
    pipe = make_cascade(3)
    output = run(pipe, height=48, width=24, output_stages=True, output_type="latent")
    assert [tuple(latents.shape[2:]) for latents in output.stage_images] == [(12, 6), (24, 12), (48, 24)]
    assert pipe.get_stage_sizes(width=40) == [(8, 10), (16, 20), (32, 40)]


def test_given_latents_replace_the_drawn_noise(shared_pipe):
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(1, 3, 8, 8, generator=generator)
    images = run(shared_pipe, [3], latents=first, generator=generator).images
    assert np.array_equal(images, run(shared_pipe, [3]).images)


def test_given_latents_of_every_stage(shared_pipe):
    generator = torch.Generator().manual_seed(0)
    noise = [torch.randn(1, 3, 8, 8, generator=generator)]
    augmentation = torch.randn(1, 3, 16, 16, generator=generator)
    noise.append(torch.randn(1, 3, 16, 16, generator=generator))
    rest = torch.Generator().manual_seed(0)
    torch.randn(1, 3, 8, 8, generator=rest)
    assert torch.equal(torch.randn(1, 3, 16, 16, generator=rest.clone_state()), augmentation)
    images = run(shared_pipe, [3], latents=noise, generator=rest).images
    assert np.array_equal(images, run(shared_pipe, [3]).images)


def test_half_precision_latents_are_taken(shared_pipe):
    noise = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0)).half()
    images = [run(shared_pipe, [3], latents=latents).images for latents in (noise, noise.float())]
    assert np.array_equal(*images)


# Callbacks and progress


def test_callback_runs_over_all_stages(shared_pipe):
    seen = []

    def record(pipe, step, timestep, callback_kwargs):
        assert set(callback_kwargs) == set(pipe._callback_tensor_inputs)
        assert torch.equal(timestep, pipe.current_timestep)
        assert pipe.stage == callback_kwargs["stage"]
        low_res = callback_kwargs["low_res"]
        seen.append((step, callback_kwargs["stage"], tuple(callback_kwargs["latents"].shape), low_res is None))
        return callback_kwargs

    names = shared_pipe._callback_tensor_inputs
    run(
        shared_pipe,
        num_inference_steps=[2, 3],
        callback_on_step_end=record,
        callback_on_step_end_tensor_inputs=names,
    )
    low, high = (2, 3, 8, 8), (2, 3, 16, 16)
    assert seen == [
        (0, 1, low, True),
        (1, 1, low, True),
        (2, 2, high, False),
        (3, 2, high, False),
        (4, 2, high, False),
    ]
    assert shared_pipe.num_timesteps == 5


def test_callback_changes_latents(shared_pipe):
    def blank(pipe, step, timestep, callback_kwargs):
        if step == pipe.num_timesteps - 1:
            callback_kwargs["latents"] = torch.zeros_like(callback_kwargs["latents"])
        return callback_kwargs

    assert np.all(run(shared_pipe, callback_on_step_end=blank).images == 0.5)


def test_callback_changes_condition_and_labels(shared_pipe):
    expected = run(shared_pipe, [1]).images

    def swap(name, stage):
        def callback(pipe, step, timestep, callback_kwargs):
            if pipe.stage == stage:
                return {name: torch.zeros_like(callback_kwargs[name])}
            return {}

        return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": [name]}

    assert np.abs(run(shared_pipe, [1], **swap("class_labels", 1)).images - expected).max() > 1e-3
    assert np.abs(run(shared_pipe, [1], **swap("low_res", 2)).images - expected).max() > 1e-3


@pytest.mark.parametrize("scale", [2.0, [2.0, 2.0]])
def test_callback_changes_guidance(scale):
    pipe = make_cascade(2)
    scales = []

    def increase(pipe, step, timestep, callback_kwargs):
        scales.append(pipe.guidance_scale)
        pipe._guidance_scale += 1.0
        return callback_kwargs

    run(pipe, guidance_scale=scale, callback_on_step_end=increase)
    # A list sets each stage's scale anew; a single one is set once.
    assert scales == ([2, 3, 4, 2, 3, 4] if isinstance(scale, list) else [2, 3, 4, 5, 6, 7])


def test_pipeline_callback_switches_guidance_off(shared_pipe):
    class GuidanceCutoff(PipelineCallback):
        tensor_inputs = ["latents"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            if step_index == self.config.cutoff_step_index:
                pipeline._guidance_scale = 0.0
            return callback_kwargs

    callback = GuidanceCutoff(cutoff_step_ratio=None, cutoff_step_index=3)
    images = run(shared_pipe, num_inference_steps=4, callback_on_step_end=callback).images
    expected = run(shared_pipe, num_inference_steps=4, guidance_scale=[4.0, 1.0]).images
    np.testing.assert_allclose(images, expected, atol=1e-6)


def test_a_pipeline_callback_gets_the_tensors_it_asks_for(shared_pipe):
    class Relabel(PipelineCallback):
        tensor_inputs = ["class_labels"]

        def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
            return {"class_labels": torch.full_like(callback_kwargs["class_labels"], 3)} if step_index == 0 else {}

    callback = Relabel(cutoff_step_ratio=None, cutoff_step_index=0)
    labels = []
    hook = shared_pipe.transformer_2.register_forward_pre_hook(
        lambda _, args, kwargs: labels.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    for one_or_several in (callback, MultiPipelineCallbacks([callback])):
        run(shared_pipe, num_inference_steps=1, guidance_scale=1.0, callback_on_step_end=one_or_several)
    hook.remove()
    assert labels == [[3, 3]] * 2


def test_interrupt_returns_the_running_stages_image(shared_pipe):
    steps = []

    def interrupt(pipe, step, timestep, callback_kwargs):
        steps.append(step)
        pipe._interrupt = step == 1
        return callback_kwargs

    output = run(shared_pipe, callback_on_step_end=interrupt, output_stages=True)
    assert steps == [0, 1]
    assert output.images.shape == (2, 8, 8, 3)
    assert len(output.stage_images) == 1
    assert run(shared_pipe).images.shape == (2, 16, 16, 3)


def test_one_progress_bar_a_stage(capsys):
    pipe = make_cascade(2)
    pipe.set_progress_bar_config()
    run(pipe, num_inference_steps=[2, 5])
    bars = capsys.readouterr().err
    assert "stage 1/2 (8x8): 100%" in bars
    assert "2/2 [" in bars
    assert "stage 2/2 (16x16): 100%" in bars
    assert "5/5 [" in bars


def test_progress_bar_config_is_respected(capsys):
    pipe = make_cascade(2)
    pipe.set_progress_bar_config(desc="mine")
    run(pipe)
    bars = capsys.readouterr().err
    assert "mine: 100%" in bars
    assert "stage" not in bars
    pipe.set_progress_bar_config(disable=True)
    run(pipe)
    assert capsys.readouterr().err == ""


# Precision, devices, offloading


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype):
    expected = run(make_cascade(2), output_type="latent", guidance_scale=1.5).images
    pipe = make_cascade(2).to(dtype)
    inputs = []
    pipe.transformer_2.register_forward_pre_hook(
        lambda _, args, kwargs: inputs.append((args, kwargs)), with_kwargs=True
    )
    latents = run(pipe, output_type="latent", guidance_scale=1.5).images
    assert pipe.transformer.dtype == dtype
    assert latents.dtype == torch.float32
    (hidden_states,), kwargs = inputs[0]
    assert hidden_states.dtype == kwargs["low_res"].dtype == dtype
    assert kwargs["timestep"].dtype == torch.int64
    assert kwargs["noise_level"].dtype == torch.float32
    assert (latents - expected).abs().mean() < 0.1 * expected.abs().mean()
    assert run(pipe, output_type="pt").images.dtype == torch.float32


def test_stages_may_differ_in_precision():
    pipe = make_cascade(2)
    pipe.transformer_2.to(torch.bfloat16)
    assert np.isfinite(run(pipe).images).all()


def test_fractional_timesteps_reach_the_model_unrounded():
    pipe = make_cascade(1, scheduler=EulerDiscreteScheduler(beta_schedule="squaredcos_cap_v2")).to(torch.bfloat16)
    timesteps = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: timesteps.append(kwargs["timestep"]), with_kwargs=True
    )
    latents = run(pipe, num_inference_steps=7, output_type="latent").images
    assert latents.dtype == torch.float32  # this scheduler returns the precision of the model's output
    expected = np.linspace(999, 0, 7, dtype=np.float32)
    np.testing.assert_array_equal([timestep[0].item() for timestep in timesteps], expected)


def test_model_cpu_offload():
    """Sequential offloading onto the CPU itself fails in accelerate, for any model."""
    pipe = make_cascade(2)
    expected = run(pipe).images
    pipe.enable_model_cpu_offload(device="cpu")
    hooks = list(pipe._all_hooks)
    np.testing.assert_allclose(run(pipe).images, expected, atol=1e-5)
    assert not set(map(id, pipe._all_hooks)) & set(map(id, hooks))  # the models were put back after the run
    np.testing.assert_allclose(run(pipe).images, expected, atol=1e-5)


@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
def test_group_offload(offload_type):
    pipe = make_cascade(2)
    expected = run(pipe).images
    pipe.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type=offload_type,
        num_blocks_per_group=1 if offload_type == "block_level" else None,
    )
    np.testing.assert_allclose(run(pipe).images, expected, atol=1e-5)


def test_layerwise_casting():
    pipe = make_cascade(2)
    expected = run(pipe, output_type="latent", guidance_scale=1.5).images
    for transformer in pipe.stages:
        transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    latents = run(pipe, output_type="latent", guidance_scale=1.5).images
    assert (latents - expected).abs().mean() < 0.1 * expected.abs().mean()


def test_transformers_are_not_changed_by_sampling(shared_pipe):
    before = {name: tensor.clone() for name, tensor in shared_pipe.transformer.state_dict().items()}
    run(shared_pipe)
    assert all(torch.equal(before[name], tensor) for name, tensor in shared_pipe.transformer.state_dict().items())


# Parts swapped after construction


def test_scheduler_can_be_swapped():
    pipe = make_cascade(3)
    before = run(pipe).images
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    assert all(isinstance(scheduler, DDIMScheduler) for scheduler in pipe.get_stage_schedulers())
    assert np.abs(run(pipe).images - before).max() > 1e-3


def test_stage_can_be_removed_and_put_back():
    pipe = make_cascade(3)
    expected = run(pipe).images
    transformer, pipe.transformer_3 = pipe.transformer_3, None
    assert run(pipe).images.shape == (2, 16, 16, 3)
    pipe.transformer_3 = transformer
    assert np.array_equal(run(pipe).images, expected)


def test_gap_made_later_is_found():
    pipe = make_cascade(3)
    pipe.transformer_2 = None
    with pytest.raises(ValueError, match="`transformer_2` is None, but `transformer_3`"):
        run(pipe)


def test_stage_sizes_need_no_power_of_two():
    pipe = PISDMCascadePipeline(
        make_transformer(1, sample_size=6),
        make_cascade(1).scheduler,
        make_transformer(2, sample_size=10, patch_size=1),
    )
    pipe.set_progress_bar_config(disable=True)
    assert pipe.get_stage_sizes(height=20) == [(12, 6), (20, 10)]
    assert run(pipe).images.shape == (2, 10, 10, 3)


# --- A checkpoint's own settings -------------------------------------------------------------------------------------

DEFAULTS = {
    "default_num_inference_steps": [2, 3, 1],
    "default_guidance_scale": [3.0, 1.0, 1.5],
    "default_noise_level": [0.3, 0.2],
}


def settings_of(pipe, **arguments):
    """Steps, guidance and noise level of each stage, as they reach the models."""
    seen = {transformer: [] for transformer in pipe.stages}

    def record(module, args, kwargs):
        level = kwargs.get("noise_level")
        seen[module].append((len(args[0]), None if level is None else round(level[0].item(), 3)))

    hooks = [stage.register_forward_pre_hook(record, with_kwargs=True) for stage in pipe.stages]
    pipe([1, 2], generator=generators(0, 1), **arguments)
    for hook in hooks:
        hook.remove()
    return [(len(calls), "guided" if calls[0][0] == 4 else "plain", calls[0][1]) for calls in seen.values()]


def test_a_call_takes_the_settings_that_the_pipeline_was_saved_with(tmp_path):
    make_cascade(3, **DEFAULTS).save_pretrained(tmp_path)
    pipe = PISDMCascadePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert settings_of(pipe) == [(2, "guided", None), (3, "plain", 0.3), (1, "guided", 0.2)]
    expected = run(
        make_cascade(3), num_inference_steps=[2, 3, 1], guidance_scale=[3.0, 1.0, 1.5], noise_level=[0.3, 0.2]
    )
    assert np.array_equal(run(pipe, num_inference_steps=None).images, expected.images)


def test_arguments_win_over_the_settings_of_the_pipeline():
    pipe = make_cascade(3, **DEFAULTS)
    arguments = {"num_inference_steps": 4, "guidance_scale": 1.0, "noise_level": 0.5}
    assert settings_of(pipe, **arguments) == [(4, "plain", None), (4, "plain", 0.5), (4, "plain", 0.5)]


def test_a_shortened_cascade_takes_the_first_settings(tmp_path):
    make_cascade(3, **DEFAULTS).save_pretrained(tmp_path)
    pipe = PISDMCascadePipeline.from_pretrained(tmp_path, transformer_3=None)
    pipe.set_progress_bar_config(disable=True)
    assert settings_of(pipe) == [(2, "guided", None), (3, "plain", 0.3)]
    assert SampleSettings(5).resolve(pipe).num_inference_steps == [2, 3]
    late = make_cascade(3, **DEFAULTS)
    late.transformer_3 = None
    assert settings_of(late) == [(2, "guided", None), (3, "plain", 0.3)]


def test_wrong_settings_of_a_pipeline_are_named():
    with pytest.raises(ValueError, match="`guidance_scale` has 2 values, but this pipeline has 3 stages"):
        run(make_cascade(3, default_guidance_scale=[1.0, 2.0]))
    with pytest.raises(ValueError, match=r"`noise_level` has to be in \[0, 1\) but is 2"):
        run(make_cascade(2, default_noise_level=2.0))


# --- Lists of stages -------------------------------------------------------------------------------------------------


def test_a_pipeline_of_lists_of_stages():
    stages = [make_transformer(i) for i in (1, 2, 3)]
    schedulers = [make_scheduler() for _ in stages]
    pipe = PISDMCascadePipeline.from_stages(stages, schedulers, id2label=["a"] * 10)
    assert pipe.stages == stages and pipe.config.id2label[3] == "a"
    assert pipe.scheduler is schedulers[0] and pipe.scheduler_2 is None  # equal ones are one
    other = DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    pipe = PISDMCascadePipeline.from_stages(stages, [schedulers[0], other, schedulers[2]])
    assert (pipe.scheduler, pipe.scheduler_2, pipe.scheduler_3) == (schedulers[0], other, schedulers[2])
    assert PISDMCascadePipeline.from_stages(stages[:1], other).scheduler is other


def test_schedulers_of_two_classes_are_not_equal():
    plain, ancestral = KDPM2DiscreteScheduler(), KDPM2AncestralDiscreteScheduler()
    assert plain.config == ancestral.config
    pipe = PISDMCascadePipeline.from_stages([make_transformer(1), make_transformer(2)], [plain, ancestral])
    assert (pipe.scheduler, pipe.scheduler_2) == (plain, ancestral)


def test_lists_that_do_not_fit_are_refused():
    stages = [make_transformer(i) for i in (1, 2)]
    other = DDIMScheduler(clip_sample=False)
    with pytest.raises(ValueError, match="`schedulers` has 3 schedulers for 2 `transformers`"):
        PISDMCascadePipeline.from_stages(stages, [make_scheduler(), other, make_scheduler()])
    for wrong in ([], [make_scheduler()] * 3):
        with pytest.raises(ValueError, match=f"`schedulers` has {len(wrong)} schedulers for 2 `transformers`"):
            PISDMCascadePipeline.from_stages(stages, wrong)
    for wrong in ([], [stages[0]] * 5):
        with pytest.raises(ValueError, match=f"`transformers` has {len(wrong)} stages, but a cascade has 1 to 4"):
            PISDMCascadePipeline.from_stages(wrong, make_scheduler())
