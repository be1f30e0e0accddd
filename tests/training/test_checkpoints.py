import pytest

from diffusers_pisdm.training.checkpoints import list_checkpoints, read_state, save_checkpoint


def write(folder):
    (folder / "weights").write_text("x")


def test_checkpoints_are_listed_by_step_and_hold_their_state(tmp_path):
    for step in (900, 1000, 80):
        save_checkpoint(tmp_path, step, {"note": "a"}, write)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-80", "checkpoint-900", "checkpoint-1000"]
    assert read_state(tmp_path / "checkpoint-900") == {"step": 900, "note": "a"}


def test_a_failed_write_leaves_the_last_checkpoint_and_no_half_one(tmp_path):
    save_checkpoint(tmp_path, 1, {}, write)

    def fail(folder):
        write(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        save_checkpoint(tmp_path, 2, {}, fail, total_limit=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-1"]
    save_checkpoint(tmp_path, 2, {}, write, total_limit=1)  # the leftover does not stand in the way
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]


def test_the_oldest_go_beyond_the_limit(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, {}, write, total_limit=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-2", "checkpoint-3"]


def test_a_missing_folder_has_no_checkpoints(tmp_path):
    assert list_checkpoints(tmp_path / "nowhere") == []
