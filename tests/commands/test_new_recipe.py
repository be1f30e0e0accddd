import json
import re

import pytest
import torch
from accelerate.state import AcceleratorState

from diffusers_pisdm import PISDMCascadePipeline
from diffusers_pisdm.commands import new_recipe
from diffusers_pisdm.commands import train as train_command
from diffusers_pisdm.data.image_data import load_image_data
from diffusers_pisdm.training.cascade_objective import warn_of_narrow_stage
from diffusers_pisdm.training.cost.stage_speed import StageSpeed
from diffusers_pisdm.training.recipes import read_recipe
from tests.data.image_folders import copy_folder


def at_speed(flops_per_second):
    """A machine that reaches the same speed whatever it is asked to train."""
    return lambda config, num_classes, batch_size, *rest: StageSpeed(2, batch_size, flops_per_second, 1e12, 0.1)


SMALL_SHAPES = (((2, 24), (2, 28)), ((2, 48), (2, 32)), ((2, 96), (2, 64)))


def plan(monkeypatch, folder, minutes, flops_per_second, size=32):
    monkeypatch.setattr(new_recipe, "measure_stage_speed", at_speed(flops_per_second))
    monkeypatch.setattr(new_recipe, "SHAPES", SMALL_SHAPES)
    return new_recipe.choose_plan(size, minutes, load_image_data(folder, "train"))


