import json
import re

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.training.checkpoints import CheckpointError
from diffusers_pisdm.training.device_trainer import DeviceStep, DeviceTrainer
from examples import train_on_device
from examples.train_on_device import parse_args
from tests.commands.training.tiny_training import STAGE, weights


CASCADE = {
    "scheduler": {"prediction_type": "v_prediction", "beta_schedule": "squaredcos_cap_v2", "clip_sample": False},
    "stages": [
        {"sample_size": 4, **STAGE},
        {"sample_size": 8, "low_res_channels": 3, "residual_scale": 0.3, "pixel_head_channels": 4, **STAGE},
    ],
    "training": {
        "prediction_types": ["v_prediction", "sample"],
        "loss_weighting": ["uniform", "min_snr"],
        "train_batch_size": [8, 6],
        "learning_rate": [2e-3, 1e-3],
        "lr_warmup_steps": 2,
        "logging_steps": 2,
        "validation_classes": 2,
        "validation_inference_steps": 2,
        "random_flip": True,
        "random_shift": 1,
        "class_name_factors": "-",
    },
}


@pytest.fixture
def recipe(tmp_path):
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(CASCADE))
    return file


@pytest.fixture
def train(tmp_path, recipe, real_image_dir):
    data = tmp_path / "images"
    for name in ("animal-mammal", "person-role"):  # names of two parts
        (data / name).mkdir(parents=True)
        for file in (real_image_dir / name).iterdir():
            (data / name / file.name).write_bytes(file.read_bytes())

    def run(name, *more):
        AcceleratorState._reset_state(reset_partial_state=True)  # each run is a process of its own, as it were
        arguments = ["--cascade_config", str(recipe), "--train_data_dir", str(data)]
        train_on_device.main([*arguments, "--output_dir", str(tmp_path / name), *more])
        return tmp_path / name

    return run


def test_a_run_trains_stage_by_stage_and_leaves_a_pipeline(train):
    output = train("run", "--max_train_steps", "4", "6", "--validation_split", "train")
    pipe = PISDMCascadePipeline.from_pretrained(output)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert pipe.scheduler_2.config.prediction_type == "sample"
    assert pipe.transformer.config.class_factors == [[0, 0], [1, 1]]
    image = pipe("person-role", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (8, 8)
    for number, steps in ((1, 4), (2, 6)):
        folder = output / f"stage_{number}"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows if f"train/denoising_{number}" in row] == list(range(2, steps + 1, 2))
        assert rows[-1][f"validation/denoising_{number}"] > 0
        assert (output / "samples" / f"stage_{number}" / f"step-{steps:07d}.png").exists()
        average = load_file(folder / f"checkpoint-{steps}" / "ema.safetensors")
        name = "transformer" if number == 1 else "transformer_2"
        for key, tensor in load_file(output / name / "diffusion_pytorch_model.safetensors").items():
            assert torch.equal(tensor, average[f"{number - 1}.{key}"])


def test_a_killed_run_resumes_to_the_same_bits(train, monkeypatch):
    arguments = ["--max_train_steps", "6", "--checkpointing_minutes", "0", "--train_stages", "2", "1"]
    arguments += ["--optimizer", "muon"]
    through = train("through", *arguments)

    class Killed(BaseException):
        pass

    calls, step = [], DeviceStep.__call__

    def stop(self, *args):
        calls.append(1)
        if len(calls) == 9:  # in the second stage's run, the third step
            raise Killed
        return step(self, *args)

    monkeypatch.setattr(DeviceStep, "__call__", stop)
    with pytest.raises(Killed):
        train("twice", *arguments)
    monkeypatch.setattr(DeviceStep, "__call__", step)
    twice = train("twice", *arguments)
    for stage in ("stage_1", "stage_2"):
        expected, found = (weights(run / stage / "checkpoint-6") for run in (through, twice))
        assert expected.keys() == found.keys()
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_minutes_become_steps(train):
    output = train("run", "--minutes", "0.1", "--train_stages", "1")
    rows = [json.loads(line) for line in (output / "stage_1" / "metrics.jsonl").read_text().splitlines()]
    cooldown = max(1, round(0.3 * rows[-1]["step"]))  # the rate falls to the end of the time, wherever that is
    assert rows[-1]["learning_rate"] == pytest.approx(2e-3 / cooldown)
    assert 3 < rows[-1]["seconds"] < 30


