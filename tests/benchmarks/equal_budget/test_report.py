import json

import pytest
from PIL import Image

from benchmarks.equal_budget.report import format_table, plot_quality, plot_samples, summarize


def result(contestant, seed, distance):
    return {
        "contestant": contestant,
        "seed": seed,
        "steps": 100,
        "parameters": 1_000_000,
        "training_flops": 2_500_000_000,
        "scores": {"frechet_distance": distance, "precision": 0.5},
        "score_names": {"frechet_distance": "Fréchet distance (efficientnet-lite0)", "precision": "precision"},
        "conditions": {"training_tflop": 20.0},
    }


RESULTS = [result("DiT", 0, 90.0), result("DiT", 1, 110.0), result("PIS-DM", 0, 79.0), result("PIS-DM", 1, 81.0)]


def test_the_table_has_ratios_means_and_spreads_best_first():
    best, worst = summarize(RESULTS, baseline="DiT")
    assert (best["contestant"], best["ratio"], best["seeds"]) == ("PIS-DM", 0.8, [0, 1])
    assert (worst["scores"]["frechet_distance"], worst["ratio"]) == (100.0, 1.0)
    assert worst["spreads"]["frechet_distance"] == pytest.approx(200**0.5)
    rows = format_table([best, worst]).splitlines()
    assert rows[2].startswith("| PIS-DM | 0.80 | 80 ± 1.4 | 0.5 ± 0 | 1.000M | 2.50 | 100 | 2 |")


def test_one_seed_has_no_spread_and_without_the_baseline_there_is_no_ratio():
    (row,) = summarize(RESULTS[:1], baseline="other")
    assert row["spreads"]["frechet_distance"] is None and row["ratio"] is None
    assert json.loads(json.dumps(row)) == row
    assert "±" not in format_table([row])


def test_pictures(tmp_path):
    plot_quality(RESULTS, tmp_path / "quality.png")
    for name in ("dit", "pisdm"):
        for sample in range(30):
            file = tmp_path / name / "seed-0" / "samples" / "000" / f"{sample:06}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), "red" if name == "dit" else "blue").save(file)
    plot_samples(tmp_path, {"dit": "DiT", "pisdm": "PIS-DM", "absent": "not run"})
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.width / picture.height > 5  # 24 columns and two rows
        colours = {colour for _, colour in picture.convert("RGB").getcolors(100_000)}
        assert {(255, 0, 0), (0, 0, 255)} <= colours
    with Image.open(tmp_path / "quality.png") as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 10
