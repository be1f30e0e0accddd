from dataclasses import replace

import pytest
import torch

from benchmarks.candidates import PISDM, make_candidates
from benchmarks.check_candidates import check_candidates
from benchmarks.peers import PEERS, UViT2DModel
from diffusers_pisdm import PISDMTransformer2DModel
from diffusers_pisdm.ops import selective_scan


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def candidates():
    return make_candidates({"num_layers": 24, "hidden_size": 64})


def test_all_are_right(candidates):
    errors = check_candidates(candidates, CPU)
    assert list(errors) == [PISDM, *PEERS]
    assert all(0 < error < 1e-5 for error in errors.values())


def test_a_wrong_one_is_named(candidates):
    class Wrong(UViT2DModel):
        def forward(self, hidden_states, *arguments, **options):
            sample, features = super().forward(hidden_states, *arguments, **options)
            return sample * (1.001 if hidden_states.dtype == torch.float32 else 1), features

    with pytest.raises(RuntimeError, match=r"^U-ViT differ from float64"):
        check_candidates([replace(candidate, model_class=Wrong) for candidate in candidates[1:2]], CPU)


def test_a_wrong_kernel_is_found(candidates, monkeypatch):
    def skip_gate(*arguments, z=None, **options):
        return selective_scan(*arguments, **options)

    class Wrong(PISDMTransformer2DModel):
        def forward(self, hidden_states, *arguments, **options):
            with monkeypatch.context() as patch:
                if hidden_states.dtype == torch.float32:
                    patch.setattr("diffusers_pisdm.models.transformer_pisdm.selective_scan", skip_gate)
                return super().forward(hidden_states, *arguments, **options)

    with pytest.raises(RuntimeError, match="find the kernel at fault"):
        check_candidates([replace(candidates[0], model_class=Wrong)], CPU)