def test_a_recipe_of_this_machine_trains(real_image_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(new_recipe, "SHAPES", (((2, 32), (2, 24)),))
    monkeypatch.setattr(new_recipe, "SECONDS_PER_MEASUREMENT", 0.0)
    recipe, output = tmp_path / "recipe.json", tmp_path / "run"
    new_recipe.main([str(real_image_dir), "--size", "32", "--minutes", "1", "--output", str(recipe)])
    told = capsys.readouterr().out
    assert re.search(rf"Next: pisdm train --cascade_config {recipe} --train_data_dir {real_image_dir}", told)
    assert re.search(r"^Stage 1: 16 px, patches of 2.*M parameters", told, re.MULTILINE)

    AcceleratorState._reset_state(reset_partial_state=True)
    arguments = ["--max_train_steps", "2", "--train_batch_size", "4", "--validation_inference_steps", "2"]
    arguments += ["--train_data_dir", str(real_image_dir), "--output_dir", str(output), "--validation_classes", "1"]
    train_command.train(["--cascade_config", str(recipe), *arguments])
    pipe = PISDMCascadePipeline.from_pretrained(output)
    assert [stage.config.sample_size for stage in pipe.stages] == [16, 32]
    assert [s.config.prediction_type for s in pipe.get_stage_schedulers()] == ["v_prediction", "sample"]


def test_steps_and_batch_fill_the_minutes(monkeypatch, real_image_dir):
    slow = plan(monkeypatch, real_image_dir, 10, 1e9)
    budget = new_recipe.SHARE_OF_TRAINING * 600
    assert budget - sum(slow.seconds) <= sum(slow.seconds) * slow.steps <= budget
    assert slow.batch_size == 8 or slow.steps >= new_recipe.FEWEST_STEPS


def test_unreadable_images_and_what_a_short_run_leaves_out_are_told(monkeypatch, real_image_files, tmp_path, capsys):
    chosen = [file for file in real_image_files if file.parent.name in ("animal-mammal", "heart")]
    folder = copy_folder(chosen, tmp_path / "images")
    (folder / "heart" / "torn.png").write_bytes(chosen[0].read_bytes()[:100])
    told = "\n".join(plan(monkeypatch, folder, 1, 1e10).describe())
    assert re.search(r"^Warning: 1 image .*check-data.*skips them.*heart/torn\.png", told, re.MULTILINE)
    assert re.search(rf"passes over {len(chosen)} images$", told, re.MULTILINE)  # not of the torn one
    assert re.search(r"^Note: .*--minutes leaves out", told, re.MULTILINE)
    arguments = ["--size", "32", "--minutes", "1", "--output", str(tmp_path / "recipe.json")]
    new_recipe.main([str(folder), *arguments])
    assert " --on_bad_image skip --output_dir" in capsys.readouterr().out  # or the command would fail
    (folder / "heart" / "torn.png").unlink()
    told = "\n".join(plan(monkeypatch, folder, 30, 1e10).describe())
    assert "Cannot read" not in told and "Note:" not in told
    new_recipe.main([str(folder), *arguments])
    assert "on_bad_image" not in capsys.readouterr().out


def test_a_faster_machine_gets_a_larger_model_that_still_sees_enough(monkeypatch, real_image_dir):
    plans = [plan(monkeypatch, real_image_dir, 10, speed) for speed in (1e8, 1.1e10, 1e13)]
    assert [plan.stages[0]["hidden_size"] for plan in plans] == [24, 48, 96]
    assert plans[0].images_seen < new_recipe.ENOUGH_IMAGES
    assert all(plan.images_seen >= new_recipe.ENOUGH_IMAGES for plan in plans[1:])


def test_too_few_images_are_warned_of(monkeypatch, real_image_dir):
    few, more = (plan(monkeypatch, real_image_dir, 10, speed).describe() for speed in (1e8, 1e10))
    assert re.search("rough: allow more --minutes", few[-1])
    assert not any("rough" in line for line in more)


def test_no_time_for_a_step_is_an_error(monkeypatch, real_image_dir):
    with pytest.raises(ValueError, match=r"A step takes .* allow more --minutes"):
        plan(monkeypatch, real_image_dir, 0.01, 1e6)


@pytest.mark.parametrize(
    ("size", "sizes"),
    [(8, [8]), (16, [16]), (30, [30]), (32, [16, 32]), (48, [24, 48]), (72, [18, 36, 72]), (128, [16, 32, 64, 128])],
)
def test_stages_halve_down_to_16_pixels(size, sizes):
    assert new_recipe.stage_sizes(size) == sizes


def test_no_shape_is_too_narrow_for_its_patches(caplog):
    for shape in new_recipe.SHAPES:
        configs = new_recipe.stage_configs([16, 32, 64, 128, 256], [0.1, 0.2, 0.3, 0.4], shape)
        assert [config.get("residual_scale") for config in configs] == [None, 0.1, 0.2, 0.3, 0.4]
        for number, config in enumerate(configs, start=1):
            warn_of_narrow_stage(number, config)
    assert not caplog.records


def test_the_residual_scale_is_that_of_the_data(real_image_dir):
    data = load_image_data(real_image_dir, "train")
    (scale,), unreadable = new_recipe.residual_scales(data, [32, 64])
    assert unreadable == []
    images = [
        new_recipe.ImageRows(data, new_recipe.ImageTransform(64)).read(i, 0, 0).images
        for i in range(len(data.dataset))
    ]
    images = torch.stack(images).float() / 127.5 - 1  # (N, 3, 64, 64)
    low = torch.nn.functional.avg_pool2d(images, 2)
    upsampled = torch.nn.functional.interpolate(low, 64, mode="bicubic", antialias=True)
    assert scale == pytest.approx((images - upsampled).std().item(), abs=2e-3)


def test_the_file_is_a_recipe_with_a_value_for_each_stage(monkeypatch, real_image_dir, tmp_path):
    made = plan(monkeypatch, real_image_dir, 5, 1e10, size=64)
    (tmp_path / "recipe.json").write_text(json.dumps(made.recipe()))
    recipe = read_recipe(tmp_path / "recipe.json")
    assert [stage["sample_size"] for stage in recipe.stages] == [16, 32, 64]
    assert recipe.training["batch_shares"] == [1, 0.25, 0.25]
    assert recipe.training["loss_weighting"] == ["sigmoid", "min_snr", "min_snr"]


def test_the_time_is_that_of_the_recipes_optimizer(monkeypatch, real_image_dir):
    asked = []
    measure = at_speed(1e9)

    def spy(config, num_classes, batch_size, settings, *rest):
        asked.append(settings.optimizer)
        return measure(config, num_classes, batch_size)

    monkeypatch.setattr(new_recipe, "SHAPES", SMALL_SHAPES)
    monkeypatch.setattr(new_recipe, "measure_stage_speed", spy)
    made = new_recipe.choose_plan(32, 10, load_image_data(real_image_dir, "train"))
    assert set(asked) == {made.recipe()["training"]["optimizer"]}


def test_minutes_must_be_positive(capsys):
    with pytest.raises(SystemExit, match="2"):
        new_recipe.main(["folder", "--minutes", "0"])
    assert "--minutes: must be more than 0" in capsys.readouterr().err
