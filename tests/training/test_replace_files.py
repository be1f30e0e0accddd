import pytest

from diffusers_pisdm.training.replace_files import save_in_place


def test_files_are_replaced_and_others_stay(tmp_path):
    (tmp_path / "other").write_text("kept")

    def write(folder, text):
        (folder / "inner").mkdir()
        (folder / "inner" / "a").write_text(text)

    for text in ("first", "second"):
        save_in_place(lambda folder, text=text: write(folder, text), tmp_path)
        assert (tmp_path / "inner" / "a").read_text() == text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["inner", "other"]


def test_a_failed_save_changes_nothing(tmp_path):
    (tmp_path / "a").write_text("whole")

    def fail(folder):
        (folder / "a").write_text("ha")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        save_in_place(fail, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (tmp_path / "a").read_text() == "whole"
