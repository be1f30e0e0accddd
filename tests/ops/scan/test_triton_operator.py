"""The Triton kernels, on a GPU if there is one, else in Triton's interpreter (see `tests/conftest.py`)."""

import itertools
import math
import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_pisdm.ops import selective_scan
from diffusers_pisdm.ops.scan import triton_operator as scan_module
from diffusers_pisdm.ops.scan.triton_operator import selective_scan_triton, split_length
from tests.ops.scan.test_dispatch import make_inputs, relative_error, run


pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


@pytest.fixture(autouse=True)
def patch_the_language_once(monkeypatch):
    """Triton's interpreter spends half of its time on patching `triton.language` again at each call of a helper."""
    from triton.runtime import interpreter

    patched = set()

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture(autouse=True)
def small_sizes(request, monkeypatch):
    """Small chunks and blocks: the interpreter takes a time in proportion to the number of steps and programs."""
    if "full_sizes" in request.fixturenames:
        return
    sizes = {"CHANNELS": 8, "BACKWARD_CHANNELS": 4, "STEPS": 2, "KEPT_STEPS": 4, "MIN_CHUNK_STEPS": 4}
    sizes |= {"JOINED": 2, "JOIN_ELEMENTS": 8, "SHORT_LENGTH": 6, "SHORT_CHANNELS": 4}
    for name, size in sizes.items():
        monkeypatch.setattr(scan_module, name, size)


@pytest.fixture
def full_sizes():
    """The sizes as they are."""


