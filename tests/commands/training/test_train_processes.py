"""Several processes, started with the configurations that are shipped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.commands import train as train_command
from diffusers_pisdm.training.checkpoints import find_checkpoints, find_fault, read_state
from diffusers_pisdm.training.metrics import read_metrics
from tests.commands.training.tiny_training import weights
from tests.support.processes import run_ranks


ROOT = Path(__file__).parents[3]
CONFIGURATIONS = sorted((ROOT / "examples" / "accelerate").glob("*.yaml"))


@pytest.fixture
def launch_command(command):
    def launch_command(configuration, *arguments, options=(), **environment):
        return {
            "args": [
                *(sys.executable, "-m", "accelerate.commands.launch"),
                *("--config_file", str(ROOT / "examples" / "accelerate" / configuration), *options),
                *("-m", "diffusers_pisdm.commands.train", *command(*arguments)),
            ],
            "env": {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        }

    return launch_command


@pytest.fixture
def launch(launch_command):
    def launch(*arguments, **options):
        subprocess.run(**launch_command(*arguments, **options), check=True, timeout=280)

    return launch


def losses(folder):
    names = ("train/denoising_1", "train/denoising_2", "train/scale_invariant_1_2")
    return [[row[name] for name in names] for row in read_metrics(folder / "metrics.jsonl") if names[0] in row]


def test_two_processes_with_half_the_batch_train_like_one_and_resume(train, command, tmp_path):
    options = ["--batch_shares", "1", "0.5", "--logging_steps", "1", "--random_flip"]
    one = train("one", 8, *options)
    half = [*options, "--train_batch_size", "4"]
    for steps in (4, 8):
        run_ranks(train_command.main, command("two", steps, *half))
    two = tmp_path / "two"
    torch.testing.assert_close(torch.tensor(losses(two)), torch.tensor(losses(one)), rtol=1e-4, atol=1e-5)
    expected, actual = weights(one / "checkpoint-8"), weights(two / "checkpoint-8")
    for name, tensor in expected.items():
        torch.testing.assert_close(
            actual[name], tensor, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}"
        )
    state = json.loads((two / "checkpoint-8" / "trainer_state.json").read_text())
    assert len(state["processes"]) == 2 and len(list((two / "checkpoint-8").glob("random_states_*"))) == 2
    train("two", 10, *options)  # one process goes on with the whole batch
    expected = weights(train("one", 10, *options) / "checkpoint-10")
    for name, tensor in weights(two / "checkpoint-10").items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-3, atol=2e-5)


def test_a_signal_stops_two_processes_after_the_same_step_with_a_checkpoint(launch_command, train, tmp_path):
    arguments = ["--checkpointing_steps", "0", "--train_batch_size", "4", "--logging_steps", "1"]
    process = subprocess.Popen(**launch_command("cpu.yaml", "run", 400, *arguments), start_new_session=True)
    output, end = tmp_path / "run", time.monotonic() + 200
    while not read_metrics(output / "metrics.jsonl"):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C in a terminal: to the launcher and to both processes
    assert process.wait(timeout=100) != 0
    ((checkpoint,), _) = find_checkpoints(output)
    step = read_state(checkpoint)["step"]
    assert 0 < step < 400 and find_fault(checkpoint) is None
    rows = read_metrics(train("run", step + 1, *arguments[:2]) / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/denoising_1" in row] == [*range(1, step + 1), step + 1]


def test_deepspeed_trains_and_resumes(launch, tmp_path):
    pytest.importorskip("deepspeed")
    # On a CPU, accelerate takes DeepSpeed's processes for one.
    options = ["--num_processes", "1", "--mixed_precision", "no"]
    for steps in (4, 8):
        launch("deepspeed_zero2.yaml", "run", steps, options=options, DS_ACCELERATOR="cpu")
    pipe = PISDMCascadePipeline.from_pretrained(tmp_path / "run")
    average = load_file(tmp_path / "run" / "checkpoint-8" / "ema.safetensors")
    assert not (tmp_path / "run" / "checkpoint-8" / "optimizer.bin").exists()  # DeepSpeed keeps its own
    for name, tensor in pipe.transformer.state_dict().items():
        assert torch.equal(tensor, average[f"0.{name}"])


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda file: file.name)
def test_configurations_are_ones_that_accelerate_reads(file):
    from accelerate.commands.config import load_config_from_file

    assert load_config_from_file(str(file)).num_processes == 2
