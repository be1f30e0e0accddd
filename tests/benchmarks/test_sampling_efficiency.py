import json

import pytest
from PIL import Image

from benchmarks import sampling_efficiency
from diffusers_pisdm.evaluation import missing_samples
from tests.pipelines.tiny_cascade import make_cascade


@pytest.fixture
def measure(tmp_path, real_image_dir, capsys):
    make_cascade().save_pretrained(tmp_path / "model")

    def measure(*arguments):
        sampling_efficiency.main(
            [
                *("--model", str(tmp_path / "model"), "--data_dir", str(real_image_dir)),
                *("--output", str(tmp_path / "out"), "--num_samples", "5", "--timed_images", "2", "--repeats", "2"),
                *("--schedulers", "DPMSolverMultistepScheduler", "DDIMScheduler", "--steps", "2", "1"),
                *("--guidance_scales", "2", "1", "--intervals", "0:1", "0.5:1", *arguments),
            ]
        )
        return capsys.readouterr().out

    return measure


def test_ways_are_drawn_in_parts_evaluated_timed_and_not_done_again(measure, tmp_path):
    out = tmp_path / "out"
    measure("--part", "0", "2")
    assert len([path for path in out.iterdir() if path.is_dir()]) == 3
    assert not (out / "sampling_efficiency.json").exists()
    printed = measure()
    ways = [path for path in out.iterdir() if path.is_dir()]
    assert len(ways) == 2 * 2 + 3 - 1  # schedulers x steps, guidance x intervals, one of which is in both
    assert all(missing_samples(way) == [] for way in ways)
    report = json.loads((out / "sampling_efficiency.json").read_text())
    assert len(report["rows"]) == 6 and report["num_reference"] == 48
    assert all(row["frechet_distance"] > 0 for row in report["rows"])
    assert all(len(row["all_seconds_per_image"]) == 2 and row["seconds_per_image"] > 0 for row in report["rows"])
    table = [line for line in printed.splitlines() if line.startswith("| ") and "s/image" not in line]
    distances = [float(line.split("|")[4]) for line in table]
    assert len(table) == 6 and distances == sorted(distances)
    with Image.open(out / "sampling_efficiency.png") as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 10

    times = {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")}
    measure()
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/result.json")} == times


def test_an_interval_that_is_none_is_refused(measure, capsys):
    with pytest.raises(SystemExit):
        measure("--intervals", "0.5")
    assert "--intervals takes start:stop" in capsys.readouterr().err
