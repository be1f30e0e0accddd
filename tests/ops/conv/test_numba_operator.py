import math

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_pisdm.ops.conv.numba_operator import causal_conv_numba
from tests.ops.conv.test_dispatch import convolve_by_definition, make_inputs, relative_error, run


pytest.importorskip("numba")


# Chunks of 32 steps, groups of 16 channels: below, at and above each of these, and filters longer than a chunk.
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(
    ("batch", "channels", "length", "kernel_size"),
    [
        (1, 1, 1, 4),
        (3, 5, 2, 3),
        (1, 16, 7, 4),
        (3, 33, 17, 1),
        (1, 15, 32, 4),
        (2, 16, 33, 3),
        (1, 17, 75, 7),
        (1, 16, 130, 40),
        (1, 16, 20, 40),
        (1, 600, 35, 4),
    ],
)
def test_equals_definition_around_the_kernels_sizes(batch, channels, length, kernel_size, activation):
    tensors = make_inputs(batch, channels, length, kernel_size)
    out, gradients = run(causal_conv_numba, tensors, activation, torch.float32)
    wanted, wanted_gradients = run(convolve_by_definition, tensors, activation)
    assert relative_error(out, wanted) <= 1e-6
    for gradient, wanted_gradient in zip(gradients, wanted_gradients):
        assert relative_error(gradient, wanted_gradient) <= 5e-6
        assert gradient.shape == wanted_gradient.shape


@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize(
    ("batch", "channels", "length", "kernel_size"),
    [(1, 1, 1, 4), (3, 5, 2, 3), (3, 33, 17, 1), (1, 15, 32, 4), (2, 16, 33, 3), (1, 17, 75, 40), (1, 600, 35, 4)],
)
def test_bfloat16_sequences_are_rounded_once(batch, channels, length, kernel_size, activation):
    x, weight, bias = make_inputs(batch, channels, length, kernel_size)
    x, weight, bias = x.bfloat16(), weight.float(), bias.float()
    grad_out = torch.randn(batch, length, channels, generator=torch.Generator().manual_seed(1)).bfloat16().mT

    def convolve(function, dtype):
        leaves = [tensor.to(dtype or tensor.dtype).detach().requires_grad_() for tensor in (x, weight, bias)]
        out = function(*leaves, activation)
        return [out.detach(), *torch.autograd.grad(out, leaves, grad_out.to(out))]

    results = convolve(causal_conv_numba, None)
    copied, exact = convolve(causal_conv_numba, torch.float32), convolve(convolve_by_definition, torch.float64)
    for index, (result, copy, wanted) in enumerate(zip(results, copied, exact)):
        assert result.dtype == (torch.bfloat16 if index < 2 else torch.float32)
        assert torch.equal(result, copy.to(result.dtype))
        rounding = torch.finfo(result.dtype).eps / 2 * wanted.abs() + 5e-6 * wanted.abs().max()
        assert ((result - wanted).abs() <= rounding).all()


def test_precision_over_a_long_sequence():
    tensors = make_inputs(1, 16, 4096, 4)
    out, gradients = run(causal_conv_numba, tensors, "silu", torch.float32)

    def convolve(x, weight, bias, activation):
        return F.silu(F.conv1d(F.pad(x, (3, 0)), weight[:, None], bias, groups=16))

    wanted, wanted_gradients = run(convolve, tensors, "silu")
    assert relative_error(out, wanted) <= 1e-6
    for gradient, wanted_gradient in zip(gradients, wanted_gradients):
        assert relative_error(gradient, wanted_gradient) <= 5e-6


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_stay_what_they_are(value):
    x, weight, bias = (tensor.float() for tensor in make_inputs(1, 5, 40, 4))
    x[0, 2, 20] = value
    out = causal_conv_numba(x, weight.abs(), bias)
    assert torch.equal(out[0, 2, 20:24], torch.full((4,), value)) or out[0, 2, 20:24].isnan().all()
    if math.isinf(value):
        assert (out[0, 2, 20:24] == value).all()
    assert (~out.isfinite()).sum() == 4


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_opcheck(requires_grad, with_bias, dtype):
    x, weight, bias = (tensor.to(dtype).requires_grad_(requires_grad) for tensor in make_inputs())
    arguments = (x, weight, bias if with_bias else None, "silu")
    torch.library.opcheck(torch.ops.diffusers_pisdm.causal_conv_numba, arguments)
    if not requires_grad:
        torch.library.opcheck(torch.ops.diffusers_pisdm.causal_conv_numba_backward, (torch.randn_like(x), *arguments))


def test_one_graph_serves_all_shapes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(causal_conv_numba, fullgraph=True, dynamic=True, backend=counter)
    for shape in [(2, 19, 37), (3, 24, 75), (5, 40, 130), (4, 16, 20)]:
        leaves = [tensor.float().requires_grad_() for tensor in make_inputs(*shape)]
        out, wanted = compiled(*leaves), causal_conv_numba(*leaves)
        assert torch.equal(out, wanted) and out.stride() == wanted.stride()
        for gradient, wanted_gradient in zip(
            torch.autograd.grad(out.sum(), leaves), torch.autograd.grad(wanted.sum(), leaves)
        ):
            assert torch.equal(gradient, wanted_gradient)
    assert counter.frame_count == 1


def test_checkpointing_changes_nothing():
    leaves = [tensor.float().requires_grad_() for tensor in make_inputs()]
    wanted = torch.autograd.grad(causal_conv_numba(*leaves).sum(), leaves)
    out = torch.utils.checkpoint.checkpoint(causal_conv_numba, *leaves, use_reentrant=False)
    for gradient, wanted_gradient in zip(torch.autograd.grad(out.sum(), leaves), wanted):
        assert torch.equal(gradient, wanted_gradient)


def test_float64_is_refused():
    with pytest.raises(NotImplementedError, match=r"float32.*backend='torch'"):
        causal_conv_numba(*make_inputs())
