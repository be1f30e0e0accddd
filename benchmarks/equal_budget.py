"""How many steps each contestant may train so that all spend the same arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.contestants import Contestant
from diffusers_pisdm.training import image_pyramid
from diffusers_pisdm.training.cost.flops import StepTrace


@dataclass(frozen=True)
class Budget:
    """
    What a contestant has and spends.

    Args:
        parameters (`int`): Of all stages; heads of the scale-invariant loss, which only training has, not among them.
        training_flops (`int`): Floating point operations of forward and backward, an image, these heads included.
    """

    parameters: int
    training_flops: int

    def steps(self, training_tflop: float, batch_size: int) -> int:
        """Whole steps of `batch_size` images that `training_tflop` (10^12 operations) pay for."""
        return int(training_tflop * 1e12 / (self.training_flops * batch_size))


def measure_budget(contestant: Contestant, num_classes: int, batch_size: int = 8) -> Budget:
    """
    Counts the operators of one training step.

    Args:
        contestant ([`Contestant`]): Whose.
        num_classes (`int`): Classes of the data.
        batch_size (`int`, defaults to 8): A multiple of what the stages' batch shares need.

    Returns:
        [`Budget`].
    """
    with torch.random.fork_rng():
        objective = contestant.make_objective(num_classes).train()
    sizes = [stage.config.sample_size for stage in objective.stages]
    images = torch.zeros(batch_size, 3, sizes[-1], sizes[-1])
    pyramid, labels = image_pyramid(images, sizes), torch.zeros(batch_size, dtype=torch.long)
    with StepTrace() as trace:
        objective(pyramid, labels, seed=0).total.backward()
    parameters = sum(parameter.numel() for parameter in objective.stages.parameters())
    return Budget(parameters, trace.flops // batch_size)
