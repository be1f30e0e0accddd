import pytest
import torch

from benchmarks.block_pair import BlockPair
from benchmarks.block_shares import ELSEWHERE, PARTS, part_of, time_shares
from benchmarks.candidates import make_candidates


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
