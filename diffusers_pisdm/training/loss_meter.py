"""Mean losses over many steps: by stage, by pair of stages, and by noise level."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .cascade_objective import CascadeLosses, CascadeObjective


NOISE_LEVELS = 4  # equal ranges of timesteps


class LossMeter:
    """
    Sums losses on their device, without waiting for it, until their means are requested.

    Args:
        objective ([`CascadeObjective`]): The objective whose losses to sum.
    """

    def __init__(self, objective: CascadeObjective):
        self.device = next(objective.parameters()).device
        self.num_timesteps = objective.schedulers[0].config.num_train_timesteps
        self.names = []
        for index in objective.stages_trained:
            self.names += [self._level_name(index + 1, level) for level in range(NOISE_LEVELS)]
        if objective.scale_invariant_loss is not None:
            self.names += [f"scale_invariant_{s}_{s + 1}" for s in objective.scale_invariant_loss.stages]
        self.stages = [index + 1 for index in objective.stages_trained]
        self.totals = torch.zeros(2, len(self.names), device=self.device)  # sums and counts

    def _level_name(self, stage: int, level: int) -> str:
        edges = [self.num_timesteps * i // NOISE_LEVELS for i in (level, level + 1)]
        return f"denoising_{stage}_t{edges[0]}-{edges[1] - 1}"

    def reset(self) -> None:
        """Resets all sums and counts."""
        self.totals.zero_()

    def add(self, losses: CascadeLosses, counted: torch.Tensor | None = None) -> None:
        """Adds a batch's losses, unless `counted`, a bool scalar on the device, is false."""
        sums, counts = [], []
        for errors, timesteps in zip(losses.denoising, losses.timesteps, strict=True):
            level = timesteps[: len(errors)] * NOISE_LEVELS // self.num_timesteps  # (B_s,)
            sums.append(torch.zeros(NOISE_LEVELS, device=errors.device).index_add(0, level, errors.float()))
            # bincount would wait for the device.
            counts.append(torch.zeros_like(sums[-1]).index_add(0, level, torch.ones_like(errors, dtype=torch.float32)))
        batch_size = losses.timesteps.shape[1]
        sums.append(losses.scale_invariant.float() * batch_size)
        counts.append(torch.full_like(sums[-1], batch_size))
        totals = torch.stack([torch.cat(sums), torch.cat(counts)])
        # In place: a recorded CUDA graph adds to these tensors.
        self.totals += totals if counted is None else torch.where(counted, totals, 0.0)

    def means(
        self, prefix: str, reduce: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor
    ) -> dict[str, float]:
        """
        The means since the last `reset`.

        Args:
            prefix (`str`): Put before every name, with a slash.
            reduce (`Callable`, *optional*): Sums a tensor over all processes.

        Returns:
            `dict[str, float]`: `denoising_S` for every trained stage, `denoising_S_tA-B` for its timesteps from A to
            B, `scale_invariant_S_S+1` for every compared pair; those without any losses are omitted.
        """
        sums, counts = reduce(self.totals.clone()).cpu().double()
        values = {}
        for position, stage in enumerate(self.stages):
            levels = slice(position * NOISE_LEVELS, (position + 1) * NOISE_LEVELS)
            if counts[levels].sum() > 0:
                values[f"{prefix}/denoising_{stage}"] = (sums[levels].sum() / counts[levels].sum()).item()
        for name, total, count in zip(self.names, sums.tolist(), counts.tolist()):
            if count > 0:
                values[f"{prefix}/{name}"] = total / count
        return values
