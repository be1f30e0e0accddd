from dataclasses import replace

import pytest
import torch

from benchmarks.peers import PEERS, UViT2DModel
from benchmarks.speed.candidates import PISDM, check_candidates, make_candidates, make_inputs, num_tokens
from diffusers_pisdm import PISDMTransformer2DModel
from diffusers_pisdm.ops import selective_scan
from diffusers_pisdm.training.cost.flops import StepTrace


CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def candidates():
    return {candidate.name: candidate for candidate in make_candidates({"num_layers": 24, "hidden_size": 64})}


def test_all_have_the_parameters_they_say(candidates):
    assert list(candidates) == [PISDM, *PEERS]
    for candidate in candidates.values():
        for image_size in (64, 128):  # at any size
            assert candidate.build(image_size).num_parameters() == candidate.parameters
        assert candidate.parameters == pytest.approx(candidates[PISDM].parameters, rel=0.05)
        assert len(candidate.build(64, 6).transformer_blocks) == 6


@pytest.mark.parametrize("name", [PISDM, *PEERS])
def test_a_stack_lacks_the_memory_of_the_skips_it_has_not(candidates, name):
    candidate, inputs = candidates[name], make_inputs(2, 512, CPU, torch.float32)

    def peak_bytes(num_layers):
        model = candidate.build(512, num_layers)
        with torch.no_grad(), StepTrace() as trace:
            for tensor in (*model.parameters(), *model.buffers()):
                trace.ignore(tensor)
            model(*inputs, return_dict=False)
        return trace.peak_bytes

    missing = candidate.missing_skip_bytes(4, 2, 512, torch.float32)
    assert (missing > 0) == candidate.has_long_skips
    assert peak_bytes(4) + missing == pytest.approx(peak_bytes(candidate.num_layers), rel=0.05)


def test_casting_keeps_what_has_to_be_float32(candidates):
    model = candidates[PISDM].build(64, 4, torch.bfloat16)
    dtypes = {name.split(".")[-1]: parameter.dtype for name, parameter in model.named_parameters()}
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == {"A_log", "D", "dt_bias"}
    for candidate in candidates.values():
        inputs = make_inputs(1, 64, CPU, torch.bfloat16)
        with torch.no_grad():
            sample = candidate.build(64, 4, torch.bfloat16)(*inputs).sample
        assert sample.dtype == torch.bfloat16 and torch.isfinite(sample).all()


def test_number_of_tokens():
    assert [num_tokens(size) for size in (256, 512, 2048)] == [256, 1024, 16384]


def test_all_are_right(candidates):
    errors = check_candidates(list(candidates.values()), CPU)
    assert list(errors) == [PISDM, *PEERS]
    assert all(0 < error < 1e-5 for error in errors.values())


def test_a_wrong_one_is_named(candidates):
    class Wrong(UViT2DModel):
        def forward(self, hidden_states, *arguments, **options):
            sample, features = super().forward(hidden_states, *arguments, **options)
            return sample * (1.001 if hidden_states.dtype == torch.float32 else 1), features

    with pytest.raises(RuntimeError, match=r"^U-ViT differ from float64"):
        check_candidates([replace(candidates["U-ViT"], model_class=Wrong)], CPU)


def test_a_wrong_kernel_is_found(candidates, monkeypatch):
    def skip_gate(*arguments, z=None, **options):
        return selective_scan(*arguments, **options)

    class Wrong(PISDMTransformer2DModel):
        def forward(self, hidden_states, *arguments, **options):
            with monkeypatch.context() as patch:
                if hidden_states.dtype == torch.float32:
                    patch.setattr("diffusers_pisdm.models.transformer_pisdm.selective_scan", skip_gate)
                return super().forward(hidden_states, *arguments, **options)

    with pytest.raises(RuntimeError, match="find the faulty kernel"):
        check_candidates([replace(candidates[PISDM], model_class=Wrong)], CPU)
