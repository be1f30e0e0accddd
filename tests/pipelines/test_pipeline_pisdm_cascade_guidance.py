"""Classifier-free guidance: one forward on both halves of the batch, or with guidance slicing one on each."""

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler
from peft import LoraConfig

from diffusers_pisdm import PISDMCascadePipeline
from tests.pipelines.tiny_cascade import NUM_CLASSES, generators, make_cascade, make_transformer
from tests.pipelines.tiny_dit import make_dit


pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers on NumPy 2

SCHEDULERS = [
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DDIMScheduler",
    "DDPMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "UniPCMultistepScheduler",
    "PNDMScheduler",
]
# Largest error over the largest value. Latents are float32 between the steps, whatever the model's precision.
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-6}


@pytest.fixture(autouse=True)
def any_steps(monkeypatch):
    """What is drawn here need not be right, so steps may be as long as they like."""
    monkeypatch.setattr("diffusers_pisdm.schedulers.LARGEST_RATIOS", {})


def make_scheduler(name, **options):
    # Noise levels up to 157 only: the cosine schedule's 20,000 would enlarge rounding.
    config = DDPMScheduler(beta_schedule="linear", prediction_type="v_prediction", clip_sample=False).config
    return getattr(diffusers, name).from_config(config, **options)


def run(pipe, **arguments):
    """Latents: images are clipped, which would hide a difference."""
    defaults = {"num_inference_steps": 4, "output_type": "latent", "generator": generators(0, 1)}
    return pipe([1, 2], **{**defaults, **arguments}).images


def record_labels(pipe):
    """The class labels of each call of the first stage's model, in a list that grows."""
    labels = []
    pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: labels.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    return labels


def assert_slicing_changes_nothing(pipe, dtype=torch.float32, **arguments):
    labels = record_labels(pipe)
    batched = run(pipe, **arguments)
    count = len(labels)
    pipe.enable_guidance_slicing()
    error = (run(pipe, **arguments) - batched).abs().max() / batched.abs().max()
    assert error < TOLERANCE[dtype]
    assert {len(batch) for batch in labels[count:]} == {2}
    assert max(len(batch) for batch in labels[:count]) == 4
    pipe.disable_guidance_slicing()
    assert torch.equal(run(pipe, **arguments), batched)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", SCHEDULERS)
def test_slicing_gives_the_same_images(name, dtype):
    assert_slicing_changes_nothing(make_cascade(2, scheduler=make_scheduler(name)).to(dtype), dtype)


def test_halves_of_the_batch():
    pipe = make_cascade(1)
    labels = record_labels(pipe)
    null = [NUM_CLASSES] * 2
    run(pipe)
    assert labels == [null + [1, 2]] * 4
    labels.clear()
    pipe.enable_guidance_slicing()
    run(pipe)
    assert labels == [null, [1, 2]] * 4
    labels.clear()
    run(pipe, guidance_start=0.25, guidance_stop=0.75)
    assert labels == [[1, 2], null, [1, 2], null, [1, 2], [1, 2]]
    labels.clear()
    run(pipe, guidance_scale=1.0)
    assert labels == [[1, 2]] * 4


@pytest.mark.parametrize(
    "offload",
    [
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        lambda pipe: pipe.enable_group_offload(
            onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
        ),
    ],
    ids=["model", "group"],
)
def test_slicing_with_offloading(offload):
    pipe = make_cascade(2)
    offload(pipe)
    assert_slicing_changes_nothing(pipe)


def test_slicing_with_lora():
    pipe = make_cascade(2)
    before = run(pipe)
    for transformer in pipe.stages:
        transformer.add_adapter(LoraConfig(r=2, target_modules=["in_proj", "out_proj"], init_lora_weights=False))
    assert (run(pipe) - before).abs().max() > 0.05
    assert_slicing_changes_nothing(pipe)


def test_slicing_with_a_callback():
    def change(pipe, step, timestep, callback_kwargs):
        pipe._guidance_scale += 0.5
        callback_kwargs["class_labels"].add_(1)  # in place, and not given back
        return {"low_res": callback_kwargs["low_res"] * 0.9} if pipe.stage > 1 else {}

    names = ["class_labels", "low_res"]
    pipe = make_cascade(2)
    plain = run(pipe)
    arguments = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    labels = record_labels(pipe)
    assert (run(pipe, **arguments) - plain).abs().max() > 0.01
    assert [batch[2:] for batch in labels] == [[1, 2], [2, 3], [3, 4], [4, 5]]
    assert_slicing_changes_nothing(pipe, **arguments)


def test_a_callback_may_switch_slicing():
    pipe = make_cascade(1)
    labels = record_labels(pipe)

    def switch(pipe, step, timestep, callback_kwargs):
        pipe.enable_guidance_slicing() if step == 0 else pipe.disable_guidance_slicing()
        return callback_kwargs

    run(pipe, callback_on_step_end=switch)
    assert [len(batch) for batch in labels] == [4, 2, 2, 4, 4]


