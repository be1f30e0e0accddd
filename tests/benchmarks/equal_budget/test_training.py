import numpy as np
import pytest
import torch

from benchmarks.equal_budget.contestants import Contestant
from benchmarks.equal_budget.training import LabelledImages, TrainingSettings, batch_rows, train_contestant
from diffusers_pisdm.training.checkpoints import find_checkpoints
from diffusers_pisdm.training.metrics import read_metrics
from diffusers_pisdm.training.trainer import Trainer


STAGE = {"patch_size": 2, "in_channels": 3, "num_layers": 2, "hidden_size": 16, "state_size": 4}
CASCADE = Contestant(
    "tiny",
    [{"sample_size": 4, **STAGE}, {"sample_size": 8, "low_res_channels": 3, **STAGE}],
    objective={"sil_weight": 0.1},
)
SETTINGS = TrainingSettings(batch_size=4, logging_steps=2, checkpointing_steps=4)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return LabelledImages(images, torch.arange(20) % 3, ["a", "b", "c"])


class Killed(Exception):
    pass


def test_a_killed_run_ends_with_the_same_weights(data, tmp_path, monkeypatch):
    whole = train_contestant(CASCADE, data, 8, 0, tmp_path / "whole", SETTINGS)

    train_step = Trainer.train_step

    def kill(self):
        if self.state.step == 6:  # two steps after a checkpoint
            raise Killed
        train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", kill)
        with pytest.raises(Killed):
            train_contestant(CASCADE, data, 8, 0, tmp_path / "killed", SETTINGS)
    resumed = train_contestant(CASCADE, data, 8, 0, tmp_path / "killed", SETTINGS)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    logged = [read_metrics(tmp_path / run / "metrics.jsonl") for run in ("whole", "killed")]
    losses = [
        [{k: v for k, v in row.items() if k == "step" or k.startswith("train/")} for row in rows] for rows in logged
    ]
    assert losses[0] == losses[1] and [row["step"] for row in losses[0]] == [2, 4, 6, 8]
    again = train_contestant(CASCADE, data, 8, 0, tmp_path / "killed", SETTINGS)  # finished: nothing is trained
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values()))
    assert len(find_checkpoints(tmp_path / "killed")[0]) == 1


def test_another_seed_gives_other_weights_and_the_average_is_what_comes_back(data, tmp_path):
    first = train_contestant(CASCADE, data, 3, 0, tmp_path / "first", SETTINGS)
    second = train_contestant(CASCADE, data, 3, 1, tmp_path / "second", SETTINGS)
    assert not first.training
    name = "stages.0.proj_out.weight"
    assert not torch.equal(first.state_dict()[name], second.state_dict()[name])


def test_an_epoch_goes_through_every_image_once():
    first, second = (
        np.concatenate([batch_rows(step, 20, 4, seed=0) for step in steps]) for steps in (range(5), range(5, 10))
    )
    assert sorted(first) == sorted(second) == list(range(20))
    assert first.tolist() != second.tolist()
