import pytest

from benchmarks.peers import PEERS, equal_parameters
from benchmarks.peers.equal_parameters import count_parameters
from diffusers_pisdm import PISDM_SIZES, PISDMTransformer2DModel


@pytest.mark.parametrize(("peer", "num_layers"), [("U-ViT", 28), ("DiT", 20), ("DiM", 49)])
def test_peers_of_the_papers_model(peer, num_layers):
    found = equal_parameters(PISDM_SIZES["H"], peer)
    assert found.config.items() >= {"num_layers": num_layers, "hidden_size": 1536}.items()
    assert found.config.get("num_heads") == (None if peer == "DiM" else 24)
    assert found.parameters == count_parameters(PEERS[peer], found.config)
    assert found.pisdm_parameters == count_parameters(PISDMTransformer2DModel, PISDM_SIZES["H"])
    assert abs(found.difference) < 0.005


@pytest.mark.parametrize("peer", PEERS)
def test_the_nearest_depth_is_found(peer):
    found = equal_parameters({"num_layers": 24, "hidden_size": 64, "num_classes": 10}, peer)
    depth = found.config["num_layers"]
    fewer, here, more = (
        count_parameters(PEERS[peer], {**found.config, "num_layers": layers})
        for layers in (depth - 1, depth, depth + 1)
    )
    assert found.parameters == here
    assert abs(found.parameters - found.pisdm_parameters) == min(
        abs(count - found.pisdm_parameters) for count in (fewer, here, more)
    )


def test_the_peer_takes_what_pisdm_takes():
    config = {"sample_size": 16, "in_channels": 3, "patch_size": 4, "num_classes": 7}
    found = equal_parameters({**config, "num_layers": 24, "hidden_size": 64}, "U-ViT", head_size=16)
    assert found.config.items() >= {**config, "num_heads": 4}.items()


def test_what_cannot_be_compared():
    with pytest.raises(ValueError, match="multiple of `head_size` \\(64\\), got 96"):
        equal_parameters({"num_layers": 4, "hidden_size": 96}, "U-ViT")
    with pytest.raises(ValueError, match="No depth of DiT at width 128 comes within 5%"):
        equal_parameters({"num_layers": 1, "hidden_size": 128, "num_classes": 1}, "DiT")
