import ctypes
import math

import pytest
import torch
import torch.nn.functional as F


numba = pytest.importorskip("numba")
vectors = pytest.importorskip("diffusers_pisdm.ops.common.numba_vectors")


def compile_kernel(kernel):
    """`kernel(source, target)` as a function of two tensors."""
    compiled = numba.cfunc(numba.types.void(numba.types.int64, numba.types.int64))(kernel)
    function = ctypes.CFUNCTYPE(None, ctypes.c_int64, ctypes.c_int64)(compiled.address)
    return lambda source, target: function(source.data_ptr(), target.data_ptr())


def apply(function, values):
    """A vector function over a tensor of 16 n floats."""
    count = len(values) // 16

    def kernel(source, target):
        for index in range(count):
            vectors.store(target, index, function(vectors.load(source, index)))

    out = torch.empty_like(values)
    compile_kernel(kernel)(values, out)
    return out


def relative_error(value, wanted):
    return ((value.double() - wanted) / wanted).abs().max().item()


def test_exp2():
    x = torch.linspace(-126, 127, 16 * 1000)
    assert relative_error(apply(vectors.exp2, x), torch.exp2(x.double())) <= 2e-7
    assert torch.equal(apply(vectors.exp2, x), apply(vectors.exp2_bounded, x))
    special = torch.tensor(
        [0.0, -0.0, 1.0, -1.0, -127.0, -1e30, -math.inf, 128.0, 1e30, math.inf, math.nan] + 5 * [0.0]
    )
    wanted = torch.tensor([1.0, 1.0, 2.0, 0.5, 0.0, 0.0, 0.0, math.inf, math.inf, math.inf, math.nan] + 5 * [1.0])
    torch.testing.assert_close(apply(vectors.exp2, special), wanted, rtol=2e-7, atol=0, equal_nan=True)
    assert apply(vectors.exp2, special)[:2].tolist() == [1.0, 1.0]
    payload = torch.tensor([0x7FFFFFFF, -1] * 8, dtype=torch.int32).view(torch.float32)  # NaN of all bits
    assert apply(vectors.exp2, payload).isnan().all()


@pytest.mark.parametrize("name", ["softplus", "sigmoid"])
def test_softplus_and_sigmoid(name):
    function, wanted = getattr(vectors, name), getattr(F, name)
    x = torch.linspace(-80, 80, 16 * 1000)
    exact = x.double().exp().log1p() if name == "softplus" else wanted(x.double())
    # The exponent of e^-80 has lost seven bits.
    assert relative_error(apply(function, x), exact) <= 1e-5
    small = x / 16
    exact = small.double().exp().log1p() if name == "softplus" else wanted(small.double())
    assert relative_error(apply(function, small), exact) <= 1e-6
    special = torch.tensor([-math.inf, math.inf, math.nan, 0.0] * 4)
    torch.testing.assert_close(apply(function, special), wanted(special), rtol=1e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 15, 16])
def test_first_lanes_touch_nothing_else(count, dtype):
    is_bfloat16 = dtype == torch.bfloat16

    def kernel(source, target):
        values = vectors.load_sequence(source, count, is_bfloat16) + vectors.splat(1.0)
        vectors.store_sequence(target, values, count, is_bfloat16)
        vectors.store(target + 64, 0, values)  # all lanes, in float32

    source, target = torch.arange(16.0).to(dtype), torch.full((128,), -1.0, dtype=dtype)
    compile_kernel(kernel)(source, target)
    assert torch.equal(target[:count], source[:count] + 1)
    assert (target[count : 64 // dtype.itemsize] == -1).all()
    lanes = target[64 // dtype.itemsize :].view(torch.float32)[:16]
    assert torch.equal(lanes[:count], source[:count].float() + 1) and (lanes[count:] == 1).all()


def test_bfloat16_is_widened_exactly():
    def kernel(source, target):
        for index in range(65536 // 16):
            vectors.store(target, index, vectors.load_sequence(source + index * 32, 16, True))
        for index in range(65536):
            vectors.store_float(target, 65536 + index, vectors.load_bfloat16(source + index * 2))

    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)  # every bfloat16 there is
    out = torch.zeros(2, 65536)
    compile_kernel(kernel)(patterns, out)
    assert torch.equal(out.view(torch.int32), (patterns.int() << 16).expand(2, -1))


def test_bfloat16_is_rounded_to_nearest_even_and_nan_is_kept():
    def kernel(source, target):
        for index in range(count):
            vectors.store_sequence(target + index * 32, vectors.load(source, index), 16, True)

    # Beside every bfloat16: itself, just below, at and above the middle to the next one, the last float32 before that.
    upper = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    values = torch.cat([upper | lower for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]).view(torch.float32)
    count = len(values) // 16
    out = torch.zeros(len(values), dtype=torch.bfloat16)
    compile_kernel(kernel)(values, out)
    wanted = values.bfloat16()
    is_nan = values.isnan()
    assert out[is_nan].isnan().all()
    assert torch.equal(out[~is_nan].view(torch.int16), wanted[~is_nan].view(torch.int16))
    assert out[~is_nan].isinf().sum() > values.isinf().sum()  # the largest ones overflow


def test_store_lane_sums():
    def kernel(source, target):
        vectors.store_lane_sums(
            target,
            1,
            vectors.load(source, 0),
            vectors.load(source, 1),
            vectors.load(source, 2),
            vectors.load(source, 3),
        )

    source, target = torch.randn(4, 16, generator=torch.Generator().manual_seed(0)), torch.zeros(6)
    compile_kernel(kernel)(source, target)
    torch.testing.assert_close(target[1:5], source.sum(1))
    assert target[0] == 0 and target[5] == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_maximum_ignores_nan_of_its_second_argument(value):
    def kernel(source, target):
        peak = vectors.maximum(vectors.load(source, 0), vectors.absolute(vectors.load(source, 1)))
        vectors.store(target, 0, peak)
        vectors.store_float(target, 16, 1.0 if vectors.any_above(peak, vectors.splat(9.0)) else 0.0)

    source, target = torch.ones(2, 16), torch.zeros(17)
    source[1, 3], source[1, 4] = -value, -2.0
    compile_kernel(kernel)(source, target)
    wanted = torch.ones(16)
    wanted[3], wanted[4] = (1.0 if math.isnan(value) else value), 2.0
    assert torch.equal(target[:16], wanted)
    assert target[16] == (0.0 if math.isnan(value) else 1.0)
