import sys
import types

import pytest
import torch
import torch.nn.functional as F

from diffusers_pisdm.ops import CAUSAL_CONV_BACKENDS, causal_conv
from diffusers_pisdm.ops.common.backends import missing_backend
from diffusers_pisdm.ops.conv import dispatch


BACKENDS = [
    pytest.param(name, marks=pytest.mark.skipif(missing_backend(name) is not None, reason=f"{name} cannot be used"))
    for name in CAUSAL_CONV_BACKENDS
]


def device_of(backend):
    """Triton's kernels run on a GPU if there is one, else in Triton's interpreter (see `tests/conftest.py`)."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def make_inputs(batch=2, channels=19, length=37, kernel_size=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return randn(batch, length, channels).mT, randn(channels, kernel_size), randn(channels)


def convolve_by_definition(x, weight, bias, activation):
    """A sum over taps; written apart from every backend."""
    kernel_size = weight.shape[1]
    steps = []
    for t in range(x.shape[2]):
        step = torch.zeros_like(x[:, :, 0]) if bias is None else bias.expand(x.shape[0], -1)
        for tap in range(kernel_size):
            source = t - (kernel_size - 1) + tap
            if source >= 0:
                step = step + weight[:, tap] * x[:, :, source]
        steps.append(step)
    y = torch.stack(steps, dim=-1)
    return y if activation is None else y * torch.sigmoid(y)


def run(function, tensors, activation, dtype=None, device="cpu"):
    leaves = [None if tensor is None else tensor.detach().to(device, dtype).requires_grad_() for tensor in tensors]
    out = function(*leaves, activation)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    used = [leaf for leaf in leaves if leaf is not None]
    gradients = torch.autograd.grad((out * weights.to(out)).sum(), used)
    return out.detach().cpu(), [gradient.cpu() for gradient in gradients]


def relative_error(value, wanted):
    return ((value.double() - wanted).abs().max() / wanted.abs().max()).item()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("activation", ["silu", None])
@pytest.mark.parametrize("with_bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize(
    ("batch", "channels", "length", "kernel_size"),
    [(1, 1, 1, 1), (2, 19, 37, 3), (1, 16, 2, 4), (3, 5, 64, 4), (1, 33, 129, 2), (1, 300, 9, 3)],
)
def test_equals_definition(backend, activation, with_bias, batch, channels, length, kernel_size):
    x, weight, bias = make_inputs(batch, channels, length, kernel_size)
    tensors = (x, weight, bias if with_bias else None)
    wanted, wanted_gradients = run(convolve_by_definition, tensors, activation, torch.float64)

    def convolve(x, weight, bias, activation):
        return causal_conv(x, weight, bias, activation, backend=backend)

    in_float64 = backend == "torch"
    out, gradients = run(
        convolve, tensors, activation, torch.float64 if in_float64 else torch.float32, device_of(backend)
    )
    assert relative_error(out, wanted) <= (1e-14 if in_float64 else 1e-6)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients):
        assert gradient.shape == wanted_gradient.shape
        assert relative_error(gradient, wanted_gradient) <= (1e-13 if in_float64 else 5e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("split", ["contiguous", "channels_last", "channels", "length", "batch", "steps"])
def test_any_strides_and_the_memory_order_of_x(backend, split):
    _, weight, bias = (tensor.float() for tensor in make_inputs(channels=23))
    wide = torch.randn(4, 41, 46, generator=torch.Generator().manual_seed(0))  # (B, L, 2 D)
    x = {
        "contiguous": wide[..., :23].mT.contiguous(),
        "channels_last": wide[..., :23].contiguous().mT,
        "channels": wide.chunk(2, dim=-1)[1].mT,
        "length": wide[:, 3:, :23].mT,
        "batch": wide[::2, :, :23].mT,
        "steps": wide[:, ::2, :23].mT,
    }[split]

    def convolve(x, weight, bias, activation):
        return causal_conv(x, weight, bias, activation, backend=backend)

    out, gradients = run(convolve, (x, weight, bias), "silu", torch.float32, device_of(backend))
    wanted, wanted_gradients = run(convolve_by_definition, (x, weight, bias), "silu", torch.float32)
    assert out.stride() == torch.empty_like(x).stride()
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    for gradient, wanted_gradient in zip(gradients, wanted_gradients):
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(backend, dtype):
    x, weight, bias = make_inputs(length=100)
    x = x.to(dtype)
    weight, bias = weight.to(dtype).float(), bias.to(dtype).float()
    out = causal_conv(*(tensor.to(device_of(backend)) for tensor in (x, weight, bias)), backend=backend)
    assert out.dtype == dtype
    wanted = convolve_by_definition(x.double(), weight.double(), bias.double(), "silu")
    assert relative_error(out.cpu(), wanted) <= torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_output_never_sees_later_steps(backend):
    x, weight, bias = (tensor.to(device_of(backend), torch.float32) for tensor in make_inputs())
    clean = causal_conv(x, weight, bias, backend=backend)
    x[1, 4, 20] = float("nan")
    hit = torch.isnan(causal_conv(x, weight, bias, backend=backend))
    assert hit[1, 4, 20:23].all() and hit.sum() == 3
    torch.testing.assert_close(causal_conv(x[..., :20], weight, bias, backend=backend), clean[..., :20])


@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_compiles_as_one_graph(backend):
    tensors = [tensor.to(device_of(backend), torch.float32).requires_grad_() for tensor in make_inputs()]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, weight, bias: causal_conv(x, weight, bias, backend=backend), fullgraph=True, backend="aot_eager"
    )
    out, wanted = compiled(*tensors), causal_conv(*tensors)
    torch.testing.assert_close(out, wanted)
    gradients, wanted_gradients = (torch.autograd.grad(y.square().sum(), tensors) for y in (out, wanted))
    for gradient, wanted_gradient in zip(gradients, wanted_gradients):
        torch.testing.assert_close(gradient, wanted_gradient)


class Convolution(torch.nn.Module):
    def forward(self, x, weight, bias):
        return causal_conv(x, weight, bias)


@pytest.mark.parametrize("strict", [True, False])
def test_exports(strict):
    x, weight, bias = (tensor.float() for tensor in make_inputs())
    shapes = ({0: torch.export.Dim("batch", min=2)}, None, None)
    program = torch.export.export(Convolution(), (x, weight, bias), dynamic_shapes=shapes, strict=strict)
    other = make_inputs(batch=5, seed=3)[0].float()
    torch.testing.assert_close(program.module()(other, weight, bias), causal_conv(other, weight, bias))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_keeps_the_dtype(backend):
    device = device_of(backend)
    tensors = [tensor.to(device, torch.float32) for tensor in make_inputs()]
    with torch.autocast(device, torch.bfloat16):
        out = causal_conv(*tensors, backend=backend)
    assert out.dtype == torch.float32
    assert relative_error(out, causal_conv(*tensors, backend=backend).double()) <= 0.02  # torch's conv1d is autocast


def test_meta_tensors_give_shapes():
    x, weight, bias = (tensor.to("meta") for tensor in make_inputs())
    assert causal_conv(x, weight, bias).shape == x.shape


@pytest.mark.parametrize(
    ("device_type", "dtypes", "missing", "wanted"),
    [
        ("cpu", (torch.float32,), (), "numba"),
        ("cpu", (torch.bfloat16, torch.float32), (), "numba"),
        ("cpu", (torch.float64,), (), "torch"),
        ("cpu", (torch.float32,), ("numba",), "torch"),
        ("cuda", (torch.float32,), (), "triton"),
        ("cuda", (torch.float64,), (), "torch"),
        ("cuda", (torch.float32,), ("triton",), "causal_conv1d"),
        ("cuda", (torch.float32,), ("triton", "causal_conv1d"), "torch"),
        ("mps", (torch.float32,), (), "torch"),
    ],
)
def test_auto_takes_the_kernels_of_the_device(device_type, dtypes, missing, wanted, monkeypatch):
    monkeypatch.setattr(dispatch, "missing_backend", lambda name: "gone" if name in missing else None)
    assert dispatch.choose_backend(device_type, dtypes, 3, False) == wanted


@pytest.mark.parametrize(
    ("kernel_size", "compiling", "wanted"),
    [(1, False, "torch"), (2, False, "causal_conv1d"), (4, False, "causal_conv1d"), (5, False, "torch")]
    + [(3, True, "torch")],
)
def test_auto_takes_causal_conv1d_where_it_can_run(kernel_size, compiling, wanted, monkeypatch):
    monkeypatch.setattr(dispatch, "missing_backend", lambda name: "gone" if name == "triton" else None)
    assert dispatch.choose_backend("cuda", (torch.float32,), kernel_size, compiling) == wanted


class CausalConv1d(types.ModuleType):
    """The package needs CUDA: a stand-in checks what it would, and computes."""

    def causal_conv1d_fn(self, x, weight, bias=None, activation=None):
        assert x.stride(2) == 1 or (x.stride(1) == 1 and x.shape[1] % 8 == 0)
        if x.stride(2) != 1:
            assert x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
        assert 2 <= weight.shape[1] <= 4 and weight.is_contiguous() and weight.dtype == x.dtype
        assert bias is None or (bias.dtype == x.dtype and bias.is_contiguous())
        return dispatch.causal_conv_torch(x, weight, bias, activation)


@pytest.fixture
def causal_conv1d(monkeypatch):
    monkeypatch.setitem(sys.modules, "causal_conv1d", CausalConv1d("causal_conv1d"))
    missing_backend.cache_clear()
    yield
    missing_backend.cache_clear()


@pytest.mark.parametrize("channels", [8, 19, 24])
@pytest.mark.parametrize("kernel_size", [1, 2, 3, 4])
@pytest.mark.parametrize("wide", [False, True])
def test_causal_conv1d_gets_what_its_kernel_takes(channels, kernel_size, wide, causal_conv1d):
    x, weight, bias = make_inputs(channels=channels, kernel_size=kernel_size)
    if wide:  # half of a projection, as in the mixer
        x = torch.cat([x.mT, x.mT], dim=2)[..., :channels].mT
    for tensors in ((x, weight, bias), (x, weight, None), (x.contiguous(), weight.T.contiguous().T, bias)):
        out, gradients = run(lambda *args: causal_conv(*args, backend="causal_conv1d"), tensors, "silu")
        wanted, wanted_gradients = run(convolve_by_definition, tensors, "silu")
        assert relative_error(out, wanted) <= 1e-13
        assert all(relative_error(*pair) <= 1e-12 for pair in zip(gradients, wanted_gradients, strict=True))


def test_causal_conv1d_refuses_longer_filters_and_other_precisions_are_cast(causal_conv1d):
    x, weight, bias = make_inputs(kernel_size=5)
    with pytest.raises(NotImplementedError, match=r"from 2 to 4, not 5.*triton"):
        causal_conv(x, weight, bias, backend="causal_conv1d")
    x, weight, bias = make_inputs()
    out = causal_conv(x.bfloat16(), weight.float(), bias.float(), backend="causal_conv1d")
    assert out.dtype == torch.bfloat16
    assert causal_conv(x[:0], weight, bias, backend="causal_conv1d").shape == (0, *x.shape[1:])


@pytest.mark.skipif(missing_backend("causal_conv1d") is None, reason="causal_conv1d is installed")
def test_a_missing_package_says_what_to_install():
    with pytest.raises(ImportError, match=r"'causal_conv1d'.*pip install causal-conv1d"):
        causal_conv(*make_inputs(), backend="causal_conv1d")


def test_auto_runs_the_chosen_backend(monkeypatch):
    calls = []
    functions = {name: lambda x, *_, name=name: calls.append(name) or F.silu(x) for name in CAUSAL_CONV_BACKENDS}
    monkeypatch.setattr(dispatch, "_FUNCTIONS", functions)
    monkeypatch.setattr(dispatch, "missing_backend", lambda name: None)
    tensors = make_inputs()
    causal_conv(*tensors)
    causal_conv(*(tensor.float() for tensor in tensors))
    causal_conv(*(tensor.float() for tensor in tensors), backend="torch")
    assert calls == ["torch", "numba", "torch"]


def test_missing_numba_says_what_to_install(monkeypatch):
    monkeypatch.setattr("diffusers_pisdm.ops.common.backends.missing_backend", lambda name: "no x: pip install x")
    with pytest.raises(ImportError, match="No x: pip install x"):
        causal_conv(*make_inputs(), backend="numba")


def test_bad_input():
    x, weight, bias = make_inputs()
    with pytest.raises(ValueError, match="`x` must have shape"):
        causal_conv(x[0], weight, bias)
    with pytest.raises(ValueError, match="`x` must have shape"):
        causal_conv(x[..., :0], weight, bias)
    with pytest.raises(ValueError, match=r"`weight` must have shape \(19, kernel size\)"):
        causal_conv(x, weight[:-1], bias)
    with pytest.raises(ValueError, match=r"`weight` must have shape \(19, kernel size\)"):
        causal_conv(x, weight[:, None], bias)
    with pytest.raises(ValueError, match=r"`bias` must have shape \(19,\)"):
        causal_conv(x, weight, bias[:-1])
    with pytest.raises(ValueError, match="`activation` must be None or 'silu', not 'relu'"):
        causal_conv(x, weight, bias, activation="relu")
    with pytest.raises(ValueError, match=r"'auto' or one of .*'torch', 'numba'.*not 'triangle'"):
        causal_conv(x, weight, bias, backend="triangle")
    with pytest.raises(ValueError, match="`weight` is on meta but `x` is on cpu"):
        causal_conv(x, weight.to("meta"), bias)
    with pytest.raises(TypeError, match=r"`weight` must be a real floating point tensor, not torch\.int64"):
        causal_conv(x, weight.long(), bias)
