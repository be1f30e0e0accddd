import pytest
import torch

from diffusers_pisdm.training.noise import RowNoise, noise_seed


DRAWS = {
    "normal": lambda noise, rows: noise.normal(rows, 3, 2),
    "uniform": lambda noise, rows: noise.uniform(rows, 5, 3),
    "integers": lambda noise, rows: noise.integers(7, rows),
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize("num_processes", [2, 3])
def test_processes_share_the_rows_of_one(draw, num_processes):
    alone = RowNoise(11, torch.device("cpu"))
    processes = [RowNoise(11, torch.device("cpu"), rank, num_processes) for rank in range(num_processes)]
    for _ in range(2):  # the second draw too
        rows = draw(alone, 6)
        for rank, noise in enumerate(processes):
            assert torch.equal(draw(noise, 6 // num_processes), rows[rank::num_processes])


def test_numbers_have_the_shape_and_the_distribution_they_say():
    noise = RowNoise(0, torch.device("cpu"))
    assert [x.shape for x in (noise.normal(2, 3, 4), noise.uniform(5), noise.integers(9, 2, 3))] == [
        (2, 3, 4),
        (5,),
        (2, 3),
    ]
    normal, uniform, integers = noise.normal(10_000), noise.uniform(10_000), noise.integers(5, 10_000)
    assert abs(normal.mean()) < 0.05 and abs(normal.std() - 1) < 0.05
    assert 0 <= uniform.min() < 0.01 and 0.99 < uniform.max() < 1
    assert integers.unique().tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
def test_a_generator_stands_for_its_seed_and_decides_the_device(draw):
    expected = draw(RowNoise(11, torch.device("cpu")), 6)
    generator = torch.Generator().manual_seed(11)
    with torch.device("meta"):  # the default device, where no numbers are
        for noise in (RowNoise(generator, torch.device("meta")), RowNoise(11, torch.device("cpu"))):
            assert noise.generator.device.type == "cpu"
            assert torch.equal(draw(noise, 6), expected)
    generator.manual_seed(11)
    assert torch.equal(draw(RowNoise(generator, torch.device("cpu")), 6), expected)  # not a copy of the generator


def test_a_place_has_one_seed_and_no_two_places_share_one():
    places = [
        (seed, process, epoch, step) for seed in (0, 1) for process in (0, 1) for epoch in (0, 1) for step in range(50)
    ]
    seeds = {noise_seed(*place) for place in places}
    assert len(seeds) == len(places)
    assert noise_seed(0, 1, 0, 7) in seeds
    assert 2**62 < max(seeds) < 2**63 and min(seeds) >= 0  # all 63 bits are used


def test_neighbouring_places_draw_unrelated_noise():
    noise = torch.stack(
        [torch.randn(4096, generator=torch.Generator().manual_seed(noise_seed(0, i))) for i in range(8)]
    )
    correlation = torch.corrcoef(noise) - torch.eye(8)
    assert correlation.abs().max() < 0.08
