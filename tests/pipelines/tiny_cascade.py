"""Cascades small enough for a test: real models with random weights, a few thousand parameters each."""

from __future__ import annotations

import torch
from diffusers import DPMSolverMultistepScheduler, SchedulerMixin

from diffusers_pisdm import PISDMCascadePipeline, PISDMTransformer2DModel


NUM_CLASSES = 10


def make_transformer(stage: int, in_channels: int = 3, **config) -> PISDMTransformer2DModel:
    """A transformer of 8 pixels in the first stage, twice as many in each next one."""
    torch.manual_seed(stage)
    low_res_channels = in_channels if stage > 1 else None
    model = PISDMTransformer2DModel(
        **{
            "sample_size": 4 * 2**stage,
            "in_channels": in_channels,
            "num_layers": 2,
            "hidden_size": 16,
            "state_size": 4,
            "num_classes": NUM_CLASSES,
            "low_res_channels": low_res_channels,
            **config,
        }
    )
    for parameter in (model.proj_out.weight, model.modulation.weight, model.modulation_out.weight):
        torch.nn.init.normal_(parameter, std=0.2)  # they start at zero, where no input has an effect
    torch.nn.init.normal_(model.class_embedding.weight)
    return model.eval()


def make_scheduler() -> DPMSolverMultistepScheduler:
    return DPMSolverMultistepScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def make_cascade(
    num_stages: int = 2, scheduler: SchedulerMixin | None = None, in_channels: int = 3, **arguments
) -> PISDMCascadePipeline:
    """A pipeline of `num_stages` stages with silent progress bars; other arguments are the constructor's."""
    names = ["transformer", *(f"transformer_{stage}" for stage in range(2, num_stages + 1))]
    transformers = {name: make_transformer(i + 1, in_channels) for i, name in enumerate(names)}
    pipe = PISDMCascadePipeline(**{**transformers, "scheduler": scheduler or make_scheduler(), **arguments})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]
