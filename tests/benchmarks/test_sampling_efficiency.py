import inspect
import json

import pytest
from PIL import Image

from benchmarks import sampling_efficiency
from benchmarks.sampling_efficiency import SamplerSettings, sampler_grid
from diffusers_pisdm import PISDMCascadePipeline
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


@pytest.mark.slow
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


def test_the_grid_is_two_products_that_share_their_first_way():
    grid = sampler_grid(["A", "B"], [20, 5], [2.0, 1.0, 4.0], [(0.0, 1.0), (0.2, 0.8)])
    assert len(grid) == len(set(grid)) == 4 + 4
    assert {(way.scheduler, way.steps) for way in grid[:4]} == {("A", 20), ("A", 5), ("B", 20), ("B", 5)}
    guidance = [way for way in grid if (way.scheduler, way.steps) == ("A", 20)]
    assert [way.guidance_label for way in guidance] == [
        "w = 2", "w = 2 in 0.2 to 0.8", "w = 1", "w = 4", "w = 4 in 0.2 to 0.8",
    ]  # fmt: skip
    assert len({way.name for way in grid}) == len(grid)


def test_every_argument_is_one_of_the_pipelines_and_reaches_the_sample_set():
    way = SamplerSettings("DDIMScheduler", 7, 3.0, 0.25, 0.75)
    arguments = way.call_arguments()
    assert set(arguments) <= set(inspect.signature(PISDMCascadePipeline.__call__).parameters)
    settings = way.sample_settings(10, seed=3)
    assert (settings.num_samples, settings.seed, settings.scheduler) == (10, 3, "DDIMScheduler")
    assert {name: getattr(settings, name) for name in arguments} == arguments
    assert sorted(arguments.values()) == [0.25, 0.75, 3.0, 7]


def test_unguided_sampling_has_no_interval():
    grid = sampler_grid(["A"], [20], [1.0], [(0.0, 1.0), (0.2, 0.8)])
    assert len(grid) == 1 and grid[0].guidance_label == "w = 1"


def test_settings_are_values():
    assert SamplerSettings() == SamplerSettings() and hash(SamplerSettings()) == hash(SamplerSettings())
    with pytest.raises(AttributeError):
        SamplerSettings().steps = 3
