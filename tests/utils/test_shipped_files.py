from pathlib import Path

import pytest

from diffusers_pisdm.training.recipes import read_recipe
from diffusers_pisdm.utils import shipped_files
from diffusers_pisdm.utils.shipped_files import CHECKPOINT, find_model, find_recipe, model_name, shipped_folder


def test_a_wheel_has_them_inside_the_package_and_a_clone_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped_files, "PACKAGE", tmp_path / "package")
    assert shipped_folder("recipes", "examples/recipes") == tmp_path / "examples" / "recipes"
    (tmp_path / "package" / "recipes").mkdir(parents=True)
    assert shipped_folder("recipes", "examples/recipes") == tmp_path / "package" / "recipes"


def test_the_checkpoint_goes_by_its_name_unless_a_folder_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_model("pisdm-emoji128") == str(CHECKPOINT) and (CHECKPOINT / "model_index.json").is_file()
    assert model_name(str(CHECKPOINT)) == "pisdm-emoji128"
    for other in ("owner/name", "checkpoints/pisdm-emoji128"):
        assert find_model(other) == model_name(other) == other
    Path("pisdm-emoji128").mkdir()
    assert find_model("pisdm-emoji128") == "pisdm-emoji128"


def test_a_recipe_goes_by_its_name_unless_a_file_has_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("emoji64").mkdir()  # an output folder, say
    assert [stage["sample_size"] for stage in read_recipe("emoji64").stages] == [8, 16, 32, 64]
    Path("imagenet256").touch()
    assert find_recipe("imagenet256") == Path("imagenet256")
    with pytest.raises(FileNotFoundError, match=r"ours are ablation32, .*imagenet512"):
        read_recipe("emoji65")
