"""The step on images that lie on the device; as a CUDA graph where there is a GPU."""

import copy

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel

from diffusers_pisdm import PISDMTransformer2DModel
from diffusers_pisdm.data.device_images import LabelledImages
from diffusers_pisdm.training import CascadeObjective, image_pyramid
from diffusers_pisdm.training.device_trainer import DeviceStep, augment_images
from diffusers_pisdm.training.noise import RowNoise
from diffusers_pisdm.training.optimization import make_optimizer, parameter_groups


SETTINGS = {"weight_decay": 0.1, "betas": (0.8, 0.9), "epsilon": 1e-6}
RATES = [1e-2, 5e-3, 2e-2, 1e-2, 1e-3, 3e-3]
NUM_CLASSES = 4


def make_objective():
    torch.manual_seed(0)
    stage = {"patch_size": 2, "in_channels": 3, "num_layers": 2, "hidden_size": 16, "num_classes": NUM_CLASSES}
    first = PISDMTransformer2DModel(sample_size=8, **stage)
    second = PISDMTransformer2DModel(
        sample_size=16, low_res_channels=3, residual_scale=0.2, pixel_head_channels=4, **stage
    )
    schedulers = [DDPMScheduler(prediction_type=kind, clip_sample=False) for kind in ("epsilon", "sample")]
    return CascadeObjective([first, second], schedulers, sil_weight=0.0, train_stages=[2])


@pytest.fixture(scope="module")
def data(real_images):
    images = ((real_images[::2] + 1) * 127.5).round().to(torch.uint8)
    labels = torch.arange(len(images)) % NUM_CLASSES
    return LabelledImages(images, labels, list("abcd"), torch.arange(len(images)) % 3 > 0)


def make_step(data, device="cpu", record=False, optimizer="adamw", **options):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=device == "cpu")
    objective = make_objective().to(device).train()
    optimizer = make_optimizer(
        parameter_groups(objective, SETTINGS["weight_decay"], optimizer),
        1.0,
        SETTINGS["betas"],
        SETTINGS["epsilon"],
        capturable=device != "cpu",
    )
    objective, optimizer = accelerator.prepare(objective, optimizer)
    average = EMAModel([p for p in objective.parameters() if p.requires_grad], decay=0.9)
    defaults = {"batch_size": 6, "max_grad_norm": 0.5, "random_flip": True, "max_shift": 1}
    data = data.to(torch.device(device))
    return DeviceStep(accelerator, objective, optimizer, average, data, record=record, **{**defaults, **options})


def rows(step):
    return np.random.default_rng(step).integers(0, 20, 6)


def plain_training(data, device="cpu"):
    """The same, written out with torch and diffusers alone."""
    objective = make_objective().to(device).train()
    data = data.to(torch.device(device))
    groups = parameter_groups(objective, SETTINGS["weight_decay"])
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=SETTINGS["betas"], eps=SETTINGS["epsilon"])
    parameters = [p for p in objective.parameters() if p.requires_grad]
    average = EMAModel(parameters, decay=0.9)
    for step, rate in enumerate(RATES):
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = torch.Generator(device).manual_seed(100 + step)
        chosen = torch.from_numpy(rows(step)).to(device)
        images = augment_images(
            data.images[chosen], RowNoise(generator, torch.device(device)), data.may_flip[chosen], 1
        )
        losses = objective(image_pyramid(images.float() / 127.5 - 1, [8, 16]), data.labels[chosen], generator)
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        average.step(parameters)
    return parameters, average.shadow_params


def run(step):
    for index, rate in enumerate(RATES):
        step(rows(index), 100 + index, rate)
    return step.parameters, step.average.shadow_params


def assert_equal_training(found, expected, **tolerance):
    for tensors, others in zip(found, expected):
        for tensor, other in zip(tensors, others, strict=True):
            torch.testing.assert_close(tensor, other, **tolerance)


def test_a_step_is_what_it_says(data):
    step = make_step(data)
    assert_equal_training(run(step), plain_training(data), rtol=1e-4, atol=1e-6)
    assert step.average.optimization_step == len(RATES)
    means = step.meter.means("train")
    assert means["train/denoising_2"] > 0 and step.skipped_steps == 0


def test_steps_repeat_bit_for_bit(data):
    assert_equal_training(run(make_step(data)), run(make_step(data)), rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_changes_nothing(data, optimizer):
    step = make_step(data, optimizer=optimizer)
    step(rows(0), 0, 1e-2)
    before = copy.deepcopy(step.parameters)
    state = copy.deepcopy(step.optimizer.state_dict()["state"])
    handle = step.objective.stages[1].proj_out.register_forward_hook(lambda module, args, out: out * float("inf"))
    step(rows(1), 1, 1e-2)
    handle.remove()
    assert step.skipped_steps == 1
    assert all(torch.equal(now, then) for now, then in zip(step.parameters, before))
    for key, tensors in step.optimizer.state_dict()["state"].items():
        assert all(torch.equal(tensor, state[key][name]) for name, tensor in tensors.items())
    step(rows(2), 2, 1e-2)
    assert step.skipped_steps == 1
    assert all(torch.isfinite(p).all() for p in step.parameters)
    assert not all(torch.equal(now, then) for now, then in zip(step.parameters, before))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_muon_is_recorded(data):
    step = make_step(data, "cuda", record=True, optimizer="muon")
    found = run(step)
    assert step.graph is not None
    assert_equal_training(found, run(make_step(data, "cuda", optimizer="muon")), rtol=1e-2, atol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recorded_step_trains_as_the_plain_one_and_waits_for_nothing(data):
    step = make_step(data, "cuda", record=True)
    found = run(step)
    assert step.graph is not None
    assert_equal_training(found, plain_training(data, "cuda"), rtol=1e-3, atol=1e-5)
    chosen = torch.from_numpy(rows(9)).pin_memory().numpy()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(chosen, 9, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_every_other_image_that_may_be_is_mirrored():
    images = torch.randint(0, 256, (1000, 3, 4, 4), dtype=torch.uint8)
    may_flip = torch.arange(1000) % 4 != 0
    augmented = augment_images(images, RowNoise(0, torch.device("cpu")), may_flip)
    same = (augmented == images).flatten(1).all(dim=1)
    mirrored = (augmented == images.flip(-1)).flatten(1).all(dim=1)
    assert (same ^ mirrored).all()
    assert same[~may_flip].all()
    assert abs(mirrored[may_flip].float().mean() - 0.5) < 0.06
    assert torch.equal(augment_images(images, RowNoise(0, torch.device("cpu")), may_flip), augmented)
    assert torch.equal(augment_images(images, RowNoise(0, torch.device("cpu"))), images)


def test_images_move_in_all_directions_and_repeat_their_borders():
    images = torch.randint(0, 256, (500, 3, 6, 5), dtype=torch.uint8)
    moved = augment_images(images, RowNoise(0, torch.device("cpu")), max_shift=2)
    padded = torch.nn.functional.pad(images.float(), (2, 2, 2, 2), mode="replicate").to(torch.uint8)
    found = set()
    for image, around in zip(moved, padded):
        matches = {
            (down, right)
            for down in range(5)
            for right in range(5)
            if torch.equal(image, around[:, down : down + 6, right : right + 5])
        }
        assert matches
        found |= matches
    assert len(found) == 25
