import pytest
import torch

from diffusers_pisdm.training.cost import stage_speed
from diffusers_pisdm.training.cost.stage_cost import CostSettings, estimate_stage_cost
from diffusers_pisdm.training.cost.stage_speed import measure_stage_speed
from diffusers_pisdm.training.optimization import Muon, make_optimizer
from tests.training.cost.cost_stages import HIGHER_STAGE, NUM_CLASSES, STAGE


def test_a_small_stage_is_run_whole():
    settings = CostSettings(gradient_checkpointing=True, mixed_precision="bf16")
    speed = measure_stage_speed(HIGHER_STAGE, NUM_CLASSES, 6, settings, "cpu", seconds=60)
    assert (speed.num_layers, speed.batch_size) == (6, 6)
    assert speed.flops_per_second > 0 and speed.updates_per_second > 0 and speed.seconds > 0


def test_without_time_two_layers_of_one_image_are_run():
    speed = measure_stage_speed(STAGE, NUM_CLASSES, 6, CostSettings(ema=False), "cpu", seconds=0)
    assert (speed.num_layers, speed.batch_size) == (2, 1)


@pytest.mark.parametrize("optimizer, kind", [("adamw", torch.optim.AdamW), ("muon", Muon)])
def test_the_runs_own_optimizer_is_timed(monkeypatch, optimizer, kind):
    made = []

    def make(*arguments):
        made.append(make_optimizer(*arguments))
        return made[-1]

    monkeypatch.setattr(stage_speed, "make_optimizer", make)
    measure_stage_speed(STAGE, NUM_CLASSES, 1, CostSettings(optimizer=optimizer), "cpu", seconds=0)
    assert [type(each) for each in made] == [kind]
    assert made[0].state and all(group["lr"] == 0 for group in made[0].param_groups)  # it stepped


def test_a_stage_that_does_not_fit_is_not_run(monkeypatch):
    monkeypatch.setattr(stage_speed, "free_memory", lambda device: 1000)
    assert measure_stage_speed(STAGE, NUM_CLASSES, 6, CostSettings(), "cpu") is None


def test_memory_limits_the_images_and_the_layers_that_are_run(monkeypatch):
    limit = estimate_stage_cost(STAGE | {"num_layers": 2}, NUM_CLASSES, 4, CostSettings()).total_bytes / 0.79
    monkeypatch.setattr(stage_speed, "free_memory", lambda device: limit)
    speed = measure_stage_speed(STAGE, NUM_CLASSES, 64, CostSettings(), "cpu", seconds=60)
    assert (speed.num_layers, speed.batch_size) == (2, 4)
