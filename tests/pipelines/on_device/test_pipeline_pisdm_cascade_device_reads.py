"""While it samples, the pipeline never waits for its device: the next steps are queued while the device works."""

import itertools
from collections import Counter
from contextlib import contextmanager

import diffusers
import pytest
import torch
from diffusers import DDPMScheduler, DPMSolverMultistepScheduler
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils.import_utils import DummyObject

from diffusers_pisdm.schedulers import UNSUITABLE
from tests.pipelines.on_device.device_reads import count_copies
from tests.pipelines.tiny_cascade import make_cascade


pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers on NumPy 2

CONFIG = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
# UniPC moves the noise levels of its sums to the device at every step.
WAITING_SCHEDULERS = {"UniPCMultistepScheduler"}
META = torch.device("meta")


@pytest.fixture(autouse=True)
def any_steps(monkeypatch):
    """What is drawn here need not be right, so steps may be as long as they like."""
    monkeypatch.setattr("diffusers_pisdm.schedulers.LARGEST_RATIOS", {})


def make_scheduler(name):
    scheduler_class = getattr(diffusers, name)
    if isinstance(scheduler_class, DummyObject):
        pytest.skip(f"{name} needs a package that is not installed")
    return scheduler_class.from_config(DDPMScheduler(**CONFIG).config)


def sample(pipe, **arguments):
    """Samples on a device without values and returns what was copied to it in the loops over the steps."""
    pipe.to(META)
    progress_bar, copies = pipe.progress_bar, Counter()

    @contextmanager
    def counted(**kwargs):  # a stage's loop runs inside its progress bar
        with progress_bar(**kwargs) as bar, count_copies() as found:
            yield bar
        copies.update(found)

    pipe.progress_bar = counted
    images = pipe([1, 2], **{"num_inference_steps": 4, "output_type": "latent", **arguments}).images
    assert images.device.type == "meta"
    return copies


@pytest.mark.parametrize(
    "read",
    [
        lambda tensor: tensor[0].item(),
        lambda tensor: bool(tensor[0]),
        lambda tensor: int(tensor[0]),
        lambda tensor: tensor.cpu(),
        lambda tensor: tensor.tolist(),
        lambda tensor: tensor.nonzero(),
        lambda tensor: tensor[tensor > 0],
        lambda tensor: torch.arange(10.0)[tensor.long()[0]],
        lambda tensor: 1 if tensor[0] > 0 else 0,
    ],
)
def test_reads_are_found(read):
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        read(torch.ones(3, device=META))


@pytest.mark.parametrize(
    "copy",
    [
        lambda: torch.tensor([1.0], device=META),
        lambda: torch.ones(3, device=META).new_tensor(1.0),
        lambda: torch.ones(3).to(META),
        lambda: torch.ones(3, device=META).copy_(torch.ones(3)),
    ],
)
def test_copies_are_found(copy):
    with count_copies() as copies:
        torch.ones(3, device=META) * torch.tensor(2.0)  # the operation takes the value of a number on the CPU
        torch.full((3,), 2.0, device=META).to(torch.float16)
        assert not copies
        copy()
    assert copies == {"test_pipeline_pisdm_cascade_device_reads.py": 1}


def test_reads_and_copies_of_a_run_are_found():
    def read(pipe, step, timestep, callback_kwargs):
        if callback_kwargs["latents"].sum() > 0:
            raise AssertionError

    def copy(pipe, step, timestep, callback_kwargs):
        return {"class_labels": torch.tensor([3, 4], device=META)}

    with pytest.raises(RuntimeError, match="meta"):
        sample(make_cascade(2), callback_on_step_end=read)
    copies = sample(make_cascade(2), callback_on_step_end=copy)
    assert copies == {"test_pipeline_pisdm_cascade_device_reads.py": 8}


@pytest.mark.parametrize(
    "name", [s.name for s in KarrasDiffusionSchedulers if s.name not in itertools.chain(*UNSUITABLE.values())]
)
def test_schedulers(name):
    copies = sample(make_cascade(2, scheduler=make_scheduler(name)))
    assert bool(copies) == (name in WAITING_SCHEDULERS)
    assert all(file.startswith("scheduling_") for file in copies)


@pytest.mark.parametrize(
    "arguments",
    [
        {"guidance_scale": 1.0},
        {"guidance_start": 0.25, "guidance_stop": 0.75},
        {"relay_strength": 0.5},
        {"timesteps": [900, 500, 100]},
        {"num_images_per_prompt": 2},
        {"callback_on_step_end": lambda pipe, step, timestep, tensors: tensors},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
@pytest.mark.parametrize("slicing", [False, True], ids=["batched", "sliced"])
def test_arguments(arguments, slicing):
    pipe = make_cascade(2)
    if slicing:
        pipe.enable_guidance_slicing()
    assert not sample(pipe, **arguments)


@pytest.mark.parametrize("options", [{"thresholding": True}, {"algorithm_type": "sde-dpmsolver++"}], ids=str)
def test_scheduler_options(options):
    scheduler = DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", **options)
    assert not sample(make_cascade(2, scheduler=scheduler))


def test_half_precision():
    assert not sample(make_cascade(2).to(torch.bfloat16))
