"""What a run says before its first step and after its last, and what it refuses."""

import re

import pytest
import torch
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature

from diffusers_pisdm.commands import cache_latents, evaluate, generate, new_recipe, sample
from diffusers_pisdm.commands import train as train_command
from diffusers_pisdm.training.cascade_objective import warn_of_narrow_stage
from diffusers_pisdm.utils.messages import show_range
from tests.data.image_folders import copy_folder, damaged_images


@pytest.fixture
def images(real_image_files, tmp_path):
    return copy_folder(real_image_files[:24], tmp_path / "images")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


def test_a_run_tells_what_it_trains_and_what_comes_next(train, images, capsys):
    output = train("run", 6, "--train_stages", "2", data=images)
    out = capsys.readouterr().out
    counts = sorted(len(list(folder.iterdir())) for folder in images.iterdir())
    assert f"Data: 24 images of {len(counts)} classes, {show_range(counts[0], counts[-1])} of each\n" in out
    assert re.search(r"^Stage 1: 4 px, 0\.0M parameters, frozen$", out, re.MULTILINE)
    assert re.search(r"^Stage 2: 8 px, 0\.0M parameters, all trained$", out, re.MULTILINE)
    assert re.search(r"^Training: 6 steps of 8 images, 2 passes over the data$", out, re.MULTILINE)
    assert re.search(rf"^Saved after 6 steps and [\d.]+ (s|min): a pipeline in {output}, ", out, re.MULTILINE)
    assert f"pisdm generate --model {output} --output grid.png" in out
    assert f"pisdm publish {output} " in out


def test_adapters_are_drawn_with_their_base(train, images, capsys):
    base = train("base", 1, data=images)
    capsys.readouterr()
    adapter = train("adapter", 1, "--pretrained_model_name_or_path", str(base), "--lora_rank", "2", data=images)
    out = capsys.readouterr().out
    assert f"pisdm generate --model {base} --lora {adapter} --output grid.png" in out
    assert re.search(r"^Stage 1: .*, 0\.00\d+M trained$", out, re.MULTILINE)


def test_a_class_without_images_is_named(train, real_image_files, tmp_path, capsys):
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=["a", "ducks", "b"])})
    rows = [{"image": str(file), "label": 2 * (i % 2)} for i, file in enumerate(real_image_files[:16])]
    (tmp_path / "set").mkdir()
    Dataset.from_list(rows, features).to_parquet(tmp_path / "set" / "train.parquet")
    train("run", 1, data=tmp_path / "set")
    assert re.search(r"^Warning: 1 class without images.*: ducks$", capsys.readouterr().out, re.MULTILINE)


@pytest.fixture
def broken(images):
    files = sorted(images.glob("*/*.png"))
    bad = [files[0], files[-1]]
    for file in bad:
        file.write_bytes(damaged_images(file.read_bytes())["truncated"])
    return bad


def test_broken_images_are_all_found_before_the_first_step(train, images, broken):
    with pytest.raises(ValueError, match="2 images cannot be read") as raised:
        train("run", 1, "--check_data", data=images)
    assert all(str(file) in str(raised.value) for file in broken)
    assert not list(images.parent.glob("run/checkpoint-*"))


def test_broken_images_to_skip_are_told_before_the_first_step(train, images, broken, capsys):
    train("run", 11, "--check_data", "--on_bad_image", "skip", data=images)
    out = capsys.readouterr().out
    assert out.index("Skipping 2 images") < out.index("Training: 11 steps of 8 images, 4 passes over the data")
    counts = sorted(len(set(folder.iterdir()) - set(broken)) for folder in images.iterdir())
    assert f"Data: 22 images of {len(counts)} classes, {show_range(counts[0], counts[-1])} of each; 2 more" in out


def test_a_warm_up_longer_than_the_run_is_remarked_on(train, images, capsys):
    train("run", 2, "--lr_warmup_steps", "2", data=images)
    assert "warm-up" not in capsys.readouterr().out
    train("run", 3, "--lr_warmup_steps", "4", data=images)
    assert re.search(
        r"^Warning: the warm-up of 4 steps .*75%.*--lr_warmup_steps 0", capsys.readouterr().out, re.MULTILINE
    )


def test_a_precision_that_is_slow_here_is_remarked_on(train, images, capsys, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    train("plain", 1, data=images)
    assert "instructions" not in capsys.readouterr().out
    train("run", 1, "--mixed_precision", "bf16", data=images)
    assert re.search("^Warning: .*instructions for bfloat16", capsys.readouterr().out, re.MULTILINE)


@pytest.mark.parametrize("condition", [None, 3])
def test_a_token_narrower_than_its_patch_is_warned_of(caplog, condition):
    values = 4 * 4 * (3 if condition is None else 6)
    config = {"patch_size": 4, "in_channels": 3, "low_res_channels": condition}
    warn_of_narrow_stage(2, {**config, "hidden_size": values})
    assert not caplog.records
    warn_of_narrow_stage(2, {**config, "hidden_size": values - 4})
    assert re.search(rf"Stage 2 .*noise.*{values} values.*width of {values - 4}", caplog.text)


def test_only_trained_stages_are_warned_of(train, images, caplog):
    train("run", 1, "--train_stages", "1", data=images)  # 2 * 2 * 3 values, and twice as many in stage 2: width 16
    assert "noise" not in caplog.text
    train("other", 1, data=images)
    assert re.search("Stage 2 .*24 values.*width of 16", caplog.text)


EMPTY_OUTPUTS = {
    "train": (train_command.main, ["--cascade_config", "emoji64", "--train_data_dir", "a", "--output_dir", ""]),
    "sample": (sample.main, ["--output_dir", ""]),
    "generate": (generate.main, ["--output_dir", " "]),
    "evaluate": (evaluate.main, ["--output", ""]),
    "new-recipe": (new_recipe.main, ["a", "--output", ""]),
    "cache-latents": (cache_latents.main, ["--cascade_config", "a", "--train_data_dir", "a", "--output_dir", ""]),
}


@pytest.mark.parametrize(("main", "arguments"), EMPTY_OUTPUTS.values(), ids=EMPTY_OUTPUTS)
def test_an_empty_path_is_not_the_current_folder(main, arguments, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert re.search(r"--output(_dir)?: must not be empty", capsys.readouterr().err)
