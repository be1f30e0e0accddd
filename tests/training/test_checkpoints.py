import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffusers_pisdm.training.checkpoints import (
    STATE_FILE,
    CheckpointError,
    find_checkpoints,
    find_fault,
    load_average,
    read_state,
    save_average,
    save_checkpoint,
)
from tests.training.processes import sharded_average


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def save(accelerator, tmp_path):
    def save(step, state={}, write=write, total_limit=None):  # noqa: B006 - only read
        return save_checkpoint(accelerator, tmp_path, step, state, write, total_limit)

    return save


def write(folder):
    (folder / "weights").write_text("x")
    (folder / "shards").mkdir()
    (folder / "shards" / "1").write_text("abc")


def complete(folder):
    return [path.name for path in find_checkpoints(folder)[0]]


def test_checkpoints_are_found_by_step_and_hold_their_state(save, tmp_path):
    for step in (900, 1000, 80):
        save(step, {"note": "a"})
    assert complete(tmp_path) == ["checkpoint-80", "checkpoint-900", "checkpoint-1000"]
    state = read_state(tmp_path / "checkpoint-900")
    assert state == {"step": 900, "note": "a", "files": {"shards/1": 3, "weights": 1}}


def test_a_failed_write_names_the_reason_and_leaves_the_last_checkpoint(save, tmp_path):
    save(1)

    def fail(folder):
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(
        CheckpointError, match=r"checkpoint-2 could not be written .*No space left.*Earlier checkpoints"
    ):
        save(2, write=fail, total_limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    save(2, total_limit=1)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_an_unwritable_place_is_an_error(accelerator, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(CheckpointError, match="NotADirectoryError"):
        save_checkpoint(accelerator, tmp_path / "file", 1, {}, write)


def test_the_oldest_go_beyond_the_limit(save, tmp_path):
    for step in (1, 2, 3):
        save(step, total_limit=2)
    assert complete(tmp_path) == ["checkpoint-2", "checkpoint-3"]


def test_an_existing_checkpoint_is_replaced(save, tmp_path):
    save(1, {"run": 1})
    save(1, {"run": 2})
    assert read_state(tmp_path / "checkpoint-1")["run"] == 2


def truncate(folder):
    (folder / "shards" / "1").write_text("ab")


def remove(folder):
    (folder / "weights").unlink()


def forget(folder):
    (folder / STATE_FILE).unlink()


def damage(folder):
    (folder / STATE_FILE).write_text("{")


@pytest.mark.parametrize(
    ("harm", "fault"),
    [
        (truncate, "its file shards/1 has 2 bytes instead of 3"),
        (remove, "its file weights is missing"),
        (forget, "its trainer_state.json is missing or damaged"),
        (damage, "its trainer_state.json is missing or damaged"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_not_counted(save, tmp_path, harm, fault):
    save(1)
    second = save(2)
    assert find_fault(second) is None
    harm(second)
    assert complete(tmp_path) == ["checkpoint-1"]
    assert find_checkpoints(tmp_path)[1] == {second: fault}


def test_a_checkpoint_that_was_being_written_is_named(tmp_path):
    partial = tmp_path / "partial-checkpoint-7"
    partial.mkdir()
    assert find_checkpoints(tmp_path) == ([], {partial: "it was being written when the run ended"})


def test_other_folders_are_not_checkpoints(tmp_path):
    (tmp_path / "checkpoint-best").mkdir()
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / STATE_FILE).write_text(json.dumps({"step": 5, "files": {}}))
    assert complete(tmp_path) == ["checkpoint-5"]
    assert find_checkpoints(tmp_path / "nowhere") == ([], {})


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
