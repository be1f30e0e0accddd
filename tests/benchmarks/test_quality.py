import json
import re

import pytest

from benchmarks import quality
from benchmarks.equal_budget.contestants import CONTESTANTS, Contestant
from benchmarks.peers import DiTPeer
from diffusers_pisdm import DiMTransformer2DModel


PISDM = {"patch_size": 2, "in_channels": 3, "num_layers": 2, "hidden_size": 16, "state_size": 4}
DIT = {"patch_size": 2, "in_channels": 3, "num_layers": 1, "hidden_size": 16, "num_heads": 2}


@pytest.fixture
def compare(monkeypatch, tmp_path, real_image_dir, capsys):
    """The benchmark, at a size of seconds."""
    cascade = [{"sample_size": 4, **PISDM}, {"sample_size": 8, "low_res_channels": 3, **PISDM}]
    tiny = {
        "dit": Contestant("DiT", [{"sample_size": 8, **DIT}], stage_class=DiTPeer),
        "dim": Contestant("DiM", [{"sample_size": 8, **PISDM, "num_layers": 3}], stage_class=DiMTransformer2DModel),
        "pisdm_residual": Contestant("PIS-DM, residual cascade", cascade, residual=True),
    }
    monkeypatch.setitem(CONTESTANTS, "small", tiny)

    def compare(*arguments):
        quality.main(
            [
                *("--data_dir", str(real_image_dir), "--held_out_split", "train", "--output", str(tmp_path)),
                *("--contestants", *tiny, "--batch_size", "4", "--points", "0.5", "1", "--num_samples", "4"),
                *("--num_inference_steps", "1", *arguments),
            ]
        )
        return capsys.readouterr().out

    return compare


@pytest.mark.slow
def test_it_compares_resumes_and_refuses_other_conditions(compare, tmp_path):
    flops = ("--training_tflop", "0.0004", "--points", "1")
    printed = compare("--seeds", "0", *flops, "--contestants", "dit", "dim")
    assert re.search(r"DiT: 0\.0\d\dM parameters, 0\.0\d GFLOP .* ms per step, \d+ steps of 4 images", printed)
    assert "| ratio after 0.000" in printed and "| distance at the end, 95% interval |" in printed
    for name in ("quality.png", "samples.png"):
        assert (tmp_path / name).stat().st_size > 1000
    report = json.loads((tmp_path / "quality.json").read_text())
    rows = {row["contestant"]: row for row in report["summary"]}
    assert rows.keys() == {"DiT", "DiM"} and "difference" not in rows["DiT"]
    difference = rows["DiM"]["difference"]
    assert difference["low"] <= difference["high"]
    assert difference["percent"] == pytest.approx(100 * (rows["DiM"]["ratios"]["tflop"] - 1), rel=0.01)
    for run in report["runs"]:
        (whole,) = run["points"]
        assert whole["scores"]["frechet_distance"] > 0 and whole["steps"] == run["steps"]
        assert whole["tflop"] == pytest.approx(run["steps"] * 4 * run["training_flops"] / 1e12)
        assert whole["tflop"] <= 0.0004 < whole["tflop"] * (1 + 1 / run["steps"])
        assert whole["seconds"] == run["steps"] * run["step_seconds"]
        assert whole["score_names"]["frechet_distance"] == "Fréchet distance (efficientnet-lite0)"

    before = (tmp_path / "dit" / "seed-0" / "result.json").stat().st_mtime_ns
    compare("--seeds", "0", "1", *flops, "--contestants", "dit")
    assert (tmp_path / "dit" / "seed-0" / "result.json").stat().st_mtime_ns == before
    assert len(json.loads((tmp_path / "quality.json").read_text())["runs"]) == 3
    compare("--seeds", "0", *flops, "--contestants", "pisdm_residual")  # the report knows all that is there
    report = json.loads((tmp_path / "quality.json").read_text())
    assert {row["contestant"] for row in report["summary"]} == {"DiT", "DiM", "PIS-DM, residual cascade"}


