import inspect

import pytest

from benchmarks.sampler_settings import SamplerSettings, sampler_grid
from diffusers_pisdm import PISDMCascadePipeline


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
