"""What surrounds a mixer, against its formula in float64: both backends, Triton's in its interpreter without a GPU."""

import os
import subprocess
import sys

import pytest
import torch

from diffusers_pisdm.ops.common.backends import force_backends, missing_backend
from diffusers_pisdm.ops.modulation import dispatch, triton_operator
from diffusers_pisdm.ops.modulation.dispatch import gated_residual, modulated_norm
from diffusers_pisdm.ops.scan_paths import TokenMove


BACKENDS = [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(missing_backend("triton") is not None, reason="needs Triton")),
]
SHAPES = [(1, 1, 1), (2, 5, 7), (3, 4, 16), (1, 9, 33)]


def device_of(backend):
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def make_inputs(batch, length, channels, count):
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, length, channels)] * count + [(batch, 3, channels), (3, channels)]
    return [0.5 + torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def make_move(length):
    order = torch.randperm(length, generator=torch.Generator().manual_seed(1))
    return TokenMove(order, order.argsort())


def norm_by_definition(tokens, modulation, table, order, eps):
    tokens = tokens if order is None else torch.stack([tokens[:, i] for i in order.tolist()], 1)
    shift, scale, _ = (modulation + table)[:, :, None].unbind(1)  # (B, 1, D) each
    centred = tokens - tokens.mean(2, keepdim=True)
    return tokens, centred / (centred.square().mean(2, keepdim=True) + eps).sqrt() * (1 + scale) + shift


def gradients_of(function, tensors):
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out) for out in outs]
    total = sum((out * weight).sum() for out, weight in zip(outs, weights))
    return [*(out.detach() for out in outs), *torch.autograd.grad(total, leaves)]


def assert_close(found, wanted, tolerance):
    for value, expected in zip(found, wanted, strict=True):
        assert value.shape == expected.shape
        error = (value.double().cpu() - expected).abs().max() / expected.abs().max().clamp(min=1e-3)
        assert error <= tolerance


def to(tensors, backend, dtype=torch.float32):
    return [tensor.to(device_of(backend), dtype) for tensor in tensors]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("moves", [False, True])
