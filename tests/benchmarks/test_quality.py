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
    with pytest.raises(SystemExit, match="other conditions"):
        compare("--seeds", "0", *flops, "--guidance_scale", "2", "--contestants", "dit")


@pytest.mark.slow
def test_equal_time_gives_cheaper_steps_more_of_them(compare, tmp_path):
    seconds = {"dit": 0.5, "pisdm_residual": 0.09}
    (tmp_path / "step_seconds.json").write_text(json.dumps(seconds))
    compare("--seeds", "0", "--training_minutes", "0.011", "--contestants", *seconds)
    for name, steps in {"dit": [1], "pisdm_residual": [4, 7]}.items():
        run = json.loads((tmp_path / name / "seed-0" / "result.json").read_text())
        assert [point["steps"] for point in run["points"]] == steps


def test_points_rise_to_the_whole_run(compare, capsys):
    with pytest.raises(SystemExit):
        compare("--points", "0.5", "0.25", "1")
    assert "--points" in capsys.readouterr().err
