import pytest
import torch

from diffusers_pisdm.training import CascadeLosses, LossMeter
from tests.training.test_cascade_objective import make_objective


def losses(first, second, timesteps, pairs, higher=None):
    return CascadeLosses(
        total=torch.zeros(()),
        denoising=[torch.tensor(first), torch.tensor(second)],
        scale_invariant=torch.tensor(pairs),
        timesteps=torch.stack([torch.tensor(timesteps), torch.tensor(timesteps if higher is None else higher)]),
    )


@pytest.fixture
def meter():
    return LossMeter(make_objective(sizes=(4, 8)))


def test_means_are_over_images_by_stage_and_noise_level(meter):
    meter.add(losses([1.0, 2.0, 3.0, 6.0], [10.0, 20.0], [0, 249, 250, 999], [4.0]))
    meter.add(losses([4.0, 4.0], [40.0], [100, 600], [1.0]))
    assert meter.means("train") == pytest.approx(
        {
            "train/denoising_1": 20 / 6,
            "train/denoising_1_t0-249": 7 / 3,
            "train/denoising_1_t250-499": 3.0,
            "train/denoising_1_t500-749": 4.0,
            "train/denoising_1_t750-999": 6.0,
            "train/denoising_2": 70 / 3,
            "train/denoising_2_t0-249": 70 / 3,
            "train/scale_invariant_1_2": 3.0,
        }
    )


def test_each_stage_has_its_own_noise_levels(meter):
    meter.add(losses([1.0, 2.0], [3.0, 4.0], [0, 999], [5.0], higher=[300, 600]))
    found = meter.means("a")
    assert (found["a/denoising_1_t0-249"], found["a/denoising_1_t750-999"]) == (1.0, 2.0)
    assert (found["a/denoising_2_t250-499"], found["a/denoising_2_t500-749"]) == (3.0, 4.0)


def test_half_precision_is_summed_in_single_on_the_losses_device():
    """And all means are numbers, whatever the default device; a batch counts once."""
    halves = losses([256.0, 1.0, 1.0], [2.0], [0, 1, 2], [1.0078125])
    halves = halves._replace(
        denoising=[errors.bfloat16() for errors in halves.denoising], scale_invariant=halves.scale_invariant.bfloat16()
    )
    wholes = losses([4.0], [4.0], [0], [258.0])
    objective = make_objective(sizes=(4, 8))
    with torch.device("meta"):  # the default, which must not matter
        meter = LossMeter(objective)
        meter.add(halves)
        meter.add(wholes, torch.ones((), dtype=torch.bool, device="cpu"))
        means = meter.means("train")
    assert means == pytest.approx(
        {
            "train/denoising_1": 262 / 4,
            "train/denoising_1_t0-249": 262 / 4,
            "train/denoising_2": 3.0,
            "train/denoising_2_t0-249": 3.0,
            "train/scale_invariant_1_2": (3 * 1.0078125 + 258) / 4,
        }
    )
    assert {type(value) for value in means.values()} == {float}


def test_a_single_stage_has_a_meter_too():
    meter = LossMeter(make_objective(sizes=(16,)))
    meter.add(CascadeLosses(torch.zeros(()), [torch.tensor([3.0])], torch.zeros(0), torch.tensor([[999]])))
    assert meter.means("a") == {"a/denoising_1": 3.0, "a/denoising_1_t750-999": 3.0}


def test_reset_forgets_and_what_does_not_count_is_ignored(meter):
    meter.add(losses([9.0], [9.0], [5], [9.0]))
    meter.reset()
    meter.add(losses([1.0], [2.0], [5], [3.0]))
    meter.add(losses([9.0], [float("nan")], [700], [9.0]), torch.tensor(False))
    means = meter.means("validation")
    assert means["validation/denoising_2"] == 2.0 and means["validation/scale_invariant_1_2"] == 3.0
    assert not any("t500" in name for name in means)


def test_a_reduction_over_processes_weighs_by_images(meter):
    meter.add(losses([1.0], [1.0], [5], [1.0]))
    other = LossMeter(make_objective(sizes=(4, 8)))
    other.add(losses([4.0, 4.0], [4.0], [5, 6], [4.0]))
    for _ in range(2):  # the reduction may work in place
        means = meter.means("train", reduce=lambda tensor: tensor.add_(other.totals))
        assert means["train/denoising_1"] == 3.0 and means["train/denoising_2"] == 2.5


def test_only_trained_stages_are_named():
    meter = LossMeter(make_objective(train_stages=[2]))
    meter.add(CascadeLosses(torch.zeros(()), [torch.tensor([1.0])], torch.tensor([2.0]), torch.tensor([[0]])))
    assert sorted(meter.means("train")) == [
        "train/denoising_2",
        "train/denoising_2_t0-249",
        "train/scale_invariant_1_2",
    ]


def test_without_losses_there_are_no_means(meter):
    assert meter.means("train") == {}
