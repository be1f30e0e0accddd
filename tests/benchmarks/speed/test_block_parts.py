import pytest
import torch

from benchmarks.speed.block_parts import ELSEWHERE, PARTS, BlockPair, median_seconds, part_of, time_shares
from benchmarks.speed.candidates import PISDM, make_candidates, num_tokens


WIDTH, IMAGE = 64, 64
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def pairs():
    candidates = make_candidates({"num_layers": 24, "hidden_size": WIDTH})
    return {candidate.name: BlockPair.build(candidate, IMAGE, 1, CPU, torch.float32) for candidate in candidates}


def test_parameters(pairs):
    square = WIDTH**2
    # adaLN: six vectors of the width, from one, in each of DiT's blocks.
    modulation = 2 * (6 * square + 6 * WIDTH)
    assert pairs["DiT"].parameters - pairs["DiT"].token_parameters == modulation
    assert 24 * square < pairs["DiT"].token_parameters < 25 * square
    for name in (PISDM, "U-ViT"):
        own = {id(parameter): parameter.numel() for block in pairs[name].blocks for parameter in block.parameters()}
        assert pairs[name].parameters == pairs[name].token_parameters == sum(own.values())


def test_the_blocks_are_one_of_each_half(pairs):
    plain, with_skip = pairs[PISDM].blocks
    assert not hasattr(plain, "skip_proj") and hasattr(with_skip, "skip_proj")
    plain, with_skip = pairs["U-ViT"].blocks
    assert plain.skip_proj is None and with_skip.skip_proj is not None


def test_arguments_are_those_of_a_pass(pairs):
    for name, pair in pairs.items():
        arguments = pair.arguments()
        assert len(arguments) == 2
        for block, (given, named) in zip(pair.blocks, arguments):
            tokens = given[0]
            assert tokens.shape[0] == 1 and tokens.shape[2] == WIDTH and tokens.shape[1] >= num_tokens(IMAGE)
            with torch.no_grad():
                assert block(*given, **named).shape == tokens.shape
        assert not any(block._forward_pre_hooks for block in pair.blocks), name


def test_memory_holds_at_least_what_goes_in(pairs):
    for pair in pairs.values():
        peak = pair.peak_bytes()
        if peak is not None:  # where it can be measured
            assert peak >= sum(tensor.nbytes for tensor in pair.arguments()[1][0])


def test_pairs_take_turns(pairs, monkeypatch):
    order = []

    def seconds(self):
        order.append(self)
        return float(len(order))

    monkeypatch.setattr(BlockPair, "seconds", seconds)
    few = {name: pairs[name] for name in (PISDM, "DiT")}
    # A warm-up each (1, 2), then 3, 5, 7 and 4, 6, 8.
    assert median_seconds(few, repeats=3) == {PISDM: 5.0, "DiT": 6.0}
    assert order == [*few.values()] * 4


def test_a_pass_takes_time(pairs):
    assert all(pair.seconds() > 0 for pair in pairs.values())


@pytest.mark.parametrize(
    ("operator", "part"),
    [
        ("aten::addmm", "matrix products"),
        ("diffusers_pisdm::selective_scan_numba", "scan"),
        ("diffusers_pisdm::causal_conv_numba", "convolution"),
        ("aten::add", "norm, modulation, gate"),
        ("aten::add_", ELSEWHERE),
        ("aten::cat", "reordering"),
        ("aten::empty", ELSEWHERE),
    ],
)
def test_parts(operator, part):
    assert part_of(operator) == part


def test_shares_of_a_block():
    candidate, *_ = make_candidates({"num_layers": 24, "hidden_size": 128})
    pair = BlockPair.build(candidate, 256, 1, torch.device("cpu"), torch.float32)
    shares = time_shares(pair, repeats=2)
    assert shares.keys() == {*PARTS, ELSEWHERE}
    assert sum(shares.values()) == pytest.approx(1)
    assert all(shares[part] > 0 for part in PARTS)
    assert shares[ELSEWHERE] < 0.5  # no large part is forgotten