def test_slicing_belongs_to_the_pipeline_object(tmp_path):
    pipe = make_cascade(2)
    pipe.enable_guidance_slicing()
    assert PISDMCascadePipeline.from_pipe(pipe)._guidance_slicing
    assert not PISDMCascadePipeline.from_pipe(make_dit(), transformer=make_transformer(1, 4))._guidance_slicing
    assert not make_cascade(2)._guidance_slicing
    pipe.save_pretrained(tmp_path)
    assert "slicing" not in (tmp_path / "model_index.json").read_text()
    assert not PISDMCascadePipeline.from_pretrained(tmp_path)._guidance_slicing


@pytest.mark.parametrize("slicing", [False, True], ids=["batched", "sliced"])
def test_the_condition_is_prepared_once_a_stage(slicing, monkeypatch):
    pipe = make_cascade(2)
    if slicing:
        pipe.enable_guidance_slicing()
    prepared, prepare_condition = [], pipe.prepare_condition

    def record(stage, class_labels, low_res, guided):
        prepared.append((pipe.stage, guided))
        return prepare_condition(stage, class_labels, low_res, guided)

    monkeypatch.setattr(pipe, "prepare_condition", record)
    run(pipe, guidance_stop=0.5)
    assert prepared == [(1, True), (1, False), (2, True), (2, False)]


def weaker_of(transformer):
    """Another model of the same stage."""
    torch.manual_seed(9)
    weaker = type(transformer).from_config(transformer.config, num_layers=1).eval()
    torch.nn.init.normal_(weaker.proj_out.weight, std=0.1)  # zero at first
    return weaker


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_weaker_model_guides_its_stage_by_the_formula(batch_size):
    pipe, scales = make_cascade(2), [3.0, 1.5]
    guides = [weaker_of(stage) for stage in pipe.stages]

    class Guided(torch.nn.Module):
        """The formula as a model, for a pipeline without guidance."""

        def __init__(self, strong, weak, scale):
            super().__init__()
            self.strong, self.weak, self.scale = strong, weak, scale
            self.config, self.dtype, self.device = strong.config, strong.dtype, strong.device

        def forward(self, *args, return_dict=True, **kwargs):
            strong, weak = (m(*args, return_dict=False, **kwargs)[0] for m in (self.strong, self.weak))
            return (weak + self.scale * (strong - weak), None)

    found = run(pipe, guidance_scale=scales, guidance_model=guides, batch_size=batch_size)
    assert not torch.allclose(found, run(pipe, guidance_scale=scales), rtol=0.01)
    stages = [Guided(*parts) for parts in zip(pipe.stages, guides, scales)]
    formula = make_cascade(2)
    formula.transformer, formula.transformer_2 = stages
    torch.testing.assert_close(found, run(formula, guidance_scale=1.0), rtol=1e-4, atol=1e-4)


def test_a_single_guide_is_the_first_stages():
    pipe = make_cascade(2)
    guide, labels = weaker_of(pipe.transformer), record_labels(pipe)
    found = run(pipe, guidance_model=guide, guidance_start=0.5)
    assert labels == [[1, 2]] * 4  # the model never runs without the class
    assert torch.equal(found, run(pipe, guidance_model=[guide, None], guidance_start=0.5))
    unguided = run(pipe, guidance_scale=[1.0, 4.0], guidance_start=0.5)
    assert torch.equal(unguided, run(pipe, guidance_scale=[1.0, 4.0], guidance_start=0.5, guidance_model=guide))
    assert not torch.equal(found, unguided)


def test_a_guide_in_half_precision_and_mixes_of_classes():
    pipe = make_cascade(2)
    guides = [weaker_of(stage) for stage in pipe.stages]
    mixes = {"guidance_model": guides, "output_type": "latent", "num_inference_steps": 2}
    found = [pipe([{1: 0.5, 2: 0.5}], generator=generators(0), **mixes).images]
    for guide in guides:
        guide.to(torch.bfloat16)
    found.append(pipe([{1: 0.5, 2: 0.5}], generator=generators(0), **mixes).images)
    assert (found[0] - found[1]).abs().max() < 0.1 * found[0].abs().max()


def test_a_guide_has_to_fit_its_stage():
    pipe = make_cascade(2)
    first, second = pipe.stages
    with pytest.raises(ValueError, match=r"`guidance_model` of stage 1 has `low_res_channels=3`.*None"):
        run(pipe, guidance_model=second)
    with pytest.raises(ValueError, match=r"stage 2 has `low_res_channels=None`"):
        run(pipe, guidance_model=[None, first])
    with pytest.raises(ValueError, match=r"1 value.*2 stages"):
        run(pipe, guidance_model=[first])
    with pytest.raises(ValueError, match=r"stage 1 is on meta.*cpu"):
        run(pipe, guidance_model=weaker_of(first).to("meta"))