def on_device(inputs, dtype=torch.float32):
    return {k: v.to(DEVICE, dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}


def gradients_of(inputs):
    """The output, and the gradients of its weighted sum."""
    leaves = {k: v.detach().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    out = selective_scan(**leaves, backend="triton")
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    tensors = {k: v for k, v in leaves.items() if isinstance(v, torch.Tensor)}
    return out.detach(), dict(zip(tensors, torch.autograd.grad((out * weights.to(out)).sum(), list(tensors.values()))))


def assert_matches_reference(inputs, output_tolerance=1e-6, gradient_tolerance=5e-6):
    wanted, wanted_gradients = run(inputs, "reference")
    out, gradients = gradients_of(on_device(inputs))
    assert relative_error(out, wanted) <= output_tolerance
    for name, gradient in gradients.items():
        assert relative_error(gradient, wanted_gradients[name]) <= gradient_tolerance, name
        assert gradient.shape == inputs[name].shape


# Unrolled steps in twos, states kept every 4 steps, chunks of 4 or 8 above 6 steps: lengths below, at and above each.
@pytest.mark.parametrize(
    ("batch", "channels", "length", "state_size", "optional"),
    [
        (1, 1, 1, 1, True),
        (3, 4, 2, 5, False),
        (1, 3, 3, 16, True),
        (2, 4, 4, 2, True),
        (1, 5, 5, 5, True),
        (1, 9, 7, 3, False),
        (2, 2, 8, 1, True),
        (1, 6, 9, 16, False),
        (1, 3, 15, 5, True),
    ],
)
def test_equals_reference(batch, channels, length, state_size, optional):
    assert_matches_reference(make_inputs(batch, channels, length, state_size, optional))


def test_equals_reference_at_full_sizes(full_sizes, monkeypatch):
    # Two blocks of channels, three chunks; the last of each is not full. Only the chunks are shorter than usual.
    monkeypatch.setattr(scan_module, "MIN_CHUNK_STEPS", scan_module.KEPT_STEPS)
    monkeypatch.setattr(scan_module, "SHORT_LENGTH", 0)
    assert split_length(1, 2, 35) == (3, 16)
    assert_matches_reference(make_inputs(1, 129, 35, 5))


@pytest.mark.parametrize("programs", [1, 3, 5])
def test_equals_reference_in_one_chunk_and_in_long_ones(programs, monkeypatch):
    # One walk over the sequence, chunks of several kept states, and a number that is not joined two by two.
    monkeypatch.setattr(scan_module, "PROGRAMS_AT_ONCE", programs)
    monkeypatch.setattr(scan_module, "MAX_ROUNDS", 1)
    assert split_length(1, 1, 21) == {1: (1, 24), 3: (3, 8), 5: (3, 8)}[programs]
    assert_matches_reference(make_inputs(1, 3, 21, 5))


@pytest.mark.parametrize(
    ("sizes", "length"),
    [
        ({"SHARED_DELTAS": False}, 9),
        ({"SHARED_FLOATS_TOKENS": 0}, 9),
        ({"FORWARD_STAGES": 1, "CHUNK_STAGES": 1}, 9),
        ({"SHORT_LENGTH": 0}, 5),
        ({"SHORT_LENGTH": 99}, 9),
    ],
    ids=str,
)
def test_every_way_gives_the_same(sizes, length, monkeypatch):
    inputs = on_device(make_inputs(1, 3, length, 2))
    halves = {k: v.bfloat16() if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    wanted = [gradients_of(x) for x in (inputs, halves)]
    for name, size in sizes.items():
        monkeypatch.setattr(scan_module, name, size)
    for (out, gradients), (wanted_out, wanted_gradients) in zip([gradients_of(x) for x in (inputs, halves)], wanted):
        tolerance = 1e-6 if out.dtype == torch.float32 else 8e-3
        assert out.dtype == wanted_out.dtype and relative_error(out, wanted_out.double()) <= tolerance
        for name, gradient in gradients.items():
            assert gradient.dtype == wanted_gradients[name].dtype
            assert relative_error(gradient, wanted_gradients[name].double()) <= tolerance, name


@pytest.mark.parametrize("shared", [True, False])
def test_the_slope_of_softplus_is_exact_for_small_and_large_steps(shared, monkeypatch):
    """Each gradient by itself: next to the largest, an error of the smallest would not show."""
    monkeypatch.setattr(scan_module, "SHARED_DELTAS", shared)
    inputs = make_inputs(1, 3, 41, 2)
    inputs["delta"] = torch.linspace(-20, 20, 3 * 41, dtype=torch.float64).view(1, 41, 3).mT
    inputs["delta_bias"] = torch.zeros(3, dtype=torch.float64)
    inputs["A"] = -torch.full((3, 2), 1e-3, dtype=torch.float64)  # steps up to 20 do not forget
    _, wanted = run(inputs, "reference")
    _, gradients = gradients_of(on_device(inputs))
    error = (gradients["delta"].double().cpu() - wanted["delta"]).abs() / wanted["delta"].abs()
    assert error.quantile(0.9) <= 1e-5 and error.max() <= 1e-3  # where terms cancel


def test_floats_are_shared_between_the_passes_where_tokens_abound(full_sizes):
    for batch, length, wanted in ((2, 1023, torch.bfloat16), (2, 1024, torch.float32), (99, 96, torch.bfloat16)):
        B = torch.empty(batch, length, 16, device="meta", dtype=torch.bfloat16)
        launch = scan_module._Launch(torch.empty(batch, 3072, length, device="meta"), 16, True, may_be_short=True)
        assert [x.dtype for x in launch.maybe_floats(B, B)] == [wanted, wanted]


def test_short_sequences_run_in_one_kernel(full_sizes):
    launches = {}
    for length in (96, 97):
        u = torch.empty(2, 3072, length, device="meta")
        launches[length] = scan_module._Launch(u, 16, True, may_be_short=True)
    assert (launches[96].chunks, launches[96].layout) == (1, (16, 2))
    assert launches[97].chunks > 1 and launches[97].layout == (128, 4)
    assert scan_module._Launch(torch.empty(2, 3072, 64, device="meta"), 16, True).chunks > 1  # the backward
    full = scan_module._Launch(torch.empty(99, 3072, 64, device="meta"), 16, True, may_be_short=True)
    assert full.layout == (128, 4)  # the batch fills the GPU


def test_chunks_cover_the_sequence(full_sizes):
    for batch, blocks, length in itertools.product((1, 3, 700), (1, 8, 96), (1, 15, 16, 63, 64, 1000, 4097)):
        chunks, steps = split_length(batch, blocks, length)
        assert steps % scan_module.KEPT_STEPS == 0 and (chunks - 1) * steps < length <= chunks * steps
        assert chunks == 1 or steps >= scan_module.MIN_CHUNK_STEPS


def test_chunks_fill_the_gpu_in_as_few_rounds_as_they_can(full_sizes, monkeypatch):
    monkeypatch.setattr(scan_module, "PROGRAMS_AT_ONCE", 1000)
    assert split_length(1, 100, 4000) == (10, 400)  # one full round
    assert split_length(1, 400, 8000) == (5, 1600)  # two full rounds; with two chunks the GPU would be full by 80%
    assert split_length(1, 600, 8000) == (1, 8000)  # what chunks cost is more than the idle 40%
    assert split_length(1, 1, 4000) == (250, 16)  # no shorter ones


@pytest.mark.parametrize("missing", list(itertools.product([False, True], repeat=3)), ids=str)
def test_optional_inputs_can_be_left_out(missing):
    inputs = make_inputs(1, 3, 6, 2)
    for name, is_missing in zip(("D", "z", "delta_bias"), missing):
        if is_missing:
            del inputs[name]
    assert_matches_reference(inputs | {"delta_softplus": sum(missing) != 1})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_are_computed_in_float32(dtype):
    sequences = ("u", "delta", "B", "C", "z")
    halves = {k: v.to(dtype) if k in sequences else v for k, v in make_inputs(1, 5, 9, 5).items()}
    wanted, wanted_gradients = run({k: v.double() if k in sequences else v for k, v in halves.items()}, "reference")
    halves = on_device({k: v.float() if k in ("A", "D", "delta_bias") else v for k, v in halves.items()}, None)
    out, gradients = gradients_of(halves)
    half_unit = torch.finfo(dtype).eps / 2
    if DEVICE == "cpu" and dtype == torch.bfloat16:
        half_unit *= 2  # the interpreter cuts the last bits off, where a GPU rounds
    assert out.dtype == dtype and relative_error(out, wanted) <= half_unit + 1e-5
    for name, gradient in gradients.items():
        assert gradient.dtype == halves[name].dtype
        assert relative_error(gradient, wanted_gradients[name]) <= 4 * half_unit, name


def test_parameters_may_be_half_precision():
    inputs = on_device(make_inputs(1, 3, 5, 2), torch.bfloat16)
    out, gradients = gradients_of(inputs)
    assert out.dtype == torch.bfloat16 and {g.dtype for g in gradients.values()} == {torch.bfloat16}


def test_half_precision_state_does_not_stall(monkeypatch):
    # A bfloat16 state stops growing at 256 times the increment.
    monkeypatch.setattr(scan_module, "STEPS", 16)
    monkeypatch.setattr(scan_module, "KEPT_STEPS", 64)
    ones = torch.ones(1, 1, 260, dtype=torch.bfloat16, device=DEVICE)
    out = selective_scan(ones, ones, torch.zeros(1, 1, device=DEVICE), ones, ones, backend="triton")
    assert out[0, 0, -1].item() == 260


@pytest.mark.parametrize("view", ["channels", "length", "batch", "steps", "contiguous"])
def test_strided_views_equal_their_copies(view):
    wide = torch.randn(4, 13, 12, generator=torch.Generator().manual_seed(0)).to(DEVICE)  # (B, L, D)
    cut = {
        "channels": lambda x: x[:2, :6, 3:8],
        "length": lambda x: x[:2, 3:9, :5],
        "batch": lambda x: x[::3, :6, :5],
        "steps": lambda x: x[:2, 1::2, :5],
        "contiguous": lambda x: x[:2, :6, :5].mT.contiguous().mT,
    }[view]
    inputs = on_device(make_inputs(2, 5, 6, 3))
    views = inputs | {"u": cut(wide).mT, "z": cut(wide + 1).mT, "delta": cut(wide - 1).mT}
    views |= {name: cut(wide * factor).mT[:, :3] for name, factor in (("B", 2), ("C", 3))}
    copies = {k: v.mT.contiguous().mT if k in ("u", "z", "delta", "B", "C") else v for k, v in views.items()}
    (out, gradients), (wanted, wanted_gradients) = gradients_of(views), gradients_of(copies)
    assert out.stride() == selective_scan(**views, backend="torch").stride()
    torch.testing.assert_close(out, wanted, rtol=0, atol=0)
    for name in gradients:
        torch.testing.assert_close(gradients[name], wanted_gradients[name], rtol=0, atol=0)


def test_an_expanded_gradient_is_read_by_its_strides():
    inputs = on_device(make_inputs(2, 5, 6, 2, optional=False))
    u = inputs["u"].requires_grad_()
    out = selective_scan_triton(**inputs)
    (wanted,) = torch.autograd.grad(out, u, torch.ones_like(out), retain_graph=True)
    (gradient,) = torch.autograd.grad(out.sum(), u)  # the gradient of a sum has strides of zero
    torch.testing.assert_close(gradient, wanted, rtol=0, atol=0)


def test_strong_decay_is_safe():
    # Decays of exp(-800) underflow to 0.
    inputs = make_inputs(1, 3, 14, 16)
    inputs["delta"] = inputs["delta"] * 20 + 20
    assert_matches_reference(inputs, 2e-6, 1e-5)


def test_steps_past_the_end_do_not_overflow():
    # An odd length leaves a dead step, of which the bias alone would make a decay of exp(400).
    ones = torch.ones(1, 1, 3, dtype=torch.float64)
    inputs = {"u": ones, "delta": -5 * ones, "B": ones, "C": ones}
    inputs |= {"A": torch.tensor([[200.0]]).double(), "delta_bias": torch.tensor([2.0]).double()}
    assert_matches_reference(inputs | {"delta_softplus": True}, 1e-5, 1e-5)


def test_softplus_is_exact_on_both_sides():
    # With rates that forget all earlier steps the output is softplus(delta): accurate relative to its own size.
    delta = torch.linspace(-80, 80, 11, dtype=torch.float64).expand(1, 1, -1)
    ones = torch.ones(1, 1, 11, device=DEVICE)
    rates = torch.full((1, 1), -1e36, device=DEVICE)
    out = selective_scan(
        ones, delta.float().to(DEVICE), rates, ones, ones, delta_softplus=True, backend="triton"
    ).double()
    torch.testing.assert_close(out.cpu(), torch.nn.functional.softplus(delta.float().double()), rtol=5e-6, atol=0)


@pytest.mark.parametrize("channels", [3, 4])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_input_stays_infinite(channels, value):
    # Lanes of states that do not exist must not turn it into NaN.
    inputs = on_device(make_inputs(1, channels, 8, 5, optional=False))
    inputs |= {"B": inputs["B"].abs(), "C": inputs["C"].abs(), "delta": inputs["delta"] * 0.1}
    inputs["u"] = inputs["u"].clone()
    inputs["u"][0, 2, 3] = value
    out = selective_scan_triton(**inputs)
    assert (out[0, 2, 3:] == value).all() and out[0, 2, :3].isfinite().all() and out[0, :2].isfinite().all()


@pytest.mark.parametrize("channels", [3, 4, 6])
def test_infinite_read_outs_have_infinite_gradients(channels):
    # A block with empty lanes, one without, one of each: the sum over channels sees no 0 * inf.
    inputs = on_device(make_inputs(1, channels, 10, 3, optional=False))
    inputs["C"], inputs["u"] = inputs["C"].clone(), inputs["u"].abs() + 1
    inputs["C"][0, 1, 5] = math.inf
    B = inputs["B"].requires_grad_()
    (gradient,) = torch.autograd.grad(selective_scan_triton(**inputs).sum(), B)
    assert (gradient[0, 1, :6] == math.inf).all()
    assert gradient[0, [0, 2]].isfinite().all() and gradient[0, 1, 6:].isfinite().all()


@pytest.mark.parametrize("wanted", NAMES)
def test_nan_in_any_input_shows(wanted):
    inputs = on_device(make_inputs(1, 3, 6, 2))
    inputs[wanted] = inputs[wanted].clone()
    inputs[wanted][(-1,) * inputs[wanted].ndim] = math.nan
    assert selective_scan_triton(**inputs).isnan().any()


def test_nan_shows_from_its_step_on():
    inputs = on_device(make_inputs(2, 5, 14, 2))
    clean = selective_scan_triton(**inputs)
    inputs["u"] = inputs["u"].clone()
    inputs["u"][1, 2, 6] = math.nan
    out = selective_scan_triton(**inputs)
    hit = torch.zeros_like(out, dtype=torch.bool)
    hit[1, 2, 6:] = True
    assert out[hit].isnan().all()
    torch.testing.assert_close(out[~hit], clean[~hit], rtol=0, atol=0)


@pytest.mark.parametrize("wanted", NAMES)
def test_gradient_of_one_input_alone(wanted):
    inputs = on_device(make_inputs(1, 3, 5, 2))
    leaves = inputs | {wanted: inputs[wanted].detach().requires_grad_()}
    out = selective_scan(**leaves, backend="triton")
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out)
    (gradient,) = torch.autograd.grad((out * weights).sum(), leaves[wanted])
    torch.testing.assert_close(gradient, gradients_of(inputs)[1][wanted], rtol=0, atol=0)
    with torch.no_grad():
        assert not selective_scan(**leaves, backend="triton").requires_grad


def test_states_are_kept_only_for_gradients():
    inputs = on_device(make_inputs(2, 5, 9, 3))
    arguments = [inputs[name] for name in NAMES]
    _, kept = torch.ops.diffusers_pisdm.selective_scan_triton(*arguments, True, True)
    assert kept.numel() == 2 * 3 * 3 * 5
    _, kept = torch.ops.diffusers_pisdm.selective_scan_triton(*arguments, True, False)
    assert kept.numel() == 0


@pytest.mark.parametrize("length", [3, 9])
def test_rates_can_come_as_logarithms(length):
    inputs = make_inputs(1, 13, length, 5)
    inputs["A"] = inputs["A"].abs().log()
    logs = inputs["A"].float().to(DEVICE)
    wanted = -torch.exp(logs.double())
    for given in (logs, logs.t().contiguous().t()):
        torch.testing.assert_close(scan_module.rates_triton(given).double(), wanted, rtol=1e-6, atol=0)
    assert scan_module.rates_triton(logs).t().is_contiguous()  # as the kernels read it

    def scan(inputs, backend):
        leaves = {k: v.detach().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        out = selective_scan(**leaves, backend=backend, A_is_log=True)
        return out.detach(), torch.autograd.grad(out.sum(), leaves["A"])[0]

    (out, gradient), (wanted, wanted_gradient) = scan(on_device(inputs), "triton"), scan(inputs, "reference")
    assert relative_error(out, wanted) <= 1e-6 and relative_error(gradient, wanted_gradient) <= 5e-6
    plain = selective_scan(**{**inputs, "A": -inputs["A"].exp()}, backend="reference")
    assert torch.equal(wanted, plain)
    torch.library.opcheck(torch.ops.diffusers_pisdm.scan_rates_triton, (logs.requires_grad_(),))


@pytest.mark.parametrize("optional", [True, False])
def test_operators_pass_opcheck(optional):
    inputs = on_device(make_inputs(1, 3, 5, 2, optional))
    inputs = {k: v.requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    arguments = [inputs.get(name) for name in NAMES]
    operators = torch.ops.diffusers_pisdm
    torch.library.opcheck(operators.selective_scan_triton, (*arguments, optional, True))
    arguments = [None if x is None else x.detach() for x in arguments]
    out, kept = operators.selective_scan_triton(*arguments, optional, True)
    torch.library.opcheck(
        operators.selective_scan_triton_backward, (torch.randn_like(out), kept, *arguments, optional)
    )


def test_one_graph_serves_all_shapes():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(selective_scan_triton, fullgraph=True, dynamic=True, backend=counter)
    for batch, channels, length in [(3, 4, 7), (4, 3, 5)]:
        inputs = on_device(make_inputs(batch, channels, length, 2))
        leaves = [inputs[name].requires_grad_() for name in NAMES]
        out, wanted = compiled(*leaves, True), selective_scan_triton(*leaves, True)
        assert torch.equal(out, wanted) and out.stride() == wanted.stride()
        gradients, wanted_gradients = (torch.autograd.grad(x.sum(), leaves) for x in (out, wanted))
        assert all(torch.equal(*pair) for pair in zip(gradients, wanted_gradients))
    assert counter.frame_count == 1


def test_empty_batch():
    inputs = on_device(make_inputs(1, 3, 5, 2))
    empty = {k: v[:0] if k in ("u", "delta", "B", "C", "z") else v for k, v in inputs.items()}
    out, gradients = gradients_of(empty)
    assert out.shape == (0, 3, 5) and gradients["u"].shape == out.shape
    assert all(gradients[name].shape == inputs[name].shape and not gradients[name].any() for name in ("A", "D"))


def test_float64_is_refused():
    with pytest.raises(NotImplementedError, match=r"float32.*backend='torch'"):
        selective_scan(**make_inputs(1, 3, 5, 2), backend="triton")


WITHOUT_INTERPRETER = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from diffusers_pisdm.ops import selective_scan
from diffusers_pisdm.ops.scan import triton_kernels as kernels

sizes = {"CHANNELS": 32, "STEPS": 2, "KEPT_STEPS": 4, "STATES": 5, "STATE_ROWS": 8, "SOFTPLUS": True, "REVERSE": True}
sizes |= {"LANE_CHANNELS": 4, "JOINED": 2, "ELEMENTS": 128, "STAGES": 2, "READY": True}
integers = ("channels", "length", "chunk_steps", "blocks", "chunks", "elements", "A_log_channel", "A_log_state")
for name in ("rates", "chunk_state", "chunk_gradient", "join", "forward", "backward"):
    kernel = getattr(kernels, f"{name}_kernel")
    signature = {x: "i32" if x in integers or x.endswith(("_row", "_step")) else "*fp32" for x in kernel.arg_names}
    signature |= {x: "*bf16" for x in ("u", "delta", "B", "C", "z", "grad", "out") if x in signature}
    signature |= {x: "constexpr" for x in sizes if x in signature}
    constants = {(i,): sizes[x] for i, x in enumerate(kernel.arg_names) if x in sizes}
    source = ASTSource(kernel, signature, constants)
    compiled = compile(source, target=GPUTarget("cuda", 80, 32), options={"num_warps": 1})
    print(name, len(compiled.asm["cubin"]) > 0)

x = torch.ones(1, 1, 3)
selective_scan(x, x, -x[0, :, :1], x, x, backend="triton")
"""


@pytest.fixture(scope="module")
def without_interpreter():
    """A process that compiles the kernels for a GPU and then scans on the CPU."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WITHOUT_INTERPRETER]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
def test_kernels_compile_for_a_gpu(without_interpreter):
    # What the interpreter takes, the compiler may refuse; it needs no GPU.
    lines = [f"{name} True" for name in ("rates", "chunk_state", "chunk_gradient", "join", "forward", "backward")]
    assert without_interpreter.stdout.splitlines() == lines, without_interpreter.stderr


def test_tensors_on_the_cpu_are_refused_without_the_interpreter(without_interpreter):
    assert without_interpreter.returncode == 1
    assert "NotImplementedError: The 'triton' backend needs a GPU" in without_interpreter.stderr
    assert "TRITON_INTERPRET=1" in without_interpreter.stderr
