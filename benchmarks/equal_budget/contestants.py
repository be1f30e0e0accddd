"""The models compared at equal budget, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn as nn
from diffusers import DDPMScheduler

from benchmarks.peers import DiTPeer
from diffusers_pisdm import DiMTransformer2DModel, PISDMTransformer2DModel
from diffusers_pisdm.training import CascadeObjective, image_pyramid
from diffusers_pisdm.training.cost.flops import StepTrace


# Velocity prediction on a cosine schedule, as for the published checkpoint.
NOISE_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "v_prediction",
    "clip_sample": False,
}


@dataclass(frozen=True)
class Contestant:
    """A model or a cascade of models, and its training objective."""

    label: str  # for tables and plots
    stages: list[dict]  # each stage's arguments, without `num_classes`; the last is at full resolution
    stage_class: type[nn.Module] = PISDMTransformer2DModel
    objective: dict = field(default_factory=dict)  # arguments of `CascadeObjective`

    def make_objective(self, num_classes: int) -> CascadeObjective:
        """New stages, initialised from torch's global generator, and their loss."""
        stages = [self.stage_class(num_classes=num_classes, **stage) for stage in self.stages]
        return CascadeObjective(stages, [DDPMScheduler(**NOISE_SCHEDULE)] * len(stages), **self.objective)


# 32 px in patches of 2, as in the paper: 256 tokens. A test keeps the parameters equal within 5%.
_SHAPE = {"patch_size": 2, "in_channels": 3}
CONTESTANTS = {
    "dit": Contestant(
        "DiT",
        [{"sample_size": 32, "num_layers": 4, "hidden_size": 100, "num_heads": 4, **_SHAPE}],
        stage_class=DiTPeer,
    ),
    "dim": Contestant(
        "DiM",
        [{"sample_size": 32, "num_layers": 9, "hidden_size": 94, **_SHAPE}],
        stage_class=DiMTransformer2DModel,
    ),
    "pisdm": Contestant("PIS-DM, one stage", [{"sample_size": 32, "num_layers": 9, "hidden_size": 96, **_SHAPE}]),
    "pisdm_cascade": Contestant(
        "PIS-DM, cascade",
        [
            {"sample_size": 16, "num_layers": 5, "hidden_size": 92, **_SHAPE},
            {"sample_size": 32, "num_layers": 3, "hidden_size": 92, "low_res_channels": 3, **_SHAPE},
        ],
        objective={"sil_weight": 0.1, "sil_per_value": False},
    ),
}


@dataclass(frozen=True)
class Budget:
    """A contestant's size and cost."""

    parameters: int  # of all stages, without the scale-invariant loss's training-only heads
    training_flops: int  # of forward and backward per image, including those heads

    def steps(self, training_tflop: float, batch_size: int) -> int:
        """Whole steps of `batch_size` images that `training_tflop` (10^12 operations) pay for."""
        return int(training_tflop * 1e12 / (self.training_flops * batch_size))


def measure_budget(contestant: Contestant, num_classes: int, batch_size: int = 8) -> Budget:
    """Counts the operators of one training step; `batch_size` must suit the stages' batch shares."""
    with torch.random.fork_rng():
        objective = contestant.make_objective(num_classes).train()
    sizes = [stage.config.sample_size for stage in objective.stages]
    images = torch.zeros(batch_size, 3, sizes[-1], sizes[-1])
    pyramid, labels = image_pyramid(images, sizes), torch.zeros(batch_size, dtype=torch.long)
    with StepTrace() as trace:
        objective(pyramid, labels, seed=0).total.backward()
    parameters = sum(parameter.numel() for parameter in objective.stages.parameters())
    return Budget(parameters, trace.flops // batch_size)
