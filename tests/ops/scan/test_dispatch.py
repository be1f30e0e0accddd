import logging
import math
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from diffusers_pisdm.ops import SELECTIVE_SCAN_BACKENDS, selective_scan
from diffusers_pisdm.ops.common.backends import missing_backend
from diffusers_pisdm.ops.scan import blocked, dispatch


SEQUENCES = ("u", "delta", "B", "C", "z")  # tensors with a length
DEVICES = {"mamba_ssm": "cuda", "triton": "cuda"}  # Triton's interpreter is slow: `test_triton_operator.py`
BACKENDS = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(
            missing_backend(name) is not None or (DEVICES.get(name) == "cuda" and not torch.cuda.is_available()),
            reason=f"the {name} backend cannot be used on this machine",
        ),
    )
    for name in SELECTIVE_SCAN_BACKENDS
]
FAST_BACKENDS = BACKENDS[1:]
TRACEABLE_BACKENDS = [backend for backend in FAST_BACKENDS if backend.values != ("mamba_ssm",)]
# mamba_ssm adds up gradients of B and C in the order in which its programs end.
TOLERANCES = {"mamba_ssm": {"rtol": 1e-3, "atol": 1e-5}}
EXACTLY = {"rtol": 0, "atol": 0}


def make_inputs(batch=2, channels=19, length=37, state_size=16, optional=True, order="channels_last", seed=0):
    """float64 tensors as a Mamba block has them: delta about 0.01 to 1 after softplus, A from -1 to -state_size."""
    generator = torch.Generator().manual_seed(seed)

    def sequence(rows):
        values = torch.randn(batch, length, rows, generator=generator, dtype=torch.float64)
        return values.mT.contiguous() if order == "contiguous" else values.mT

    def vector():
        return torch.randn(channels, generator=generator, dtype=torch.float64)

    rates = torch.arange(1, state_size + 1, dtype=torch.float64) * torch.exp(0.1 * vector()[:, None])
    inputs = {"u": sequence(channels), "delta": sequence(channels), "A": -rates}
    inputs |= {"B": sequence(state_size), "C": sequence(state_size)}
    if optional:
        inputs |= {"D": vector(), "z": sequence(channels), "delta_bias": vector() - 3}
    else:
        inputs["delta"] = F.softplus(inputs["delta"] - 3)
    return inputs | {"delta_softplus": optional}


def run(inputs, backend, dtype=None, weights_seed=1):
    """The output and the gradients of every tensor for a random weighting of the output."""
    leaves = {}
    for name, value in inputs.items():
        if isinstance(value, torch.Tensor):
            value = value.detach().to(DEVICES.get(backend, "cpu"), dtype).requires_grad_()
        leaves[name] = value
    out = selective_scan(**leaves, backend=backend)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(weights_seed), dtype=torch.float64)
    tensors = {name: value for name, value in leaves.items() if isinstance(value, torch.Tensor)}
    gradients = torch.autograd.grad((out * weights.to(out)).sum(), list(tensors.values()))
    return out.detach(), dict(zip(tensors, gradients))


def relative_error(value, wanted):
    scale = wanted.abs().max().item() or 1.0  # A's gradient of a single step is zero
    return (value.double().cpu() - wanted).abs().max().item() / scale


def assert_matches_reference(inputs, backend):
    wanted, wanted_gradients = run(inputs, "reference")
    in_float64 = backend in ("reference", "torch")
    out, gradients = run(inputs, backend, None if in_float64 else torch.float32)
    assert relative_error(out, wanted) <= (1e-12 if in_float64 else 1e-6)
    for name, gradient in gradients.items():
        assert relative_error(gradient, wanted_gradients[name]) <= (1e-12 if in_float64 else 5e-6), name
        assert gradient.shape == inputs[name].shape


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("optional", [True, False], ids=["all", "bare"])
@pytest.mark.parametrize(
    ("batch", "channels", "length", "state_size"),
    [(1, 1, 1, 1), (2, 19, 37, 16), (3, 16, 8, 4), (1, 33, 129, 5), (2, 5, 9, 3), (5, 8, 64, 16), (1, 300, 33, 16)],
)
def test_equals_reference(backend, optional, batch, channels, length, state_size):
    assert_matches_reference(make_inputs(batch, channels, length, state_size, optional), backend)


