"""One step of the objective in each of two processes; the first writes losses and averaged gradients to a file."""

import os

import torch
import torch.distributed as dist
from diffusers import DDPMScheduler
from safetensors.torch import save_file

from diffusers_pisdm.training import CascadeObjective, image_pyramid
from tests.training.test_cascade_objective import make_stages


BATCH_SIZE = 8


def run(process_index: int, num_processes: int) -> dict[str, torch.Tensor]:
    objective = CascadeObjective(
        make_stages(sizes=(4, 8)),
        [DDPMScheduler()] * 2,
        batch_shares=[1.0, 0.5],
        sil_mask_same_class=True,
        process_index=process_index,
        num_processes=num_processes,
    )
    pyramid = image_pyramid(torch.rand(BATCH_SIZE, 3, 8, 8) * 2 - 1, [4, 8])
    labels = torch.arange(BATCH_SIZE) % 3
    rows = slice(process_index, None, num_processes)
    losses = objective([level[rows] for level in pyramid], labels[rows], seed=7)
    losses.total.backward()
    results = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    denoising = torch.stack([errors.mean() for errors in losses.denoising])
    return results | {"denoising": denoising, "scale_invariant": losses.scale_invariant}


def main(arguments: list[str]) -> None:
    """arguments: the file."""
    dist.init_process_group("gloo")
    results = run(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    for tensor in results.values():
        dist.all_reduce(tensor)
        tensor /= dist.get_world_size()
    if dist.get_rank() == 0:
        save_file(results, arguments[0])
    dist.destroy_process_group()
