import json

import pytest
from PIL import Image

from benchmarks.equal_budget.report import distance_at, format_table, plot_quality, plot_samples, summarize


def result(contestant, seed, distances, tflop=4.0, seconds=8.0):
    shares = [0.25, 0.5, 1.0]
    return {
        "contestant": contestant,
        "seed": seed,
        "steps": 100,
        "parameters": 1_000_000,
        "training_flops": 2_500_000_000,
        "step_seconds": 0.0625,
        "points": [
            {
                "tflop": share * tflop,
                "seconds": share * seconds,
                "scores": {"frechet_distance": distance, "precision": 0.5, "recall": 0.25},
                "score_names": {"frechet_distance": "Fréchet distance (efficientnet-lite0)"},
            }
            for share, distance in zip(shares, distances)
        ],
    }


RESULTS = [
    result("DiT", 0, [360.0, 180.0, 90.0]),
    result("DiT", 1, [440.0, 220.0, 110.0]),
    result("PIS-DM", 0, [316.0, 158.0, 79.0], seconds=16.0),
    result("PIS-DM", 1, [324.0, 162.0, 81.0], seconds=16.0),
]


def test_curves_are_lines_in_logarithms():
    own = RESULTS[0]  # its distance is 360 / TFLOP
    assert [distance_at(own, "tflop", budget) for budget in (1.0, 3.0, 4.0)] == pytest.approx([360.0, 120.0, 90.0])
    assert distance_at(own, "seconds", 6.0) == pytest.approx(120.0)


def test_the_table_has_ratios_means_and_spreads_best_first():
    best, worst = summarize(RESULTS, baseline="DiT")
    assert best["budgets"] == {"tflop": 4.0, "seconds": 8.0}  # what all have reached
    assert (best["contestant"], best["seeds"]) == ("PIS-DM", [0, 1])
    assert best["ratios"] == pytest.approx({"tflop": 0.8, "seconds": 1.6})  # in 8 seconds it is half way
    assert worst["distances"] == pytest.approx({"tflop": 100.0, "seconds": 100.0})
    assert worst["spreads"]["tflop"] == pytest.approx(200**0.5)
    header, _, first, _ = format_table([best, worst]).splitlines()
    assert header.startswith("|  | ratio after 4 TFLOP | ratio after 8 s |")
    assert first.startswith("| PIS-DM | 0.80 | 1.60 | 80 ± 1.4 | 160 ± 2.8 | 0.5 | 0.25 | 1.000M | 2.50 | 62.5 | 2 |")


def test_one_seed_has_no_spread_and_without_the_baseline_there_is_no_ratio():
    (row,) = summarize(RESULTS[:1], baseline="other")
    assert row["spreads"]["tflop"] is None and row["ratios"]["tflop"] is None
    assert json.loads(json.dumps(row)) == row
    assert "±" not in format_table([row])


def test_pictures(tmp_path):
    plot_quality(RESULTS, tmp_path / "quality.png")
    for name in ("dit", "pisdm"):
        for sample in range(30):
            file = tmp_path / name / "seed-0" / "share-1" / "samples" / "000" / f"{sample:06}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), "red" if name == "dit" else "blue").save(file)
    plot_samples(tmp_path, {"dit": "DiT", "pisdm": "PIS-DM", "absent": "not run"})
    with Image.open(tmp_path / "samples.png") as picture:
        assert picture.width / picture.height > 5  # 24 columns and two rows
        colours = {colour for _, colour in picture.convert("RGB").getcolors(100_000)}
        assert {(255, 0, 0), (0, 0, 255)} <= colours
    with Image.open(tmp_path / "quality.png") as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 10
