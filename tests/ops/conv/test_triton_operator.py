"""What `test_dispatch.py` does not see of the Triton convolution: its launches, and that it compiles for a GPU."""

import itertools
import os
import subprocess
import sys

import pytest
import torch

from diffusers_pisdm.ops import causal_conv
from diffusers_pisdm.ops.conv import triton_operator as conv_module
from diffusers_pisdm.ops.conv.triton_operator import causal_conv_triton, split_steps
from tests.ops.conv.test_dispatch import convolve_by_definition, device_of, make_inputs, relative_error, run


pytest.importorskip("triton")

DEVICE = device_of("triton")


def test_chunks_cover_the_sequence_and_follow_the_programs():
    for batch, blocks, length in itertools.product((1, 7), (1, 48), (1, 15, 16, 17, 1000, 4097)):
        chunks, steps = split_steps(batch, blocks, length, 16, 100)
        assert steps % 16 == 0 and (chunks - 1) * steps < length <= chunks * steps
    assert split_steps(2, 5, 16 * 10, 16, 100) == (10, 16)  # as many programs as wanted
    assert split_steps(2, 5, 16 * 40, 16, 100) == (10, 64)


@pytest.mark.parametrize("length", [16 * 65_535, 16 * 65_535 + 1, 10**7, 2**31])
def test_chunks_fit_a_launch_whatever_the_length(length):
    for programs in (2048, length):
        chunks, steps = split_steps(1, 1, length, 16, programs)
        assert chunks <= 65_535 and steps % 16 == 0 and (chunks - 1) * steps < length <= chunks * steps


def test_a_sequence_longer_than_a_launch_equals_its_definition(monkeypatch):
    monkeypatch.setattr(conv_module, "MAX_CHUNKS", 3)
    tensors = make_inputs(2, 70, 16 * 7 + 5, 3)
    wanted, wanted_gradients = run(convolve_by_definition, tensors, "silu", torch.float64)
    grids, start = [], conv_module._start
    monkeypatch.setattr(
        conv_module, "_start", lambda *arguments, **kw: grids.append(arguments[1]) or start(*arguments, **kw)
    )
    out, gradients = run(causal_conv_triton, tensors, "silu", torch.float32, DEVICE)
    assert grids == [3, 3]
    assert relative_error(out, wanted) <= 1e-6
    assert all(relative_error(*pair) <= 5e-6 for pair in zip(gradients, wanted_gradients))


@pytest.mark.parametrize("taps", [1, 4])
def test_a_program_of_the_backward_walks_several_tiles(taps, monkeypatch):
    monkeypatch.setattr(conv_module, "WANTED_PROGRAMS", 2)
    tensors = make_inputs(1, 70, 75, taps)
    assert split_steps(1, 2, 75, conv_module.BACKWARD_STEPS, 2) == (1, 80)
    wanted, wanted_gradients = run(convolve_by_definition, tensors, "silu", torch.float64)
    out, gradients = run(causal_conv_triton, tensors, "silu", torch.float32, DEVICE)
    assert relative_error(out, wanted) <= 1e-6
    assert all(relative_error(*pair) <= 5e-6 for pair in zip(gradients, wanted_gradients))


def test_an_infinity_spreads_no_further_than_in_torch():
    tensors = [tensor.to(DEVICE, torch.float32) for tensor in make_inputs(1, 3, 5, 3)]
    tensors[0][0, 1, 4] = float("inf")  # the kernels' tiles go on past this last step
    finite = {}
    for backend in ("triton", "torch"):
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        out = causal_conv(*leaves, backend=backend)
        finite[backend] = [x.isfinite() for x in (out, *torch.autograd.grad(out.sum(), leaves))]
    assert all(torch.equal(*pair) for pair in zip(finite["triton"], finite["torch"]))
    assert not all(mask.all() for mask in finite["triton"])


def test_empty_batch():
    x, weight, bias = (tensor.to(DEVICE, torch.float32).requires_grad_() for tensor in make_inputs())
    out = causal_conv(x[:0], weight, bias, backend="triton")
    out.sum().backward()
    assert out.shape == (0, 19, 37)
    assert weight.grad.shape == weight.shape and not weight.grad.any() and not bias.grad.any()


def test_float64_is_refused():
    with pytest.raises(NotImplementedError, match=r"float32.*backend='torch'"):
        causal_conv(*make_inputs(), backend="triton")


WITHOUT_INTERPRETER = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from diffusers_pisdm.ops import causal_conv
from diffusers_pisdm.ops.conv import triton_kernels as kernels

sizes = {"SILU": True, "TAPS": 3, "STEPS": 16, "CHANNELS": 64}
integers = ("channels", "length", "chunk_steps", "blocks", "weight_channel", "weight_tap")
integers += ("x_row", "x_step", "grad_row", "grad_step")
for name in ("forward", "backward"):
    kernel = getattr(kernels, f"conv_{name}_kernel")
    signature = {x: "i32" if x in integers else "*fp32" for x in kernel.arg_names}
    signature |= {x: "*bf16" for x in ("x", "grad", "out", "grad_x") if x in signature}
    signature |= {x: "constexpr" for x in sizes}
    constants = {(i,): sizes[x] for i, x in enumerate(kernel.arg_names) if x in sizes}
    compiled = compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 80, 32))
    print(name, len(compiled.asm["cubin"]) > 0)

causal_conv(torch.ones(1, 2, 3), torch.ones(2, 1), backend="triton")
"""


@pytest.mark.slow
def test_kernels_compile_for_a_gpu_and_refuse_the_cpu_without_the_interpreter():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WITHOUT_INTERPRETER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines() == ["forward True", "backward True"], done.stderr
    assert done.returncode == 1
    assert "NotImplementedError: The 'triton' backend needs a GPU" in done.stderr