@pytest.mark.parametrize("programs", [1, 1000])
def test_the_norm_is_its_formula(backend, shape, moves, programs, monkeypatch):
    if backend == "torch" and programs == 1:
        pytest.skip("has no programs")
    monkeypatch.setattr(triton_operator, "WANTED_PROGRAMS", programs)  # one chunk, or a token each
    inputs, move = make_inputs(*shape, 1), make_move(shape[1]) if moves else None
    on_device = None if move is None else TokenMove(*(index.to(device_of(backend)) for index in move))
    order = None if move is None else move.index
    wanted = gradients_of(lambda *x: norm_by_definition(*x, order, 1e-3), inputs)
    dtype = torch.float64 if backend == "torch" else torch.float32
    found = gradients_of(
        lambda *x: modulated_norm(*x, on_device, eps=1e-3, backend=backend), to(inputs, backend, dtype)
    )
    assert_close(found, wanted, 1e-12 if backend == "torch" else 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("programs", [1, 1000])
def test_the_gated_residual_is_its_formula(backend, shape, programs, monkeypatch):
    if backend == "torch" and programs == 1:
        pytest.skip("has no programs")
    monkeypatch.setattr(triton_operator, "WANTED_PROGRAMS", programs)
    inputs = make_inputs(*shape, 2)
    wanted = gradients_of(lambda x, y, m, t: x + (m + t)[:, 2:] * y, inputs)
    dtype = torch.float64 if backend == "torch" else torch.float32
    found = gradients_of(lambda *x: gated_residual(*x, backend=backend), to(inputs, backend, dtype))
    assert_close(found, wanted, 1e-12 if backend == "torch" else 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_selections_of_tokens_and_strided_ones(backend):
    """The first move of a sequence repeats padding tokens: it has no inverse."""
    tokens, modulation, table = to(make_inputs(2, 5, 8, 1), backend)
    index = torch.tensor([0, 3, 3, 1, 4, 2, 2], device=tokens.device)
    moved, normed = modulated_norm(tokens, modulation, table, TokenMove(index, None), backend=backend)
    assert torch.equal(moved, tokens[:, index])
    assert_close([normed], [modulated_norm(tokens[:, index].cpu(), modulation.cpu(), table.cpu())[1].double()], 5e-6)
    wide = torch.cat([tokens, tokens], 2)
    for view in (wide[..., :8], tokens.mT.contiguous().mT, wide[:, ::2, 8:]):
        wanted = modulated_norm(view.contiguous(), modulation, table, backend=backend)
        assert all(
            torch.equal(*pair) for pair in zip(modulated_norm(view, modulation, table, backend=backend), wanted)
        )
        wanted = gated_residual(view.contiguous(), view.contiguous(), modulation, table, backend=backend)
        assert torch.equal(gated_residual(view, view, modulation, table, backend=backend), wanted)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtypes", [(torch.bfloat16,) * 4, (torch.float32, torch.bfloat16, torch.bfloat16, torch.float32)]
)
def test_half_precision_and_mixtures(backend, dtypes):
    """As under autocast, where the mixer's update is in half precision."""
    exact = make_inputs(2, 6, 16, 2)
    x, y, modulation, table = (
        tensor.to(device_of(backend), dtype) for tensor, dtype in zip(exact, dtypes, strict=True)
    )
    rounded = [tensor.double().cpu() for tensor in (x, y, modulation, table)]
    out = gated_residual(x, y, modulation, table, backend=backend)
    assert out.dtype == dtypes[0]
    assert_close([out], [rounded[0] + (rounded[2] + rounded[3])[:, 2:] * rounded[1]], 2e-2)
    found = gradients_of(lambda *a: modulated_norm(*a, backend=backend)[1], (x, modulation, table))
    wanted = gradients_of(lambda *a: norm_by_definition(*a, None, 1e-6)[1], [rounded[0], *rounded[2:]])
    assert [g.dtype for g in found[1:]] == [x.dtype, modulation.dtype, table.dtype]
    assert_close(found, wanted, 3e-2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batches(backend):
    tokens, update, modulation, table = to(make_inputs(1, 5, 8, 2), backend)
    empty = tokens[:0], update[:0], modulation[:0]
    found = gradients_of(lambda x, y, m, t: gated_residual(x, y, m, t, backend=backend), (*empty, table))
    assert found[0].shape == (0, 5, 8) and not found[-1].any()
    move = make_move(5)
    move = TokenMove(*(index.to(tokens.device) for index in move))
    moved, normed = modulated_norm(empty[0], empty[2], table, move, backend=backend)
    assert moved.shape == normed.shape == (0, 5, 8)


@pytest.mark.skipif(missing_backend("triton") is not None, reason="needs Triton")
@pytest.mark.parametrize("moves", [False, True])
def test_operators_pass_opcheck(moves):
    tokens, update, modulation, table = (tensor.requires_grad_() for tensor in to(make_inputs(2, 5, 8, 2), "triton"))
    order = make_move(5).index.to(tokens.device) if moves else None
    operators = torch.ops.diffusers_pisdm
    torch.library.opcheck(operators.modulated_norm_triton, (tokens, modulation, table, order, 1e-6))
    torch.library.opcheck(operators.gated_residual_triton, (tokens, update, modulation, table))
    plain = [tensor.detach() for tensor in (tokens, update, modulation, table)]
    grad = torch.randn_like(plain[0])
    torch.library.opcheck(operators.modulated_norm_triton_backward, (grad, grad, plain[0], *plain[2:], order, 1e-6))
    torch.library.opcheck(operators.gated_residual_triton_backward, (grad, *plain[1:]))


@pytest.mark.parametrize(
    ("device_type", "dtype", "compiling", "missing", "wanted"),
    [
        ("cuda", torch.bfloat16, False, False, "triton"),
        ("cuda", torch.float64, False, False, "torch"),
        ("cuda", torch.float32, True, False, "torch"),
        ("cuda", torch.float32, False, True, "torch"),
        ("cpu", torch.float32, False, False, "torch"),
    ],
)
def test_auto_takes_the_kernels_on_a_gpu(device_type, dtype, compiling, missing, wanted, monkeypatch):
    monkeypatch.setattr(dispatch, "missing_backend", lambda name: "gone" if missing else None)
    assert dispatch.choose_backend(device_type, (dtype, torch.float32), compiling) == wanted


def test_a_backend_can_be_forced_and_unknown_ones_are_refused(monkeypatch):
    calls = []
    monkeypatch.setattr(dispatch, "gated_residual_triton", lambda x, *_: calls.append(1) or x)
    tensors = make_inputs(1, 2, 4, 2)
    with force_backends(modulation="triton"):
        gated_residual(*tensors)
    gated_residual(*tensors)
    assert calls == [1]
    with pytest.raises(ValueError, match=r"'torch', 'triton'.*not 'numba'"):
        modulated_norm(tensors[0], *tensors[2:], backend="numba")


def test_programs_cover_all_tokens():
    for batch, length in [(1, 1), (1, 1056), (2, 4096), (64, 256), (1, 70_000)]:
        step = triton_operator.chunk_tokens(batch, length)
        chunks = -(-length // step)
        assert chunks * step >= length and chunks <= 65_535 and (step == 1 or batch * chunks >= 1056)


WITHOUT_INTERPRETER = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from diffusers_pisdm.ops.modulation import triton_kernels as kernels

integers = ("channels", "length", "chunk_tokens")
for name in ("norm_forward", "norm_backward", "gate_forward", "gate_backward"):
    kernel = getattr(kernels, f"{name}_kernel")
    signature = {x: "i32" if x in integers or x.endswith(("_image", "_token")) else "*bf16" for x in kernel.arg_names}
    signature |= {x: "*fp32" for x in ("table", "grad_shift", "grad_scale", "grad_gate") if x in signature}
    signature |= {x: y for x, y in (("order", "*i64"), ("eps", "fp32"), ("WIDTH", "constexpr")) if x in signature}
    constants = {(kernel.arg_names.index("WIDTH"),): 2048}
    source = ASTSource(kernel, signature, constants)
    compiled = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    print(name, len(compiled.asm["cubin"]) > 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(missing_backend("triton") is not None, reason="needs Triton")
def test_kernels_compile_for_a_gpu():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WITHOUT_INTERPRETER]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    lines = [f"{name} True" for name in ("norm_forward", "norm_backward", "gate_forward", "gate_backward")]
    assert done.stdout.splitlines() == lines, done.stderr