@pytest.mark.slow
def test_equal_time_gives_cheaper_steps_more_of_them(compare, tmp_path):
    seconds = {"dit": 0.5, "pisdm_residual": 0.09}
    (tmp_path / "step_seconds.json").write_text(json.dumps(seconds))
    compare("--seeds", "0", "--training_minutes", "0.011", "--contestants", *seconds)
    for name, steps in {"dit": [1], "pisdm_residual": [4, 7]}.items():
        run = json.loads((tmp_path / name / "seed-0" / "result.json").read_text())
        assert [point["steps"] for point in run["points"]] == steps


class Prepared(Exception):
    """All has been checked that can be without computing anything."""


@pytest.fixture
def check(compare, monkeypatch):
    """The benchmark until it loads images."""

    def stop(*arguments):
        raise Prepared

    monkeypatch.setattr(quality, "load_images", stop)

    def check(*arguments):
        with pytest.raises(Prepared):
            compare(*arguments)

    return check


@pytest.mark.parametrize(
    "name, value",
    [
        ("learning_rate", "1e-4"),
        ("adam_beta1", "0.5"),
        ("training_tflop", "3"),
        ("training_minutes", "1"),
        ("num_samples", "5"),
        ("guidance_scale", "2"),
        ("features_weights", "weights.pth"),
    ],
)
def test_an_output_folder_is_of_one_comparison(compare, check, tmp_path, name, value):
    """From its first moment, as a run that was interrupted goes on in it."""
    check("--seeds", "0", "--contestants", "dit")
    check("--seeds", "1", "2", "--contestants", "dim")
    with pytest.raises(SystemExit, match=rf"error: .*{tmp_path.name}.*{name} was .*, is .*another folder"):
        compare(f"--{name}", value)
    check()


def test_the_tables_models_do_not_mix_with_others(compare, check):
    check()
    with pytest.raises(SystemExit, match="comparison was 'small', is 'table_1'"):
        compare("--comparison", "table_1", "--contestants", "full")


def test_runs_of_an_older_folder_are_compared_too(compare, check, tmp_path):
    check()
    conditions = json.loads((tmp_path / "conditions.json").read_text())
    (tmp_path / "conditions.json").unlink()
    run = tmp_path / "dit" / "seed-3"
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"conditions": conditions | {"batch_size": 7}}))
    with pytest.raises(SystemExit, match=r"seed-3 .*batch_size was 7, is 4"):
        compare()
    check("--batch_size", "7")  # what was refused has not claimed the folder


def test_data_that_cannot_be_read_is_told_before_anything_is_computed(compare, tmp_path):
    for arguments, message in {
        ("--held_out_split", "test"): r"error: .*'?test'?.*train",
        ("--data_dir", str(tmp_path / "nowhere")): "error: .*nowhere",
    }.items():
        with pytest.raises(SystemExit, match=message):
            compare(*arguments)
        assert not (tmp_path / "conditions.json").exists()


def test_a_reference_of_trained_images_is_warned_of(check, capsys):
    check()
    assert "Warning: the reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    [
        "--training_tflop -1",
        "--training_tflop nan",
        "--training_minutes 0",
        "--num_samples 1",
        "--num_inference_steps 0",
        "--batch_size 0",
        "--learning_rate 0",
        "--adam_beta1 1",
        "--seeds -1",
    ],
)
def test_values_out_of_range_are_named(compare, capsys, arguments):
    with pytest.raises(SystemExit):
        compare(*arguments.split())
    assert re.search(rf"error: argument {arguments.split()[0]}: must be", capsys.readouterr().err)


def test_points_rise_to_the_whole_run(compare, capsys):
    with pytest.raises(SystemExit):
        compare("--points", "0.5", "0.25", "1")
    assert "--points" in capsys.readouterr().err
