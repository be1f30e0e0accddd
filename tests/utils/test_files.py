import os

import pytest
import torch
from safetensors.torch import save_file

from diffusers_pisdm.utils.files import lock_folder, save_in_place, write_whole
from tests.support.small_disk import small_disk


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "file"
    with write_whole(path) as unfinished:
        unfinished.write_text("half")
        assert not path.exists()
        unfinished.write_text("whole")
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_write_leaves_the_old_file(tmp_path, error):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(error), write_whole(path) as unfinished:
        unfinished.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "write", [lambda path: path.write_bytes(bytes(2000)), lambda path: save_file({"a": torch.ones(500)}, path)]
)
def test_a_full_disk_is_told(tmp_path, write):
    path = tmp_path / "new" / "file"
    with small_disk(1000), pytest.raises(OSError, match=f"Cannot write {path}: .*too large.*Free up space"):
        with write_whole(path) as unfinished:
            write(unfinished)
    path.parent.rmdir()
    with small_disk(1000), pytest.raises(OSError, match=f"Cannot write {path.parent}: .*too large.*Free up space"):
        save_in_place(lambda folder: write(folder / "file"), path.parent)
    assert list(tmp_path.iterdir()) == []


def test_new_files_have_the_usual_mode(tmp_path):
    (tmp_path / "usual").touch()
    save_in_place(lambda folder: save_file({"a": torch.ones(1)}, folder / "a"), tmp_path)
    with write_whole(tmp_path / "b") as unfinished:
        save_file({"b": torch.ones(1)}, unfinished)
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1


def test_a_folder_that_cannot_be_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"Cannot write .*file/inner: .*File exists"):
        with write_whole(tmp_path / "file" / "inner"):
            pass


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


def test_a_folder_is_locked_until_its_owner_is_done(tmp_path):
    folder = tmp_path / "new" / "run"
    with lock_folder(folder):
        with pytest.raises(OSError, match=f"Another process .* {folder}.*--output_dir"), lock_folder(folder):
            pass
        with lock_folder(tmp_path):
            pass
    with lock_folder(folder):
        pass


def test_contents_are_on_disk_before_a_file_gets_its_name(tmp_path, monkeypatch):
    calls, fsync, replace = [], os.fsync, os.replace

    def note_fsync(descriptor):
        calls.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def note_replace(source, target):
        calls.append(f"to {os.path.basename(target)}")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_replace)
    with write_whole(tmp_path / "a") as unfinished:
        unfinished.write_text("a")
    save_in_place(lambda folder: [(folder / name).write_text(name) for name in "bc"], tmp_path)
    assert calls == ["a.unfinished", "to a", "b", "c", "to b", "to c"]
