import torch

from diffusers_pisdm.training.seeds import noise_seed


def test_a_place_has_one_seed_and_no_two_places_share_one():
    places = [
        (seed, process, epoch, step) for seed in (0, 1) for process in (0, 1) for epoch in (0, 1) for step in range(50)
    ]
    seeds = {noise_seed(*place) for place in places}
    assert len(seeds) == len(places)
    assert noise_seed(0, 1, 0, 7) in seeds
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_neighbouring_places_draw_unrelated_noise():
    noise = torch.stack(
        [torch.randn(4096, generator=torch.Generator().manual_seed(noise_seed(0, i))) for i in range(8)]
    )
    correlation = torch.corrcoef(noise) - torch.eye(8)
    assert correlation.abs().max() < 0.08
