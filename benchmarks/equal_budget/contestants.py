"""The models compared at equal budget, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn as nn
from diffusers import DDPMScheduler

from benchmarks.peers import DiTPeer, UViT2DModel
from diffusers_pisdm import DiMTransformer2DModel, PISDMTransformer2DModel
from diffusers_pisdm.ops.conditioning_augmentation import residual_deviations
from diffusers_pisdm.schedulers import stage_noise_schedules
from diffusers_pisdm.training import CascadeObjective, image_pyramid
from diffusers_pisdm.training.cost.flops import StepTrace
from examples.ablation.rows import TABLES


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
    residual: bool = False  # whether higher stages diffuse what their condition lacks
    objective: dict = field(default_factory=dict)  # arguments of `CascadeObjective`

    def make_objective(self, num_classes: int, residual_scales: list[float] | None = None) -> CascadeObjective:
        """
        New stages, initialised from torch's global generator, and their loss.

        Args:
            num_classes (`int`): The number of classes.
            residual_scales (`list[float]`, *optional*):
                One per higher stage, from [`measure_residual_scales`]; 1 by default. They do not affect the cost.
        """
        stages, types = [dict(stage) for stage in self.stages], ["v_prediction"] * len(self.stages)
        if self.residual:
            scales = residual_scales or [1.0] * (len(stages) - 1)
            stages[1:] = [stage | {"residual_scale": scale} for stage, scale in zip(stages[1:], scales, strict=True)]
            types[1:] = ["sample"] * (len(stages) - 1)
        schedulers = stage_noise_schedules(DDPMScheduler(**NOISE_SCHEDULE), len(stages), prediction_types=types)
        weighting = ["min_snr" if kind == "sample" else "uniform" for kind in types]
        models = [self.stage_class(num_classes=num_classes, **stage) for stage in stages]
        return CascadeObjective(models, schedulers, **{"loss_weighting": weighting, **self.objective})


def measure_residual_scales(contestant: Contestant, images: torch.Tensor) -> list[float]:
    """The scales of a contestant's residuals, from images (N, 3, H, W) of type uint8."""
    sizes = [stage["sample_size"] for stage in contestant.stages]
    return residual_deviations(image_pyramid(images.float() / 127.5 - 1.0, sizes))


# 32 px in patches of 2, as in the paper: 256 tokens. A test keeps the parameters of a size equal within 5%.
_SHAPE = {"patch_size": 2, "in_channels": 3}


def _peers(
    dit: dict, uvit: dict, dim: dict, one_stage: dict, first_stage: dict, second_stage: dict
) -> dict[str, Contestant]:
    """PIS-DM and its peers, from each model's depth and width."""
    at_32 = {"sample_size": 32, **_SHAPE}
    cascade = [
        {"sample_size": 16, **first_stage, **_SHAPE},
        {"low_res_channels": 3, **second_stage, **at_32},
    ]
    return {
        "dit": Contestant("DiT", [{**dit, **at_32}], stage_class=DiTPeer),
        "uvit": Contestant("U-ViT", [{**uvit, **at_32}], stage_class=UViT2DModel),
        "dim": Contestant("DiM", [{**dim, **at_32}], stage_class=DiMTransformer2DModel),
        "pisdm": Contestant("PIS-DM, one stage", [{**one_stage, **at_32}]),
        "pisdm_cascade": Contestant("PIS-DM, cascade", cascade),
        "pisdm_residual": Contestant("PIS-DM, residual cascade", cascade, residual=True),
    }


def _ablation(table: int, hidden_size: int) -> dict[str, Contestant]:
    """The rows of a table of the paper."""
    shape = {"num_layers": 15, "hidden_size": hidden_size, **_SHAPE}
    complete = {
        "stages": [{"sample_size": 16, **shape}, {"sample_size": 32, "low_res_channels": 3, **shape}],
        "training": {},
    }
    recipes = [(row, row.recipe(complete)) for row in TABLES[table]]
    return {row.name: Contestant(row.label, recipe["stages"], objective=recipe["training"]) for row, recipe in recipes}


# The first of each is what the others are compared with.
CONTESTANTS = {
    "small": _peers(  # 0.8 million parameters, for a CPU
        dit={"num_layers": 4, "hidden_size": 100, "num_heads": 4},
        uvit={"num_layers": 7, "hidden_size": 92, "num_heads": 4},
        dim={"num_layers": 9, "hidden_size": 94},
        one_stage={"num_layers": 9, "hidden_size": 96},
        first_stage={"num_layers": 5, "hidden_size": 92},
        second_stage={"num_layers": 3, "hidden_size": 92},
    ),
    "large": _peers(  # 8 million, for a GPU
        dit={"num_layers": 7, "hidden_size": 248, "num_heads": 4},
        uvit={"num_layers": 9, "hidden_size": 260, "num_heads": 4},
        dim={"num_layers": 15, "hidden_size": 256},
        one_stage={"num_layers": 15, "hidden_size": 256},
        first_stage={"num_layers": 9, "hidden_size": 256},
        second_stage={"num_layers": 5, "hidden_size": 256},
    ),
    "table_1": _ablation(1, hidden_size=48),  # 0.7 million parameters
    "table_2": _ablation(2, hidden_size=48),
    "table_1_large": _ablation(1, hidden_size=160),  # 7 million
    "table_2_large": _ablation(2, hidden_size=160),
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
