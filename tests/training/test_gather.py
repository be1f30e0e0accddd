import os
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file

from diffusers_pisdm.training.gather import gather_rows
from tests.training import objective_in_processes


def test_alone_nothing_is_gathered():
    rows = torch.randn(3, 2, requires_grad=True)
    assert gather_rows(rows) is rows


def test_two_processes_give_the_losses_and_gradients_of_one(tmp_path):
    """Noise, batch shares and the scale-invariant loss with its negatives from the other process."""
    script = Path(objective_in_processes.__file__)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launcher, str(script), str(tmp_path / "two.safetensors")], check=True, env=environment, timeout=200
    )
    two, one = load_file(tmp_path / "two.safetensors"), objective_in_processes.run(0, 1)
    assert two.keys() == one.keys()
    for name, expected in one.items():
        torch.testing.assert_close(
            two[name], expected, rtol=1e-4, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
        )
