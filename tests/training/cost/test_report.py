import dataclasses
import json

import pytest

from diffusers_pisdm.training.cost.report import cost_report, format_cost_report
from diffusers_pisdm.training.cost.stage_cost import CostSettings, StageCost
from diffusers_pisdm.training.cost.stage_speed import StageSpeed


COST = StageCost(
    sample_size=32,
    num_layers=49,
    batch_size=16,
    parameters=1000,
    forward_flops=100,
    training_flops=300,
    weight_bytes=4 * 2**30,
    gradient_bytes=4 * 2**30,
    optimizer_bytes=8 * 2**30,
    ema_bytes=4 * 2**30,
    saved_bytes=10 * 2**30,
    working_bytes=2 * 2**30,
)
SPEED = StageSpeed(num_layers=2, batch_size=4, flops_per_second=1200.0, updates_per_second=500.0, seconds=3.0)


def test_report_adds_up():
    higher = dataclasses.replace(COST, batch_size=8, parameters=2000)
    settings = CostSettings(num_processes=2, gradient_accumulation_steps=3)
    report = json.loads(json.dumps(cost_report([COST, higher], settings, 16, 864, [SPEED, SPEED])))
    assert report["stages"][0]["seconds_per_step"] == 3 * 16 * 300 / 1200 + 1000 / 500
    assert report["stages"][1]["seconds_per_step"] == 3 * 8 * 300 / 1200 + 2000 / 500
    total = report["total"]
    assert total["parameters"] == 3000
    assert total["flops_per_step"] == 3 * (16 + 8) * 300
    assert total["total_bytes"] == 2 * (20 + 10 + 2) * 2**30
    assert total["images_per_step"] == 16 * 3 * 2
    assert total["seconds_per_step"] == 24
    assert total["images_per_second"] == 4
    assert total["days"] == pytest.approx(864 * 24 / 86400)


def test_the_table_says_what_is_measured():
    text = format_cost_report(cost_report([COST], CostSettings(), 16, 500_000, [SPEED]))
    line = next(line for line in text.splitlines() if line.lstrip().startswith("1 "))
    assert "2 layers, 4 im." in line
    assert "Memory: 32 GiB per process (mixed precision no, no gradient checkpointing)" in text
    assert "extrapolated" in text and "images/s" in text and "500,000 steps" in text
    whole = dataclasses.replace(SPEED, num_layers=49)
    assert "all layers, 4 im." in format_cost_report(cost_report([COST], CostSettings(), 16, 1, [whole]))


def test_the_table_says_why_there_is_no_time():
    text = format_cost_report(cost_report([COST, COST], CostSettings(), 16, 1, [SPEED, None]))
    assert "does not fit" in text and "Time: unknown" in text
    text = format_cost_report(cost_report([COST], CostSettings(), 16, 1))
    assert "does not fit" not in text and "Time: not measured." in text
