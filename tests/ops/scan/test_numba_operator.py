import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from diffusers_pisdm.ops import selective_scan
from diffusers_pisdm.ops.common import numba_launch
from diffusers_pisdm.ops.scan.numba_operator import selective_scan_numba
from tests.ops.scan.test_dispatch import SEQUENCES, assert_matches_reference, make_inputs, run


pytest.importorskip("numba")

from diffusers_pisdm.ops.scan.numba_kernels import CHUNK


def make_arguments(**kwargs):
    """float32 tensors in the order of the arguments."""
    return [v.float() if isinstance(v, torch.Tensor) else v for v in make_inputs(**kwargs).values()]


def in_call_order(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    return u, delta, A, B, C, D, z, delta_bias, delta_softplus


# Chunks of 24 steps, groups of 16 channels, four states at a time: below, at and above each of these.
@pytest.mark.parametrize("optional", [True, False], ids=["all", "bare"])
@pytest.mark.parametrize(
    ("batch", "channels", "length", "state_size"),
    [
        (1, 1, 1, 1),
        (3, 5, 2, 2),
        (1, 16, 7, 3),
        (3, 33, 17, 4),
        (1, 15, 23, 5),
        (2, 16, 24, 8),
        (1, 17, 25, 16),
        (3, 31, 75, 20),
        (1, 32, 130, 16),
    ],
)
def test_equals_reference_around_the_kernels_sizes(batch, channels, length, state_size, optional):
    assert_matches_reference(make_inputs(batch, channels, length, state_size, optional), "numba")


@pytest.mark.parametrize("optional", [True, False], ids=["all", "bare"])
@pytest.mark.parametrize(
    ("batch", "channels", "length", "state_size"),
    [(1, 1, 1, 1), (3, 5, 2, 2), (3, 33, 17, 4), (1, 15, 23, 5), (2, 16, 24, 8), (1, 17, 25, 16), (2, 600, 51, 3)],
)
def test_bfloat16_sequences_are_rounded_once(batch, channels, length, state_size, optional):
    inputs = make_inputs(batch, channels, length, state_size, optional)
    halves = {k: v.bfloat16() if k in SEQUENCES else v for k, v in inputs.items()}
    halves = {k: v.float() if k in ("A", "D", "delta_bias") else v for k, v in halves.items()}
    weights = torch.randn(batch, channels, length, generator=torch.Generator().manual_seed(1)).bfloat16()

    def scan(backend, dtype):
        leaves = {k: v.to(dtype or v.dtype) for k, v in halves.items() if k != "delta_softplus"}
        leaves = {k: v.detach().requires_grad_() for k, v in leaves.items()}
        out = selective_scan(**leaves, delta_softplus=optional, backend=backend)
        gradients = torch.autograd.grad(out, list(leaves.values()), weights.to(out))
        return {"out": out.detach(), **dict(zip(leaves, gradients))}

    results = scan("numba", None)
    copied, exact = scan("numba", torch.float32), scan("reference", torch.float64)
    for name, result in results.items():
        assert result.dtype == (torch.bfloat16 if name in ("out", *SEQUENCES) else torch.float32)
        assert torch.equal(result, copied[name].to(result.dtype)), name
        rounding = torch.finfo(result.dtype).eps / 2 * exact[name].abs() + 5e-6 * exact[name].abs().max()
        assert ((result - exact[name]).abs() <= rounding).all(), name


@pytest.mark.parametrize("name", SEQUENCES)
def test_mixed_sequences_are_cast(name):
    inputs = {k: v.bfloat16() if k in SEQUENCES else v for k, v in make_inputs(1, 17, 25).items()}
    inputs = {k: v.float() if k in ("A", "D", "delta_bias", name) else v for k, v in inputs.items()}
    out, gradients = run(inputs, "numba")
    single = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    wanted, _ = run(single, "numba")
    assert torch.equal(out, wanted.to(inputs["u"].dtype))
    assert {k: v.dtype for k, v in gradients.items()} == {k: inputs[k].dtype for k in gradients}


@pytest.mark.parametrize("batch", [1, 3])
def test_equals_reference_over_several_blocks_of_channels(batch):
    blocks, groups = numba_launch.split_channels(batch, 600)
    assert blocks > 2 and blocks * groups * 16 != 600  # the last block is smaller
    assert_matches_reference(make_inputs(batch, 600, CHUNK + 3), "numba")


def test_precision_over_a_long_sequence():
    assert_matches_reference(make_inputs(1, 16, 4096), "numba")


@pytest.mark.parametrize("sign", [1, -1])
def test_exponents_that_need_clamping(sign):
    # Within a chunk some |delta A| exceed 126 log(2), so that both copies of the loop run.
    inputs = make_inputs(1, 19, 3 * CHUNK, optional=False)
    inputs["delta"] = inputs["delta"] * 0.1
    inputs["delta"][..., CHUNK + 5] = 40.0
    inputs["delta"][..., CHUNK + 6] = 0.0
    if sign > 0:  # growth: e^(40 A) overflows
        inputs["A"] = -inputs["A"]
        out = selective_scan_numba(*in_call_order_of_bare(inputs))
        assert out[..., : CHUNK + 5].isfinite().all()
        assert not out[..., CHUNK + 5 :].isfinite().any()
    else:
        assert_matches_reference(inputs, "numba")


def in_call_order_of_bare(inputs):
    names = ("u", "delta", "A", "B", "C")
    return [inputs[name].float() for name in names]


@pytest.mark.parametrize("state_size", [1, 2, 3, 4, 16])
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_an_infinite_input_stays_infinite(state_size, value):
    # Repeated states and empty lanes must not turn it into NaN.
    u, delta, A, B, C = in_call_order_of_bare(make_inputs(1, 5, 40, state_size, optional=False))
    u[0, 2, 3] = value
    out = selective_scan_numba(u, delta, A, B.abs(), C.abs())
    assert (out[0, 2, 3:20] == value).all()
    assert out[0, [0, 1, 3, 4]].isfinite().all()


@pytest.mark.parametrize("channels", [5, 16, 21])
def test_infinite_read_outs_have_infinite_gradients(channels):
    # A group with empty lanes, one without, one of each: the sum over channels sees no 0 * inf.
    u, delta, A, B, C = in_call_order_of_bare(make_inputs(1, channels, 40, 4, optional=False))
    C = C.clone()
    C[0, 1, 7] = math.inf
    B = B.requires_grad_()
    (gradient,) = torch.autograd.grad(selective_scan_numba(u.abs() + 1, delta, A, B, C).sum(), B)
    assert (gradient[0, 1, :8] == math.inf).all()
    assert gradient[0, [0, 2, 3]].isfinite().all() and gradient[0, 1, 8:].isfinite().all()


@pytest.mark.parametrize("wanted", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias"])
def test_nan_in_any_input_shows(wanted):
    inputs = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in make_inputs(length=40).items()}
    inputs[wanted] = inputs[wanted].clone()
    inputs[wanted][(-1,) * inputs[wanted].ndim] = math.nan
    assert selective_scan_numba(**inputs).isnan().any()


@pytest.mark.parametrize("requires_grad", [True, False])
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_operator_passes_opcheck(requires_grad, optional, dtype):
    inputs = make_inputs(2, 5, CHUNK + 1, 4, optional)
    inputs = {
        k: v.to(dtype).requires_grad_(requires_grad) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()
    }
    arguments = [inputs.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    torch.library.opcheck(torch.ops.diffusers_pisdm.selective_scan_numba, (*arguments, optional, requires_grad))


@pytest.mark.parametrize("optional", [True, False])
def test_backward_operator_passes_opcheck(optional):
    inputs = make_inputs(2, 5, CHUNK + 1, 4, optional)
    inputs = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    arguments = [inputs.get(name) for name in ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")]
    out, kept = torch.ops.diffusers_pisdm.selective_scan_numba(*arguments, optional, True)
    torch.library.opcheck(
        torch.ops.diffusers_pisdm.selective_scan_numba_backward, (torch.randn_like(out), kept, *arguments, optional)
    )


@pytest.mark.parametrize("state_size", [16, 5])
def test_one_graph_serves_all_shapes(state_size):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(selective_scan_numba, fullgraph=True, dynamic=True, backend=counter)
    for batch, channels, length in [(2, 19, 37), (3, 24, 75), (5, 40, 130), (4, 16, 20)]:
        arguments = in_call_order(
            *make_arguments(batch=batch, channels=channels, length=length, state_size=state_size)
        )
        leaves = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in arguments]
        out, wanted = compiled(*leaves), selective_scan_numba(*leaves)
        assert torch.equal(out, wanted) and out.stride() == wanted.stride()
        for gradient, wanted_gradient in zip(
            torch.autograd.grad(out.sum(), leaves[:-1]), torch.autograd.grad(wanted.sum(), leaves[:-1])
        ):
            assert torch.equal(gradient, wanted_gradient)
    assert counter.frame_count == 1


def test_kept_states_are_linear_in_length_and_absent_without_gradients():
    arguments = in_call_order(*make_arguments(batch=1, channels=32, length=10 * CHUNK))
    _, kept = torch.ops.diffusers_pisdm.selective_scan_numba(*arguments, True)
    assert kept.numel() == 10 * 16 * 32
    _, kept = torch.ops.diffusers_pisdm.selective_scan_numba(*arguments, False)
    assert kept.numel() == 0


def test_gradients_lie_in_channels_last_order():
    inputs = {k: v.float() if isinstance(v, torch.Tensor) else v for k, v in make_inputs().items()}
    _, gradients = run(inputs, "numba")
    for name in ("u", "delta", "B", "C", "z"):
        assert gradients[name].mT.is_contiguous(), name


def test_float64_is_refused():
    with pytest.raises(NotImplementedError, match=r"float32.*backend='torch'"):
        selective_scan_numba(*make_inputs().values())
