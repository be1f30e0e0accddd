"""Averages of sharded weights (FSDP2), in two processes on the CPU."""

from pathlib import Path

import torch
import torch.distributed as dist
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from diffusers_pisdm import PISDMTransformer2DModel
from diffusers_pisdm.training.checkpoints import load_average, save_average


def main(arguments: list[str]) -> None:
    """arguments: a folder for the averages."""
    folder = Path(arguments[0])
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = PISDMTransformer2DModel(4, 2, 3, num_layers=3, hidden_size=16, state_size=4, num_classes=4)
    whole = {name: p.detach().clone() for name, p in model.named_parameters()}
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.transformer_blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    names, parameters = zip(*model.named_parameters())
    assert all(isinstance(p, DTensor) for p in parameters)

    average = EMAModel(parameters, decay=0.5)
    with torch.no_grad():
        for p in parameters:
            p.mul_(3)
    average.optimization_step = 100  # past the rise of the decay
    average.step(parameters)  # 0.5 * 1 + 0.5 * 3
    file = folder / "ema.safetensors"
    save_average(average, names, file, dist.get_rank() == 0)
    dist.barrier()
    saved = load_file(file)
    for name, tensor in whole.items():
        torch.testing.assert_close(saved[name], 2 * tensor)

    other = EMAModel(parameters, decay=0.5)
    load_average(other, names, file, step=101)
    assert other.optimization_step == 101
    for mine, theirs in zip(other.shadow_params, average.shadow_params):
        assert isinstance(mine, DTensor) and torch.equal(mine.full_tensor(), theirs.full_tensor())
    other.copy_to(parameters)
    x = torch.randn(2, 3, 4, 4)
    model(x, torch.tensor([1, 2]), torch.tensor([0, 1]))  # the averages can be sampled with
    dist.destroy_process_group()
