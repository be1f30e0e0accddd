import json
import subprocess
import sys

import pytest

from ablation.folder import AblationError, AblationFolder, hold_lock
from ablation.rows import TABLES


CONDITIONS = {"recipe": {"training": {"learning_rate": 0.1}}, "num_samples": 4}


@pytest.fixture
def folder(tmp_path):
    folder = AblationFolder(tmp_path / "ablation")
    folder.claim(CONDITIONS)
    return folder


def test_results_are_kept_by_variant_and_seed(folder):
    assert folder.results(TABLES[1]) == [] and not folder.is_done("full", 3)
    for variant, seed in (("full", 3), ("full", 12), ("2_directions", 3)):
        folder.write_result(variant, seed, {"steps": seed})
    assert folder.is_done("full", 3)
    assert folder.results(TABLES[1]) == [{"variant": "full", "seed": seed, "steps": seed} for seed in (12, 3)]
    assert [result["variant"] for result in folder.results(TABLES[2])] == ["2_directions", "full", "full"]
    assert [path.name for path in folder.run("full", 3).iterdir()] == ["result.json"]


def test_other_conditions_are_refused(folder):
    folder.claim(CONDITIONS)
    changed = {"recipe": {"training": {"learning_rate": 0.2, "seed": 1}}, "num_samples": 4}
    message = r"recipe.training.learning_rate was 0.1, is 0.2; recipe.training.seed was None, is 1\..*another folder"
    with pytest.raises(AblationError, match=message):
        folder.claim(changed)
    assert folder.conditions() == CONDITIONS


def test_a_result_from_elsewhere_is_refused(folder, tmp_path):
    folder.write_result("full", 0, {})
    folder.conditions_file.write_text(json.dumps(CONDITIONS | {"num_samples": 5}))
    with pytest.raises(AblationError, match=r"result.json does not belong to .*num_samples was 4, is 5. Remove its"):
        folder.results(TABLES[1])


def test_a_folder_of_something_else_is_told(tmp_path):
    with pytest.raises(AblationError, match=r"not an ablation's folder: .*ablation.json"):
        AblationFolder(tmp_path).results(TABLES[1])


def test_a_lock_is_held_by_one(tmp_path):
    file = tmp_path / "run" / "lock"
    with hold_lock(file, wait=False) as lock:
        assert lock is not None
        with hold_lock(file, wait=False) as second:
            assert second is None
    with hold_lock(file, wait=True) as lock:
        assert lock is not None


def test_a_process_that_outlives_its_parent_keeps_the_lock(tmp_path):
    file = tmp_path / "lock"
    with hold_lock(file, wait=False) as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock.fileno()])
    with hold_lock(file, wait=False) as mine:
        assert mine is None
    child.communicate(b"\n")
    with hold_lock(file, wait=False) as mine:
        assert mine is not None
