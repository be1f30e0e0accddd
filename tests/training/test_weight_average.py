import os
import subprocess
import sys
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel

from diffusers_pisdm.training.weight_average import load_average, save_average
from tests.training import sharded_average


def test_averages_are_saved_by_name_and_loaded(tmp_path):
    first, second = (torch.nn.Linear(3, 2) for _ in range(2))
    names, parameters = zip(*first.named_parameters())
    average = EMAModel(parameters)
    average.step(list(second.parameters()))
    save_average(average, names, tmp_path / "ema.safetensors")
    other = EMAModel(list(second.parameters()))
    load_average(other, names, tmp_path / "ema.safetensors", step=7)
    assert other.optimization_step == 7
    assert all(torch.equal(a, b) for a, b in zip(average.shadow_params, other.shadow_params))


def test_averages_of_sharded_weights_are_saved_whole(tmp_path):
    script = Path(sharded_average.__file__)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run([*launcher, str(script), str(tmp_path)], check=True, env=environment, timeout=280)
