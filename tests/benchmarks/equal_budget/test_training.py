import pytest
import torch

from benchmarks.equal_budget.contestants import Contestant
from benchmarks.equal_budget.training import LabelledImages, TrainingSettings, make_trainer, measure_step_seconds
from diffusers_pisdm.training.device_trainer import DeviceTrainer
from diffusers_pisdm.training.metrics import read_metrics


STAGE = {"patch_size": 2, "in_channels": 3, "num_layers": 2, "hidden_size": 16, "state_size": 4}
CASCADE = Contestant("tiny", [{"sample_size": 4, **STAGE}, {"sample_size": 8, "low_res_channels": 3, **STAGE}])
SETTINGS = TrainingSettings(batch_size=4, lr_warmup_steps=2)


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 3, 8, 8), dtype=torch.uint8, generator=generator)
    return LabelledImages(images, torch.arange(20) % 3, ["a", "b", "c"])


@pytest.fixture
def train(data, tmp_path):
    """Trains and returns the averaged weights at each point, by step."""

    def train(name, points, seed=0):
        found = {}

        def keep(trainer):
            found[trainer.state.step] = {k: v.clone() for k, v in trainer.objective.stages.state_dict().items()}

        trainer = make_trainer(CASCADE, data, points, seed, tmp_path / name, SETTINGS, keep)
        trainer.resume()
        trainer.train()
        return found

    return train


class Killed(Exception):
    pass


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_killed_run_ends_with_the_same_weights(train, tmp_path, monkeypatch):
    whole = train("whole", [3, 8])
    assert list(whole) == [3, 8]

    train_step, is_due = DeviceTrainer.train_step, DeviceTrainer.is_due

    def kill(self):
        if self.state.step == 6:  # two steps after a checkpoint
            raise Killed
        train_step(self)

    with monkeypatch.context() as patch:
        patch.setattr(DeviceTrainer, "train_step", kill)
        patch.setattr(
            DeviceTrainer,
            "is_due",
            lambda self, what: self.state.step == 4 if what == "checkpointing" else is_due(self, what),
        )
        with pytest.raises(Killed):
            train("killed", [3, 8])
    assert_equal(train("killed", [3, 8])[8], whole[8])
    logged = [read_metrics(tmp_path / run / "metrics.jsonl")[-1] for run in ("whole", "killed")]
    assert [row["step"] for row in logged] == [8, 8]
    assert train("killed", [3, 8]) == {}  # finished: nothing is trained


def test_a_point_is_what_a_shorter_run_ends_with(train):
    assert_equal(train("long", [3, 8])[3], train("short", [3])[3])
    other = train("other", [3], seed=1)[3]
    assert not torch.equal(other["0.proj_out.weight"], train("again", [3])[3]["0.proj_out.weight"])


def test_steps_are_timed_without_a_trace(data, tmp_path):
    seconds = measure_step_seconds([CASCADE, CASCADE], data, tmp_path / "none", SETTINGS, turns=1)
    assert len(seconds) == 2 and min(seconds) > 0
    assert not (tmp_path / "none").exists()
