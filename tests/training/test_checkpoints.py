import hashlib
import json
import re

import pytest
import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from diffusers_pisdm.training.checkpoints import (
    STATE_FILE,
    CheckpointError,
    find_checkpoints,
    find_fault,
    find_resume_point,
    load_average,
    read_state,
    save_average,
    save_checkpoint,
    settings_changed,
)
from tests.support.processes import run_ranks
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
    assert {name: state[name] for name in ("step", "note", "files")} == {
        **{"step": 900, "note": "a"},
        "files": {"shards/1": 3, "weights": 1},
    }
    assert state["digests"]["shards/1"] == hashlib.sha256(b"abc").hexdigest()


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


def test_with_a_limit_the_old_ones_make_room_first_but_the_newest_stays(save, tmp_path):
    for step in (1, 2, 3):
        save(step, total_limit=3)
    there = []

    def fail(folder):
        there.extend(complete(tmp_path))
        raise OSError(28, "No space left on device")

    for limit, left in ((3, ["checkpoint-2", "checkpoint-3"]), (1, ["checkpoint-3"])):
        there.clear()
        with pytest.raises(CheckpointError):
            save(4, write=fail, total_limit=limit)
        assert there == complete(tmp_path) == left


def test_checkpoints_are_ordered_by_run_then_step(save, tmp_path):
    save(12, {"run": 0})
    save(4, {"run": 1}, total_limit=2)
    assert complete(tmp_path) == ["checkpoint-12", "checkpoint-4"]
    assert find_resume_point(tmp_path, "latest") == (tmp_path / "checkpoint-4", 1)
    save(6, {"run": 1}, total_limit=2)
    assert complete(tmp_path) == ["checkpoint-4", "checkpoint-6"]


def test_a_new_run_begins_wherever_it_does_not_continue_the_newest_checkpoint(save, tmp_path):
    assert find_resume_point(tmp_path, "latest") == find_resume_point(tmp_path, "none") == (None, 0)
    save(4, {"run": 3})
    save(8, {"run": 3})
    assert find_resume_point(tmp_path, "none") == (None, 4)
    assert find_resume_point(tmp_path, "checkpoint-4") == (tmp_path / "checkpoint-4", 4)
    assert find_resume_point(tmp_path, str(tmp_path / "checkpoint-8")) == (tmp_path / "checkpoint-8", 3)
    assert find_resume_point(tmp_path / "elsewhere", str(tmp_path / "checkpoint-8"))[1] == 0


@pytest.mark.parametrize("file", ["weights", "shards/1", STATE_FILE])
def test_a_flipped_bit_is_found_and_the_checkpoint_before_taken(save, tmp_path, file):
    first, second = save(1, {"run": 0}), save(2, {"run": 0, "elapsed": 1.25})
    path, messages = second / file, []
    text = path.read_bytes()
    changed = text.replace(b"1.25", b"1.35") if file == STATE_FILE else bytes([text[0] ^ 1]) + text[1:]
    assert changed != text and len(changed) == len(text)
    path.write_bytes(changed)
    assert find_resume_point(tmp_path, "latest", messages.append)[0] == first
    assert re.search(rf"checkpoint-2: its (file )?{file} .*damaged", messages[0])
    with pytest.raises(ValueError, match=rf"checkpoint-2: its .*{file} .*damaged"):
        find_resume_point(tmp_path, "checkpoint-2", messages.append)


@pytest.mark.parametrize(("file", "content"), [("weights", "y"), ("weights", ""), (STATE_FILE, "{}")])
def test_if_no_checkpoint_is_intact_nothing_starts_over_in_silence(save, tmp_path, file, content):
    (save(1) / file).write_text(content)
    with pytest.raises(CheckpointError, match=r"is intact.* --resume_from_checkpoint none"):
        find_resume_point(tmp_path, "latest")


def test_a_checkpoint_that_is_not_there_is_answered_with_those_that_are(save, tmp_path):
    save(3)
    save(5)
    with pytest.raises(ValueError, match=r"no checkpoint 'checkpoint-4'.*: checkpoint-3, checkpoint-5"):
        find_resume_point(tmp_path, "checkpoint-4")


def test_what_cannot_change_is_refused_with_both_values_and_what_can_is_told(tmp_path):
    state = {"step": 7, "identity": {"class 0": "a", "size": [4, 8]}, "settings": {"learning_rate": 0.1, "seed": 1}}
    messages = []
    same = {"class 0": "a", "size": (4, 8)}
    found = settings_changed(tmp_path, state, same, {"learning_rate": 0.2, "seed": 1, "new": 3}, messages.append)
    assert found == {"learning_rate": [0.1, 0.2]}
    assert messages == ["--learning_rate was 0.1, is 0.2 from step 7 on."]
    with pytest.raises(CheckpointError, match="class 0 was 'a', is 'b'; class 1 was None, is 'c'"):
        settings_changed(tmp_path, state, {**same, "class 0": "b", "class 1": "c"}, {})
    assert settings_changed(tmp_path, {"step": 7}, same, {"seed": 2}) == {}  # an early checkpoint


@pytest.mark.parametrize(
    ("argument", "old", "new"),
    [
        ("pretrained_model_name_or_path", "outputs/a", "outputs/b"),
        ("class_name_factors", "_", "-"),
        ("train_stages", [2], [3]),
        ("sil_weight", 0.0, 0.5),
        ("seed", 1, 2),
    ],
)
def test_arguments_that_a_checkpoint_depends_on_are_refused_by_their_name(tmp_path, argument, old, new):
    state = {"step": 7, "identity": {}, "settings": {argument: old}}
    with pytest.raises(CheckpointError, match=re.escape(f"--{argument} was {old!r}, is {new!r}")):
        settings_changed(tmp_path, state, {}, {argument: new}, pytest.fail)


def test_the_weight_of_a_loss_that_stays_may_change(tmp_path):
    state = {"step": 7, "settings": {"sil_weight": 0.25}}
    assert settings_changed(tmp_path, state, {}, {"sil_weight": 0.5}, str) == {"sil_weight": [0.25, 0.5]}


def test_a_refusal_names_the_argument_behind_it_and_is_short(tmp_path):
    state = {"step": 7, "identity": {"betas": [0.125] * 1000}, "settings": {"noise_shifts": None, "ema_decay": 0.9}}
    with pytest.raises(
        CheckpointError, match=r"betas was .*\.\.\., is .*: --noise_shifts was None, is \[2.0\]\."
    ) as refused:
        settings_changed(tmp_path, state, {"betas": [0.25] * 1000}, {"noise_shifts": [2.0]}, pytest.fail)
    assert len(str(refused.value)) < 700


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


def test_what_a_killed_replacement_left_is_no_obstacle(save, tmp_path):
    save(1, {"run": 1})
    (tmp_path / "partial-checkpoint-1-replaced" / "shards").mkdir(parents=True)
    save(1, {"run": 2})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
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
    run_ranks(sharded_average.main, [str(tmp_path)])
