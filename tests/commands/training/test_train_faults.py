"""What goes wrong on real machines: killed processes, full disks, broken images, losses that are not finite."""

import json
import os
import re
import resource
import shutil
import signal
import time

import pytest
import torch

from diffusers_pisdm.commands import train as train_command
from diffusers_pisdm.data.rows import BadImageError
from diffusers_pisdm.publishing.model_card import make_model_card
from diffusers_pisdm.training import CascadeObjective
from diffusers_pisdm.training.checkpoints import CheckpointError, find_checkpoints, read_state
from diffusers_pisdm.training.metrics import read_metrics
from tests.commands.training.tiny_training import weights
from tests.support.processes import Process


def train_on_a_slow_disk(arguments):
    """Slow enough for a checkpoint to be caught while it is being written."""
    flush = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.05), flush(descriptor))
    train_command.main(arguments)


@pytest.fixture
def one_thread():
    """As in the processes that are started: bits depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_killed_run_goes_on_to_the_same_weights(tmp_path, command, train, one_thread, capsys):
    expected = weights(train("through", 8, "--checkpointing_steps", "2") / "checkpoint-8")
    arguments, output = command("killed", 8, "--checkpointing_steps", "2"), tmp_path / "killed"

    process = Process(train_on_a_slow_disk, arguments)
    process.wait_for((output / "checkpoint-2").exists)
    process.kill()  # somewhere in the steps after a checkpoint
    process = Process(train_on_a_slow_disk, arguments)
    process.wait_for(lambda: list(output.glob("partial-checkpoint-*")))
    process.kill()  # while a checkpoint is being written
    left = [path.name for path in output.glob("partial-checkpoint-*")]
    last = find_checkpoints(output)[0][-1]
    assert read_state(last)["step"] >= 2

    capsys.readouterr()
    train("killed", 8, "--checkpointing_steps", "2")
    said = capsys.readouterr().out
    assert f"Resuming from {last}" in said
    for name in left:
        assert f"Ignoring {output / name}: it was being written when the run ended." in said
    actual = weights(output / "checkpoint-8")
    assert [name for name in expected if not torch.equal(expected[name], actual[name])] == []
    steps = [row["step"] for row in read_metrics(output / "metrics.jsonl") if "train/denoising_1" in row]
    assert steps == [2, 4, 6, 8]


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(train, capsys):
    output = train("run", 8)
    (output / "checkpoint-8" / "model.safetensors").write_bytes(b"half")
    again = train("run", 8)
    said = capsys.readouterr().out
    assert "checkpoint-8: its file model.safetensors has 4 bytes instead of" in said
    assert f"Resuming from {again / 'checkpoint-4'}" in said
    with pytest.raises(ValueError, match=r"no checkpoint .*nowhere.*: checkpoint-4, checkpoint-8"):
        train("run", 8, "--resume_from_checkpoint", str(output / "nowhere"))


def test_a_full_disk_is_told_and_leaves_the_last_checkpoint(train):
    output = train("run", 4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16_384, hard))  # files of a checkpoint are larger, others are not
    try:
        with pytest.raises(
            CheckpointError, match=r"checkpoint-6 could not be written .*Earlier checkpoints are intact"
        ):
            train("run", 8, "--checkpointing_steps", "6", "--validation_steps", "0")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in output.glob("*checkpoint-*")] == ["checkpoint-4"]
    assert (train("run", 8) / "checkpoint-8").exists()


def test_other_data_or_settings_cannot_continue_a_run(train, tmp_path, real_image_dir):
    train("run", 4)
    fewer = tmp_path / "fewer"
    shutil.copytree(real_image_dir, fewer)
    next(fewer.rglob("*.png")).unlink()
    with pytest.raises(ValueError, match="The data's position does not fit"):
        train("run", 8, data=fewer)


@pytest.fixture
def damaged_dir(tmp_path, real_image_dir):
    folder = tmp_path / "damaged"
    shutil.copytree(real_image_dir, folder)
    image = sorted(folder.rglob("*.png"))[3]
    image.write_bytes(image.read_bytes()[:200])
    return folder, image


def test_a_broken_image_stops_the_run_or_is_skipped_with_its_path_and_a_count(train, damaged_dir):
    folder, image = damaged_dir
    steps = len(list(folder.rglob("*.png"))) // 8  # an epoch, and so the broken one
    with pytest.raises(BadImageError, match=f"{image}.*--on_bad_image skip"):
        train("stopped", steps, data=folder)
    output = train("skipped", steps, "--on_bad_image", "skip", data=folder)
    assert str(image) in (output / "bad_images.txt").read_text()
    assert read_metrics(output / "metrics.jsonl")[-1]["bad_images"] >= 1


def test_a_step_that_is_not_finite_is_skipped_and_counted(train, monkeypatch):
    forward, calls = CascadeObjective.forward, []

    def broken_at_the_third(self, *args):
        losses = forward(self, *args)
        if self.training:
            calls.append(1)
        return losses._replace(total=losses.total * float("nan")) if len(calls) == 3 and self.training else losses

    monkeypatch.setattr(CascadeObjective, "forward", broken_at_the_third)
    output = train("run", 4)
    rows = read_metrics(output / "metrics.jsonl")
    assert [row["skipped_steps"] for row in rows if "skipped_steps" in row] == [0, 1]
    assert read_state(output / "checkpoint-4")["skipped_steps"] == 1
    assert all(tensor.isfinite().all() for tensor in weights(output / "checkpoint-4").values())


def test_a_run_that_has_diverged_stops(train):
    with pytest.raises(FloatingPointError, match=r"3 steps in a row, up to step \d+.*--learning_rate"):
        train("run", 20, "--learning_rate", "1e30", "--lr_warmup_steps", "0", "--max_skipped_steps", "2")


def test_a_run_without_a_validation_split_of_that_name_is_refused(train):
    with pytest.raises(ValueError, match="heldout"):
        train("run", 1, "--validation_split", "heldout")


def test_the_training_configuration_is_kept(train):
    output = train("run", 1)
    config = json.loads((output / "training_config.json").read_text())
    assert config["arguments"]["train_batch_size"] == 8 and config["images"] > 8
    assert config["num_processes"] == 1 and config["versions"]["torch"] == torch.__version__


def test_a_signal_ends_a_run_with_a_checkpoint_and_a_second_run_in_its_folder_is_refused(tmp_path, command):
    arguments, output = command("run", 500, "--checkpointing_steps", "0"), tmp_path / "run"
    process = Process(train_on_a_slow_disk, arguments)
    process.wait_for(lambda: (output / "metrics.jsonl").exists() and read_metrics(output / "metrics.jsonl"))
    second = Process(train_on_a_slow_disk, arguments)
    assert second.wait() == 1 and f"error: Another process is writing to {output}" in second.said
    process.signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM, process.said
    said = process.said
    assert "SIGTERM: stopping after this step" in said and "Traceback" not in said
    ((checkpoint,), _) = find_checkpoints(output)
    step = read_state(checkpoint)["step"]
    assert 0 < step < 500 and f"Stopped after step {step}. Rerun the same command to resume." in said


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--train_data_dir", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--cascade_config", "/nowhere.json"], "/nowhere.json"),
        (["--pretrained_model_name_or_path", "/nowhere/model"], "/nowhere/model"),
        (["--resume_from_checkpoint", "checkpoint-77"], "checkpoint-77"),
        (["--train_stages", "5"], "--train_stages 5: the cascade has 2 stages"),
        (["--train_stages", "5", "--dry_run"], "--train_stages 5: the cascade has 2 stages"),
        (["--noise_shifts", "1", "2", "3"], "--noise_shifts takes one value"),
        (["--flip_column", "may_mirror"], "--random_flip"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_mistake_is_a_sentence(command, more, told, capsys):
    with pytest.raises(SystemExit) as ended:
        train_command.main(command("run", 1, *more))
    said = f"{ended.value.code} {capsys.readouterr().err}"
    assert told in said and "error" in said


def test_decorations_that_fail_cost_no_step(train, monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise RuntimeError("out of paint")

    for name in ("draw_samples", "plot_loss_curves"):
        monkeypatch.setattr(train_command, name, fail)
    output = train("run", 8)
    said = capsys.readouterr().out
    assert said.count("drawing samples failed") == said.count("plotting the losses failed") == 1
    assert (output / "checkpoint-8").exists() and (output / "model_index.json").exists()


def test_the_card_tells_what_was_changed_on_the_way(train):
    train("run", 4)
    output = train("run", 8, "--adam_weight_decay", "0.5")
    (changes,) = json.loads((output / "training_config.json").read_text())["changes"]
    assert changes["adam_weight_decay"] == [0.03, 0.5]
    card = str(make_model_card(output, "owner/name"))
    assert re.search(r"`adam_weight_decay` until step 4 \| 0\.03 ", card)


def test_a_renamed_class_cannot_continue_a_run(train, tmp_path, real_image_dir):
    data = tmp_path / "data"
    shutil.copytree(real_image_dir, data)
    train("run", 4, data=data)
    first = min(path for path in data.iterdir() if path.is_dir())
    first.rename(data / "zzz")
    with pytest.raises(CheckpointError, match=rf"class 0 was '{first.name}', is .*--output_dir"):
        train("run", 8, data=data)
