import json
import re

import pytest

from benchmarks import quality
from benchmarks.equal_budget.contestants import CONTESTANTS, Contestant
from benchmarks.equal_budget.training import TrainingSettings
from benchmarks.peers import DiTPeer
from diffusers_pisdm import DiMTransformer2DModel


PISDM = {"patch_size": 2, "in_channels": 3, "num_layers": 2, "hidden_size": 16, "state_size": 4}
DIT = {"patch_size": 2, "in_channels": 3, "num_layers": 1, "hidden_size": 16, "num_heads": 2}


@pytest.fixture
def compare(monkeypatch, tmp_path, real_image_dir, capsys):
    """The benchmark, at a size of seconds."""
    monkeypatch.setitem(CONTESTANTS, "dit", Contestant("DiT", [{"sample_size": 8, **DIT}], stage_class=DiTPeer))
    dim = Contestant("DiM", [{"sample_size": 8, **PISDM, "num_layers": 3}], stage_class=DiMTransformer2DModel)
    monkeypatch.setitem(CONTESTANTS, "dim", dim)
    monkeypatch.setitem(CONTESTANTS, "pisdm", Contestant("PIS-DM, one stage", [{"sample_size": 8, **PISDM}]))
    monkeypatch.setattr(quality, "TrainingSettings", lambda: TrainingSettings(batch_size=4))

    def compare(*arguments):
        quality.main(
            [
                *("--data_dir", str(real_image_dir), "--held_out_split", "train", "--output", str(tmp_path)),
                *("--contestants", "dit", "dim", "pisdm", "--training_tflop", "0.0004", "--num_samples", "4"),
                *("--num_inference_steps", "1", *arguments),
            ]
        )
        return capsys.readouterr().out

    return compare


def test_it_compares_resumes_and_refuses_other_conditions(compare, tmp_path):
    printed = compare("--seeds", "0")
    assert re.search(r"PIS-DM, one stage: 0\.0\d\dM parameters, 0\.0\d GFLOP .* \d+ steps of 4 images", printed)
    assert "| ratio |" in printed
    for name in ("quality.png", "samples.png"):
        assert (tmp_path / name).stat().st_size > 1000
    report = json.loads((tmp_path / "quality.json").read_text())
    assert {row["contestant"] for row in report["summary"]} == {"DiT", "DiM", "PIS-DM, one stage"}
    assert all(run["scores"]["frechet_distance"] > 0 for run in report["runs"])
    assert report["runs"][0]["score_names"]["frechet_distance"] == "Fréchet distance (efficientnet-lite0)"

    before = (tmp_path / "pisdm" / "seed-0" / "result.json").stat().st_mtime_ns
    compare("--seeds", "0", "1")
    assert (tmp_path / "pisdm" / "seed-0" / "result.json").stat().st_mtime_ns == before
    assert len(json.loads((tmp_path / "quality.json").read_text())["runs"]) == 6
    with pytest.raises(SystemExit, match="other conditions"):
        compare("--seeds", "0", "--guidance_scale", "2")
