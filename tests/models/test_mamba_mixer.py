"""The Mamba mixer against an independent implementation: transformers' MambaMixer without kernels."""

import pytest
import torch

from benchmarks.peers.slow_mixer import SlowMixer, slow_name
from diffusers_pisdm.models.transformer_pisdm import PISDMMambaMixer


# hidden_size, state_size, conv_kernel, expand, time_step_rank, batch, length
SHAPES = [(16, 4, 3, 2, 1, 2, 17), (32, 16, 4, 2, 2, 1, 40), (24, 8, 2, 1, 5, 3, 9), (8, 1, 3, 3, 1, 2, 1)]


def make_pair(hidden_size, state_size, conv_kernel, expand, rank, seed=0):
    """Both mixers with the same random weights."""
    torch.manual_seed(seed)
    mixer = PISDMMambaMixer(hidden_size, state_size, conv_kernel, expand, rank)
    for parameter in (mixer.A_log, mixer.D, mixer.dt_bias):
        parameter.data += torch.randn_like(parameter) * 0.3  # away from the regular values they start at
    for linear in (mixer.in_proj, mixer.x_proj, mixer.dt_proj):
        linear.weight.data *= 4  # as they start, the skip `D` hides the scan
    oracle = SlowMixer(mixer)
    assert {slow_name(name) for name in mixer.state_dict()} == oracle.mixer.state_dict().keys()
    return mixer, oracle


def assert_near(ours, theirs, name):
    """Equal to 1e-5 of the largest entry."""
    error, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    assert error <= 1e-5 * scale, f"{name}: {error:.1e} of {scale:.1e}"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_equal_the_oracles(shape):
    *sizes, batch, length = shape
    mixer, oracle = make_pair(*sizes)
    tokens = torch.randn(batch, length, sizes[0])
    grad = torch.randn(batch, length, sizes[0])
    ours, theirs = tokens.clone().requires_grad_(), tokens.clone().requires_grad_()

    out, expected = mixer(ours), oracle(theirs)
    assert_near(out, expected, "output")
    out.backward(grad)
    expected.backward(grad)
    assert_near(ours.grad, theirs.grad, "input")
    gradients = {name: parameter.grad for name, parameter in oracle.mixer.named_parameters()}
    for name, parameter in mixer.named_parameters():
        assert_near(parameter.grad, gradients[slow_name(name)], name)


def test_step_bias_is_the_oracles_projection_bias():
    """A larger bias means larger steps; both mixers must see it in the same place."""
    mixer, oracle = make_pair(16, 4, 3, 2, 1)
    tokens = torch.randn(1, 12, 16)
    before = mixer(tokens)
    mixer.dt_bias.data += 2.0
    assert (mixer(tokens) - before).norm() > 0.1 * before.norm()
    assert (mixer(tokens) - oracle(tokens)).norm() > 0.1 * before.norm()
    oracle.mixer.dt_proj.bias.data += 2.0
    assert_near(mixer(tokens), oracle(tokens), "output")


def test_is_causal():
    mixer, _ = make_pair(16, 4, 3, 2, 1)
    tokens = torch.randn(1, 10, 16)
    changed = tokens.clone()
    changed[:, 6] += 1.0
    difference = (mixer(changed) - mixer(tokens)).abs().amax((0, 2))
    assert torch.equal(difference[:6], torch.zeros(6))
    assert (difference[6:] > 0).all()


def test_starts_with_the_steps_and_rates_of_the_mamba_paper():
    torch.manual_seed(0)
    mixer = PISDMMambaMixer(64, 16, 3, 2, 4)
    steps = torch.nn.functional.softplus(mixer.dt_bias)
    assert 1e-3 * 0.999 <= steps.min() < 2e-3
    assert 0.05 < steps.max() <= 0.1 * 1.001
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    assert torch.equal(mixer.D, torch.ones(128))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_single(dtype):
    mixer, _ = make_pair(32, 8, 3, 2, 2)
    tokens = torch.randn(2, 20, 32).to(dtype)
    half, _ = make_pair(32, 8, 3, 2, 2)
    for name, parameter in half.named_parameters():
        if name not in ("A_log", "D", "dt_bias"):
            parameter.data = parameter.data.to(dtype)
    out, expected = half(tokens), mixer(tokens.float())
    assert out.dtype == dtype
    assert (out.float() - expected).norm() / expected.norm() < (2e-2 if dtype == torch.bfloat16 else 3e-3)


def test_what_steers_the_scan_is_taken_in_single_precision():
    """Also where a user has cast all of the model."""
    half = make_pair(32, 8, 3, 2, 2)[0].bfloat16()
    tokens = torch.randn(2, 20, 32).bfloat16()
    out = half(tokens)
    for parameter in (half.A_log, half.D, half.dt_bias):
        parameter.data = parameter.data.float()
    assert torch.equal(out, half(tokens))
