import pytest
import torch

from benchmarks.measuring.timing import PassTime, time_pass, whole_seconds
from benchmarks.speed.candidates import PISDM, make_candidates, make_inputs


@pytest.mark.parametrize(("num_layers", "wanted"), [(49, 3 + 25 * 2 + 24 * 5), (28, 3 + 14 * 2 + 14 * 5)])
def test_a_stack_tells_the_time_of_the_whole(num_layers, wanted):
    # 3 seconds outside of the layers, 2 in one of the first half and 5 in one of the second.
    assert whole_seconds(PassTime(3 + 2 * 2 + 2 * 5, (2, 2, 5, 5)), num_layers) == pytest.approx(wanted)


def test_the_first_layers_of_the_halves_are_no_example():
    layers = (1, 2, 3, 4, 10, 20)  # 2.5 and 15 for each that is missing
    assert whole_seconds(PassTime(sum(layers), layers), 8) == pytest.approx(40 + 2.5 + 15)


def test_every_layer_is_timed():
    candidates = make_candidates({"num_layers": 24, "hidden_size": 64})
    inputs = make_inputs(1, 64, torch.device("cpu"), torch.float32)
    for candidate in candidates:
        model = candidate.build(64, 6)
        time_pass(model, inputs)  # compiles PIS-DM's kernels
        found = time_pass(model, inputs, by_layer=True)
        assert len(found.layers) == 6 and min(found.layers) > 0
        assert sum(found.layers) < found.seconds
        assert not any(block._forward_hooks or block._forward_pre_hooks for block in model.transformer_blocks)
        assert time_pass(model, inputs).layers == ()
    assert candidates[0].name == PISDM