def test_a_run_can_start_from_a_pipelines_weights(train, monkeypatch):
    first = train("first", "--max_train_steps", "2")
    second = train(
        "second", "--max_train_steps", "1", "--learning_rate", "0", "--pretrained_model_name_or_path", str(first)
    )
    for name in ("transformer", "transformer_2"):
        before, after = (load_file(run / name / "diffusion_pytorch_model.safetensors") for run in (first, second))
        for key, tensor in before.items():
            torch.testing.assert_close(after[key], tensor)


def test_a_rehearsal_is_not_taken_for_the_run(train, capsys):
    train("run", "--minutes", "1", "--rehearse", "--train_stages", "1")
    with pytest.raises(CheckpointError, match=r"minutes was 0\.1, is 1\.0; .*--output_dir"):
        train("run", "--minutes", "1", "--train_stages", "1")
    train("run", "--minutes", "1", "--rehearse", "--train_stages", "1")
    assert "stage 1: already complete" in capsys.readouterr().out


def test_the_command_line_overrides_the_recipes_time(recipe):
    content = json.loads(recipe.read_text())
    recipe.write_text(json.dumps({**content, "training": {**content["training"], "minutes": [2, 3]}}))
    arguments = ["--cascade_config", str(recipe), "--train_data_dir", "d", "--output_dir", "o"]
    args, _ = parse_args(arguments)
    assert (args.minutes, args.max_train_steps) == ([2.0, 3.0], None)
    args, _ = parse_args([*arguments, "--max_train_steps", "7"])
    assert (args.minutes, args.max_train_steps) == (None, [7, 7])


def test_a_recipe_that_asks_the_pretrained_stages_for_something_else_is_refused(train):
    first = train("first", "--max_train_steps", "1")
    arguments = ["--max_train_steps", "1", "--pretrained_model_name_or_path", str(first)]
    with pytest.raises(ValueError, match=r"Stage 2 .* predicts 'sample', but the recipe asks for 'v_prediction'"):
        train("other", *arguments, "--prediction_types", "v_prediction", "v_prediction")
    with pytest.raises(ValueError, match=r"Stage 2 .* noise schedule.*--noise_shifts"):
        train("other", *arguments, "--noise_shifts", "1", "2")
    train("other", *arguments)


@pytest.mark.parametrize(
    ("more", "culprit"),
    [
        ([], "one of --minutes and --max_train_steps"),
        (["--minutes", "1", "--max_train_steps", "1"], "one of --minutes and --max_train_steps"),
        (["--minutes", "1", "2", "3"], "--minutes takes one value.* per stage .*2.* got 3"),
        (["--minutes", "1", "--ema_decay", "0.1", "0.2", "0.3"], "--ema_decay takes one value"),
    ],
)
def test_usage_errors(recipe, more, culprit, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--cascade_config", str(recipe), "--train_data_dir", "d", "--output_dir", "o", *more])
    assert re.search(culprit, capsys.readouterr().err)


def test_a_rehearsal_is_a_tenth(recipe):
    arguments = ["--cascade_config", str(recipe), "--train_data_dir", "d", "--output_dir", "o", "--rehearse"]
    args, _ = parse_args([*arguments, "--minutes", "5", "--train_batch_size", "256", "8"])
    assert (args.minutes, args.train_batch_size, args.lr_warmup_steps) == ([0.5, 0.5], [25, 1], 0)


def test_a_run_that_has_diverged_stops(train):
    arguments = ["--max_train_steps", "60", "--learning_rate", "1e30", "--train_stages", "1", "--lr_warmup_steps", "0"]
    with pytest.raises(FloatingPointError, match=r"steps in a row, up to step 2[2-6]\b.*--learning_rate"):
        train("run", *arguments)


def test_a_checkpoint_between_two_logs_counts_the_skipped_steps(train, monkeypatch, tmp_path):
    class Killed(BaseException):
        pass

    save = DeviceTrainer.save

    def save_and_stop(self):
        save(self)
        if self.state.step == 6:
            raise Killed

    monkeypatch.setattr(DeviceTrainer, "save", save_and_stop)
    arguments = ["--max_train_steps", "9", "--learning_rate", "1e30", "--train_stages", "1", "--lr_warmup_steps", "0"]
    with pytest.raises(Killed):
        train("run", *arguments, "--logging_steps", "100", "--checkpointing_minutes", "0")
    state = json.loads((tmp_path / "run" / "stage_1" / "checkpoint-6" / "trainer_state.json").read_text())
    assert 0 < state["skipped_steps"] < 6