@pytest.mark.parametrize("missing", ["D", "z", "delta_bias"])
@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_each_optional_input_can_be_left_out(backend, missing):
    inputs = make_inputs()
    del inputs[missing]
    assert_matches_reference(inputs, backend)


@pytest.mark.parametrize("backend", ["torch"])
def test_equals_reference_across_batch_groups(backend, monkeypatch):
    # Blocks of two rows: five rows make groups of 2, 2 and 1.
    monkeypatch.setattr(blocked, "CPU_BLOCK_ELEMENTS", 2 * blocked.STEPS * 19 * 16)
    assert_matches_reference(make_inputs(batch=5), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_equals_closed_forms(backend):
    # A = 0 is a cumulative sum; a constant input with one rate is a geometric series.
    length, device = 50, DEVICES.get(backend, "cpu")
    ones = torch.ones(1, 1, length, device=device)
    u = torch.randn(1, 3, length, generator=torch.Generator().manual_seed(0)).to(device)
    out = selective_scan(u, 0.5 * ones.expand(1, 3, -1), torch.zeros(3, 1, device=device), ones, ones, backend=backend)
    torch.testing.assert_close(out, 0.5 * u.cumsum(-1))

    out = selective_scan(ones, 0.1 * ones, torch.full((1, 1), -2.0, device=device), ones, ones, backend=backend)
    decay = math.exp(-0.2)
    wanted = 0.1 * (1 - decay ** torch.arange(1.0, length + 1, device=device)) / (1 - decay)
    torch.testing.assert_close(out[0, 0], wanted)

    gate = torch.linspace(-3, 3, length, device=device).expand(1, 1, -1)
    D = torch.full((1,), 1.5, device=device)
    zeros = torch.zeros(1, 1, device=device)
    out = selective_scan(ones, ones, zeros, 0 * ones, ones, D=D, z=gate, backend=backend)
    torch.testing.assert_close(out, 1.5 * gate * torch.sigmoid(gate))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", ["channels_last", "contiguous"])
def test_output_has_the_memory_order_of_u(backend, order):
    inputs = make_inputs(order=order)
    inputs = {k: v.float().to(DEVICES.get(backend, "cpu")) if k != "delta_softplus" else v for k, v in inputs.items()}
    assert selective_scan(**inputs, backend=backend).stride() == inputs["u"].stride()
    # The order of the other tensors makes no difference, to the strides and to the values.
    other = {k: v.mT.contiguous().mT if order == "contiguous" and k in SEQUENCES[1:] else v for k, v in inputs.items()}
    out = selective_scan(**other, backend=backend)
    assert out.stride() == inputs["u"].stride()
    torch.testing.assert_close(out, selective_scan(**inputs, backend=backend), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("backend", FAST_BACKENDS)
@pytest.mark.parametrize("split", ["channels", "length", "batch", "steps"])
def test_strided_views_equal_their_copies(backend, split):
    # u and z as chunks of one projection, tokens without a prefix, every second row, every second token.
    device = DEVICES.get(backend, "cpu")
    wide = torch.randn(4, 41, 46, generator=torch.Generator().manual_seed(0)).to(device)  # (B, L, 2 D)
    u, z = wide.chunk(2, dim=-1)
    u, z = {
        "channels": (u, z),
        "length": (u[:, 3:], z[:, 3:]),
        "batch": (u[::2], z[::2]),
        "steps": (u[:, ::2], z[:, ::2]),
    }[split]
    inputs = make_inputs(u.shape[0], 23, u.shape[1])
    inputs = {k: v.float().to(device) if k != "delta_softplus" else v for k, v in inputs.items()}
    views, copies = inputs | {"u": u.mT, "z": z.mT}, inputs | {"u": u.mT.contiguous(), "z": z.mT.contiguous()}
    assert not views["u"].is_contiguous()
    (out, gradients), (wanted, wanted_gradients) = run(views, backend), run(copies, backend)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-6)
    for name in gradients:
        torch.testing.assert_close(gradients[name], wanted_gradients[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(backend, dtype):
    inputs = make_inputs(length=100)
    halves = {k: v.to(dtype) if k in SEQUENCES else v for k, v in inputs.items()}
    wanted, wanted_gradients = run({k: v.double() if k in SEQUENCES else v for k, v in halves.items()}, "reference")
    halves = {k: v.float() if k in ("A", "D", "delta_bias") else v for k, v in halves.items()}
    out, gradients = run(halves, backend)
    assert out.dtype == dtype
    # One rounding of the result: half a unit in the last place of the largest value.
    half_unit = torch.finfo(dtype).eps / 2
    assert relative_error(out, wanted) <= half_unit + 1e-5
    for name, gradient in gradients.items():
        assert gradient.dtype == halves[name].dtype
        assert relative_error(gradient, wanted_gradients[name]) <= 4 * half_unit, name


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_state_does_not_stall(backend):
    # A bfloat16 state stops growing at 256 times the increment; 2048 increments need a float32 state.
    ones = torch.ones(1, 1, 2048, dtype=torch.bfloat16, device=DEVICES.get(backend, "cpu"))
    out = selective_scan(
        ones, ones, torch.zeros_like(ones[0, :, :1], dtype=torch.float32), ones, ones, backend=backend
    )
    assert out[0, 0, -1].item() == 2048


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_strong_decay_is_safe(backend):
    # Decays of exp(-800) underflow to 0, and sums of their logarithms reach -100000.
    inputs = make_inputs(length=130)
    inputs["delta"] = inputs["delta"] * 20 + 20
    out, gradients = run(inputs, backend, torch.float32)
    wanted, wanted_gradients = run(inputs, "reference")
    assert relative_error(out, wanted) <= 2e-6
    for name, gradient in gradients.items():
        assert torch.isfinite(gradient).all(), name
        assert relative_error(gradient, wanted_gradients[name]) <= 1e-5, name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_and_inf_show_from_their_step_on(backend, value):
    inputs = make_inputs(batch=2, length=40)
    inputs = {k: v.float().to(DEVICES.get(backend, "cpu")) if k != "delta_softplus" else v for k, v in inputs.items()}
    clean = selective_scan(**inputs, backend=backend)
    inputs["u"] = inputs["u"].clone()
    inputs["u"][1, 7, 21] = value
    out = selective_scan(**inputs, backend=backend)
    hit = ~torch.isfinite(out)
    assert hit[1, 7, 21]
    assert not hit[0].any() and not hit[1, :7].any() and not hit[1, 8:].any() and not hit[1, 7, :21].any()
    torch.testing.assert_close(out[~hit], clean[~hit])
    if math.isnan(value):
        assert hit[1, 7, 21:].all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_gradient_of_one_input_alone(backend, wanted):
    inputs = make_inputs()
    inputs = {k: v.float().to(DEVICES.get(backend, "cpu")) if k != "delta_softplus" else v for k, v in inputs.items()}
    leaves = inputs | {wanted: inputs[wanted].detach().requires_grad_()}
    (gradient,) = torch.autograd.grad(selective_scan(**leaves, backend=backend).sum(), leaves[wanted])
    _, gradients = run(inputs, backend)
    assert gradient.shape == gradients[wanted].shape and gradient.abs().max() > 0
    with torch.no_grad():
        assert not selective_scan(**leaves, backend=backend).requires_grad


def test_torch_backend_passes_gradcheck():
    inputs = make_inputs(batch=1, channels=2, length=blocked.STEPS + 3, state_size=2)
    names = [name for name in inputs if name != "delta_softplus"]
    leaves = [inputs[name].detach().contiguous().requires_grad_() for name in names]

    def scan(*tensors):
        return selective_scan(**dict(zip(names, tensors)), delta_softplus=True, backend="torch")

    assert torch.autograd.gradcheck(scan, leaves)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_torch_operator_passes_opcheck(requires_grad):
    shapes = {"x": (2, 11, 5), "delta": (2, 11, 5), "A": (3, 5), "B": (2, 11, 3), "C": (2, 11, 3)}
    tensors = [torch.rand(shape).requires_grad_(requires_grad) for shape in shapes.values()]
    torch.library.opcheck(torch.ops.diffusers_pisdm.selective_scan_torch, (*tensors, requires_grad))


@pytest.mark.parametrize("backend", ["torch"])
def test_memory_is_linear_in_length(backend):
    def saved_elements(length):
        inputs = make_inputs(batch=1, channels=32, length=length)
        leaves = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        storages = {}

        def pack(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.itemsize
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            selective_scan(**leaves, backend=backend)
        return sum(storages.values())

    short, long = saved_elements(128), saved_elements(512)
    assert long <= 4 * short
    assert long < 32 * 512 * 16  # less than all states


@pytest.mark.parametrize("backend", [*TRACEABLE_BACKENDS, "auto"])
def test_compiles_as_one_graph(backend):
    inputs, device = make_inputs(), DEVICES.get(backend, "cpu")
    wanted, wanted_gradients = run(inputs, backend, torch.float32)
    leaves = {k: v.to(device, torch.float32) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    leaves = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in leaves.items()}

    def scan(u, delta, A, B, C, D, z, delta_bias):
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True, backend=backend)

    torch._dynamo.reset()
    tensors = {k: v for k, v in leaves.items() if k != "delta_softplus"}
    out = torch.compile(scan, fullgraph=True, backend="aot_eager")(**tensors)
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    gradients = torch.autograd.grad((out * weights).sum(), list(tensors.values()))
    for name, gradient in zip(tensors, gradients):
        torch.testing.assert_close(gradient, wanted_gradients[name], rtol=1e-4, atol=1e-4)


class Scan(torch.nn.Module):
    def __init__(self, backend):
        super().__init__()
        self.backend = backend

    def forward(self, u, delta, A, B, C, D, z, delta_bias):
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus=True, backend=self.backend)


@pytest.mark.parametrize("backend", [*TRACEABLE_BACKENDS, "auto"])
@pytest.mark.parametrize("strict", [True, False])
def test_exports(backend, strict):
    device = DEVICES.get(backend, "cpu")
    inputs = {k: v.float().to(device) for k, v in make_inputs().items() if k != "delta_softplus"}
    batch = torch.export.Dim("batch", min=2)
    shapes = {name: {0: batch} if name in SEQUENCES else None for name in inputs}
    program = torch.export.export(Scan(backend), (), inputs, dynamic_shapes=shapes, strict=strict)
    other = {k: v.float().to(device) for k, v in make_inputs(batch=5, seed=3).items() if k != "delta_softplus"}
    other = {k: v if k in SEQUENCES else inputs[k] for k, v in other.items()}
    torch.testing.assert_close(program.module()(**other), Scan(backend)(**other))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_checkpointing_changes_nothing(backend):
    inputs, device = make_inputs(), DEVICES.get(backend, "cpu")
    leaves = [v.to(device, torch.float32).requires_grad_() for k, v in inputs.items() if k != "delta_softplus"]
    wanted = torch.autograd.grad(Scan(backend)(*leaves).sum(), leaves)
    out = torch.utils.checkpoint.checkpoint(Scan(backend), *leaves, use_reentrant=False)
    for gradient, wanted_gradient in zip(torch.autograd.grad(out.sum(), leaves), wanted):
        torch.testing.assert_close(gradient, wanted_gradient, **TOLERANCES.get(backend, EXACTLY))


@pytest.mark.parametrize("backend", FAST_BACKENDS)
def test_autocast_does_not_touch_the_state(backend):
    inputs = {k: v.float() if k != "delta_softplus" else v for k, v in make_inputs().items()}
    wanted, wanted_gradients = run(inputs, backend)
    with torch.autocast(DEVICES.get(backend, "cpu"), torch.bfloat16):
        out, gradients = run(inputs, backend)
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    for name in gradients:
        torch.testing.assert_close(gradients[name], wanted_gradients[name], **TOLERANCES.get(backend, EXACTLY))


def test_meta_tensors_give_shapes():
    inputs = {k: v.to("meta") if k != "delta_softplus" else v for k, v in make_inputs().items()}
    assert selective_scan(**inputs).shape == inputs["u"].shape


@pytest.mark.parametrize(
    ("device_type", "dtypes", "missing", "compiling", "wanted"),
    [
        ("cpu", (torch.float32,), (), False, "numba"),
        ("cpu", (torch.bfloat16, torch.float32), (), True, "numba"),
        ("cpu", (torch.float16,), (), False, "numba"),
        ("cpu", (torch.float32, torch.float64), (), False, "torch"),
        ("cpu", (torch.float32,), ("numba",), False, "torch"),
        ("cuda", (torch.bfloat16,), (), False, "triton"),
        ("cuda", (torch.bfloat16,), (), True, "triton"),
        ("cuda", (torch.bfloat16,), ("triton",), True, "torch"),
        ("cuda", (torch.float64,), (), False, "torch"),
        ("cuda", (torch.float32,), ("mamba_ssm",), False, "triton"),
        ("cuda", (torch.float32,), ("mamba_ssm", "triton"), False, "torch"),
        ("cuda", (torch.float32,), ("triton",), False, "mamba_ssm"),
        ("mps", (torch.float32,), (), False, "torch"),
    ],
)
def test_auto_takes_the_fastest_usable_backend(device_type, dtypes, missing, compiling, wanted, monkeypatch):
    monkeypatch.setattr(dispatch, "missing_backend", lambda name: "gone" if name in missing else None)
    assert dispatch.choose_backend(device_type, dtypes, compiling) == wanted


def test_auto_runs_the_chosen_backend(monkeypatch):
    inputs = make_inputs()
    calls = []
    functions = {name: lambda u, *_, name=name: calls.append(name) or u for name in SELECTIVE_SCAN_BACKENDS}
    monkeypatch.setattr(dispatch, "_FUNCTIONS", functions)
    monkeypatch.setattr(dispatch, "missing_backend", lambda name: None)
    selective_scan(**inputs)
    selective_scan(**{k: v.float() if k != "delta_softplus" else v for k, v in inputs.items()})
    selective_scan(**inputs, backend="reference")
    assert calls == ["torch", "numba", "reference"]


def test_a_slow_choice_is_logged_once(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "missing_backend", lambda name: f"no {name}; pip install {name}")
    dispatch._log_slow_choice.cache_clear()
    inputs = {k: v.float() if k != "delta_softplus" else v for k, v in make_inputs().items()}
    with caplog.at_level(logging.WARNING):
        selective_scan(**inputs)
        selective_scan(**inputs)
        selective_scan(**inputs, backend="reference")
    dispatch._log_slow_choice.cache_clear()
    assert len(caplog.records) == 1
    assert "'torch'" in caplog.text and "pip install numba" in caplog.text


@pytest.mark.parametrize(
    ("missing", "compiling", "words"),
    [
        (("triton",), False, ["'mamba_ssm'", "no triton"]),
        (("triton",), True, ["'torch'", "no triton; ", "compiled graph"]),
        (("mamba_ssm", "triton"), False, ["'torch'", "no triton; no mamba_ssm"]),
        (("mamba_ssm",), False, []),
        ((), True, []),
    ],
)
def test_the_log_says_why_each_faster_backend_was_not_taken(missing, compiling, words, monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "missing_backend", lambda name: f"no {name}" if name in missing else None)
    dispatch._log_slow_choice.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            dispatch.choose_backend("cuda", (torch.float32,), compiling)
    dispatch._log_slow_choice.cache_clear()
    assert len(caplog.records) == bool(words)
    assert all(word in caplog.text for word in words)


def test_mamba_ssm_gets_the_dtypes_its_kernel_wants(monkeypatch):
    # The kernel itself needs CUDA: a stand-in of the package shows what it is given, and computes.
    seen = {}

    def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
        seen.update(u=u, delta=delta, A=A, B=B, C=C, D=D, z=z, delta_bias=delta_bias)
        return selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend="reference")

    names = ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.selective_scan_interface")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules[names[-1]], "selective_scan_fn", selective_scan_fn, raising=False)
    missing_backend.cache_clear()
    inputs = {k: v.float() if k != "delta_softplus" else v for k, v in make_inputs().items()}
    inputs["u"] = inputs["u"].bfloat16()
    out = selective_scan(**inputs, backend="mamba_ssm")
    missing_backend.cache_clear()
    assert {name: tensor.dtype for name, tensor in seen.items()} == {
        name: torch.bfloat16 if name in SEQUENCES else torch.float32 for name in seen
    }
    assert out.dtype == torch.bfloat16 and out.stride() == inputs["u"].stride()


def test_unknown_backend_names_the_choices():
    with pytest.raises(ValueError, match="'triangle'") as error:
        selective_scan(**make_inputs(), backend="triangle")
    assert all(name in str(error.value) for name in ("auto", *SELECTIVE_SCAN_BACKENDS))


@pytest.mark.skipif(missing_backend("mamba_ssm") is None, reason="mamba_ssm is installed")
def test_missing_backend_says_what_to_install():
    with pytest.raises(ImportError, match=r"'mamba_ssm'.*pip install mamba-ssm"):
        selective_scan(**make_inputs(), backend="mamba_ssm")


@pytest.mark.parametrize("name", ["delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_wrong_shape_names_the_tensor(name):
    inputs = make_inputs()
    wrong = inputs | {name: inputs[name][..., :-1] if name != "A" else inputs[name][:-1]}
    with pytest.raises(ValueError, match=f"`{name}` must have shape"):
        selective_scan(**wrong)


@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_wrong_dtype_names_the_tensor(name):
    inputs = make_inputs()
    with pytest.raises(TypeError, match=f"`{name}` must be a real floating point tensor, not torch.int64"):
        selective_scan(**(inputs | {name: inputs[name].long()}))


def test_wrong_rank_length_and_device():
    inputs = make_inputs()
    with pytest.raises(ValueError, match=r"`u` must have shape \(batch, channels, length\)"):
        selective_scan(**(inputs | {"u": inputs["u"][0]}))
    with pytest.raises(ValueError, match="`u` must have shape"):
        selective_scan(**(inputs | {name: inputs[name][..., :0] for name in SEQUENCES}))
    with pytest.raises(ValueError, match="`A` must have shape"):
        selective_scan(**(inputs | {"A": inputs["A"][0]}))
    with pytest.raises(ValueError, match="`B` is on meta but `u` is on cpu"):
        selective_scan(**(inputs | {"B": inputs["B"].to("meta")}))


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend):
    inputs = make_inputs()
    inputs = {
        k: v.to(DEVICES.get(backend, "cpu"), torch.float32) if k != "delta_softplus" else v for k, v in inputs.items()
    }
    empty = {k: v[:0].requires_grad_() if k in SEQUENCES else v for k, v in inputs.items()}
    out = selective_scan(**empty, backend=backend)
    out.sum().backward()
    assert out.shape == (0, 19, 37) and empty["u"].grad.shape == out.shape
